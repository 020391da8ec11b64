// Operators over all weights of a network: casts, and the steps of its optimizer.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <type_traits>
#include <vector>

#include "../guarded.h"
#include "adam.h"
#include "cast_all.h"
#include "launch.h"
#include "operators.h"

namespace operators {

// to[i] <- from[i], cast, of as many as one launch takes; each pair has its values in one order in memory
void cast_all_(at::TensorList from, at::TensorList to) {
  static_assert(gpu::CastAll<float, bfloat16>::MOST == MOST_CASTS);
  TORCH_CHECK(from.size() == to.size() && from.size() <= MOST_CASTS, "casts of ", from.size(), " tensors");
  if (from.empty()) return;
  auto cast = [&](auto kernel, const auto *first, auto *second) {
    using From = std::remove_cvref_t<decltype(*first)>;
    using To = std::remove_cvref_t<decltype(*second)>;
    for (size_t i = 0; i < from.size(); i++) {
      TORCH_CHECK(from[i].strides() == to[i].strides() && from[i].sizes() == to[i].sizes(), "a cast of ", from[i].sizes());
      int at = kernel.tensors.add(from[i].numel());
      kernel.from[at] = in<From>(from[i]), kernel.to[at] = out<To>(to[i]);
    }
    launch<float>(kernel, from[0].device(), kernel.tensors.blocks(), kernel.tensors.THREADS, 0);
  };
  const float *single = nullptr;
  const bfloat16 *half = nullptr;
  if (from[0].scalar_type() == at::kFloat) cast(gpu::CastAll<float, bfloat16>(), single, const_cast<bfloat16 *>(half));
  else cast(gpu::CastAll<bfloat16, float>(), half, const_cast<float *>(single));
}

// The numbers of a step, for adam_all_. `checked` [n] may be empty, and so may `averaged`, where there is no average.
at::Tensor prepare_step_(const at::Tensor &checked, const at::Tensor &rate, const at::Tensor &steps, const at::Tensor &averaged,
                         double beta_1, double beta_2, double max_norm, double decay, bool warmup) {
  auto numbers = at::empty({sizeof(gpu::StepNumbers) / sizeof(float)}, steps.options());
  gpu::PrepareStep kernel{checked.numel(),
                          in<double>(checked),
                          in<double>(rate),
                          out<float>(steps),
                          averaged.numel() > 0 ? out<double>(averaged) : nullptr,
                          beta_1,
                          beta_2,
                          max_norm,
                          decay,
                          warmup,
                          reinterpret_cast<gpu::StepNumbers *>(out<float>(numbers))};
  launch<double>(kernel, steps.device(), 1, 32, 0);
  return numbers;
}

// Whether two tensors have their values in one order in memory, without gaps. An axis of one value has no order.
bool lie_alike(const at::Tensor &a, const at::Tensor &b) {
  if (a.sizes() != b.sizes() || !a.is_non_overlapping_and_dense()) return false;
  for (int64_t axis = 0; axis < a.dim(); axis++)
    if (a.size(axis) != 1 && a.stride(axis) != b.stride(axis)) return false;
  return true;
}

// A step of as many tensors as one launch takes, whose values each lie in one order in memory. `average` may be empty.
void adam_all_(at::TensorList parameters, at::TensorList gradients, at::TensorList first, at::TensorList second,
               at::TensorList average, const at::Tensor &numbers, double beta_1, double beta_2, double decay, double eps,
               bool decoupled) {
  static_assert(gpu::AdamAll::MOST == MOST_STEPS);
  size_t count = parameters.size();
  TORCH_CHECK(count <= MOST_STEPS && gradients.size() == count && first.size() == count && second.size() == count &&
                  (average.empty() || average.size() == count), "a step of ", count, " tensors");
  if (count == 0) return;
  gpu::AdamAll kernel;
  for (size_t i = 0; i < count; i++) {
    for (auto &list : {gradients, first, second, average})
      TORCH_CHECK(list.empty() || (lie_alike(parameters[i], list[i]) && list[i].numel() < int64_t{1} << 31),
                  "a step of ", parameters[i].sizes(), ", which lies otherwise than what goes with it");
    int at = kernel.tensors.add(parameters[i].numel());
    kernel.parameters[at] = out<float>(parameters[i]);
    kernel.gradients[at] = in<float>(gradients[i]);
    kernel.first[at] = out<float>(first[i]);
    kernel.second[at] = out<float>(second[i]);
    kernel.average[at] = average.empty() ? nullptr : out<float>(average[i]);
  }
  kernel.numbers = reinterpret_cast<const gpu::StepNumbers *>(in<float>(numbers));
  kernel.beta_1 = static_cast<float>(beta_1), kernel.beta_2 = static_cast<float>(beta_2);
  kernel.decay = static_cast<float>(decay), kernel.eps = static_cast<float>(eps);
  kernel.decoupled = decoupled;
  launch<float>(kernel, parameters[0].device(), kernel.tensors.blocks(), kernel.tensors.THREADS, 0);
}

}  // namespace operators

// ---- for Rust -----------------------------------------------------------------------------------------------------------

// What a step does with an average; `updates` is null where there is none.
struct AverageOfWeights {
  at::Tensor *updates;
  double decay;
  bool warmup;
};

// *numbers <- those of a step, which is counted
extern "C" char *lvdm_gpu_prepare_step(const at::Tensor *checked, const at::Tensor *rate, const at::Tensor *steps,
                                       AverageOfWeights average, double beta_1, double beta_2, double max_norm,
                                       at::Tensor **numbers) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    static const auto prepare = operator_named<&operators::prepare_step_>("lvdm::prepare_step_");
    auto none = at::empty({0}, rate->options());
    *numbers = new at::Tensor(prepare.call(checked ? *checked : none, *rate, *steps, average.updates ? *average.updates : none,
                                           beta_1, beta_2, max_norm, average.decay, average.warmup));
  });
}

// A step of `count` tensors; `average` may be null.
extern "C" char *lvdm_gpu_adam(at::Tensor *const *parameters, at::Tensor *const *gradients, at::Tensor *const *first,
                               at::Tensor *const *second, at::Tensor *const *average, int64_t count, const at::Tensor *numbers,
                               double beta_1, double beta_2, double decay, double eps, bool decoupled) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    static const auto step = operator_named<&operators::adam_all_>("lvdm::adam_all_");
    constexpr int64_t most = operators::MOST_STEPS;
    for (int64_t from = 0; from < count; from += most) {
      auto part = [&](at::Tensor *const *all) {
        std::vector<at::Tensor> tensors;
        for (int64_t i = from; all && i < std::min(count, from + most); i++) tensors.push_back(*all[i]);
        return tensors;
      };
      step.call(part(parameters), part(gradients), part(first), part(second), part(average), *numbers, beta_1, beta_2, decay,
                eps, decoupled);
    }
  });
}
