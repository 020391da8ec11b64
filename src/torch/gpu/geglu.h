// Of rows [R, 2·D] the first half times GELU of the second (Shazeer 2020).
#pragma once
#include "block.h"

namespace gpu {

// Φ(x) and x·φ(x), of which GELU and its slope are made.
template <class A>
inline void gelu_parts(A x, A *share, A *bell) {
  *share = A(0.5) * (A(1) + erf(x * A(0.70710678118654752440)));
  *bell = x * A(0.39894228040143267794) * exp(A(-0.5) * x * x);
}

template <class T, int N>
struct Geglu {
  using A = computed<T>;
  static constexpr int THREADS = 256;
  int64_t rows, width;
  const T *x;
  T *y;

  int64_t blocks() const { return (rows * (width / N) + THREADS - 1) / THREADS; }

  void operator()(const Block &block) const {
    block.each([&](int thread) {
      int64_t at = block.index() * THREADS + thread, row = at / (width / N), c = at % (width / N) * N;
      if (row >= rows) return;
      A first[N], second[N], share, bell;
      load<N>(x + row * 2 * width + c, first);
      load<N>(x + row * 2 * width + width + c, second);
      for (int i = 0; i < N; i++) {
        gelu_parts(second[i], &share, &bell);
        first[i] *= second[i] * share;
      }
      store<N>(first, y + row * width + c);
    });
  }
};

template <class T, int N>
struct GegluBack {
  using A = computed<T>;
  static constexpr int THREADS = 256;
  int64_t rows, width;
  const T *x, *dy;
  T *dx;

  int64_t blocks() const { return (rows * (width / N) + THREADS - 1) / THREADS; }

  void operator()(const Block &block) const {
    block.each([&](int thread) {
      int64_t at = block.index() * THREADS + thread, row = at / (width / N), c = at % (width / N) * N;
      if (row >= rows) return;
      A first[N], second[N], gradient[N], share, bell;
      load<N>(x + row * 2 * width + c, first);
      load<N>(x + row * 2 * width + width + c, second);
      load<N>(dy + row * width + c, gradient);
      for (int i = 0; i < N; i++) {
        gelu_parts(second[i], &share, &bell);
        A of_second = gradient[i] * first[i] * (share + bell);
        first[i] = gradient[i] * second[i] * share;
        second[i] = of_second;
      }
      store<N>(first, dx + row * 2 * width + c);
      store<N>(second, dx + row * 2 * width + width + c);
    });
  }
};

}  // namespace gpu
