// A step of Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) for many float32 tensors in one launch, with the
// clipping of the gradient by its norm before it and the moving average of the weights after it. All that changes from step to
// step lies on the device, so that a recorded step is that of every later one.
#pragma once
#include "many_tensors.h"

namespace gpu {

// What all tensors of a step share.
struct StepNumbers {
  float rate, clip;                   // of learning; the gradients' factor
  float correction_1, correction_2;  // 1 − β₁ⁿ and √(1 − β₂ⁿ) at the n-th step
  float average;                      // how much of the new weights goes into their average
  float taken;                        // 1, or 0 where nothing moves
};

// Counts a step, if all of `checked` is finite, of which the last is the gradient's norm, and computes its numbers.
struct PrepareStep {
  int64_t count;
  const double *checked;  // none: all is well
  const double *rate;
  float *steps;           // taken so far
  double *averaged;       // how often the average took weights in; may be none
  double beta_1, beta_2, max_norm, decay;  // no clipping where max_norm is negative
  bool warmup;
  StepNumbers *numbers;

  void operator()(const Block &block) const {
    block.each([&](int thread) {
      if (thread > 0) return;
      bool is_finite = true;
      for (int64_t i = 0; i < count; i++) is_finite = is_finite && checked[i] - checked[i] == 0;
      double before = *steps;
      if (is_finite) *steps += 1;
      double n = is_finite ? before + 1 : before;
      StepNumbers of{};
      of.taken = is_finite ? 1 : 0;
      of.rate = static_cast<float>(*rate);
      of.clip = 1;
      if (max_norm >= 0 && count > 0) {
        float factor = static_cast<float>(max_norm) / (static_cast<float>(checked[count - 1]) + 1e-6f);
        of.clip = factor < 1 ? factor : 1;
      }
      of.correction_1 = static_cast<float>(1 - pow(beta_1, n));
      of.correction_2 = static_cast<float>(sqrt(1 - pow(beta_2, n)));
      if (averaged) {
        double updates = is_finite ? *averaged + 1 : *averaged, warm = (1 + updates) / (10 + updates);
        *averaged = updates;
        of.average = static_cast<float>(1 - (warmup && warm < decay ? warm : decay));
      }
      *numbers = of;
    });
  }
};

struct AdamAll {
  static constexpr int MOST = 64;
  ManyTensors<MOST> tensors;
  float *parameters[MOST], *first[MOST], *second[MOST], *average[MOST];  // the last may be none
  const float *gradients[MOST];
  const StepNumbers *numbers;
  float beta_1, beta_2, decay, eps;  // the weights' decay
  bool decoupled;

  // from a to b by a share
  static float between(float a, float b, float share) { return share < 0.5f ? a + share * (b - a) : b - (b - a) * (1 - share); }

  void operator()(const Block &block) const {
    constexpr int PACK = ManyTensors<MOST>::PACK;
    StepNumbers n = *numbers;
    if (n.taken == 0) return;
    int at = tensors.tensor(block.index());
    float *p = parameters[at], *m = first[at], *v = second[at], *mean = average[at];
    const float *g = gradients[at];
    auto move = [&](float &weight, float gradient, float &moment, float &square, float &averaged) {
      gradient *= n.clip;
      if (decoupled) weight -= n.rate * decay * weight;
      else gradient += weight * decay;
      moment = between(moment, gradient, 1 - beta_1);
      square = between(square, gradient * gradient, 1 - beta_2);
      weight -= n.rate / n.correction_1 * moment / (sqrt(square) / n.correction_2 + eps);
      averaged = between(averaged, weight, n.average);
    };
    bool whole = (as_number(p) | as_number(m) | as_number(v) | as_number(g) | as_number(mean)) % 16 == 0;
    tensors.each(block, at, [&](uint32_t i, int count) {
      float weight[PACK], gradient[PACK], moment[PACK], square[PACK], averaged[PACK] = {};
      if (whole && count == PACK) {
        load<PACK>(p + i, weight), load<PACK>(g + i, gradient), load<PACK>(m + i, moment), load<PACK>(v + i, square);
        if (mean) load<PACK>(mean + i, averaged);
        for (int j = 0; j < PACK; j++) move(weight[j], gradient[j], moment[j], square[j], averaged[j]);
        store<PACK>(weight, p + i), store<PACK>(moment, m + i), store<PACK>(square, v + i);
        if (mean) store<PACK>(averaged, mean + i);
        return;
      }
      for (uint32_t j = i; j < i + count; j++) {
        float unused = 0;
        move(p[j], g[j], m[j], v[j], mean ? mean[j] : unused);
      }
    });
  }
};

}  // namespace gpu
