// See rows.h. LVDM_ROWS names the table that this compilation makes; the compiler is told the instructions (build.rs). Nothing
// of the standard library but its mathematics is used here: an inline function compiled for AVX-512 could be the copy that
// the linker keeps for all.
#include "rows.h"

#include <cmath>
#include <cstring>

namespace {

// e^x to 2 ulp (Cephes), written so that compilers vectorise it
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

void sums(const float *x, int64_t rows, int64_t stride, int64_t channels, float *sum, float *square) {
  for (int64_t c = 0; c < channels; c++) sum[c] = square[c] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const float *row = x + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      sum[c] += row[c];
      square[c] += row[c] * row[c];
    }
  }
}

void norm(const float *x, int64_t rows, int64_t stride, int64_t channels, const float *gain, const float *offset,
          bool silu, float *y) {
  for (int64_t r = 0; r < rows; r++) {
    const float *in = x + r * stride;
    float *out = y + r * stride;
    if (silu) {
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        float u = in[c] * gain[c] + offset[c];
        out[c] = u / (1.0f + fast_exp(-u));
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) out[c] = in[c] * gain[c] + offset[c];
    }
  }
}

void norm_sums_back(const float *x, const float *dy, int64_t rows, int64_t stride, int64_t channels, const float *gain,
                    const float *offset, const float *inverse, const float *centre, bool silu, float *dx, float *sum,
                    float *along) {
  for (int64_t c = 0; c < channels; c++) sum[c] = along[c] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const float *in = x + r * stride, *from = dy + r * stride;
    float *to = dx + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      float du = from[c];
      if (silu) {
        float u = in[c] * gain[c] + offset[c];
        float gate = 1.0f / (1.0f + fast_exp(-u));
        du *= gate * (1.0f + u * (1.0f - gate));
      }
      to[c] = du;
      sum[c] += du;
      along[c] += du * (in[c] * inverse[c] - centre[c]);
    }
  }
}

void norm_back(const float *x, int64_t rows, int64_t stride, int64_t channels, const float *gain, const float *of_one,
               const float *of_x, float *dx) {
  for (int64_t r = 0; r < rows; r++) {
    const float *in = x + r * stride;
    float *out = dx + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) out[c] = out[c] * gain[c] - of_one[c] - in[c] * of_x[c];
  }
}

inline float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

inline void add_scaled(float *to, const float *from, float factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] += factor * from[i];
}

// The rows of one place: `which` is 0 for q, 1 for k, 2 for v.
struct Parts {
  const FrameAttentionPlace &p;
  int64_t at(int64_t frame, int64_t which) const { return frame * p.step + which * p.channels; }
  const float *of(int64_t frame, int64_t which) const { return p.q + at(frame, which); }
  // score[t, u] gains β·q_of·R[of, by]
  int64_t asks(int64_t t, int64_t u) const { return p.transposed ? u : t; }
  int64_t row(int64_t t, int64_t u) const {
    return p.transposed ? (u * p.frames + t) * p.width : (t * p.frames + u) * p.width;
  }
};

void attend(const FrameAttentionPlace &p, float *out) {
  Parts part{p};
  int64_t F = p.frames, d = p.width;
  for (int64_t t = 0; t < F; t++, out += p.out_step) {
    float *w = p.weights + t * F;
    float most = -INFINITY, sum = 0;
    for (int64_t u = 0; u < F; u++) {
      w[u] = p.alpha * dot(part.of(t, 0), part.of(u, 1), d) +
             p.beta * dot(part.of(part.asks(t, u), 0), p.keys + part.row(t, u), d);
      most = w[u] > most ? w[u] : most;
    }
    for (int64_t u = 0; u < F; u++) sum += w[u] = std::exp(w[u] - most);
    for (int64_t i = 0; i < d; i++) out[i] = 0;
    for (int64_t u = 0; u < F; u++) {
      w[u] /= sum;
      add_scaled(out, part.of(u, 2), w[u], d);
      add_scaled(out, p.values + (t * F + u) * d, w[u], d);
    }
  }
}

void attend_back(const FrameAttentionPlace &p, const float *dout, float *ds, float *dqkv, float *dkeys, float *dvalues) {
  Parts part{p};
  int64_t F = p.frames, d = p.width;
  for (int64_t t = 0; t < F; t++, dout += p.out_step) {
    const float *w = p.weights + t * F;
    float mean = 0;
    for (int64_t u = 0; u < F; u++) {
      ds[u] = dot(dout, part.of(u, 2), d) + dot(dout, p.values + (t * F + u) * d, d);
      mean += w[u] * ds[u];
      add_scaled(dqkv + part.at(u, 2), dout, w[u], d);
      add_scaled(dvalues + (t * F + u) * d, dout, w[u], d);
    }
    for (int64_t u = 0; u < F; u++) {
      float score = w[u] * (ds[u] - mean);
      int64_t asks = part.asks(t, u), row = part.row(t, u);
      float product = p.alpha * score, position = p.beta * score;
      add_scaled(dqkv + part.at(t, 0), part.of(u, 1), product, d);
      add_scaled(dqkv + part.at(u, 1), part.of(t, 0), product, d);
      add_scaled(dqkv + part.at(asks, 0), p.keys + row, position, d);
      add_scaled(dkeys + row, part.of(asks, 0), position, d);
    }
  }
}

void add(const float *from, int64_t count, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

}  // namespace

const Rows LVDM_ROWS = {sums, norm, norm_sums_back, norm_back, attend, attend_back, add};
