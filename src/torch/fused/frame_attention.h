// Attention over the frames of each position, with relative positions: float32 on the CPU, in one pass over memory each way.
// Gradients of the tables of positions are summed over fixed pieces in a fixed order, so that results do not depend on the
// number of threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "../guarded.h"
#include "rows.h"

namespace {

struct Shape {
  int64_t clips, frames, places, channels, heads, width;
  double alpha, beta;
  bool transposed;

  // where head h of place n of all clips' places begins in the first frame, of rows of `width` numbers
  int64_t begin(int64_t n, int64_t h, int64_t row) const {
    return ((n / places * frames) * places + n % places) * row + h * width;
  }
  FrameAttentionPlace place(int64_t n, int64_t h, const float *qkv, const float *keys, const float *values,
                            float *weights) const {
    return {frames, width, places * 3 * channels, channels, places * channels, static_cast<float>(alpha),
            static_cast<float>(beta), transposed, qkv + begin(n, h, 3 * channels), keys, values,
            weights + (n * heads + h) * frames * frames};
  }
};

constexpr int64_t PLACES = 16;  // of a piece

struct FrameAttention : torch::autograd::Function<FrameAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &qkv, const at::Tensor &keys,
                            const at::Tensor &values, int64_t heads, double alpha, double beta, bool transposed) {
    Shape s = shape(qkv, heads, alpha, beta, transposed);
    int64_t F = s.frames, C = s.channels, d = s.width;
    auto y = at::empty({s.clips, F, s.places, C}, qkv.options());
    auto weights = at::empty({s.clips * s.places, heads, F, F}, qkv.options());
    const float *px = qkv.const_data_ptr<float>(), *pk = keys.const_data_ptr<float>(), *pv = values.const_data_ptr<float>();
    float *py = y.data_ptr<float>(), *pw = weights.data_ptr<float>();
    at::parallel_for(0, s.clips * s.places, PLACES, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; n++)
        for (int64_t h = 0; h < heads; h++) rows().attend(s.place(n, h, px, pk, pv, pw), py + s.begin(n, h, C));
    });
    context->save_for_backward({qkv, keys, values, weights});
    context->saved_data["heads"] = heads;
    context->saved_data["alpha"] = alpha;
    context->saved_data["beta"] = beta;
    context->saved_data["transposed"] = transposed;
    return y;
  }

  static Shape shape(const at::Tensor &qkv, int64_t heads, double alpha, double beta, bool transposed) {
    int64_t channels = qkv.size(3) / 3;
    return {qkv.size(0), qkv.size(1), qkv.size(2), channels, heads, channels / heads, alpha, beta, transposed};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto qkv = saved[0], keys = saved[1], values = saved[2], weights = saved[3];
    auto &data = context->saved_data;
    Shape s = shape(qkv, data["heads"].toInt(), data["alpha"].toDouble(), data["beta"].toDouble(),
                    data["transposed"].toBool());
    int64_t F = s.frames, C = s.channels, d = s.width, all = s.clips * s.places, table = F * F * d;
    int64_t pieces = (all + PLACES - 1) / PLACES;
    auto dy = gradients[0].contiguous();
    auto dqkv = at::zeros_like(qkv);
    auto dtables = at::zeros({pieces, 2, F, F, d}, qkv.options());
    const float *px = qkv.const_data_ptr<float>(), *pk = keys.const_data_ptr<float>(), *pv = values.const_data_ptr<float>();
    const float *pg = dy.const_data_ptr<float>();
    float *pw = weights.data_ptr<float>(), *pd = dqkv.data_ptr<float>(), *pt = dtables.data_ptr<float>();
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      std::vector<float> ds(F);
      for (int64_t piece = from; piece < to; piece++)
        for (int64_t n = piece * PLACES; n < std::min(all, (piece + 1) * PLACES); n++)
          for (int64_t h = 0; h < s.heads; h++) {
            float *dkeys = pt + piece * 2 * table, *dvalues = dkeys + table;
            rows().attend_back(s.place(n, h, px, pk, pv, pw), pg + s.begin(n, h, C), ds.data(), pd + s.begin(n, h, 3 * C),
                               dkeys, dvalues);
          }
    });
    auto sum = dtables.sum(0);
    return {dqkv, sum[0], sum[1], {}, {}, {}, {}};
  }
};

}  // namespace

// *y <- [B, F, P, C]: attention over F of qkv [B, F, P, 3·C] with key and value rows [F, F, d] of relative positions
extern "C" char *lvdm_frame_attention(const at::Tensor *qkv, const at::Tensor *keys, const at::Tensor *values,
                                      int64_t heads, double alpha, double beta, bool transposed, at::Tensor **y) {
  return guarded(
      [&] { *y = new at::Tensor(FrameAttention::apply(*qkv, *keys, *values, heads, alpha, beta, transposed)); });
}
