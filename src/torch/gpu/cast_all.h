// Many tensors cast from one kind to another in one launch.
#pragma once
#include "many_tensors.h"

namespace gpu {

template <class From, class To>
struct CastAll {
  static constexpr int MOST = 128;
  ManyTensors<MOST> tensors;
  const From *from[MOST];
  To *to[MOST];

  void operator()(const Block &block) const {
    constexpr int PACK = ManyTensors<MOST>::PACK;
    int at = tensors.tensor(block.index());
    const From *source = from[at];
    To *target = to[at];
    bool whole = as_number(source) % (PACK * sizeof(From)) == 0 && as_number(target) % (PACK * sizeof(To)) == 0;
    tensors.each(block, at, [&](uint32_t i, int count) {
      if (whole && count == PACK) {
        float values[PACK];
        load<PACK>(source + i, values);
        store<PACK>(values, target + i);
      } else {
        for (uint32_t j = i; j < i + count; j++) target[j] = static_cast<To>(static_cast<float>(source[j]));
      }
    });
  }
};

}  // namespace gpu
