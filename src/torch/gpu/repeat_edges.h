// A video [B, F, H, W, C] whose edges are repeated, and the way back, which sums in float what came from an edge.
#pragma once
#include "block.h"

namespace gpu {

struct EdgesShape {
  static constexpr int THREADS = 256;
  int64_t clips, frames, height, width, channels;  // without the repeated ones
  int64_t front[3], back[3];                       // of frames, height, width

  int64_t size(int axis) const { return axis == 0 ? frames : axis == 1 ? height : width; }
  int64_t padded(int axis) const { return size(axis) + front[axis] + back[axis]; }
};

template <class T, int N>
struct RepeatEdges {
  EdgesShape shape;
  const T *x;
  T *y;

  int64_t places() const {
    const EdgesShape &s = shape;
    return s.clips * s.padded(0) * s.padded(1) * s.padded(2) * (s.channels / N);
  }
  int64_t blocks() const { return (places() + EdgesShape::THREADS - 1) / EdgesShape::THREADS; }

  void operator()(const Block &block) const {
    const EdgesShape &s = shape;
    auto inside = [&](int64_t at, int axis) {
      int64_t i = at - s.front[axis], last = s.size(axis) - 1;
      return i < 0 ? 0 : i > last ? last : i;
    };
    block.each([&](int thread) {
      int64_t at = block.index() * block.threads() + thread;
      if (at >= places()) return;
      int64_t channel = at % (s.channels / N) * N, place = at / (s.channels / N);
      int64_t w = place % s.padded(2), h = place / s.padded(2) % s.padded(1), rest = place / s.padded(2) / s.padded(1);
      int64_t f = rest % s.padded(0), b = rest / s.padded(0);
      int64_t from = ((b * s.frames + inside(f, 0)) * s.height + inside(h, 1)) * s.width + inside(w, 2);
      computed<T> values[N];
      load<N>(x + from * s.channels + channel, values);
      store<N>(values, y + place * s.channels + channel);
    });
  }
};

template <class T, int N>
struct RepeatEdgesBack {
  using A = computed<T>;
  EdgesShape shape;
  const T *dy;
  T *dx;

  int64_t places() const {
    const EdgesShape &s = shape;
    return s.clips * s.frames * s.height * s.width * (s.channels / N);
  }
  int64_t blocks() const { return (places() + EdgesShape::THREADS - 1) / EdgesShape::THREADS; }

  void operator()(const Block &block) const {
    const EdgesShape &s = shape;
    // the places of a padded axis at which place i stands
    auto begin = [&](int64_t i, int axis) { return i == 0 ? 0 : i + s.front[axis]; };
    auto end = [&](int64_t i, int axis) { return i == s.size(axis) - 1 ? s.padded(axis) : i + s.front[axis] + 1; };
    block.each([&](int thread) {
      int64_t at = block.index() * block.threads() + thread;
      if (at >= places()) return;
      int64_t channel = at % (s.channels / N) * N, place = at / (s.channels / N);
      int64_t w = place % s.width, h = place / s.width % s.height, rest = place / s.width / s.height;
      int64_t f = rest % s.frames, b = rest / s.frames;
      A sum[N] = {}, values[N];
      for (int64_t i = begin(f, 0); i < end(f, 0); i++)
        for (int64_t j = begin(h, 1); j < end(h, 1); j++)
          for (int64_t k = begin(w, 2); k < end(w, 2); k++) {
            int64_t from = ((b * s.padded(0) + i) * s.padded(1) + j) * s.padded(2) + k;
            load<N>(dy + from * s.channels + channel, values);
            for (int v = 0; v < N; v++) sum[v] += values[v];
          }
      store<N>(sum, dx + place * s.channels + channel);
    });
  }
};

}  // namespace gpu
