// Weights in the form in which products and convolutions take them, kept while the weights themselves do not change. At every
// call oneDNN would bring a convolution's kernel into an order of its own, which depends on the sizes of the input, and
// autocast would cast each weight to bfloat16.
#pragma once
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "../gpu/rounded_weights.h"
#include "../guarded.h"

namespace {

// A weight in the form in which a product or convolution takes it.
struct PackedWeight {
  std::vector<at::Tensor> weights;  // keep alive the memory that the key points to
  at::Tensor kernel;
  std::optional<at::Tensor> bias;
};

// What tells weights apart: where they lie, or, of one without memory, its storage.
const void *address(const at::Tensor &weight) {
  auto *data = weight.const_data_ptr();
  return data ? data : weight.storage().unsafeGetStorageImpl();
}

struct FixedWeights {
  int64_t depth = 0;
  std::map<std::tuple<const void *, at::ScalarType, int64_t, std::vector<int64_t>>, PackedWeight> packed;
  std::set<const void *> seen;
  size_t seen_bytes = 0, kept_bytes = 0;

  // Whether the host has room for a copy of so many bytes of this weight: a small network may be held twice, of a large
  // one an eighth of what was seen of it so far.
  bool has_room(const at::Tensor &weight, size_t bytes) {
    if (seen.insert(weight.const_data_ptr()).second) seen_bytes += weight.nbytes();
    if (kept_bytes + bytes > std::max(size_t{128} << 20, seen_bytes / 8)) return false;
    kept_bytes += bytes;
    return true;
  }

  void clear() {
    packed.clear();
    seen.clear();
    seen_bytes = kept_bytes = 0;
  }
};

thread_local FixedWeights fixed_weights;

using Pointwise = at::Tensor(const at::Tensor &, const at::Tensor &, const std::optional<at::Tensor> &, at::IntArrayRef,
                             at::IntArrayRef, at::IntArrayRef, int64_t, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

bool weights_are_fixed() { return fixed_weights.depth > 0 && !at::GradMode::is_enabled(); }

// The weights, one behind the other along their first axis, as autocast would cast them at every call: kept while weights are
// fixed, or one of those cast together.
at::Tensor cast_weights(const std::vector<at::Tensor> &weights) {
  auto joined = [&] { return weights.size() == 1 ? weights[0] : at::cat(weights); };
  auto device = weights[0].device().type();
  if (!at::autocast::is_autocast_enabled(device)) return joined();
  if (!weights_are_fixed()) return rounded_weights_joined(weights);
  auto kind = at::autocast::get_autocast_dtype(device);
  if (weights[0].scalar_type() != at::kFloat) return joined();
  std::vector<int64_t> others;
  for (size_t i = 1; i < weights.size(); i++) others.push_back(reinterpret_cast<int64_t>(address(weights[i])));
  std::tuple key{address(weights[0]), kind, int64_t{0}, others};
  if (auto found = fixed_weights.packed.find(key); found != fixed_weights.packed.end()) return found->second.kernel;
  auto weight = joined();
  bool is_on_host = device == at::kCPU && weights[0].const_data_ptr();
  if (is_on_host && !fixed_weights.has_room(weights[0], weight.numel() * c10::elementSize(kind))) return weight;
  auto cast = weight.to(kind);
  fixed_weights.packed[key] = {weights, cast, {}};
  return cast;
}

// An undefined tensor where the kernel is not to be kept, or there is no room.
at::Tensor fixed_conv(const at::Tensor &x, const at::Tensor &weight, const std::optional<at::Tensor> &bias,
                      int64_t stride, int64_t padding, bool in_float32, bool in_bfloat16) {
  bool mixed = at::autocast::is_autocast_enabled(at::kCPU);
  if (!weights_are_fixed() || !(mixed ? in_bfloat16 : in_float32)) return {};
  auto kind = mixed ? at::kBFloat16 : at::kFloat;
  std::vector<int64_t> strides{stride, stride}, paddings{padding, padding}, ones{1, 1};
  std::tuple key{address(weight), kind, stride, x.sizes().vec()};
  auto found = fixed_weights.packed.find(key);
  if (found == fixed_weights.packed.end()) {
    if (!fixed_weights.has_room(weight, weight.numel() * c10::elementSize(kind))) return {};
    auto kernel = at::mkldnn_reorder_conv2d_weight(weight.to(kind).to_mkldnn(), paddings, strides, ones, 1, x.sizes());
    auto offset = bias ? std::optional(bias->to(kind)) : std::nullopt;
    found = fixed_weights.packed.emplace(key, PackedWeight{{weight}, kernel, offset}).first;
  }
  auto &[held, kernel, offset] = found->second;
  static auto convolution = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("mkldnn::_convolution_pointwise", "")
                                .typed<Pointwise>();
  return convolution.call(x.to(kind), kernel, offset, paddings, strides, ones, 1, "none", c10::List<std::optional<at::Scalar>>(),
                          std::nullopt);
}

}  // namespace

// While `begin` calls outnumber the others, this thread's weights stay as they are: whether they do from now on.
extern "C" bool lvdm_fixed_weights(bool begin) {
  fixed_weights.depth += begin ? 1 : -1;
  if (fixed_weights.depth == 0) fixed_weights.clear();
  return fixed_weights.depth > 0;
}

extern "C" bool lvdm_weights_are_fixed() { return weights_are_fixed(); }

extern "C" char *lvdm_cast_weights(const at::Tensor *const *weights, int64_t count, at::Tensor **y) {
  return guarded([&] {
    std::vector<at::Tensor> all;
    for (int64_t i = 0; i < count; i++) all.push_back(*weights[i]);
    *y = new at::Tensor(cast_weights(all));
  });
}

// *y <- nullptr where there is nothing to gain, or the processor's kernels cannot be kept in this precision
extern "C" char *lvdm_fixed_conv(const at::Tensor *x, const at::Tensor *weight, const at::Tensor *bias, int64_t stride,
                                 int64_t padding, bool in_float32, bool in_bfloat16, at::Tensor **y) {
  return guarded([&] {
    auto offset = bias ? std::optional(*bias) : std::nullopt;
    auto result = fixed_conv(*x, *weight, offset, stride, padding, in_float32, in_bfloat16);
    *y = result.defined() ? new at::Tensor(std::move(result)) : nullptr;
  });
}
