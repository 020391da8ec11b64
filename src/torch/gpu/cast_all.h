// Many tensors cast from one kind to another in one launch.
#pragma once
#include "block.h"

namespace gpu {

template <class From, class To>
struct CastAll {
  static constexpr int MOST = 128, THREADS = 256, PACK = 4, OF_A_BLOCK = THREADS * PACK * 4;
  int count;
  const From *from[MOST];
  To *to[MOST];
  uint32_t sizes[MOST], starts[MOST + 1];  // how many values; and each one's first block

  void take(int i, const From *source, To *target, int64_t size) {
    from[i] = source, to[i] = target, sizes[i] = static_cast<uint32_t>(size);
    if (i == 0) starts[0] = 0;
    starts[i + 1] = starts[i] + static_cast<uint32_t>((size + OF_A_BLOCK - 1) / OF_A_BLOCK);
  }
  int64_t blocks() const { return starts[count]; }

  void operator()(const Block &block) const {
    uint32_t at = static_cast<uint32_t>(block.index());
    int first = 0, last = count - 1;
    while (first < last) {
      int middle = (first + last + 1) / 2;
      if (starts[middle] <= at) first = middle;
      else last = middle - 1;
    }
    const From *source = from[first];
    To *target = to[first];
    uint32_t size = sizes[first], begin = (at - starts[first]) * OF_A_BLOCK;
    bool whole = as_number(source) % (PACK * sizeof(From)) == 0 && as_number(target) % (PACK * sizeof(To)) == 0;
    block.each([&](int thread) {
      for (uint32_t i = begin + thread * PACK; i < begin + OF_A_BLOCK && i < size; i += THREADS * PACK) {
        if (whole && i + PACK <= size) {
          float values[PACK];
          load<PACK>(source + i, values);
          store<PACK>(values, target + i);
        } else {
          for (uint32_t j = i; j < i + PACK && j < size; j++) target[j] = static_cast<To>(static_cast<float>(source[j]));
        }
      }
    });
  }
};

}  // namespace gpu
