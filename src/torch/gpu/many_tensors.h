// Many tensors whose values the blocks of one launch share out: each block takes some of one tensor.
#pragma once
#include "block.h"

namespace gpu {

template <int MOST>
struct ManyTensors {
  static constexpr int THREADS = 256, PACK = 4, OF_A_BLOCK = THREADS * PACK * 4;
  int count = 0;
  uint32_t sizes[MOST], starts[MOST + 1];  // how many values; and each one's first block

  // The tensor's number.
  int add(int64_t size) {
    if (count == 0) starts[0] = 0;
    sizes[count] = static_cast<uint32_t>(size);
    starts[count + 1] = starts[count] + static_cast<uint32_t>((size + OF_A_BLOCK - 1) / OF_A_BLOCK);
    return count++;
  }
  int64_t blocks() const { return starts[count]; }

  int tensor(int64_t block) const {
    int first = 0, last = count - 1;
    while (first < last) {
      int middle = (first + last + 1) / 2;
      if (starts[middle] <= block) first = middle;
      else last = middle - 1;
    }
    return first;
  }

  // body(where, how many) for the packs of a block's values, of which the last of a tensor may hold fewer than `PACK`.
  template <class Body>
  void each(const Block &block, int tensor, Body body) const {
    uint32_t size = sizes[tensor], begin = (static_cast<uint32_t>(block.index()) - starts[tensor]) * OF_A_BLOCK;
    block.each([&](int thread) {
      for (uint32_t i = begin + thread * PACK; i < begin + OF_A_BLOCK && i < size; i += THREADS * PACK)
        body(i, i + PACK <= size ? PACK : static_cast<int>(size - i));
    });
  }
};

}  // namespace gpu
