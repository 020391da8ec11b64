// Attention over the frames of each place, with relative positions. For a place and a head, with q, k, v [F, d]:
//   score[t, s] = α q_t·k_s + β q_t·K[s − t], or, transposed, … + β q_s·K[t − s];  w = softmax over s;
//   out_t = Σ_s w[t, s]·(v_s + V[s − t]),
// where the tables K and V have rows for distances of at most L, and those beyond count as L.
#pragma once
#include "block.h"

namespace gpu {

struct FrameAttentionShape {
  static constexpr int THREADS = 128;
  int64_t clips, frames, places, heads, width, distance;
  int together;     // places of a block
  bool transposed;

  int64_t groups() const { return (clips * places + together - 1) / together; }
  int pitch() const { return static_cast<int>(width) + 1; }  // of a row in shared memory: no two rows in one bank
  int rows() const { return 2 * static_cast<int>(distance) + 1; }
  int row(int from, int to) const {
    int l = static_cast<int>(distance), by = to - from;
    return (by < -l ? -l : by > l ? l : by) + l;
  }
  // where the first frame's row of d numbers of a place and a head lies, of rows of `channels`
  int64_t first(int64_t n, int64_t channels, int64_t head) const {
    return (n / places * frames * places + n % places) * channels + head * width;
  }
};

// What both ways share: rows of q, k and v and the weights of a group of places, for one head.
template <class T>
struct FrameAttentionPart {
  using A = computed<T>;
  const FrameAttentionShape &s;
  A alpha, beta;
  const T *qkv;
  const A *keys;
  A *q, *k, *v, *weights;
  int f, d, pitch, square, there;
  int64_t n0, head;

  FrameAttentionPart(const FrameAttentionShape &s, A alpha, A beta, const T *qkv, const A *keys, A *shared, int64_t group,
                     int64_t head)
      : s(s), alpha(alpha), beta(beta), qkv(qkv), keys(keys), head(head) {
    f = static_cast<int>(s.frames), d = static_cast<int>(s.width), pitch = s.pitch(), square = f * f;
    n0 = group * s.together;
    int64_t left = s.clips * s.places - n0;
    there = static_cast<int>(left < s.together ? left : s.together);
    int rows = s.together * f * pitch;
    q = shared, k = q + rows, v = k + rows, weights = v + rows;
  }
  static int64_t shared(const FrameAttentionShape &s) {
    return s.together * (3 * s.frames * s.pitch() + s.frames * s.frames);
  }
  // where frame t's row of place u lies in rows of `channels`
  int64_t at(int u, int t, int64_t channels) const {
    return s.first(n0 + u, channels, head) + t * s.places * channels;
  }

  // one of q, k, v, and of what has their shape
  template <class Row>
  void fetch(const Block &block, A *to, Row row) const {
    block.each([&](int thread) {
      for (int i = thread; i < there * f * d; i += block.threads())
        to[i / d * pitch + i % d] = static_cast<A>(row(i / d / f, i / d % f)[i % d]);
    });
  }

  void weigh(const Block &block) const {
    int64_t channels = s.heads * s.width;
    A *rows[3] = {q, k, v};
    for (int part = 0; part < 3; part++)
      fetch(block, rows[part], [&](int u, int t) { return qkv + at(u, t, 3 * channels) + part * channels; });
    block.each([&](int thread) {
      for (int i = thread; i < there * square; i += block.threads()) {
        int u = i / square, t = i / f % f, to = i % f;
        const A *one = q + (u * f + t) * pitch, *other = k + (u * f + to) * pitch;
        const A *asks = s.transposed ? q + (u * f + to) * pitch : one;
        const A *place = keys + (s.transposed ? s.row(to, t) : s.row(t, to)) * d;
        A dot = 0, position = 0;
        for (int c = 0; c < d; c++) dot += one[c] * other[c], position += asks[c] * place[c];
        weights[i] = alpha * dot + beta * position;
      }
    });
    block.each([&](int thread) {
      for (int i = thread; i < there * f; i += block.threads()) {
        A *row = weights + i * f, most = row[0], sum = 0;
        for (int to = 1; to < f; to++) most = row[to] > most ? row[to] : most;
        for (int to = 0; to < f; to++) sum += row[to] = exp(row[to] - most);
        for (int to = 0; to < f; to++) row[to] /= sum;
      }
    });
  }
};

template <class T>
struct FrameAttention {
  using A = computed<T>;
  FrameAttentionShape shape;
  A alpha, beta;
  const T *qkv;
  const A *keys, *values;
  T *out;

  int64_t blocks() const { return shape.groups() * shape.heads; }
  static int64_t shared(const FrameAttentionShape &s) { return FrameAttentionPart<T>::shared(s); }

  void operator()(const Block &block) const {
    const FrameAttentionShape &s = shape;
    FrameAttentionPart<T> p(s, alpha, beta, qkv, keys, block.shared<A>(), block.index() / s.heads, block.index() % s.heads);
    p.weigh(block);
    block.each([&](int thread) {
      for (int i = thread; i < p.there * p.f * p.d; i += block.threads()) {
        int c = i % p.d, t = i / p.d % p.f, u = i / p.d / p.f;
        const A *row = p.weights + u * p.square + t * p.f;
        A sum = 0;
        for (int to = 0; to < p.f; to++)
          sum += row[to] * (p.v[(u * p.f + to) * p.pitch + c] + values[s.row(t, to) * p.d + c]);
        out[p.at(u, t, s.heads * s.width) + c] = static_cast<T>(sum);
      }
    });
  }
};

// The way back computes the weights again. Each block sums what it finds of the tables over all places that are its own.
template <class T>
struct FrameAttentionBack {
  using A = computed<T>;
  FrameAttentionShape shape;
  A alpha, beta;
  const T *qkv, *dout;
  const A *keys, *values;
  T *dqkv;
  A *dtables;      // [blocks, 2, 2L+1, d]: of the keys' table and of the values'
  int64_t pieces;  // blocks of a head

  int64_t blocks() const { return pieces * shape.heads; }
  static int64_t shared(const FrameAttentionShape &s) {
    int64_t more = s.together * (s.frames * s.pitch() + s.frames * s.frames);
    return FrameAttentionPart<T>::shared(s) + more + 2 * s.rows() * s.width;
  }

  void operator()(const Block &block) const {
    const FrameAttentionShape &s = shape;
    int64_t head = block.index() % s.heads;
    int tables = 2 * s.rows() * static_cast<int>(s.width);
    A *table = block.shared<A>(), *others = table + tables;
    block.each([&](int thread) {
      for (int i = thread; i < tables; i += block.threads()) table[i] = 0;
    });
    for (int64_t group = block.index() / s.heads; group < s.groups(); group += pieces) {
      FrameAttentionPart<T> p(s, alpha, beta, qkv, keys, others, group, head);
      int f = p.f, d = p.d;
      A *dy = p.weights + s.together * p.square, *ds = dy + s.together * f * p.pitch;
      p.weigh(block);
      p.fetch(block, dy, [&](int u, int t) { return dout + p.at(u, t, s.heads * s.width); });
      block.each([&](int thread) {
        for (int i = thread; i < p.there * p.square; i += block.threads()) {
          int u = i / p.square, t = i / f % f, to = i % f;
          const A *of = dy + (u * f + t) * p.pitch, *v = p.v + (u * f + to) * p.pitch, *place = values + s.row(t, to) * d;
          A sum = 0;
          for (int c = 0; c < d; c++) sum += of[c] * (v[c] + place[c]);
          ds[i] = sum;
        }
      });
      block.each([&](int thread) {
        for (int i = thread; i < p.there * f; i += block.threads()) {
          A *row = ds + i * f, mean = 0;
          const A *weights = p.weights + i * f;
          for (int to = 0; to < f; to++) mean += weights[to] * row[to];
          for (int to = 0; to < f; to++) row[to] = weights[to] * (row[to] - mean);
        }
      });
      block.each([&](int thread) {
        for (int i = thread; i < p.there * f * d; i += block.threads()) {
          int c = i % d, t = i / d % f, u = i / d / f;
          const A *weights = p.weights + u * p.square, *slopes = ds + u * p.square;
          A dq = 0, dk = 0, dv = 0, of_position = 0;
          for (int to = 0; to < f; to++) {
            int other = (u * f + to) * p.pitch + c;
            dq += slopes[t * f + to] * p.k[other];
            dk += slopes[to * f + t] * p.q[other];
            dv += weights[to * f + t] * dy[other];
            // q_t has asked for the scores of its own row, or, transposed, of its own column
            of_position += (s.transposed ? slopes[to * f + t] : slopes[t * f + to]) * keys[s.row(t, to) * d + c];
          }
          int64_t channels = s.heads * s.width;
          T *to = dqkv + p.at(u, t, 3 * channels) + c;
          to[0] = static_cast<T>(alpha * dq + beta * of_position);
          to[channels] = static_cast<T>(alpha * dk);
          to[2 * channels] = static_cast<T>(dv);
        }
        for (int i = thread; i < tables; i += block.threads()) {
          int c = i % d, row = i / d % s.rows();
          bool of_keys = i < tables / 2;
          A sum = 0;
          for (int u = 0; u < p.there; u++)
            for (int t = 0; t < f; t++) {
              // the frames whose distance from t has this row: one, or, at the ends of the table, all beyond too
              int by = row - static_cast<int>(s.distance), first = row == 0 ? 0 : t + by, last = row == s.rows() - 1 ? f - 1 : t + by;
              for (int to = first < 0 ? 0 : first; to <= last && to < f; to++) {
                int asks = (u * f + t) * p.pitch + c, at = u * p.square + t * f + to, turned = u * p.square + to * f + t;
                sum += of_keys ? beta * ds[s.transposed ? turned : at] * p.q[asks] : p.weights[at] * dy[asks];
              }
            }
          table[i] += sum;
        }
      });
    }
    block.each([&](int thread) {
      for (int i = thread; i < tables; i += block.threads()) dtables[block.index() * tables + i] = table[i];
    });
  }
};

}  // namespace gpu
