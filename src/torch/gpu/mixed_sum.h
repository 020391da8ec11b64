// y = a + b, where b is bfloat16 and of a and y one is: what maps gave in, or out of, float32.
#pragma once
#include "block.h"

namespace gpu {

template <class From, class To, int N>
struct MixedSum {
  static constexpr int THREADS = MOST_THREADS;
  int64_t count;
  const From *a;
  const bfloat16 *b;
  To *y;

  int64_t blocks() const { return (count / N + THREADS - 1) / THREADS; }

  void operator()(const Block &block) const {
    block.each([&](int thread) {
      int64_t at = (block.index() * THREADS + thread) * N;
      if (at >= count) return;
      float sum[N], more[N];
      load<N>(a + at, sum);
      load<N>(b + at, more);
      for (int i = 0; i < N; i++) sum[i] += more[i];
      store<N>(sum, y + at);
    });
  }
};

}  // namespace gpu
