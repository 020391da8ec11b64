// What networks on a GPU do between their products, made of LibTorch's operations on memory as it lies, with ways back of our
// own: they keep less than the operations' own would, and give the same to the bit each time.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor full_precision(const at::Tensor &x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x;
}

// ---- group norm of [O, S, I, C] over S and a group of C, then y = x̂·scale + shift, then perhaps SiLU --------------

// Keeps x as it came, in mixed precision two bytes a value, and the statistics; the rest is computed again on the way back.
struct Norm : torch::autograd::Function<Norm> {
  static at::Tensor grouped(const at::Tensor &rows, int64_t groups) {  // [R, C] -> [R, 1, 1, G, C/G]
    return rows.reshape({rows.size(0), 1, 1, groups, rows.size(1) / groups});
  }

  static at::Tensor forward(AutogradContext *context, const at::Tensor &x, const at::Tensor &scale, const at::Tensor &shift,
                            int64_t groups, double eps, bool silu) {
    auto shape = x.sizes();
    auto values = full_precision(x).reshape({shape[0], shape[1], shape[2], groups, shape[3] / groups});
    auto [variance, mean] = at::var_mean(values, at::IntArrayRef{1, 4}, at::Scalar(0), /*keepdim=*/true);
    auto rstd = (variance + eps).rsqrt();
    auto gain = rstd * grouped(scale, groups);
    auto y = at::addcmul(grouped(shift, groups) - mean * gain, values, gain);
    if (silu) at::silu_(y);
    context->save_for_backward({x, scale, shift, mean, rstd});
    context->saved_data["silu"] = silu;
    return y.reshape(shape);
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &shift = saved[2], &mean = saved[3], &rstd = saved[4];
    auto groups = mean.size(3);
    auto shape = x.sizes();
    const std::vector<int64_t> group{1, 4};
    auto normed = (full_precision(x).reshape({shape[0], shape[1], shape[2], groups, shape[3] / groups}) - mean) * rstd;
    auto gradient = gradients[0].reshape(normed.sizes());
    auto scales = grouped(scale, groups);
    if (context->saved_data["silu"].toBool())
      gradient = at::silu_backward(gradient, at::addcmul(grouped(shift, groups), normed, scales));
    // a row of factors for each O, or one for all
    auto rows = [&](const at::Tensor &values) {
      auto sums = values.sum({1, 2}).reshape({shape[0], shape[3]});
      return scale.size(0) == 1 && shape[0] > 1 ? sums.sum({0}, /*keepdim=*/true) : sums;
    };
    auto of_scale = rows(gradient * normed), of_shift = rows(gradient);
    gradient = gradient * scales;
    auto along = (gradient * normed).mean(group, /*keepdim=*/true);
    auto dx = (gradient - gradient.mean(group, /*keepdim=*/true)).addcmul_(normed, along, -1).mul_(rstd);
    return {dx.reshape(shape).to(x.scalar_type()), of_scale, of_shift, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// ---- a video with its edges repeated ---------------------------------------------------------------------------------

// LibTorch's own way back adds what comes from edges atomically, in any order, and in mixed precision rounds each sum.
struct RepeatEdges : torch::autograd::Function<RepeatEdges> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x, std::vector<int64_t> pads) {
    context->saved_data["pads"] = pads;
    auto y = x.permute({0, 2, 3, 4, 1});
    if (!y.is_contiguous()) return at::replication_pad3d(x, pads);
    // LibTorch's kernel would bring the channels to the front
    for (int64_t axis = 1; axis < 4; axis++) {  // F, H, W; pads come for W first
      auto edge = [&](int64_t at, int64_t count) {
        auto shape = y.sizes().vec();
        shape[axis] = count;
        return y.narrow(axis, at, 1).expand(shape);
      };
      y = at::cat({edge(0, pads[6 - 2 * axis]), y, edge(y.size(axis) - 1, pads[7 - 2 * axis])}, axis);
    }
    return y.permute({0, 4, 1, 2, 3});
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto pads = context->saved_data["pads"].toIntVector();
    auto gradient = full_precision(gradients[0]);
    for (int64_t axis = 0; axis < 3; axis++) {  // of F, H, W; pads come for W first
      auto front = pads[4 - 2 * axis], back = pads[5 - 2 * axis];
      auto inner = gradient.size(axis + 2) - front - back;
      auto sum = gradient.narrow(axis + 2, front, inner).clone();
      if (front > 0) sum.narrow(axis + 2, 0, 1).add_(gradient.narrow(axis + 2, 0, front).sum({axis + 2}, true));
      if (back > 0)
        sum.narrow(axis + 2, inner - 1, 1).add_(gradient.narrow(axis + 2, front + inner, back).sum({axis + 2}, true));
      gradient = sum;
    }
    return {gradient.to(gradients[0].scalar_type()), at::Tensor()};
  }
};

}  // namespace

// *y <- x [O, S, I, C] normalised over S and each group of channels, times scale plus shift ([1 or O, C]), then SiLU
extern "C" char *lvdm_composed_norm(const at::Tensor *x, const at::Tensor *scale, const at::Tensor *shift, int64_t groups,
                                    double eps, bool silu, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(Norm::apply(*x, *scale, *shift, groups, eps, silu)); });
}

extern "C" char *lvdm_composed_edges(const at::Tensor *x, const int64_t *pads, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(RepeatEdges::apply(*x, std::vector<int64_t>(pads, pads + 6))); });
}
