// The operators of kernels.cpp with their ways back, and weights in bfloat16, for Rust.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <map>
#include <utility>
#include <vector>

#include "../guarded.h"
#include "operators.h"
#include "rounded_weights.h"

namespace {

#define CALL(name, ...)                                                           \
  [&] {                                                                           \
    static const auto handle = operator_named<&operators::name>("lvdm::" #name);  \
    at::AutoDispatchBelowADInplaceOrView below;                                   \
    return handle.call(__VA_ARGS__);                                              \
  }()

// ---- their ways back ----------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Optional perhaps(const at::Tensor &x) { return x.defined() ? std::optional(x) : std::nullopt; }

struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(AutogradContext *context, const at::Tensor &x, const Optional &residual, const Optional &added,
                               const Optional &modulation, const at::Tensor &scale, const at::Tensor &shift, int64_t groups,
                               double eps, bool silu) {
    auto [y, stats, stream] = CALL(group_norm, x, residual, added, modulation, scale, shift, groups, eps, silu);
    at::Tensor none;
    context->save_for_backward(
        {stream.defined() ? stream : x, added.value_or(none), modulation.value_or(none), scale, shift, stats});
    context->saved_data["groups"] = groups;
    context->saved_data["silu"] = silu;
    if (!stream.defined()) return {y};
    return {y, stream};
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &x = saved[0], &added = saved[1], &modulation = saved[2], &scale = saved[3], &shift = saved[4], &stats = saved[5];
    variable_list result(9);
    auto &dx = result[0], &dresidual = result[1], &dadded = result[2], &dmodulation = result[3], &dscale = result[4],
         &dshift = result[5];
    bool has_stream = gradients.size() > 1;
    if (!gradients[0].defined()) {  // only the stream was used
      dx = dresidual = gradients[1];
      return result;
    }
    auto like = [&](const at::Tensor &gradient) { return gradient.to(x.scalar_type()).contiguous(); };
    auto dstream = has_stream && gradients[1].defined() ? std::optional(like(gradients[1])) : std::nullopt;
    auto &data = context->saved_data;
    at::Tensor dfactors;
    std::tie(dx, dfactors, dadded, dmodulation) =
        CALL(group_norm_backward, x, perhaps(added), perhaps(modulation), like(gradients[0]), dstream, scale, shift, stats,
             data["groups"].toInt(), data["silu"].toBool());
    if (has_stream) dresidual = dx;
    if (added.defined() && added.size(0) < dadded.size(0)) dadded = dadded.view({added.size(0), -1, added.size(1)}).sum(1);
    if (scale.size(0) == 1) {
      auto sums = dfactors.size(0) == 1 ? dfactors[0] : CALL(column_sums, dfactors, 0);
      dscale = sums.narrow(0, 0, 1), dshift = sums.narrow(0, 1, 1);
    } else {
      dscale = dfactors.select(1, 0), dshift = dfactors.select(1, 1);
    }
    return result;
  }
};

// x [R, D] of rows, as gate, scale and shift, of which each serves R / O
struct RowNorm : torch::autograd::Function<RowNorm> {
  static variable_list forward(AutogradContext *context, const at::Tensor &x, const Optional &update, const Optional &gate,
                               const at::Tensor &scale, const at::Tensor &shift, bool plus_one, double eps, bool half) {
    auto [y, stats, stream] = CALL(layer_norm, x, update, gate, scale, shift, plus_one, eps, half);
    at::Tensor none;
    context->save_for_backward({stream.defined() ? stream : x, gate ? update.value_or(none) : none, gate.value_or(none), scale,
                                shift, stats});
    context->saved_data["plus_one"] = plus_one;
    context->saved_data["kind"] = y.scalar_type();
    if (!stream.defined()) return {y};
    return {y, stream};
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &x = saved[0], &update = saved[1], &gate = saved[2], &scale = saved[3], &shift = saved[4], &stats = saved[5];
    bool has_stream = gradients.size() > 1;
    auto kind = context->saved_data["kind"].toScalarType();
    auto as = [&](const at::Tensor &gradient, at::ScalarType kind) { return gradient.to(kind).contiguous(); };
    auto dy = gradients[0].defined() ? as(gradients[0], kind) : at::zeros_like(x, kind);
    auto dstream = has_stream && gradients[1].defined() ? std::optional(as(gradients[1], x.scalar_type())) : std::nullopt;
    auto [dx, dupdate, dfactors] = CALL(layer_norm_backward, x, perhaps(update), perhaps(gate), dy, dstream, scale, shift, stats,
                                        context->saved_data["plus_one"].toBool());
    auto sums = dfactors.size(0) == 1 ? dfactors[0] : CALL(column_sums, dfactors, 0);  // [O, 3, D]
    auto of_gate = gate.defined() ? sums.select(1, 2) : at::Tensor();
    if (!has_stream) dupdate = at::Tensor();
    else if (!dupdate.defined()) dupdate = dx;
    return {dx, dupdate, of_gate, sums.select(1, 0), sums.select(1, 1), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct GatedGelu : torch::autograd::Function<GatedGelu> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x) {
    context->save_for_backward({x});
    return CALL(geglu, x);
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto x = context->get_saved_variables()[0];
    return {CALL(geglu_backward, x, gradients[0].to(x.scalar_type()).contiguous())};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &qkv, const Optional &keys, const Optional &values,
                            int64_t heads, double alpha, double beta, bool transposed) {
    at::Tensor none;
    context->save_for_backward({qkv, keys.value_or(none), values.value_or(none)});
    auto &data = context->saved_data;
    data["heads"] = heads, data["alpha"] = alpha, data["beta"] = beta, data["transposed"] = transposed;
    return CALL(frame_attention, qkv, keys, values, heads, alpha, beta, transposed);
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &qkv = saved[0], &keys = saved[1];
    auto &data = context->saved_data;
    auto dout = gradients[0].to(qkv.scalar_type()).contiguous();
    auto [dqkv, dtables] = CALL(frame_attention_backward, qkv, perhaps(keys), perhaps(saved[2]), dout, data["heads"].toInt(),
                                data["alpha"].toDouble(), data["beta"].toDouble(), data["transposed"].toBool());
    variable_list result(7);
    result[0] = dqkv;
    if (keys.defined()) {
      auto sums = CALL(column_sums, dtables, (keys.size(0) - dtables.size(2)) / 2);
      result[1] = sums[0], result[2] = sums[1];
    }
    return result;
  }
};

struct Edges : torch::autograd::Function<Edges> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &x, std::vector<int64_t> pads) {
    context->saved_data["pads"] = pads;
    return CALL(repeat_edges, x.permute({0, 2, 3, 4, 1}).contiguous(), pads).permute({0, 4, 1, 2, 3});
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto dy = gradients[0].permute({0, 2, 3, 4, 1}).contiguous();
    auto dx = CALL(repeat_edges_backward, dy, context->saved_data["pads"].toIntVector());
    return {dx.permute({0, 4, 1, 2, 3}), at::Tensor()};
  }
};

// ---- weights in half precision ------------------------------------------------------------------------------------------

void cast_all(const std::vector<at::Tensor> &from, const std::vector<at::Tensor> &to) {
  constexpr size_t most = operators::MOST_CASTS;
  for (size_t first = 0; first < from.size(); first += most) {
    size_t count = std::min(most, from.size() - first);
    CALL(cast_all_, at::TensorList(from).slice(first, count), at::TensorList(to).slice(first, count));
  }
}

// Weights in bfloat16, all cast at once; and their gradients in float32.
struct CastWeights : torch::autograd::Function<CastWeights> {
  static variable_list forward(AutogradContext *context, at::TensorList weights) {
    variable_list casts;
    for (auto &weight : weights) casts.push_back(at::empty_like(weight, at::kBFloat16));
    cast_all(weights.vec(), casts);
    context->save_for_backward(weights.vec());
    return casts;
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto weights = context->get_saved_variables();
    variable_list result(gradients.size());
    std::vector<at::Tensor> from, to;
    for (size_t i = 0; i < gradients.size(); i++) {
      if (!gradients[i].defined()) continue;
      result[i] = at::empty_like(weights[i]);
      bool same = gradients[i].strides() == result[i].strides();
      from.push_back(same ? gradients[i] : at::empty_like(weights[i], at::kBFloat16).copy_(gradients[i]));
      to.push_back(result[i]);
    }
    cast_all(from, to);
    return result;
  }
};

// The weights that a network's passes take in bfloat16, in the order in which they first did.
struct RoundedWeights {
  std::vector<at::Tensor> weights, casts;  // a cast is undefined where it is not held
  std::map<const c10::TensorImpl *, size_t> places;

  // Casts weights from `first` up to `last`, in a node of the graph of their own.
  void cast(size_t first, size_t last) {
    auto cast = CastWeights::apply(at::TensorList(weights).slice(first, last - first));
    std::move(cast.begin(), cast.end(), casts.begin() + first);
  }

  // A pass begins: what is known is cast, in as few launches as there are nodes, so that gradients come as the way back goes.
  void begin() {
    at::AutoGradMode with_gradients(true);
    constexpr size_t most = operators::MOST_CASTS;
    for (size_t first = 0; first < weights.size(); first += most) cast(first, std::min(first + most, weights.size()));
  }

  // Its way back begins, or it is over: what the graph does not need is given back.
  void forget() { std::fill(casts.begin(), casts.end(), at::Tensor()); }

  const at::Tensor &of(const at::Tensor &weight) {
    auto [found, is_new] = places.emplace(weight.unsafeGetTensorImpl(), weights.size());
    size_t place = found->second;
    if (is_new) {
      weights.push_back(weight);
      casts.emplace_back();
    }
    if (!casts[place].defined()) cast(place, place + 1);
    return casts[place];
  }
};
thread_local RoundedWeights *rounded_weights = nullptr;

}  // namespace

at::Tensor rounded_weight(const at::Tensor &weight) {
  bool is_trained = weight.is_leaf() && weight.requires_grad() && at::GradMode::is_enabled();
  if (!rounded_weights || !is_trained || weight.scalar_type() != at::kFloat) return weight;
  return rounded_weights->of(weight);
}

NoRoundedWeights::NoRoundedWeights() : before(std::exchange(rounded_weights, nullptr)) {}
NoRoundedWeights::~NoRoundedWeights() { rounded_weights = static_cast<RoundedWeights *>(before); }

// ---- for Rust -----------------------------------------------------------------------------------------------------------

// *y, and *stream where there is a residual
extern "C" char *lvdm_gpu_norm(const at::Tensor *x, const at::Tensor *residual, const at::Tensor *added,
                               const at::Tensor *modulation, const at::Tensor *scale, const at::Tensor *shift, int64_t groups,
                               double eps, bool silu, at::Tensor **y, at::Tensor **stream) {
  return guarded([&] {
    auto given = [](const at::Tensor *t) { return t ? std::optional(t->contiguous()) : std::nullopt; };
    auto found = Norm::apply(x->contiguous(), given(residual), given(added), given(modulation), scale->contiguous(),
                             shift->contiguous(), groups, eps, silu);
    *y = new at::Tensor(found[0]);
    *stream = found.size() > 1 ? new at::Tensor(found[1]) : nullptr;
  });
}

// *y, and *stream where there is an update, of x [R, D]; gate, scale and shift [O, D]
extern "C" char *lvdm_gpu_layer_norm(const at::Tensor *x, const at::Tensor *update, const at::Tensor *gate,
                                     const at::Tensor *scale, const at::Tensor *shift, bool plus_one, double eps, bool half,
                                     at::Tensor **y, at::Tensor **stream) {
  return guarded([&] {
    auto whole = [](const at::Tensor *t) { return t ? std::optional(t->contiguous()) : std::nullopt; };
    // parts of one wider matrix may stay where they are
    bool alike = scale->stride(-1) == 1 && shift->strides() == scale->strides() && (!gate || gate->strides() == scale->strides());
    auto factor = [&](const at::Tensor *t) { return alike ? *t : t->contiguous(); };
    auto found = RowNorm::apply(x->contiguous(), whole(update), gate ? std::optional(factor(gate)) : std::nullopt, factor(scale),
                                factor(shift), plus_one, eps, half);
    *y = new at::Tensor(found[0]);
    *stream = found.size() > 1 ? new at::Tensor(found[1]) : nullptr;
  });
}

// *y <- the first half of x's last axis times GELU of the second
extern "C" char *lvdm_gpu_geglu(const at::Tensor *x, at::Tensor **y) {
  return guarded([&] {
    auto shape = x->sizes().vec();
    auto rows = x->contiguous().view({-1, shape.back()});
    shape.back() /= 2;
    *y = new at::Tensor(GatedGelu::apply(rows).view(shape));
  });
}

// `keys` and `values` may be null
extern "C" char *lvdm_gpu_frame_attention(const at::Tensor *qkv, const at::Tensor *keys, const at::Tensor *values, int64_t heads,
                                          double alpha, double beta, bool transposed, at::Tensor **y) {
  return guarded([&] {
    auto given = [](const at::Tensor *t) { return t ? std::optional(t->contiguous()) : std::nullopt; };
    *y = new at::Tensor(Attention::apply(qkv->contiguous(), given(keys), given(values), heads, alpha, beta, transposed));
  });
}

extern "C" char *lvdm_gpu_repeat_edges(const at::Tensor *x, const int64_t *pads, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(Edges::apply(*x, std::vector<int64_t>(pads, pads + 6))); });
}

extern "C" RoundedWeights *lvdm_rounded_weights() { return new RoundedWeights; }
extern "C" void lvdm_rounded_weights_free(RoundedWeights *weights) { delete weights; }

// Casts the weights, of which this thread's products then take part in the graph; *before is what they were of.
extern "C" char *lvdm_rounded_weights_begin(RoundedWeights *weights, RoundedWeights **before) {
  return guarded([&] {
    weights->begin();
    *before = std::exchange(rounded_weights, weights);
  });
}
extern "C" void lvdm_rounded_weights_end(RoundedWeights *before) {
  if (rounded_weights) rounded_weights->forget();
  rounded_weights = before;
}
// The way back of this thread's pass, if it is in one, begins.
extern "C" void lvdm_rounded_weights_go_back() {
  if (rounded_weights) rounded_weights->forget();
}
