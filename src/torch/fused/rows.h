// The inner loops of our own kernels, on plain memory, compiled once for each set of vector instructions (rows.cpp). Which of
// them runs is chosen when the program runs (fused.cpp).
#pragma once
#include <cstdint>

struct FrameAttentionPlace;

struct Rows {
  // per channel Σ x and Σ x², of `rows` rows of `channels` that lie `stride` apart
  void (*sums)(const float *x, int64_t rows, int64_t stride, int64_t channels, float *sum, float *square);
  // y = u, or SiLU(u), where u = x·gain + offset
  void (*norm)(const float *x, int64_t rows, int64_t stride, int64_t channels, const float *gain, const float *offset,
               bool silu, float *y);
  // du goes into dx; per channel Σ du and Σ du·x̂, where x̂ = x·inverse − centre
  void (*norm_sums_back)(const float *x, const float *dy, int64_t rows, int64_t stride, int64_t channels,
                         const float *gain, const float *offset, const float *inverse, const float *centre, bool silu,
                         float *dx, float *sum, float *along);
  // dx = du·gain − of_one − x·of_x, where du stands in dx
  void (*norm_back)(const float *x, int64_t rows, int64_t stride, int64_t channels, const float *gain,
                    const float *of_one, const float *of_x, float *dx);
  // one head of one place: see FrameAttentionPlace
  void (*attend)(const FrameAttentionPlace &place, float *out);
  void (*attend_back)(const FrameAttentionPlace &place, const float *dout, float *ds, float *dqkv, float *dkeys,
                      float *dvalues);
  // to += from
  void (*add)(const float *from, int64_t count, float *to);
};

// One head's attention over the frames of one place, with relative positions:
// score[t, u] = α q_t·k_u + β q_t·R[t, u], or, transposed, … + β q_u·R[u, t]; weights = softmax over u;
// out_t = Σ_u weights[t, u]·(v_u + V[t, u]).
struct FrameAttentionPlace {
  int64_t frames, width;  // F, and d of a head
  int64_t step;           // from a frame's q (and k, v) of this place to the next frame's
  int64_t channels;       // from q to k to v
  int64_t out_step;       // from a frame's output to the next frame's
  float alpha, beta;
  bool transposed;
  const float *q;             // of frame 0
  const float *keys, *values; // R and V, [F, F, d]
  float *weights;             // [F, F]
};

// On every processor; with AVX2 and FMA; with AVX-512 (F, BW, DQ, VL). The last two are there on x86-64 only.
extern const Rows rows_plain, rows_avx2, rows_avx512;

// The one for the processor that the program runs on.
const Rows &rows();
