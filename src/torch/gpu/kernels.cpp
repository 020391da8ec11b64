// The kernels of this folder as operators of LibTorch; those over all weights are in optimizer.cpp. An operator does the same for
// every device: it makes the outputs and launches a kernel, on the CPU as a loop over its blocks. A device that hands operators to the CPU, as
// a simulated GPU does, needs nothing more; for a real one `src/torch/gpu_kernels.rs` compiles the kernels first.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "adam.h"
#include "cast_all.h"
#include "column_sums.h"
#include "frame_attention.h"
#include "geglu.h"
#include "group_norm.h"
#include "launch.h"
#include "layer_norm.h"
#include "mixed_sum.h"
#include "operators.h"
#include "repeat_edges.h"

namespace {

using namespace operators;

// ---- all kernels -------------------------------------------------------------------------------------------------------

#define OF_EACH_KIND(KERNEL) \
  KERNEL(float, 1), KERNEL(float, 4), KERNEL(gpu::bfloat16, 1), KERNEL(gpu::bfloat16, 8), KERNEL(double, 1)
#define COMPILED(...) Compiled{"gpu::run<gpu::" #__VA_ARGS__ ">", &function_of<gpu::__VA_ARGS__>}
#define OF_BOTH(NAME) COMPILED(NAME<float, gpu::bfloat16, 1>), COMPILED(NAME<float, gpu::bfloat16, 8>)
#define NORM(T, N) COMPILED(GroupNorm<T, T, N>)
#define NORM_BACK(T, N) COMPILED(GroupNormBack<T, T, N>)
#define EDGES(T, N) COMPILED(RepeatEdges<T, N>)
#define EDGES_BACK(T, N) COMPILED(RepeatEdgesBack<T, N>)
#define LAYER_NORM(T, N) COMPILED(LayerNorm<T, T, N>)
#define LAYER_NORM_BACK(T, N) COMPILED(LayerNormBack<T, T, N>)
#define ATTENTION(T, N) COMPILED(FrameAttention<T, N>)
#define ATTENTION_BACK(T, N) COMPILED(FrameAttentionBack<T, N>)
#define GEGLU(T, N) COMPILED(Geglu<T, N>)
#define GEGLU_BACK(T, N) COMPILED(GegluBack<T, N>)

Compiled compiled[] = {
    OF_EACH_KIND(NORM),
    OF_BOTH(GroupNorm),
    OF_EACH_KIND(NORM_BACK),
    OF_BOTH(GroupNormBack),
    OF_EACH_KIND(LAYER_NORM),
    OF_BOTH(LayerNorm),
    OF_EACH_KIND(LAYER_NORM_BACK),
    OF_BOTH(LayerNormBack),
    OF_EACH_KIND(GEGLU),
    OF_EACH_KIND(GEGLU_BACK),
    OF_EACH_KIND(EDGES),
    OF_EACH_KIND(EDGES_BACK),
    OF_EACH_KIND(ATTENTION),
    OF_EACH_KIND(ATTENTION_BACK),
    COMPILED(MixedSum<float, gpu::bfloat16, 1>),
    COMPILED(MixedSum<float, gpu::bfloat16, 8>),
    COMPILED(MixedSum<gpu::bfloat16, float, 1>),
    COMPILED(MixedSum<gpu::bfloat16, float, 8>),
    COMPILED(CastAll<float, gpu::bfloat16>),
    COMPILED(CastAll<gpu::bfloat16, float>),
    COMPILED(PrepareStep),
    COMPILED(AdamAll),
    COMPILED(ColumnSums<float>),
    COMPILED(ColumnSums<double>),
};

}  // namespace

// ---- the operators ------------------------------------------------------------------------------------------------------

namespace operators {

// `pack` values of the kind of y are moved as one, where `aligned`; `pack` is 1 where that would not meet the groups.
gpu::NormShape norm_shape(const at::Tensor &x, const at::Tensor &y, const Optional &added, const at::Tensor &scale, int64_t groups,
                          bool silu, bool aligned, int64_t *pack) {
  constexpr int64_t threads = gpu::MOST_THREADS;
  gpu::NormShape s{x.size(0), x.size(1), x.size(2), y.size(3), x.size(3), scale.size(0)};
  TORCH_CHECK(s.channels % groups == 0 && (s.rows == 1 || (s.rows == s.outer && s.inner == 1)) && s.steps > 0,
              "group norm of ", x.sizes(), " in ", groups, " groups by ", scale.sizes());
  TORCH_CHECK(!has(added) || s.outer % added->size(0) == 0, "group norm of ", x.sizes(), " with ", added->sizes());
  s.group = static_cast<int>(s.channels / groups);
  s.silu = silu;
  s.of_added = has(added) ? s.outer / added->size(0) : 1;
  // whole groups in whole packs, of 32 bytes or more
  int64_t unit = std::lcm<int64_t>(s.group, in_a_pack(y));
  *pack = aligned && s.channels % unit == 0 && s.first % in_a_pack(y) == 0 ? in_a_pack(y) : 1;
  if (*pack == 1) unit = s.group;
  int64_t least = 32 / y.element_size(), chunk = unit;
  while (chunk < least && chunk < s.channels) {
    chunk += unit;
    while (s.channels % chunk != 0) chunk += unit;
  }
  s.chunk = static_cast<int>(chunk);
  int64_t lanes = chunk / *pack;
  TORCH_CHECK(lanes <= threads, "groups of ", s.group, " channels are more than a block takes");
  s.slots = 1;
  while (s.slots * 2 * lanes <= threads && s.slots * 8 <= s.steps) s.slots *= 2;
  // as many samples as have room for three sums of each channel and two of each group
  int64_t numbers = 3 * s.slots * s.chunk + 2 * (s.chunk / s.group), room = SHARED_BYTES / scale.element_size() / numbers;
  s.samples = static_cast<int>(std::clamp<int64_t>(std::min(s.count(), threads / (s.slots * lanes)), 1, std::max<int64_t>(1, room)));
  if (s.rows > 1) s.samples = 1;
  // where few blocks would have very many steps each, there are more of fewer
  constexpr int64_t many = 16 << 10, few = 1 << 10, enough_blocks = 1 << 10;
  s.pieces = 1;
  if (s.steps > many) s.pieces = std::clamp<int64_t>(enough_blocks / s.blocks(), 1, s.steps / few);
  return s;
}

// Where a sample's steps are in pieces, a first launch leaves `rows` sums of each.
template <class A, class Kernel>
void launch_norm(Kernel &kernel, const at::Tensor &x, const at::TensorOptions &options, int64_t pack, int64_t rows) {
  const gpu::NormShape &s = kernel.shape;
  auto run = [&] { launch<A>(kernel, x.device(), s.blocks(), s.threads(static_cast<int>(pack)), kernel.shared(s)); };
  if (s.pieces == 1) return run();
  auto sums = at::empty({s.count(), s.pieces, rows, s.channels}, options);
  kernel.left = out<A>(sums);
  run();
  kernel.left = nullptr, kernel.sums_of_pieces = in<A>(sums);
  run();
}

// body(S{}, T{}) for a stream's kind, and for that of y, which is what is added too: the same, or bfloat16 beside float32
template <class Body>
void by_kinds(at::ScalarType stream, const at::Tensor &y, Body body) {
  if (stream == at::kFloat && y.scalar_type() == at::kBFloat16) return body(float{}, bfloat16{});
  TORCH_CHECK(stream == y.scalar_type(), "a stream of ", stream, " beside ", y.scalar_type());
  by_kind(y, [&](auto kind) { body(kind, kind); });
}

// y, in bfloat16 where it is to be `half`, as the update then is; the statistics; x + update; x and what is beside it, in one
// piece and y's kind, where `narrows`
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm(const at::Tensor &x, const Optional &beside,
                                                                      const Optional &update, const Optional &added,
                                                                      const Optional &modulation, const at::Tensor &scale,
                                                                      const at::Tensor &shift, int64_t groups, double eps,
                                                                      bool silu, bool half, bool narrows) {
  int64_t pack;
  auto sizes = x.sizes().vec();
  if (has(beside)) {
    TORCH_CHECK(beside->sizes().slice(0, 3) == x.sizes().slice(0, 3) && beside->scalar_type() == x.scalar_type() && !has(update),
                "group norm of ", x.sizes(), " beside ", beside->sizes());
    sizes[3] += beside->size(3);
  }
  auto y = at::empty(sizes, x.options().dtype(half ? at::kBFloat16 : x.scalar_type()));
  auto s = norm_shape(x, y, added, scale, groups, silu, is_aligned({x, beside, update}), &pack);
  auto stream = has(update) ? at::empty_like(x) : at::Tensor(), narrow = narrows ? at::empty_like(y) : at::Tensor();
  auto stats = at::empty({s.count(), 2, groups}, scale.options());
  by_kinds(x.scalar_type(), y, [&](auto of_stream, auto kind) {
    using S = decltype(of_stream);
    using T = decltype(kind);
    using A = gpu::computed<S>;
    together<T>(pack > 1, [&](auto n) {
      gpu::GroupNorm<S, T, n> kernel{s, static_cast<A>(eps), in<S>(x), in<S>(beside), in<T>(update), in<A>(added),
                                     {in<A>(scale), in<A>(shift), in<A>(modulation)}, out<T>(y),
                                     has(update) ? out<S>(stream) : nullptr, narrows ? out<T>(narrow) : nullptr, out<A>(stats),
                                     nullptr, nullptr};
      launch_norm<A>(kernel, x, scale.options(), n, 2);
    });
  });
  return {y, stats, stream, narrow};
}

// Over the first axis. Along the one before the last, so many rows of zeros stand before and behind what is there.
at::Tensor column_sums(const at::Tensor &x, int64_t zeros) {
  auto sizes = x.sizes().vec();
  TORCH_CHECK(sizes.size() >= 2 && (zeros == 0 || sizes.size() > 2), "column sums of ", x.sizes());
  int64_t each = sizes.size() > 2 ? sizes[sizes.size() - 2] * sizes.back() : sizes.back();
  if (zeros > 0) sizes[sizes.size() - 2] += 2 * zeros;
  auto y = at::empty(at::IntArrayRef(sizes).slice(1), x.options());
  by_kind(x, [&](auto kind) {
    if constexpr (!std::is_same_v<decltype(kind), bfloat16>) {
      using A = decltype(kind);
      gpu::ColumnSums<A> kernel{x.size(0), x.numel() / x.size(0), each, zeros * x.size(-1), in<A>(x), out<A>(y)};
      launch<A>(kernel, x.device(), kernel.blocks(), kernel.COLUMNS * kernel.SLOTS, kernel.shared());
    }
  });
  return y;
}

// dx; that of what is beside x; dx as dy's kind, where `narrows`; [pieces, 2, C], of which the sum is the gradient of scale and
// shift; [O, C], of which the sums over those that share a row are that of `added`; that of the modulation
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor &x, const Optional &beside, const Optional &added, const Optional &modulation, const at::Tensor &dy,
    const Optional &dstream, const Optional &dnarrow, const at::Tensor &scale, const at::Tensor &shift, const at::Tensor &stats,
    int64_t groups, bool silu, bool narrows) {
  int64_t pack;
  auto s = norm_shape(x, dy, added, scale, groups, silu, is_aligned({x, beside, dy, dstream, dnarrow}), &pack);
  auto dx = at::empty_like(x), dupdate = narrows ? at::empty_like(dy) : at::Tensor();
  auto dbeside = has(beside) ? at::empty_like(*beside) : at::Tensor();
  auto dadded = has(added) ? at::empty({s.outer, s.channels}, scale.options()) : at::Tensor();
  auto dmodulation = has(modulation) ? at::empty_like(*modulation) : at::Tensor();
  auto dfactors = at::empty({s.batches(), 2, s.channels}, scale.options());
  by_kinds(x.scalar_type(), dy, [&](auto of_stream, auto kind) {
    using S = decltype(of_stream);
    using T = decltype(kind);
    using A = gpu::computed<S>;
    together<T>(pack > 1, [&](auto n) {
      gpu::GroupNormBack<S, T, n> kernel{s, in<S>(x), in<S>(beside), in<S>(dstream), in<T>(dnarrow), in<T>(dy), in<A>(added),
                                         {in<A>(scale), in<A>(shift), in<A>(modulation)}, in<A>(stats), out<S>(dx),
                                         has(beside) ? out<S>(dbeside) : nullptr, narrows ? out<T>(dupdate) : nullptr,
                                         out<A>(dfactors), has(added) ? out<A>(dadded) : nullptr,
                                         has(modulation) ? out<A>(dmodulation) : nullptr, nullptr, nullptr};
      launch_norm<A>(kernel, x, scale.options(), n, kernel.sums());
    });
  });
  return {dx, dbeside, dupdate, dfactors, dadded, dmodulation};
}

// a + b, in bfloat16 of a float32 a, and the other way round; b is bfloat16
at::Tensor mixed_sum(const at::Tensor &a, const at::Tensor &b) {
  TORCH_CHECK(a.sizes() == b.sizes() && a.strides() == b.strides() && a.is_non_overlapping_and_dense(), "a sum of ", a.sizes(),
              " and ", b.sizes(), " of strides ", a.strides(), " and ", b.strides());
  bool half = a.scalar_type() == at::kFloat;
  auto y = at::empty_like(a, half ? at::kBFloat16 : at::kFloat);
  together<bfloat16>(a.numel() % in_a_pack(b) == 0 && is_aligned({a, b}), [&](auto n) {
    auto run = [&](auto from, auto to) {
      using From = decltype(from);
      using To = decltype(to);
      gpu::MixedSum<From, To, n> kernel{a.numel(), in<From>(a), in<bfloat16>(b), out<To>(y)};
      launch<float>(kernel, a.device(), kernel.blocks(), kernel.THREADS, 0);
    };
    half ? run(float{}, bfloat16{}) : run(bfloat16{}, float{});
  });
  return y;
}

int64_t computed_size(const at::Tensor &x) { return x.scalar_type() == at::kDouble ? sizeof(double) : sizeof(float); }

// As many places in a block as have room in 24 KB, and at most eight.
gpu::FrameAttentionShape attention_shape(const at::Tensor &qkv, const Optional &keys, int64_t heads, bool transposed) {
  int64_t channels = qkv.size(3) / 3, distance = has(keys) ? keys->size(0) / 2 : -1;
  gpu::FrameAttentionShape s{qkv.size(0), qkv.size(1), qkv.size(2), heads, channels / heads, distance, 1, 1, transposed};
  auto bytes = [&](int64_t places) {
    return places * (4 * s.frames * s.pitch() + 2 * s.frames * s.frames) * computed_size(qkv);
  };
  while (s.together < 8 && bytes(2 * s.together) <= 24 << 10) s.together *= 2;
  while (s.parts < 8 && 2 * s.parts * s.together * s.frames * s.frames <= 2 * s.THREADS) s.parts *= 2;
  return s;
}

// Whether both ways have room for it.
bool attention_fits(const at::Tensor &qkv, const Optional &keys, int64_t heads) {
  auto s = attention_shape(qkv, keys, heads, false);
  return gpu::FrameAttentionBack<float, 1>::shared(s) * computed_size(qkv) <= SHARED_BYTES;
}

// Whether the rows of a head are whole packs.
bool attention_packs(const gpu::FrameAttentionShape &s, const at::Tensor &qkv, const Optional &keys, const Optional &values,
                     const Optional &dout) {
  return s.width % in_a_pack(qkv) == 0 && is_aligned({qkv, keys, values, dout});
}

at::Tensor frame_attention(const at::Tensor &qkv, const Optional &keys, const Optional &values, int64_t heads, double alpha,
                           double beta, bool transposed) {
  auto s = attention_shape(qkv, keys, heads, transposed);
  auto y = at::empty({s.clips, s.frames, s.places, s.heads * s.width}, qkv.options());
  by_kind(qkv, [&](auto kind) {
    using T = decltype(kind);
    using A = gpu::computed<T>;
    together<T>(attention_packs(s, qkv, keys, values, std::nullopt), [&](auto n) {
      gpu::FrameAttention<T, n> kernel{s, static_cast<A>(alpha), static_cast<A>(beta), in<T>(qkv), in<A>(keys), in<A>(values),
                                       out<T>(y)};
      launch<A>(kernel, qkv.device(), kernel.blocks(), s.THREADS, kernel.shared(s));
    });
  });
  return y;
}

// dqkv; [pieces, 2, 2L+1, d], of which the sum is the gradient of both tables, but for rows at both ends that no frames use;
// nothing without tables
std::tuple<at::Tensor, at::Tensor> frame_attention_backward(const at::Tensor &qkv, const Optional &keys, const Optional &values,
                                                            const at::Tensor &dout, int64_t heads, double alpha, double beta,
                                                            bool transposed) {
  auto s = attention_shape(qkv, keys, heads, transposed);
  constexpr int64_t most_blocks = 1024;
  int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(s.groups(), most_blocks / heads));
  auto dqkv = at::empty_like(qkv);
  auto dtables = has(keys) ? at::empty({pieces * heads, 2, s.used(), s.width}, keys->options()) : at::Tensor();
  by_kind(qkv, [&](auto kind) {
    using T = decltype(kind);
    using A = gpu::computed<T>;
    together<T>(attention_packs(s, qkv, keys, values, dout), [&](auto n) {
      gpu::FrameAttentionBack<T, n> kernel{s, static_cast<A>(alpha), static_cast<A>(beta), in<T>(qkv), in<T>(dout), in<A>(keys),
                                           in<A>(values), out<T>(dqkv), has(keys) ? out<A>(dtables) : nullptr, pieces};
      launch<A>(kernel, qkv.device(), kernel.blocks(), s.THREADS, kernel.shared(s));
    });
  });
  return {dqkv, dtables};
}

// x [B, F, H, W, C] without its repeated places; pads as LibTorch orders them (W, H, F, each in front and behind)
gpu::EdgesShape edges_shape(at::IntArrayRef inside, at::IntArrayRef pads) {
  return {inside[0], inside[1], inside[2], inside[3], inside[4], {pads[4], pads[2], pads[0]}, {pads[5], pads[3], pads[1]}};
}

at::Tensor repeat_edges(const at::Tensor &x, at::IntArrayRef pads) {
  auto s = edges_shape(x.sizes(), pads);
  auto y = at::empty({s.clips, s.padded(0), s.padded(1), s.padded(2), s.channels}, x.options());
  by_kind(x, [&](auto kind) {
    using T = decltype(kind);
    together<T>(s.channels % in_a_pack(x) == 0 && is_aligned({x}), [&](auto n) {
      gpu::RepeatEdges<T, n> kernel{s, in<T>(x), out<T>(y)};
      launch<T>(kernel, x.device(), kernel.blocks(), s.THREADS, 0);
    });
  });
  return y;
}

at::Tensor repeat_edges_backward(const at::Tensor &dy, at::IntArrayRef pads) {
  auto inside = dy.sizes().vec();
  for (int axis = 0; axis < 3; axis++) inside[axis + 1] -= pads[4 - 2 * axis] + pads[5 - 2 * axis];
  auto s = edges_shape(inside, pads);
  auto dx = at::empty(inside, dy.options());
  by_kind(dy, [&](auto kind) {
    using T = decltype(kind);
    together<T>(s.channels % in_a_pack(dy) == 0 && is_aligned({dy}), [&](auto n) {
      gpu::RepeatEdgesBack<T, n> kernel{s, in<T>(dy), out<T>(dx)};
      launch<T>(kernel, dy.device(), kernel.blocks(), s.THREADS, 0);
    });
  });
  return dx;
}

// x [R, D]; gate, scale and shift [O, D] with rows that lie alike
gpu::RowsShape rows_shape(const at::Tensor &x, const Optional &gate, const at::Tensor &scale, const at::Tensor &shift,
                          bool plus_one, int64_t pack) {
  gpu::RowsShape s{x.size(0), x.size(1), scale.size(0), scale.size(0) == 1 ? 0 : scale.stride(0), plus_one};
  auto alike = [&](const at::Tensor &t) {
    return t.sizes() == scale.sizes() && t.stride(1) == 1 && (s.of_factors == 1 || t.stride(0) == s.stride);
  };
  TORCH_CHECK(s.rows % s.of_factors == 0 && s.width > 0 && alike(scale) && alike(shift) && (!has(gate) || alike(*gate)),
              "layer norm of ", x.sizes(), " by ", scale.sizes());
  constexpr int lanes = 32, threads = gpu::MOST_THREADS;
  s.lanes = 1;
  while (s.lanes < lanes && s.lanes * pack * 2 <= s.width) s.lanes *= 2;
  s.slots = threads / s.lanes;
  constexpr int64_t most_pieces = 512;
  s.chunk = std::max<int64_t>(s.slots, (s.rows + most_pieces - 1) / most_pieces);
  return s;
}

// y, in bfloat16 where it is to be `half`, as the update then is, and x may be: the stream is float32 all the same
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(const at::Tensor &x, const Optional &update, const Optional &gate,
                                                          const at::Tensor &scale, const at::Tensor &shift, bool plus_one,
                                                          double eps, bool half) {
  auto y = at::empty_like(x, half ? at::kBFloat16 : x.scalar_type());
  auto of = half && has(update) ? at::kFloat : x.scalar_type();
  bool is_narrow = of != x.scalar_type();
  auto stream = has(update) ? at::empty_like(x, of) : at::Tensor();
  bool whole = x.size(1) % in_a_pack(y) == 0 && is_aligned({x, update});
  auto s = rows_shape(x, gate, scale, shift, plus_one, whole ? in_a_pack(y) : 1);
  auto stats = at::empty({s.rows, 2}, scale.options());
  by_kinds(of, y, [&](auto of_stream, auto kind) {
    using S = decltype(of_stream);
    using T = decltype(kind);
    using A = gpu::computed<S>;
    together<T>(whole, [&](auto n) {
      gpu::LayerNorm<S, T, n> kernel{s, static_cast<A>(eps), is_narrow ? nullptr : in<S>(x), is_narrow ? in<T>(x) : nullptr,
                                     in<T>(update), {in<A>(scale), in<A>(shift), in<A>(gate)}, out<T>(y),
                                     has(update) ? out<S>(stream) : nullptr, out<A>(stats)};
      launch<A>(kernel, x.device(), kernel.blocks(), s.lanes * s.slots, kernel.shared(s));
    });
  });
  return {y, stats, stream};
}

// dx, in the kind of dy where x `was_narrow`; what comes back along an update, where that is something else; [pieces, O, 3, D], of
// which the sum is the gradient of scale, shift and gate
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(const at::Tensor &x, const Optional &update,
                                                                   const Optional &gate, const at::Tensor &dy,
                                                                   const Optional &dstream, const at::Tensor &scale,
                                                                   const at::Tensor &shift, const at::Tensor &stats,
                                                                   bool plus_one, bool had_update, bool was_narrow) {
  bool whole = x.size(1) % in_a_pack(dy) == 0 && is_aligned({x, update, dy, dstream});
  auto s = rows_shape(x, gate, scale, shift, plus_one, whole ? in_a_pack(dy) : 1);
  bool is_other = had_update && (has(gate) || (x.scalar_type() != dy.scalar_type() && !was_narrow));
  auto dx = at::empty_like(was_narrow ? dy : x), dupdate = is_other ? at::empty_like(dy) : at::Tensor();
  auto dfactors = at::empty({s.pieces(), s.of_factors, 3, s.width}, scale.options());
  int64_t bytes = gpu::LayerNormBack<float, float, 1>::shared(s) * scale.element_size();
  TORCH_CHECK(bytes <= SHARED_BYTES, "layer norm of rows of ", s.width, " values, which are more than a block takes");
  by_kinds(x.scalar_type(), dy, [&](auto of_stream, auto kind) {
    using S = decltype(of_stream);
    using T = decltype(kind);
    using A = gpu::computed<S>;
    together<T>(whole, [&](auto n) {
      gpu::LayerNormBack<S, T, n> kernel{s, in<S>(x), in<S>(dstream), in<T>(update), in<T>(dy),
                                         {in<A>(scale), in<A>(shift), in<A>(gate)}, in<A>(stats),
                                         was_narrow ? nullptr : out<S>(dx), was_narrow ? out<T>(dx) : nullptr,
                                         is_other ? out<T>(dupdate) : nullptr, out<A>(dfactors)};
      launch<A>(kernel, x.device(), kernel.blocks(), s.lanes * s.slots, kernel.shared(s));
    });
  });
  return {dx, dupdate, dfactors};
}

at::Tensor geglu(const at::Tensor &x) {
  int64_t width = x.size(1) / 2;
  auto y = at::empty({x.size(0), width}, x.options());
  by_kind(x, [&](auto kind) {
    using T = decltype(kind);
    together<T>(width % in_a_pack(x) == 0 && is_aligned({x}), [&](auto n) {
      gpu::Geglu<T, n> kernel{x.size(0), width, in<T>(x), out<T>(y)};
      launch<T>(kernel, x.device(), kernel.blocks(), kernel.THREADS, 0);
    });
  });
  return y;
}

at::Tensor geglu_backward(const at::Tensor &x, const at::Tensor &dy) {
  int64_t width = x.size(1) / 2;
  auto dx = at::empty_like(x);
  by_kind(x, [&](auto kind) {
    using T = decltype(kind);
    together<T>(width % in_a_pack(x) == 0 && is_aligned({x, dy}), [&](auto n) {
      gpu::GegluBack<T, n> kernel{x.size(0), width, in<T>(x), in<T>(dy), out<T>(dx)};
      launch<T>(kernel, x.device(), kernel.blocks(), kernel.THREADS, 0);
    });
  });
  return dx;
}

}  // namespace operators

namespace {

void implement(torch::Library &m) {
  m.impl("cast_all_", operators::cast_all_);
  m.impl("prepare_step_", operators::prepare_step_);
  m.impl("adam_all_", operators::adam_all_);
  m.impl("geglu", operators::geglu);
  m.impl("geglu_backward", operators::geglu_backward);
  m.impl("layer_norm", operators::layer_norm);
  m.impl("layer_norm_backward", operators::layer_norm_backward);
  m.impl("group_norm", operators::group_norm);
  m.impl("group_norm_backward", operators::group_norm_backward);
  m.impl("mixed_sum", operators::mixed_sum);
  m.impl("column_sums", operators::column_sums);
  m.impl("frame_attention", operators::frame_attention);
  m.impl("frame_attention_backward", operators::frame_attention_backward);
  m.impl("repeat_edges", operators::repeat_edges);
  m.impl("repeat_edges_backward", operators::repeat_edges_backward);
}

TORCH_LIBRARY(lvdm, m) {
  m.def("geglu(Tensor x) -> Tensor");
  m.def("geglu_backward(Tensor x, Tensor dy) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? update, Tensor? gate, Tensor scale, Tensor shift, bool plus_one, float eps, "
        "bool half) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor x, Tensor? update, Tensor? gate, Tensor dy, Tensor? dstream, Tensor scale, Tensor shift, "
        "Tensor stats, bool plus_one, bool had_update, bool was_narrow) -> (Tensor, Tensor, Tensor)");
  m.def("cast_all_(Tensor[] from, Tensor(a!)[] to) -> ()");
  m.def("prepare_step_(Tensor checked, Tensor rate, Tensor(a!) steps, Tensor(b!) averaged, float beta_1, float beta_2, "
        "float max_norm, float decay, bool warmup) -> Tensor");
  m.def("adam_all_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] average, "
        "Tensor numbers, float beta_1, float beta_2, float decay, float eps, bool decoupled) -> ()");
  m.def("group_norm(Tensor x, Tensor? beside, Tensor? update, Tensor? added, Tensor? modulation, Tensor scale, Tensor shift, int groups, "
        "float eps, bool silu, bool half, bool narrows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("group_norm_backward(Tensor x, Tensor? beside, Tensor? added, Tensor? modulation, Tensor dy, Tensor? dstream, "
        "Tensor? dnarrow, Tensor scale, Tensor shift, Tensor stats, int groups, bool silu, bool narrows) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("mixed_sum(Tensor a, Tensor b) -> Tensor");
  m.def("column_sums(Tensor x, int zeros) -> Tensor");
  m.def("frame_attention(Tensor qkv, Tensor? keys, Tensor? values, int heads, float alpha, float beta, bool transposed) -> Tensor");
  m.def("frame_attention_backward(Tensor qkv, Tensor? keys, Tensor? values, Tensor dout, int heads, float alpha, float beta, "
        "bool transposed) -> (Tensor, Tensor)");
  m.def("repeat_edges(Tensor x, int[] pads) -> Tensor");
  m.def("repeat_edges_backward(Tensor dy, int[] pads) -> Tensor");
}
TORCH_LIBRARY_IMPL(lvdm, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(lvdm, Meta, m) { implement(m); }

}  // namespace

// ---- for Rust -----------------------------------------------------------------------------------------------------------

// *names and *functions <- the kernels' names in C++, and where the driver's handles of them belong; how many they are
extern "C" int64_t lvdm_gpu_kernel_list(const char **names, void ***functions, int64_t room) {
  int64_t count = std::size(compiled);
  for (int64_t i = 0; i < std::min(count, room); i++) names[i] = compiled[i].name, functions[i] = compiled[i].function;
  return count;
}

// From now on the operators run on GPUs, for which all handles are there; `launch` is the driver's cuLaunchKernel.
extern "C" void lvdm_gpu_kernels_are_compiled(Launch launch, int (*current)(int)) {
  launch_on_gpu = launch, make_current = current;
  static torch::Library *library = nullptr;
  if (library) return;
  library = new torch::Library(torch::Library::IMPL, "lvdm", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  implement(*library);
}

// Whether GPUs hand operators that they lack to the CPU.
extern "C" bool lvdm_gpu_falls_back() {
  return c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(c10::DispatchKey::CUDA);
}

// `keys` may be null
extern "C" bool lvdm_gpu_attention_fits(const at::Tensor *qkv, const at::Tensor *keys, int64_t heads) {
  return operators::attention_fits(*qkv, keys ? std::optional(*keys) : std::nullopt, heads);
}
