// Layer norm of rows [R, D]: y = x̂·scale + shift, with one row of factors, or one for each `R / O` rows in turn. Where there is
// an update, x is first x + gate·update, or x + update, and that, as it is in memory, is the stream. The stream is of kind S,
// and of kind T is what it takes in and what comes out; at first x may be that too.
#pragma once
#include "block.h"

namespace gpu {

struct RowsShape {
  int64_t rows, width, of_factors;  // R, D, O
  int64_t stride;                   // from a row of the factors to the next
  bool plus_one;                    // the factor is 1 + scale
  int lanes;                        // threads of a row, a power of two
  int slots;                        // rows of a block at a time
  int64_t chunk;                    // rows of a block on the way back, all of one row of factors

  int64_t each() const { return rows / of_factors; }
  int64_t pieces() const { return (each() + chunk - 1) / chunk; }  // of the rows of one row of factors
};

template <class A>
struct RowFactors {
  const A *scale, *shift, *gate;
};

// Sums over the lanes of each slot of what `value(slot, lane)` gives, into the first `slots` numbers of `sums`.
template <class A, class Value>
inline void sum_of_rows(const Block &block, const RowsShape &s, A *sums, Value value) {
  block.each([&](int thread) { sums[thread % s.lanes * s.slots + thread / s.lanes] = value(thread / s.lanes, thread % s.lanes); });
  sum_slots(block, sums, s.lanes, s.slots);
}

template <class S, class T, int N>
struct LayerNorm {
  using A = computed<S>;
  RowsShape shape;
  A eps;
  const S *x;
  const T *narrow, *update;  // `narrow` in the place of x
  RowFactors<A> factors;
  T *y;
  S *stream;
  A *stats;  // [R, 2]: mean, 1/σ

  int64_t blocks() const { return (shape.rows + shape.slots - 1) / shape.slots; }
  static int64_t shared(const RowsShape &s) { return s.lanes * s.slots + 2 * s.slots; }

  void operator()(const Block &block) const {
    const RowsShape &s = shape;
    A *sums = block.shared<A>(), *means = sums + s.lanes * s.slots, *inverses = means + s.slots;
    const S *from = update ? stream : x;
    auto row = [&](int slot) { return block.index() * s.slots + slot; };
    auto each = [&](int slot, int lane, auto body) {
      if (row(slot) >= s.rows) return;
      A value[N];
      for (int64_t c = lane * N; c < s.width; c += s.lanes * N) {
        load<N>(from + row(slot) * s.width + c, value);
        body(c, value);
      }
    };
    if (update)
      block.each([&](int thread) {
        int64_t r = row(thread / s.lanes);
        if (r >= s.rows) return;
        const A *gate = factors.gate ? factors.gate + r / s.each() * s.stride : nullptr;
        A value[N], more[N];
        for (int64_t c = thread % s.lanes * N; c < s.width; c += s.lanes * N) {
          if (narrow) load<N>(narrow + r * s.width + c, value);
          else load<N>(x + r * s.width + c, value);
          load<N>(update + r * s.width + c, more);
          for (int i = 0; i < N; i++) value[i] += gate ? gate[c + i] * more[i] : more[i];
          store<N>(value, stream + r * s.width + c);
        }
      });
    sum_of_rows(block, s, sums, [&](int slot, int lane) {
      A sum = 0;
      each(slot, lane, [&](int64_t, const A *value) {
        for (int i = 0; i < N; i++) sum += value[i];
      });
      return sum;
    });
    block.each([&](int thread) {
      if (thread < s.slots) means[thread] = sums[thread] / static_cast<A>(s.width);
    });
    sum_of_rows(block, s, sums, [&](int slot, int lane) {
      A sum = 0;
      each(slot, lane, [&](int64_t, const A *value) {
        for (int i = 0; i < N; i++) sum += (value[i] - means[slot]) * (value[i] - means[slot]);
      });
      return sum;
    });
    block.each([&](int thread) {
      if (thread >= s.slots) return;
      inverses[thread] = A(1) / sqrt(sums[thread] / static_cast<A>(s.width) + eps);
      if (row(thread) < s.rows) {
        stats[2 * row(thread)] = means[thread];
        stats[2 * row(thread) + 1] = inverses[thread];
      }
    });
    block.each([&](int thread) {
      int slot = thread / s.lanes;
      int64_t factor = row(slot) / s.each() * s.stride;
      each(slot, thread % s.lanes, [&](int64_t c, A *value) {
        for (int i = 0; i < N; i++) {
          A scale = factors.scale[factor + c + i] + (s.plus_one ? A(1) : A(0));
          value[i] = (value[i] - means[slot]) * inverses[slot] * scale + factors.shift[factor + c + i];
        }
        store<N>(value, y + row(slot) * s.width + c);
      });
    });
  }
};

// The way back. `x` is the stream where there was an update, and `dstream` what comes back along it. Each block gives the sums
// over its rows for scale, shift and gate.
template <class S, class T, int N>
struct LayerNormBack {
  using A = computed<S>;
  RowsShape shape;
  const S *x, *dstream;
  const T *update, *dy;
  RowFactors<A> factors;
  const A *stats;
  S *dx;        // or nothing, where x was narrow
  T *dnarrow;   // then, where that is not dupdate
  T *dupdate;   // where it is not dx: where there is a gate, or another kind
  A *dfactors;  // [pieces, O, 3, D]

  int64_t blocks() const { return shape.pieces() * shape.of_factors; }
  static int64_t shared(const RowsShape &s) { return 2 * s.lanes * s.slots + 3 * s.width; }

  void operator()(const Block &block) const {
    const RowsShape &s = shape;
    int64_t o = block.index() % s.of_factors, piece = block.index() / s.of_factors, factor = o * s.stride;
    int64_t begin = o * s.each() + piece * s.chunk, end = begin + s.chunk, last = (o + 1) * s.each();
    if (end > last) end = last;
    int width = static_cast<int>(s.width);
    A *sums = block.shared<A>(), *columns = sums + 2 * s.lanes * s.slots;
    auto scale = [&](int c) { return factors.scale[factor + c] + (s.plus_one ? A(1) : A(0)); };
    block.each([&](int thread) {
      for (int i = thread; i < 3 * width; i += block.threads()) columns[i] = 0;
    });
    for (int64_t first = begin; first < end; first += s.slots) {
      // x̂ and its gradient, of the values of a row that a thread takes
      auto each = [&](int thread, auto body) {
        int64_t r = first + thread / s.lanes;
        if (r >= end) return;
        A normal[N], gradient[N], mean = stats[2 * r], inverse = stats[2 * r + 1];
        for (int c = thread % s.lanes * N; c < width; c += s.lanes * N) {
          load<N>(x + r * s.width + c, normal);
          load<N>(dy + r * s.width + c, gradient);
          for (int i = 0; i < N; i++) {
            normal[i] = (normal[i] - mean) * inverse;
            gradient[i] *= scale(c + i);
          }
          body(r * s.width + c, c, normal, gradient);
        }
      };
      // for each row the sum of its gradients, and of those times x̂
      block.each([&](int thread) {
        A sum = 0, along = 0;
        each(thread, [&](int64_t, int, const A *normal, const A *gradient) {
          for (int i = 0; i < N; i++) sum += gradient[i], along += gradient[i] * normal[i];
        });
        int at = thread % s.lanes * 2 * s.slots + thread / s.lanes;
        sums[at] = sum, sums[at + s.slots] = along;
      });
      sum_slots(block, sums, s.lanes, 2 * s.slots);
      auto slope = [&](int slot, A inverse, A gradient, A normal) {
        A count = static_cast<A>(s.width);
        return inverse * (gradient - sums[slot] / count - normal * (sums[slot + s.slots] / count));
      };
      block.each([&](int thread) {
        int slot = thread / s.lanes;
        each(thread, [&](int64_t at, int c, const A *normal, const A *gradient) {
          A d[N], more[N], inverse = stats[2 * (first + slot) + 1];
          for (int i = 0; i < N; i++) d[i] = slope(slot, inverse, gradient[i], normal[i]);
          if (dstream) {
            load<N>(dstream + at, more);
            for (int i = 0; i < N; i++) d[i] += more[i];
          }
          if (dx) store<N>(d, dx + at);
          if (dnarrow) store<N>(d, dnarrow + at);
          if (!dupdate) return;
          if (factors.gate)
            for (int i = 0; i < N; i++) d[i] *= factors.gate[factor + c + i];
          store<N>(d, dupdate + at);
        });
        // of the factors, each thread takes some columns of these rows
        for (int c = thread; c < width; c += block.threads()) {
          A of_scale = 0, of_shift = 0, of_gate = 0;
          for (int i = 0; i < s.slots && first + i < end; i++) {
            int64_t r = first + i, at = r * s.width + c;
            A inverse = stats[2 * r + 1], normal = (static_cast<A>(x[at]) - stats[2 * r]) * inverse;
            A gradient = static_cast<A>(dy[at]);
            of_scale += gradient * normal;
            of_shift += gradient;
            if (!factors.gate) continue;
            A d = slope(i, inverse, gradient * scale(c), normal) + (dstream ? static_cast<A>(dstream[at]) : A(0));
            of_gate += d * static_cast<A>(update[at]);
          }
          columns[c] += of_scale, columns[width + c] += of_shift, columns[2 * width + c] += of_gate;
        }
      });
    }
    block.each([&](int thread) {
      for (int i = thread; i < 3 * width; i += block.threads())
        dfactors[(piece * s.of_factors + o) * 3 * width + i] = columns[i];
    });
  }
};

}  // namespace gpu
