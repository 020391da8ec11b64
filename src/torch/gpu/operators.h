// The operators of kernels.cpp and optimizer.cpp, which the dispatcher knows as `lvdm::…`. What they take and give is said there.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

using Optional = std::optional<at::Tensor>;

namespace operators {

constexpr size_t MOST_CASTS = 128, MOST_STEPS = 64;  // tensors of one launch

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm(const at::Tensor &x, const Optional &beside,
                                                                      const Optional &update, const Optional &added,
                                                                      const Optional &modulation, const at::Tensor &scale,
                                                                      const at::Tensor &shift, int64_t groups, double eps,
                                                                      bool silu, bool half, bool narrows);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor &x, const Optional &beside, const Optional &added, const Optional &modulation, const at::Tensor &dy,
    const Optional &dstream, const Optional &dnarrow, const at::Tensor &scale, const at::Tensor &shift, const at::Tensor &stats,
    int64_t groups, bool silu, bool narrows);
at::Tensor mixed_sum(const at::Tensor &a, const at::Tensor &b);

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(const at::Tensor &x, const Optional &update, const Optional &gate,
                                                          const at::Tensor &scale, const at::Tensor &shift, bool plus_one,
                                                          double eps, bool half);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(const at::Tensor &x, const Optional &update,
                                                                   const Optional &gate, const at::Tensor &dy,
                                                                   const Optional &dstream, const at::Tensor &scale,
                                                                   const at::Tensor &shift, const at::Tensor &stats,
                                                                   bool plus_one, bool had_update, bool was_narrow);

at::Tensor frame_attention(const at::Tensor &qkv, const Optional &keys, const Optional &values, int64_t heads, double alpha,
                           double beta, bool transposed);
std::tuple<at::Tensor, at::Tensor> frame_attention_backward(const at::Tensor &qkv, const Optional &keys, const Optional &values,
                                                            const at::Tensor &dout, int64_t heads, double alpha, double beta,
                                                            bool transposed);

at::Tensor repeat_edges(const at::Tensor &x, at::IntArrayRef pads);
at::Tensor repeat_edges_backward(const at::Tensor &dy, at::IntArrayRef pads);

at::Tensor geglu(const at::Tensor &x);
at::Tensor geglu_backward(const at::Tensor &x, const at::Tensor &dy);

at::Tensor column_sums(const at::Tensor &x, int64_t zeros);
void cast_all_(at::TensorList from, at::TensorList to);
at::Tensor prepare_step_(const at::Tensor &checked, const at::Tensor &rate, const at::Tensor &steps, const at::Tensor &averaged,
                         double beta_1, double beta_2, double max_norm, double decay, bool warmup);
void adam_all_(at::TensorList parameters, at::TensorList gradients, at::TensorList first, at::TensorList second,
               at::TensorList average, const at::Tensor &numbers, double beta_1, double beta_2, double decay, double eps,
               bool decoupled);

}  // namespace operators

// An operator by name, as a function of the signature that it was defined with.
template <auto *implementation>
auto operator_named(const char *name) {
  using Signature = std::remove_pointer_t<decltype(implementation)>;
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
