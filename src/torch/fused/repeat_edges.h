// A video whose edges are repeated: float32 on the CPU. LibTorch's kernel goes back through it with one thread a clip; this one
// shares the frames among threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/replication_pad3d.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "../guarded.h"
#include "rows.h"

namespace {

// The places of a padded axis at which place i of n stands.
struct Copies {
  int64_t begin, end;

  Copies(int64_t i, int64_t n, int64_t front, int64_t back)
      : begin(i == 0 ? 0 : i + front), end(i == n - 1 ? n + front + back : i + front + 1) {}
};

// x [B, C, F, H, W] with its channels last in memory; pads as LibTorch orders them (W, H, F, each in front and behind).
struct RepeatEdges : torch::autograd::Function<RepeatEdges> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x, std::vector<int64_t> pads) {
    context->saved_data["sizes"] = x.sizes().vec();
    context->saved_data["pads"] = pads;
    return at::replication_pad3d(x, pads);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto sizes = context->saved_data["sizes"].toIntVector(), pads = context->saved_data["pads"].toIntVector();
    int64_t B = sizes[0], C = sizes[1], F = sizes[2], H = sizes[3], W = sizes[4];
    int64_t height = H + pads[2] + pads[3], width = W + pads[0] + pads[1], frames = F + pads[4] + pads[5];
    auto dy = gradients[0].contiguous(at::MemoryFormat::ChannelsLast3d);
    auto dx = at::empty(sizes, dy.options().memory_format(at::MemoryFormat::ChannelsLast3d));
    const float *from = dy.const_data_ptr<float>();
    float *to = dx.data_ptr<float>();
    at::parallel_for(0, B * F * H, std::max<int64_t>(1, 16384 / (W * C)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        int64_t b = row / (F * H);
        Copies of_f(row / H % F, F, pads[4], pads[5]), of_h(row % H, H, pads[2], pads[3]);
        float *out = to + row * W * C;
        std::fill(out, out + W * C, 0.0f);
        for (int64_t f = of_f.begin; f < of_f.end; f++)
          for (int64_t h = of_h.begin; h < of_h.end; h++) {
            const float *in = from + ((b * frames + f) * height + h) * width * C;
            rows().add(in + pads[0] * C, W * C, out);
            for (int64_t w = 0; w < pads[0]; w++) rows().add(in + w * C, C, out);
            for (int64_t w = W + pads[0]; w < width; w++) rows().add(in + w * C, C, out + (W - 1) * C);
          }
      }
    });
    return {dx, at::Tensor()};
  }
};

}  // namespace

extern "C" char *lvdm_repeat_edges(const at::Tensor *x, const int64_t *pads, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(RepeatEdges::apply(*x, std::vector<int64_t>(pads, pads + 6))); });
}
