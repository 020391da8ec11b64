// Group norm of [O, S, I, C] over S and a group of C: y = x̂·scale + shift, then perhaps SiLU. With a modulation, [O, 2·C], y is
// x̂·scale·(1 + m) + shift·(1 + m) + n, where m are the first C of its row and n the others. A sample is one (o, i). A block
// takes some whole groups of some samples, of each of which `slots` threads share the steps; it reads them twice, the second
// time from cache. Of samples of very many steps, pieces are the blocks' own: a first launch leaves their sums for a second.
#pragma once
#include "block.h"

namespace gpu {

// How a norm is shared out.
struct NormShape {
  int64_t outer, steps, inner, channels;
  int64_t first;   // channels of x; those behind are of what lies beside it
  int64_t rows;    // of scale and shift: 1, or outer
  int group;       // channels of a group
  int chunk;       // channels of a block
  int slots;       // threads that share the steps of a sample, a power of two
  int samples;     // of a block
  int64_t pieces;  // of the steps of a sample
  bool silu;
  int64_t of_added;  // samples' o that share a row of what is added

  int64_t count() const { return outer * inner; }
  int64_t chunks() const { return channels / chunk; }
  int64_t batches() const { return (count() + samples - 1) / samples; }  // of samples
  int64_t blocks() const { return batches() * pieces * chunks(); }
  int threads(int together) const { return slots * samples * (chunk / together); }
};

// What a block takes of it: of some samples, from `n` on, some steps of the channels from `channel` on.
struct NormPart {
  int64_t batch, piece, n, channel, begin, end;

  NormPart(const NormShape &s, int64_t index)
      : batch(index / s.chunks() / s.pieces), piece(index / s.chunks() % s.pieces), n(batch * s.samples),
        channel(index % s.chunks() * s.chunk) {
    int64_t each = (s.steps + s.pieces - 1) / s.pieces;
    begin = piece * each;
    end = begin + each < s.steps ? begin + each : s.steps;
  }
};

// What one thread takes of it: `together` channels of every `slots`-th step of a sample.
struct NormThread {
  int slot, sample, channel;  // the channel within the chunk
  int64_t n, o, first;        // the sample's number, its o, and where its first step's value lies
  int64_t step;               // from a step to the next
  bool is_beside;             // not of x
  int64_t in_first, in_step;  // as `first` and `step`, in that of x and what is beside it in which it lies
  bool is_there;

  NormThread(const NormShape &s, const NormPart &part, int thread, int together) {
    int lanes = s.chunk / together;
    channel = thread % lanes * together;
    slot = thread / lanes % s.slots;
    sample = thread / lanes / s.slots;
    n = part.n + sample;
    is_there = n < s.count();
    o = n / s.inner;
    step = s.inner * s.channels;
    first = o * s.steps * step + n % s.inner * s.channels + part.channel + channel;
    int64_t c = part.channel + channel;
    is_beside = c >= s.first;
    int64_t width = is_beside ? s.channels - s.first : s.first;
    in_step = s.inner * width;
    in_first = o * s.steps * in_step + n % s.inner * width + (is_beside ? c - s.first : c);
  }
};

// The sums of a block over its steps, `count` of them for each of its samples and channels, are left for a second launch, as
// [O·I, pieces, count, C], where each thread takes up its share of one of them.
template <class A>
inline void leave_sums(const Block &block, const NormShape &s, const NormPart &part, A *const *rows, int count, A *left) {
  block.each([&](int thread) {
    for (int i = thread; i < s.samples * s.chunk; i += block.threads()) {
      int64_t n = part.n + i / s.chunk;
      if (n >= s.count()) continue;
      A *to = left + (n * s.pieces + part.piece) * count * s.channels + part.channel + i % s.chunk;
      for (int row = 0; row < count; row++) to[row * s.channels] = rows[row][i];
    }
  });
}
template <int N, class A>
inline void take_up(const NormShape &s, const NormPart &part, const NormThread &t, const A *left, int count, int row, A *sum) {
  for (int64_t piece = t.slot; piece < s.pieces; piece += s.slots) {
    const A *from = left + ((t.n * s.pieces + piece) * count + row) * s.channels + part.channel + t.channel;
    for (int i = 0; i < N; i++) sum[i] += from[i];
  }
}

// What a norm multiplies by and adds, for one o and channel.
template <class A>
struct NormFactors {
  const A *scale, *shift, *modulation;

  A gain(const NormShape &s, int64_t o, int64_t c) const { return modulation ? A(1) + modulation[o * 2 * s.channels + c] : A(1); }
  A of_scale(const NormShape &s, int64_t o, int64_t c) const {
    return scale[(s.rows == 1 ? 0 : o) * s.channels + c] * gain(s, o, c);
  }
  A of_shift(const NormShape &s, int64_t o, int64_t c) const {
    A more = modulation ? modulation[(o * 2 + 1) * s.channels + c] : A(0);
    return shift[(s.rows == 1 ? 0 : o) * s.channels + c] * gain(s, o, c) + more;
  }
};

// x is of kind S, and of kind T is what is added to it and what comes out. An update, where there is one, is added to x first,
// and the sum, as it is in memory, is the stream; `added`, [A, C], is added for the norm alone. What lies beside x has the
// channels behind those of x.
template <class S, class T, int N>
struct GroupNorm {
  using A = computed<S>;
  NormShape shape;
  A eps;
  const S *x, *beside;
  const T *update;
  const A *added;
  NormFactors<A> factors;
  T *y;
  S *stream;
  T *narrow;                // x, and what is beside it, as kind T
  A *stats;                 // [O·I, 2, groups]: mean, 1/σ
  A *left;                  // the sums of pieces: this launch leaves them
  const A *sums_of_pieces;  // or takes them up

  static int64_t shared(const NormShape &s) {
    return (2 * s.slots + 1) * s.samples * s.chunk + 2 * s.samples * (s.chunk / s.group);
  }

  void operator()(const Block &block) const {
    const NormShape &s = shape;
    int width = s.samples * s.chunk, groups = s.chunk / s.group;
    A *sums = block.shared<A>(), *squares = sums + s.slots * width, *pivots = squares + s.slots * width;
    A *means = pivots + width, *inverses = means + s.samples * groups;
    NormPart part(s, block.index());
    int64_t c0 = part.channel;

    // sums of what is beyond the first step's value, so that a large mean takes no digits from the variance
    block.each([&](int thread) {
      NormThread t(s, part, thread, N);
      A pivot[N] = {}, sum[N] = {}, square[N] = {}, value[N], more[N];
      if (t.is_there) {
        const A *plus = added ? added + t.o / s.of_added * s.channels + c0 + t.channel : nullptr;
        const S *from = t.is_beside ? beside : x;
        auto take = [&](int64_t at) {
          load<N>(from + at, value);
          if (update) {
            load<N>(update + at, more);
            for (int i = 0; i < N; i++) value[i] = rounded<S>(value[i] + more[i]);
          }
        };
        take(t.in_first);
        for (int i = 0; i < N; i++) pivot[i] = value[i];
        if (sums_of_pieces) {
          take_up<N>(s, part, t, sums_of_pieces, 2, 0, sum);
          take_up<N>(s, part, t, sums_of_pieces, 2, 1, square);
        }
        for (int64_t step = sums_of_pieces ? part.end : part.begin + t.slot; step < part.end; step += s.slots) {
          int64_t at = t.first + step * t.step;
          take(t.in_first + step * t.in_step);
          if (update) store<N>(value, stream + at);
          if (narrow) store<N>(value, narrow + at);
          for (int i = 0; i < N; i++) {
            A beyond = value[i] - pivot[i];
            sum[i] += beyond;
            square[i] += beyond * beyond;
          }
        }
        if (plus)
          for (int i = 0; i < N; i++) pivot[i] += plus[i];
      }
      int at = t.sample * s.chunk + t.channel;
      for (int i = 0; i < N; i++) {
        sums[t.slot * width + at + i] = sum[i];
        squares[t.slot * width + at + i] = square[i];
        if (t.slot == 0) pivots[at + i] = pivot[i];
      }
    });
    sum_slots(block, sums, s.slots, width);
    sum_slots(block, squares, s.slots, width);
    if (left) {
      A *rows[] = {sums, squares};
      return leave_sums(block, s, part, rows, 2, left);
    }

    block.each([&](int thread) {
      for (int i = thread; i < s.samples * groups; i += block.threads()) {
        int sample = i / groups, first = sample * s.chunk + i % groups * s.group;
        int64_t n = part.n + sample;
        A steps = static_cast<A>(s.steps), mean = 0, beyond = 0;
        for (int c = first; c < first + s.group; c++) mean += pivots[c] + sums[c] / steps;
        mean /= s.group;
        for (int c = first; c < first + s.group; c++) {
          A away = pivots[c] + sums[c] / steps - mean;
          beyond += squares[c] - sums[c] * sums[c] / steps + steps * away * away;
        }
        A variance = beyond / (steps * s.group);
        means[i] = mean;
        inverses[i] = A(1) / sqrt((variance < 0 ? A(0) : variance) + eps);
        if (n < s.count() && part.piece == 0) {
          int64_t all = s.channels / s.group, g = c0 / s.group + i % groups;
          stats[n * 2 * all + g] = means[i];
          stats[n * 2 * all + all + g] = inverses[i];
        }
      }
    });

    block.each([&](int thread) {
      NormThread t(s, part, thread, N);
      if (!t.is_there) return;
      A mean[N], gain[N], offset[N], value[N];
      for (int i = 0; i < N; i++) {
        int c = t.channel + i, g = t.sample * groups + c / s.group;
        mean[i] = means[g] - (added ? added[t.o / s.of_added * s.channels + c0 + c] : A(0));
        gain[i] = inverses[g] * factors.of_scale(s, t.o, c0 + c);
        offset[i] = factors.of_shift(s, t.o, c0 + c);
      }
      const S *from = update ? stream : t.is_beside ? beside : x;
      for (int64_t step = part.begin + t.slot; step < part.end; step += s.slots) {
        load<N>(from + t.in_first + step * t.in_step, value);
        for (int i = 0; i < N; i++) {
          A u = (value[i] - mean[i]) * gain[i] + offset[i];
          value[i] = s.silu ? silu(u) : u;
        }
        store<N>(value, y + t.first + step * t.step);
      }
    });
  }
};

// The way back. `x` is the stream where there was an update; `dstream` and `dnarrow` are what comes back to it otherwise. Of
// scale and shift each block gives the sums over its samples, or, where they have a row for each o, that row.
template <class S, class T, int N>
struct GroupNormBack {
  using A = computed<S>;
  NormShape shape;
  const S *x, *beside, *dstream;
  const T *dnarrow, *dy;
  const A *added;
  NormFactors<A> factors;
  const A *stats;
  S *dx, *dbeside;
  T *dupdate;      // where it is not dx
  A *dfactors;     // [pieces, 2, C]: of scale and of shift
  A *dadded;       // [O, C]: for each o its share of the row
  A *dmodulation;  // [O, 2·C]
  A *left;         // as above
  const A *sums_of_pieces;

  // how many sums there are: that of x̂ is for `added` alone
  int sums() const { return dadded ? 3 : 2; }
  int64_t shared(const NormShape &s) const {
    return sums() * s.slots * s.samples * s.chunk + 2 * s.samples * (s.chunk / s.group);
  }

  void operator()(const Block &block) const {
    const NormShape &s = shape;
    int width = s.samples * s.chunk, groups = s.chunk / s.group;
    A *ones = block.shared<A>(), *alongs = ones + s.slots * width, *normals = alongs + s.slots * width;
    A *means = ones + sums() * s.slots * width, *along_means = means + s.samples * groups;
    NormPart part(s, block.index());
    int64_t c0 = part.channel;
    int64_t all = s.channels / s.group;

    struct Factors {
      A mean[N], inverse[N], scale[N], shift[N];
    };
    auto read = [&](const NormThread &t) {
      Factors f;
      for (int i = 0; i < N; i++) {
        int64_t c = c0 + t.channel + i, g = t.n * 2 * all + c / s.group;
        f.mean[i] = stats[g] - (added ? added[t.o / s.of_added * s.channels + c] : A(0));
        f.inverse[i] = stats[g + all];
        f.scale[i] = factors.of_scale(s, t.o, c);
        f.shift[i] = factors.of_shift(s, t.o, c);
      }
      return f;
    };
    // x̂, and the gradient of u = x̂·scale + shift
    auto take = [&](const NormThread &t, const Factors &f, int64_t step, A *normal, A *du) {
      load<N>((t.is_beside ? beside : x) + t.in_first + step * t.in_step, normal);
      load<N>(dy + t.first + step * t.step, du);
      for (int i = 0; i < N; i++) {
        normal[i] = (normal[i] - f.mean[i]) * f.inverse[i];
        if (s.silu) du[i] *= silu_slope(normal[i] * f.scale[i] + f.shift[i]);
      }
    };

    block.each([&](int thread) {
      NormThread t(s, part, thread, N);
      A one[N] = {}, along[N] = {}, normal_sum[N] = {}, normal[N], du[N];
      if (t.is_there && sums_of_pieces) {
        take_up<N>(s, part, t, sums_of_pieces, sums(), 0, one);
        take_up<N>(s, part, t, sums_of_pieces, sums(), 1, along);
        if (dadded) take_up<N>(s, part, t, sums_of_pieces, sums(), 2, normal_sum);
      } else if (t.is_there) {
        Factors f = read(t);
        for (int64_t step = part.begin + t.slot; step < part.end; step += s.slots) {
          take(t, f, step, normal, du);
          for (int i = 0; i < N; i++) {
            one[i] += du[i];
            along[i] += du[i] * normal[i];
            normal_sum[i] += normal[i];
          }
        }
      }
      int at = t.slot * width + t.sample * s.chunk + t.channel;
      for (int i = 0; i < N; i++) ones[at + i] = one[i], alongs[at + i] = along[i];
      if (dadded)
        for (int i = 0; i < N; i++) normals[at + i] = normal_sum[i];
    });
    sum_slots(block, ones, s.slots, width);
    sum_slots(block, alongs, s.slots, width);
    if (dadded) sum_slots(block, normals, s.slots, width);
    if (left) {
      A *rows[] = {ones, alongs, normals};
      return leave_sums(block, s, part, rows, sums(), left);
    }

    block.each([&](int thread) {
      for (int i = thread; i < s.samples * groups; i += block.threads()) {
        int sample = i / groups, first = sample * s.chunk + i % groups * s.group;
        int64_t n = part.n + sample, o = n < s.count() ? n / s.inner : 0;
        A mean = 0, along_mean = 0, count = static_cast<A>(s.steps) * s.group;
        for (int c = first; c < first + s.group; c++) {
          A factor = factors.of_scale(s, o, c0 + c - sample * s.chunk);
          mean += ones[c] * factor;
          along_mean += alongs[c] * factor;
        }
        means[i] = mean / count;
        along_means[i] = along_mean / count;
      }
      for (int c = thread; c < s.chunk && part.piece == 0; c += block.threads()) {
        A of_scale = 0, of_shift = 0;
        for (int sample = 0; sample < s.samples; sample++) {
          int64_t n = part.n + sample;
          if (n >= s.count()) break;
          int64_t o = n / s.inner, at = c0 + c;
          A along = alongs[sample * s.chunk + c], one = ones[sample * s.chunk + c], gain = factors.gain(s, o, at);
          of_scale += gain * along;
          of_shift += gain * one;
          if (dmodulation) {
            dmodulation[o * 2 * s.channels + at] = factors.scale[at] * along + factors.shift[at] * one;
            dmodulation[(o * 2 + 1) * s.channels + at] = one;
          }
        }
        dfactors[part.batch * 2 * s.channels + c0 + c] = of_scale;
        dfactors[part.batch * 2 * s.channels + s.channels + c0 + c] = of_shift;
      }
    });

    block.each([&](int thread) {
      NormThread t(s, part, thread, N);
      if (!t.is_there) return;
      Factors f = read(t);
      A mean[N], along_mean[N], normal[N], du[N], more[N];
      for (int i = 0; i < N; i++) {
        int g = t.sample * groups + (t.channel + i) / s.group;
        mean[i] = means[g];
        along_mean[i] = along_means[g];
      }
      for (int64_t step = part.begin + t.slot; step < part.end; step += s.slots) {
        int64_t at = t.first + step * t.step, in = t.in_first + step * t.in_step;
        take(t, f, step, normal, du);
        for (int i = 0; i < N; i++) du[i] = f.inverse[i] * (du[i] * f.scale[i] - mean[i] - normal[i] * along_mean[i]);
        if (dstream) {
          load<N>(dstream + in, more);
          for (int i = 0; i < N; i++) du[i] += more[i];
        }
        if (dnarrow) {
          load<N>(dnarrow + at, more);
          for (int i = 0; i < N; i++) du[i] += more[i];
        }
        store<N>(du, (t.is_beside ? dbeside : dx) + in);
        if (dupdate) store<N>(du, dupdate + at);
      }
      if (dadded && t.slot == 0 && part.piece == 0)
        for (int i = 0; i < N; i++) {
          int c = t.sample * s.chunk + t.channel + i;
          A sum = f.scale[i] * ones[c] - static_cast<A>(s.steps) * mean[i] - along_mean[i] * normals[c];
          dadded[t.o * s.channels + c0 + t.channel + i] = f.inverse[i] * sum;
        }
    });
  }
};

}  // namespace gpu
