// Attention over the frames of each place, with relative positions or without. For a place and a head, with q, k, v [F, d]:
//   score[t, s] = α q_t·k_s + β q_t·K[s − t], or, transposed, … + β q_s·K[t − s];  w = softmax over s;
//   out_t = Σ_s w[t, s]·(v_s + V[s − t]),
// where the tables K and V have rows for distances of at most L, and those beyond count as L. Without positions there are no
// tables (null, L = −1).
#pragma once
#include "block.h"

namespace gpu {

struct FrameAttentionShape {
  static constexpr int THREADS = 128;
  int64_t clips, frames, places, heads, width, distance;
  int together;     // places of a block
  int parts;        // threads that share the product of two rows, a power of two
  bool transposed;

  int64_t groups() const { return (clips * places + together - 1) / together; }
  int pitch() const { return static_cast<int>(width) + 8; }  // of a row in shared memory: rows that are read together lie in other banks
  // the tables' rows that some two frames have between them: so many, from the first on
  int reach() const { return static_cast<int>(frames - 1 < distance ? frames - 1 : distance); }
  int used() const { return distance < 0 ? 0 : 2 * reach() + 1; }
  int first_used() const { return static_cast<int>(distance) - reach(); }
  int row(int from, int to) const {
    int l = static_cast<int>(distance), by = to - from;
    return (by < -l ? -l : by > l ? l : by) + l;
  }
  // where the first frame's row of d numbers of a place and a head lies, of rows of `channels`
  int64_t first(int64_t n, int64_t channels, int64_t head) const {
    return (n / places * frames * places + n % places) * channels + head * width;
  }
};

// What both ways share: rows of q, k and v and the weights of a group of places, for one head. `N` values of a row are read as
// one, and `V` of them computed.
template <class T, int N>
struct FrameAttentionPart {
  using A = computed<T>;
  static constexpr int V = N > 4 ? 4 : N;
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
  static int64_t rows(const FrameAttentionShape &s) { return s.together * s.frames * s.pitch(); }
  static int64_t sums(const FrameAttentionShape &s) { return s.parts * s.together * s.frames * s.frames; }
  static int64_t shared(const FrameAttentionShape &s) { return 3 * rows(s) + sums(s); }

  // where frame t's row of place u lies in rows of `channels`
  int64_t at(int u, int t, int64_t channels) const {
    return s.first(n0 + u, channels, head) + t * s.places * channels;
  }

  // COUNT arrays of rows, such as q, k and v, of which `row(i, u, t)` is one of the i-th
  template <int COUNT, class Row>
  void fetch(const Block &block, A *const (&to)[COUNT], Row row) const {
    int packs = d / N;
    block.each([&](int thread) {
      for (int i = thread; i < there * f * packs; i += block.threads()) {
        int at = i / packs, c = i % packs * N;
        A values[COUNT][N];
        for (int array = 0; array < COUNT; array++) load<N>(row(array, at / f, at % f) + c, values[array]);
        for (int array = 0; array < COUNT; array++) store<N>(values[array], to[array] + at * pitch + c);
      }
    });
  }
  // where a row of q, k or v lies
  const T *of_qkv(int part, int u, int t) const {
    int64_t channels = s.heads * s.width;
    return qkv + at(u, t, 3 * channels) + part * channels;
  }

  // numbers[i], for each pair of frames of each place, is the sum of `term(u, t, s)(c)` over the d places of a row, `V` at a time
  template <class Term>
  void sum_rows(const Block &block, A *numbers, Term term) const {
    int count = there * square;
    block.each([&](int thread) {
      for (int i = thread; i < count * s.parts; i += block.threads()) {
        int pair = i / s.parts, part = i % s.parts;
        auto of = term(pair / square, pair / f % f, pair % f);
        A sum = 0;
        for (int c = part * V; c < d; c += s.parts * V) sum += of(c);
        numbers[part * count + pair] = sum;
      }
    });
    sum_slots(block, numbers, s.parts, count);
  }

  // q and k are fetched
  void weigh(const Block &block) const {
    sum_rows(block, weights, [&](int u, int t, int to) {
      const A *one = q + (u * f + t) * pitch, *other = k + (u * f + to) * pitch;
      const A *asks = s.transposed ? q + (u * f + to) * pitch : one;
      const A *place = keys ? keys + (s.transposed ? s.row(to, t) : s.row(t, to)) * d : nullptr;
      return [=, a = alpha, b = beta](int c) {
        A x[V], y[V], z[V] = {}, w[V] = {}, dot = 0, position = 0;
        load<V>(one + c, x), load<V>(other + c, y);
        if (place) load<V>(asks + c, z), load<V>(place + c, w);
        for (int i = 0; i < V; i++) dot += x[i] * y[i], position += z[i] * w[i];
        return a * dot + b * position;
      };
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

template <class T, int N>
struct FrameAttention {
  using A = computed<T>;
  using Part = FrameAttentionPart<T, N>;
  FrameAttentionShape shape;
  A alpha, beta;
  const T *qkv;
  const A *keys, *values;
  T *out;

  int64_t blocks() const { return shape.groups() * shape.heads; }
  static int64_t shared(const FrameAttentionShape &s) { return Part::shared(s); }

  void operator()(const Block &block) const {
    constexpr int V = Part::V;
    const FrameAttentionShape &s = shape;
    Part p(s, alpha, beta, qkv, keys, block.shared<A>(), block.index() / s.heads, block.index() % s.heads);
    p.fetch(block, {p.q, p.k, p.v}, [&](int part, int u, int t) { return p.of_qkv(part, u, t); });
    p.weigh(block);
    int packs = p.d / V;
    block.each([&](int thread) {
      for (int i = thread; i < p.there * p.f * packs; i += block.threads()) {
        int c = i % packs * V, t = i / packs % p.f, u = i / packs / p.f;
        const A *row = p.weights + u * p.square + t * p.f;
        A sum[V] = {}, v[V], place[V] = {};
        for (int to = 0; to < p.f; to++) {
          load<V>(p.v + (u * p.f + to) * p.pitch + c, v);
          if (values) load<V>(values + s.row(t, to) * p.d + c, place);
          for (int j = 0; j < V; j++) sum[j] += row[to] * (v[j] + place[j]);
        }
        store<V>(sum, out + p.at(u, t, s.heads * s.width) + c);
      }
    });
  }
};

// The way back computes the weights again. Each block sums what it finds of the tables over all places that are its own.
template <class T, int N>
struct FrameAttentionBack {
  using A = computed<T>;
  using Part = FrameAttentionPart<T, N>;
  FrameAttentionShape shape;
  A alpha, beta;
  const T *qkv, *dout;
  const A *keys, *values;
  T *dqkv;
  A *dtables;      // [blocks, 2, rows that are used, d]: of the keys' table and of the values', where there are any
  int64_t pieces;  // blocks of a head

  int64_t blocks() const { return pieces * shape.heads; }
  static int64_t shared(const FrameAttentionShape &s) {
    return 2 * s.used() * s.width + Part::shared(s) + Part::rows(s) + Part::sums(s) + 2 * s.used() * s.together * s.frames;
  }

  void operator()(const Block &block) const {
    constexpr int V = Part::V;
    const FrameAttentionShape &s = shape;
    int64_t head = block.index() % s.heads;
    int f = static_cast<int>(s.frames), d = static_cast<int>(s.width), packs = d / V, tables = 2 * s.used() * d;
    A *table = block.shared<A>(), *dy = table + tables, *others = dy + Part::rows(s), *ds = others + Part::shared(s);
    A *shares = ds + Part::sums(s);  // [2, rows that are used, places, F]
    block.each([&](int thread) {
      for (int i = thread; i < tables; i += block.threads()) table[i] = 0;
    });
    for (int64_t group = block.index() / s.heads; group < s.groups(); group += pieces) {
      Part p(s, alpha, beta, qkv, keys, others, group, head);
      p.fetch(block, {p.q, p.k, p.v, dy}, [&](int part, int u, int t) {
        return part < 3 ? p.of_qkv(part, u, t) : dout + p.at(u, t, s.heads * s.width);
      });
      p.weigh(block);
      p.sum_rows(block, ds, [&](int u, int t, int to) {
        const A *of = dy + (u * f + t) * p.pitch, *v = p.v + (u * f + to) * p.pitch;
        const A *place = values ? values + s.row(t, to) * d : nullptr;
        return [=](int c) {
          A x[V], y[V], z[V] = {}, sum = 0;
          load<V>(of + c, x), load<V>(v + c, y);
          if (place) load<V>(place + c, z);
          for (int i = 0; i < V; i++) sum += x[i] * (y[i] + z[i]);
          return sum;
        };
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
        for (int i = thread; i < p.there * f * packs; i += block.threads()) {
          int c = i % packs * V, t = i / packs % f, u = i / packs / f;
          const A *weights = p.weights + u * p.square, *slopes = ds + u * p.square;
          A dq[V] = {}, dk[V] = {}, dv[V] = {}, k[V], q[V], of[V], place[V] = {};
          for (int to = 0; to < f; to++) {
            int other = (u * f + to) * p.pitch + c;
            load<V>(p.k + other, k);
            load<V>(p.q + other, q);
            load<V>(dy + other, of);
            if (keys) load<V>(keys + s.row(t, to) * d + c, place);
            A own = slopes[t * f + to], turned = slopes[to * f + t], weight = weights[to * f + t];
            // q_t has asked for the scores of its own row, or, transposed, of its own column
            A asked = s.transposed ? turned : own;
            for (int j = 0; j < V; j++) {
              dq[j] += alpha * (own * k[j]) + beta * (asked * place[j]);
              dk[j] += turned * q[j];
              dv[j] += weight * of[j];
            }
          }
          for (int j = 0; j < V; j++) dk[j] *= alpha;
          int64_t channels = s.heads * s.width;
          T *to = dqkv + p.at(u, t, 3 * channels) + c;
          store<V>(dq, to);
          store<V>(dk, to + channels);
          store<V>(dv, to + 2 * channels);
        }
        // how much of a frame's q, or of what comes back to it, goes into each row of the tables
        for (int i = thread; i < 2 * s.used() * p.there * f; i += block.threads()) {
          int t = i % f, u = i / f % p.there, row = i / f / p.there % s.used() + s.first_used();
          bool of_keys = i < s.used() * p.there * f;
          // the frames whose distance from t has this row: one, or, at the ends of the table, all beyond too
          int by = row - static_cast<int>(s.distance);
          int first = row == 0 ? 0 : t + by, last = row == 2 * s.distance ? f - 1 : t + by;
          A share = 0;
          for (int to = first < 0 ? 0 : first; to <= last && to < f; to++) {
            int at = u * p.square + t * f + to, turned = u * p.square + to * f + t;
            share += of_keys ? beta * ds[s.transposed ? turned : at] : p.weights[at];
          }
          shares[i] = share;
        }
      });
      block.each([&](int thread) {
        for (int i = thread; i < tables / V; i += block.threads()) {
          int c = i % packs * V, row = i / packs;
          const A *from = (row < s.used() ? p.q : dy) + c, *share = shares + row * p.there * f;
          A sum[V] = {}, asks[V];
          for (int frame = 0; frame < p.there * f; frame++) {
            load<V>(from + frame * p.pitch, asks);
            for (int j = 0; j < V; j++) sum[j] += share[frame] * asks[j];
          }
          for (int j = 0; j < V; j++) table[i * V + j] += sum[j];
        }
      });
    }
    block.each([&](int thread) {
      for (int i = thread; i < tables; i += block.threads()) dtables[block.index() * tables + i] = table[i];
    });
  }
};

}  // namespace gpu
