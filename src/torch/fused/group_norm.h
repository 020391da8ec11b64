// Group norm of [O, S, I, C] over S and a group of C, then y = x̂·scale + shift, then SiLU where it is asked for: float32 on the
// CPU, in one pass over memory each way. Sums are taken over fixed pieces in a fixed order, so that results do not depend on
// the number of threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../guarded.h"
#include "rows.h"

namespace {

constexpr int64_t ROWS = 64;  // of a piece

// [O, S, I, C] in pieces of at most ROWS rows of one sample (o, i)
struct Pieces {
  int64_t outer, steps, inner, channels, a_sample;

  explicit Pieces(const at::Tensor &x)
      : outer(x.size(0)), steps(x.size(1)), inner(x.size(2)), channels(x.size(3)), a_sample((steps + ROWS - 1) / ROWS) {}
  int64_t samples() const { return outer * inner; }
  int64_t count() const { return samples() * a_sample; }
  int64_t stride() const { return inner * channels; }
  int64_t sample(int64_t piece) const { return piece / a_sample; }
  int64_t rows(int64_t piece) const { return std::min(ROWS, steps - piece % a_sample * ROWS); }
  int64_t begin(int64_t piece) const {
    int64_t o = sample(piece) / inner, i = sample(piece) % inner;
    return ((o * steps + piece % a_sample * ROWS) * inner + i) * channels;
  }
  // so that a thread gets some 16,000 numbers
  int64_t grain() const { return std::max<int64_t>(1, 16384 / (std::min(ROWS, steps) * channels)); }
};

struct Norm : torch::autograd::Function<Norm> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x, const at::Tensor &scale,
                            const at::Tensor &shift, int64_t groups, double eps, bool silu) {
    Pieces p(x);
    int64_t C = p.channels, width = C / groups;
    auto sums = at::empty({p.count(), 2 * groups}, x.options().dtype(at::kDouble));
    auto stats = at::empty({p.samples(), 2, groups}, x.options());  // mean, 1/σ
    auto y = at::empty_like(x);
    const float *px = x.const_data_ptr<float>(), *pa = scale.const_data_ptr<float>(), *pb = shift.const_data_ptr<float>();
    double *ps = sums.data_ptr<double>();
    float *pm = stats.data_ptr<float>(), *py = y.data_ptr<float>();
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> sum(C), square(C);
      for (int64_t piece = from; piece < to; piece++) {
        rows().sums(px + p.begin(piece), p.rows(piece), p.stride(), C, sum.data(), square.data());
        for (int64_t g = 0; g < groups; g++) {
          double s = 0, q = 0;
          for (int64_t c = g * width; c < (g + 1) * width; c++) s += sum[c], q += square[c];
          ps[piece * 2 * groups + g] = s;
          ps[piece * 2 * groups + groups + g] = q;
        }
      }
    });
    double count = static_cast<double>(p.steps * width);
    for (int64_t n = 0; n < p.samples(); n++) {
      for (int64_t g = 0; g < groups; g++) {
        double s = 0, q = 0;
        for (int64_t k = n * p.a_sample; k < (n + 1) * p.a_sample; k++)
          s += ps[k * 2 * groups + g], q += ps[k * 2 * groups + groups + g];
        double mean = s / count, variance = std::max(0.0, q / count - mean * mean);
        pm[n * 2 * groups + g] = static_cast<float>(mean);
        pm[n * 2 * groups + groups + g] = static_cast<float>(1.0 / std::sqrt(variance + eps));
      }
    }
    bool shared = scale.size(0) == 1;
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), offset(C);
      for (int64_t piece = from; piece < to; piece++) {
        gains(p, piece, from, pm, groups, pa, pb, shared, gain.data(), offset.data());
        rows().norm(px + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), offset.data(), silu, py + p.begin(piece));
      }
    });
    context->save_for_backward({x, scale, shift, stats});
    context->saved_data["groups"] = groups;
    context->saved_data["silu"] = silu;
    return y;
  }

  // u = x·gain + offset, for a piece's sample
  static void gains(const Pieces &p, int64_t piece, int64_t first, const float *stats, int64_t groups, const float *scale,
                    const float *shift, bool shared, float *gain, float *offset) {
    if (piece != first && piece % p.a_sample != 0) return;  // as the piece before
    int64_t n = p.sample(piece), row = shared ? 0 : n / p.inner, width = p.channels / groups;
    const float *mean = stats + n * 2 * groups, *inverse = mean + groups;
    for (int64_t g = 0, c = 0; g < groups; g++)
      for (; c < (g + 1) * width; c++) {
        gain[c] = inverse[g] * scale[row * p.channels + c];
        offset[c] = shift[row * p.channels + c] - mean[g] * gain[c];
      }
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto x = saved[0], scale = saved[1], shift = saved[2], stats = saved[3];
    int64_t groups = context->saved_data["groups"].toInt();
    bool silu = context->saved_data["silu"].toBool();
    auto dy = gradients[0].contiguous();
    Pieces p(x);
    int64_t C = p.channels, width = C / groups;
    auto dx = at::empty_like(x);
    auto sums = at::empty({p.count(), 2, C}, x.options());  // Σ du, Σ du·x̂
    auto dscale = at::zeros({scale.size(0), C}, x.options().dtype(at::kDouble)), dshift = at::zeros_like(dscale);
    const float *px = x.const_data_ptr<float>(), *pa = scale.const_data_ptr<float>(), *pb = shift.const_data_ptr<float>();
    const float *pm = stats.const_data_ptr<float>(), *pdy = dy.const_data_ptr<float>();
    float *pdx = dx.data_ptr<float>(), *ps = sums.data_ptr<float>();
    double *pda = dscale.data_ptr<double>(), *pdb = dshift.data_ptr<double>();
    bool shared = scale.size(0) == 1;
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), offset(C), inverse(C), centre(C);
      for (int64_t piece = from; piece < to; piece++) {
        gains(p, piece, from, pm, groups, pa, pb, shared, gain.data(), offset.data());
        const float *mean = pm + p.sample(piece) * 2 * groups;
        for (int64_t c = 0; c < C; c++) {
          inverse[c] = mean[groups + c / width];
          centre[c] = mean[c / width] * inverse[c];
        }
        rows().norm_sums_back(px + p.begin(piece), pdy + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), offset.data(),
                       inverse.data(), centre.data(), silu, pdx + p.begin(piece), ps + piece * 2 * C, ps + piece * 2 * C + C);
      }
    });
    // per sample and group the means of dx̂ and dx̂·x̂
    std::vector<float> means(p.samples() * 2 * groups);
    double count = static_cast<double>(p.steps * width);
    std::vector<double> sum(C), along(C);
    for (int64_t n = 0; n < p.samples(); n++) {
      int64_t row = shared ? 0 : n / p.inner;
      std::fill(sum.begin(), sum.end(), 0), std::fill(along.begin(), along.end(), 0);
      for (int64_t k = n * p.a_sample; k < (n + 1) * p.a_sample; k++)
        for (int64_t c = 0; c < C; c++) sum[c] += ps[k * 2 * C + c], along[c] += ps[k * 2 * C + C + c];
      for (int64_t g = 0; g < groups; g++) {
        double of_one = 0, of_x = 0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
          pdb[row * C + c] += sum[c];
          pda[row * C + c] += along[c];
          of_one += sum[c] * pa[row * C + c];
          of_x += along[c] * pa[row * C + c];
        }
        means[n * 2 * groups + g] = static_cast<float>(of_one / count);
        means[n * 2 * groups + groups + g] = static_cast<float>(of_x / count);
      }
    }
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), of_one(C), of_x(C);
      for (int64_t piece = from; piece < to; piece++) {
        int64_t n = p.sample(piece), row = shared ? 0 : n / p.inner;
        const float *mean = pm + n * 2 * groups, *inverse = mean + groups, *m = means.data() + n * 2 * groups;
        for (int64_t g = 0, c = 0; g < groups; g++)
          for (; c < (g + 1) * width; c++) {
            // 1/σ·(du·scale − m₁ − x̂·m₂)
            gain[c] = inverse[g] * pa[row * C + c];
            of_x[c] = inverse[g] * inverse[g] * m[groups + g];
            of_one[c] = inverse[g] * m[g] - mean[g] * of_x[c];
          }
        rows().norm_back(px + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), of_one.data(), of_x.data(),
                       pdx + p.begin(piece));
      }
    });
    return {dx, dscale.to(at::kFloat), dshift.to(at::kFloat), {}, {}, {}};
  }
};

}  // namespace

// *y <- x [O, S, I, C] normalised over S and each group of channels, times scale plus shift ([1 or O, C]), then SiLU
extern "C" char *lvdm_group_norm(const at::Tensor *x, const at::Tensor *scale, const at::Tensor *shift, int64_t groups,
                                 double eps, bool silu, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(Norm::apply(*x, *scale, *shift, groups, eps, silu)); });
}
