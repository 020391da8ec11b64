// The operators of kernels.cpp with their ways back, and weights in bfloat16, for Rust.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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

// What a norm gives beside y: x + update, or x where there is none; or x, and what is beside it, in the kind of y.
enum Keeps : int64_t { NOTHING, STREAM, NARROW };

struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(AutogradContext *context, const at::Tensor &x, const Optional &beside, const Optional &update,
                               const Optional &added, const Optional &modulation, const at::Tensor &scale,
                               const at::Tensor &shift, int64_t groups, double eps, bool silu, bool half, int64_t keeps) {
    TORCH_CHECK(keeps != STREAM || !beside, "of two tensors side by side there is no stream");
    bool narrows = keeps == NARROW && (half || beside);
    auto [y, stats, stream, narrow] =
        CALL(group_norm, x, beside, update, added, modulation, scale, shift, groups, eps, silu, half, narrows);
    if (!stream.defined()) stream = x;
    context->set_materialize_grads(false);
    at::Tensor none;
    context->save_for_backward(
        {stream, beside.value_or(none), added.value_or(none), modulation.value_or(none), scale, shift, stats});
    auto &data = context->saved_data;
    data["groups"] = groups, data["silu"] = silu, data["kind"] = y.scalar_type();
    data["has_update"] = update.has_value(), data["narrows"] = narrows;
    if (keeps == NOTHING) return {y};
    return {y, narrows ? narrow : stream};
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &x = saved[0], &beside = saved[1], &added = saved[2], &modulation = saved[3], &scale = saved[4], &shift = saved[5],
               &stats = saved[6];
    variable_list result(12);
    auto &dx = result[0], &dbeside = result[1], &dupdate = result[2], &dadded = result[3], &dmodulation = result[4],
         &dscale = result[5], &dshift = result[6];
    auto &data = context->saved_data;
    auto kind = data["kind"].toScalarType();
    bool has_update = data["has_update"].toBool(), narrows = data["narrows"].toBool(), same = kind == x.scalar_type();
    auto as = [&](const at::Tensor &gradient, at::ScalarType kind) { return gradient.to(kind).contiguous(); };
    at::Tensor kept = gradients.size() > 1 ? gradients[1] : at::Tensor();
    if (!gradients[0].defined()) {  // only what was kept was used
      if (!kept.defined()) return result;
      dx = as(kept.narrow(3, 0, x.size(3)), x.scalar_type());
      if (beside.defined()) dbeside = as(kept.narrow(3, x.size(3), beside.size(3)), x.scalar_type());
      if (has_update) dupdate = as(kept, kind);
      return result;
    }
    auto kept_as = [&](at::ScalarType kind) { return kept.defined() ? std::optional(as(kept, kind)) : std::nullopt; };
    auto dstream = narrows ? std::nullopt : kept_as(x.scalar_type()), dnarrow = narrows ? kept_as(kind) : std::nullopt;
    at::Tensor dfactors;
    std::tie(dx, dbeside, dupdate, dfactors, dadded, dmodulation) =
        CALL(group_norm_backward, x, perhaps(beside), perhaps(added), perhaps(modulation), as(gradients[0], kind), dstream, dnarrow,
             scale, shift, stats, data["groups"].toInt(), data["silu"].toBool(), has_update && !same);
    if (has_update && same) dupdate = dx;
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

struct Mixed : torch::autograd::Function<Mixed> {
  static at::Tensor forward(AutogradContext *context, const at::Tensor &a, const at::Tensor &b) {
    context->saved_data["kind"] = a.scalar_type();
    return CALL(mixed_sum, a, b);
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto da = gradients[0].to(context->saved_data["kind"].toScalarType());
    return {da, da.scalar_type() == at::kBFloat16 ? da : gradients[0].to(at::kBFloat16)};
  }
};

// x [R, D] of rows, as gate, scale and shift, of which each serves R / O
struct RowNorm : torch::autograd::Function<RowNorm> {
  static variable_list forward(AutogradContext *context, const at::Tensor &x, const Optional &update, const Optional &gate,
                               const at::Tensor &scale, const at::Tensor &shift, bool plus_one, double eps, bool half) {
    auto [y, stats, stream] = CALL(layer_norm, x, update, gate, scale, shift, plus_one, eps, half);
    if (!stream.defined()) stream = x;
    context->set_materialize_grads(false);
    at::Tensor none;
    context->save_for_backward({stream, gate ? update.value_or(none) : none, gate.value_or(none), scale, shift, stats});
    auto &data = context->saved_data;
    data["plus_one"] = plus_one, data["kind"] = y.scalar_type();
    data["had_update"] = update.has_value(), data["was_narrow"] = stream.scalar_type() != x.scalar_type();
    return {y, stream};
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto &x = saved[0], &update = saved[1], &gate = saved[2], &scale = saved[3], &shift = saved[4], &stats = saved[5];
    auto &data = context->saved_data;
    auto kind = data["kind"].toScalarType();
    auto as = [&](const at::Tensor &gradient, at::ScalarType kind) { return gradient.to(kind).contiguous(); };
    bool had_update = data["had_update"].toBool();
    if (!gradients[0].defined() && !gradients[1].defined()) return variable_list(8);
    auto dy = gradients[0].defined() ? as(gradients[0], kind) : at::zeros_like(x, kind);
    auto dstream = gradients[1].defined() ? std::optional(as(gradients[1], x.scalar_type())) : std::nullopt;
    auto [dx, dupdate, dfactors] = CALL(layer_norm_backward, x, perhaps(update), perhaps(gate), dy, dstream, scale, shift, stats,
                                        data["plus_one"].toBool(), had_update, data["was_narrow"].toBool());
    auto sums = dfactors.size(0) == 1 ? dfactors[0] : CALL(column_sums, dfactors, 0);  // [O, 3, D]
    auto of_gate = gate.defined() ? sums.select(1, 2) : at::Tensor();
    if (had_update && !dupdate.defined()) dupdate = dx;
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

at::Tensor room_for(const Joined &weights, at::ScalarType kind) {
  if (weights.size() == 1) return at::empty_like(weights[0], kind);
  auto sizes = weights[0].sizes().vec();
  sizes[0] = 0;
  for (auto &weight : weights) sizes[0] += weight.size(0);
  return at::empty(sizes, weights[0].options().dtype(kind));
}

// The parts of a joined tensor, each as its weight lies in memory, put behind `parts`.
void take_apart(const at::Tensor &joined, const Joined &weights, std::vector<at::Tensor> &parts) {
  if (weights.size() == 1) return parts.push_back(joined);
  int64_t first = 0;
  for (auto &weight : weights) {
    parts.push_back(joined.narrow(0, first, weight.size(0)));
    first += weight.size(0);
  }
}

// Weights in bfloat16, all cast at once; and their gradients in float32. `counts` says how many are joined each time.
struct CastWeights : torch::autograd::Function<CastWeights> {
  // The weights of each joined tensor.
  static std::vector<Joined> joined(at::TensorList weights, const std::vector<int64_t> &counts) {
    std::vector<Joined> all;
    size_t first = 0;
    for (size_t count : counts) {
      all.push_back(weights.slice(first, count).vec());
      first += count;
    }
    return all;
  }

  static variable_list forward(AutogradContext *context, at::TensorList weights, std::vector<int64_t> counts) {
    variable_list casts;
    std::vector<at::Tensor> parts;
    for (auto &each : joined(weights, counts)) {
      casts.push_back(room_for(each, at::kBFloat16));
      take_apart(casts.back(), each, parts);
    }
    cast_all(weights.vec(), parts);
    context->set_materialize_grads(false);  // most weights of a block that is computed again have none here
    context->save_for_backward(weights.vec());
    context->saved_data["counts"] = counts;
    return casts;
  }

  static variable_list backward(AutogradContext *context, variable_list gradients) {
    auto weights = context->get_saved_variables();
    auto all = joined(weights, context->saved_data["counts"].toIntVector());
    variable_list result;
    std::vector<at::Tensor> from, to;
    for (size_t i = 0; i < gradients.size(); i++) {
      if (!gradients[i].defined()) {
        result.resize(result.size() + all[i].size());
        continue;
      }
      auto like = room_for(all[i], at::kBFloat16);
      bool same = gradients[i].strides() == like.strides();
      take_apart(same ? gradients[i] : like.copy_(gradients[i]), all[i], from);
      for (auto &weight : all[i]) to.push_back(at::empty_like(weight)), result.push_back(to.back());
    }
    cast_all(from, to);
    result.emplace_back();
    return result;
  }
};

}  // namespace

thread_local RoundedWeights *rounded_weights = nullptr;

// Casts weights from `first` up to `last`, in a node of the graph of their own.
void RoundedWeights::cast(size_t first, size_t last) {
  at::AutoGradMode with_gradients(true);
  std::vector<at::Tensor> all;
  std::vector<int64_t> counts;
  for (size_t i = first; i < last; i++) {
    all.insert(all.end(), weights[i].begin(), weights[i].end());
    counts.push_back(weights[i].size());
  }
  auto cast = CastWeights::apply(at::TensorList(all), counts);
  std::move(cast.begin(), cast.end(), casts.begin() + first);
}

void RoundedWeights::begin() {
  forget();
  groups.clear();
  constexpr size_t most = operators::MOST_CASTS;
  for (size_t first = 0, last = 0; first < weights.size(); first = last) {
    for (size_t count = 0; last < weights.size() && (count += weights[last].size()) <= most;) last++;
    if (last == first) last++;
    for (size_t i = first; i < last; i++) groups.emplace_back(first, last);
  }
}

void RoundedWeights::forget() { std::fill(casts.begin(), casts.end(), at::Tensor()); }

size_t RoundedWeights::place(const Joined &joined) {
  std::vector<const c10::TensorImpl *> key;
  for (auto &weight : joined) key.push_back(weight.unsafeGetTensorImpl());
  auto [found, is_new] = places.emplace(std::move(key), weights.size());
  if (is_new) {
    weights.push_back(joined);
    casts.emplace_back();
  }
  return found->second;
}

// When the first of a launch is asked for, and not before: LibTorch's way back runs nodes in the reverse order in which they were
// made, so that gradients of later weights are in float32, and on their way to other GPUs, while it is at earlier ones.
const at::Tensor &RoundedWeights::of(const Joined &joined) {
  if (part) part->place(joined);
  size_t at = place(joined);
  if (!casts[at].defined()) {
    auto [first, last] = at < groups.size() ? groups[at] : std::pair{at, at + 1};
    cast(first, last);
  }
  return casts[at];
}

at::Tensor rounded_weights_joined(const Joined &weights) {
  auto is_trained = [](const at::Tensor &weight) {
    return weight.is_leaf() && weight.requires_grad() && weight.scalar_type() == at::kFloat;
  };
  bool in_pass = rounded_weights && (at::GradMode::is_enabled() || rounded_weights->part);
  if (in_pass && std::all_of(weights.begin(), weights.end(), is_trained)) return rounded_weights->of(weights);
  return weights.size() == 1 ? weights[0] : at::cat(weights);
}

// ---- for Rust -----------------------------------------------------------------------------------------------------------

// *y, and *kept where something is
extern "C" char *lvdm_gpu_norm(const at::Tensor *x, const at::Tensor *beside, const at::Tensor *update, const at::Tensor *added,
                               const at::Tensor *modulation, const at::Tensor *scale, const at::Tensor *shift, int64_t groups,
                               double eps, bool silu, bool half, int64_t keeps, at::Tensor **y, at::Tensor **kept) {
  return guarded([&] {
    auto given = [](const at::Tensor *t) { return t ? std::optional(t->contiguous()) : std::nullopt; };
    auto found = Norm::apply(x->contiguous(), given(beside), given(update), given(added), given(modulation), scale->contiguous(),
                             shift->contiguous(), groups, eps, silu, half, keeps);
    *y = new at::Tensor(found[0]);
    *kept = found.size() > 1 ? new at::Tensor(found[1]) : nullptr;
  });
}

// *y <- a + b
extern "C" char *lvdm_gpu_mixed_sum(const at::Tensor *a, const at::Tensor *b, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(Mixed::apply(*a, *b)); });
}

// *y, and *stream, which is x where there is no update, of x [R, D]; gate, scale and shift [O, D]
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
    *stream = new at::Tensor(found[1]);
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
