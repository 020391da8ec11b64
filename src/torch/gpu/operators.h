// The operators of kernels.cpp, which the dispatcher knows as `lvdm::…`. What they take and give is said there.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

using Optional = std::optional<at::Tensor>;

namespace operators {

constexpr size_t MOST_CASTS = 128;  // of one launch

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(const at::Tensor &x, const Optional &residual, const Optional &added,
                                                          const Optional &modulation, const at::Tensor &scale,
                                                          const at::Tensor &shift, int64_t groups, double eps, bool silu);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor &x, const Optional &added, const Optional &modulation, const at::Tensor &dy, const Optional &dstream,
    const at::Tensor &scale, const at::Tensor &shift, const at::Tensor &stats, int64_t groups, bool silu);

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(const at::Tensor &x, const Optional &update, const Optional &gate,
                                                          const at::Tensor &scale, const at::Tensor &shift, bool plus_one,
                                                          double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(const at::Tensor &x, const Optional &update,
                                                                   const Optional &gate, const at::Tensor &dy,
                                                                   const Optional &dstream, const at::Tensor &scale,
                                                                   const at::Tensor &shift, const at::Tensor &stats,
                                                                   bool plus_one);

at::Tensor frame_attention(const at::Tensor &qkv, const at::Tensor &keys, const at::Tensor &values, int64_t heads, double alpha,
                           double beta, bool transposed);
std::tuple<at::Tensor, at::Tensor> frame_attention_backward(const at::Tensor &qkv, const at::Tensor &keys,
                                                            const at::Tensor &values, const at::Tensor &dout, int64_t heads,
                                                            double alpha, double beta, bool transposed);

at::Tensor repeat_edges(const at::Tensor &x, at::IntArrayRef pads);
at::Tensor repeat_edges_backward(const at::Tensor &dy, at::IntArrayRef pads);

at::Tensor geglu(const at::Tensor &x);
at::Tensor geglu_backward(const at::Tensor &x, const at::Tensor &dy);

at::Tensor column_sums(const at::Tensor &x);
void cast_all_(at::TensorList from, at::TensorList to);

}  // namespace operators
