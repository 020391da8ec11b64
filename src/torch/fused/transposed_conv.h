// A transposed 3D convolution whose weight gradient is computed in another way than LibTorch's: float32 on the CPU.
#pragma once
#include <ATen/autocast_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv3d.h>
#include <ATen/ops/conv_transpose3d.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <vector>

#include "../guarded.h"

namespace {

// The weight's gradient is that of a convolution from dy to x. oneDNN is nearly twice as fast at it where dy was padded
// before instead of by the convolution.
struct TransposedConv : torch::autograd::Function<TransposedConv> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x, const at::Tensor &weight,
                            const at::Tensor &bias, std::vector<int64_t> stride, int64_t crop) {
    context->save_for_backward({x, weight});
    context->saved_data["stride"] = stride;
    context->saved_data["crop"] = crop;
    return at::conv_transpose3d(x, weight, bias, stride, crop);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto stride = context->saved_data["stride"].toIntVector();
    int64_t crop = context->saved_data["crop"].toInt();
    auto &dy = gradients[0];
    auto dx = at::conv3d(dy, saved[1], {}, stride, crop);
    auto padded = at::constant_pad_nd(dy, std::vector<int64_t>(6, crop));
    auto dw = at::convolution_backward(saved[0], padded, saved[1], c10::nullopt, stride, {0, 0, 0}, {1, 1, 1}, false,
                                       {0, 0, 0}, 1, {false, true, false});
    return {dx, std::get<1>(dw), dy.sum({0, 2, 3, 4}), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" char *lvdm_transposed_conv(const at::Tensor *x, const at::Tensor *weight, const at::Tensor *bias,
                                      const int64_t *stride, int64_t crop, at::Tensor **y) {
  return guarded([&] {
    std::vector<int64_t> strides(stride, stride + 3);
    // mixed precision goes its own way back
    bool mixed = at::autocast::is_autocast_enabled(at::kCPU);
    *y = new at::Tensor(mixed ? at::conv_transpose3d(*x, *weight, *bias, strides, crop)
                              : TransposedConv::apply(*x, *weight, *bias, strides, crop));
  });
}
