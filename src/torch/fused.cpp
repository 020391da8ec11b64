// Kernels for the CPU, float32: what the networks do between their products in one pass each, forward and backward.
// Sums are taken over fixed pieces in a fixed order, so results do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "guarded.h"
#include "rows.h"

namespace {

// The inner loops for the instructions that LibTorch's own kernels use here, which ATEN_CPU_CAPABILITY can lower.
const Rows &rows() {
#ifdef __x86_64__
  static const Rows &chosen = [] () -> const Rows & {
    std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? rows_avx512 : capability == "AVX2" ? rows_avx2 : rows_plain;
  }();
  return chosen;
#else
  return rows_plain;
#endif
}

// ---- group norm of [O, S, I, C] over S and a group of C, then y = x̂·scale + shift, then perhaps SiLU --------------

constexpr int64_t ROWS = 64;  // of a piece

// [O, S, I, C] in pieces of at most ROWS rows of one sample (o, i)
struct Pieces {
  int64_t outer, steps, inner, channels, a_sample;

  explicit Pieces(const at::Tensor &x)
      : outer(x.size(0)), steps(x.size(1)), inner(x.size(2)), channels(x.size(3)), a_sample((steps + ROWS - 1) / ROWS) {}
  int64_t samples() const { return outer * inner; }
  int64_t count() const { return samples() * a_sample; }
  int64_t stride() const { return inner * channels; }
  int64_t sample(int64_t piece) const { return piece / a_sample; }
  int64_t rows(int64_t piece) const { return std::min(ROWS, steps - piece % a_sample * ROWS); }
  int64_t begin(int64_t piece) const {
    int64_t o = sample(piece) / inner, i = sample(piece) % inner;
    return ((o * steps + piece % a_sample * ROWS) * inner + i) * channels;
  }
  // so that a thread gets some 16,000 numbers
  int64_t grain() const { return std::max<int64_t>(1, 16384 / (std::min(ROWS, steps) * channels)); }
};

struct Norm : torch::autograd::Function<Norm> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x, const at::Tensor &scale,
                            const at::Tensor &shift, int64_t groups, double eps, bool silu) {
    Pieces p(x);
    int64_t C = p.channels, width = C / groups;
    auto sums = at::empty({p.count(), 2 * groups}, x.options().dtype(at::kDouble));
    auto stats = at::empty({p.samples(), 2, groups}, x.options());  // mean, 1/σ
    auto y = at::empty_like(x);
    const float *px = x.const_data_ptr<float>(), *pa = scale.const_data_ptr<float>(), *pb = shift.const_data_ptr<float>();
    double *ps = sums.data_ptr<double>();
    float *pm = stats.data_ptr<float>(), *py = y.data_ptr<float>();
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> sum(C), square(C);
      for (int64_t piece = from; piece < to; piece++) {
        rows().sums(px + p.begin(piece), p.rows(piece), p.stride(), C, sum.data(), square.data());
        for (int64_t g = 0; g < groups; g++) {
          double s = 0, q = 0;
          for (int64_t c = g * width; c < (g + 1) * width; c++) s += sum[c], q += square[c];
          ps[piece * 2 * groups + g] = s;
          ps[piece * 2 * groups + groups + g] = q;
        }
      }
    });
    double count = static_cast<double>(p.steps * width);
    for (int64_t n = 0; n < p.samples(); n++) {
      for (int64_t g = 0; g < groups; g++) {
        double s = 0, q = 0;
        for (int64_t k = n * p.a_sample; k < (n + 1) * p.a_sample; k++)
          s += ps[k * 2 * groups + g], q += ps[k * 2 * groups + groups + g];
        double mean = s / count, variance = std::max(0.0, q / count - mean * mean);
        pm[n * 2 * groups + g] = static_cast<float>(mean);
        pm[n * 2 * groups + groups + g] = static_cast<float>(1.0 / std::sqrt(variance + eps));
      }
    }
    bool shared = scale.size(0) == 1;
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), offset(C);
      for (int64_t piece = from; piece < to; piece++) {
        gains(p, piece, from, pm, groups, pa, pb, shared, gain.data(), offset.data());
        rows().norm(px + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), offset.data(), silu, py + p.begin(piece));
      }
    });
    context->save_for_backward({x, scale, shift, stats});
    context->saved_data["groups"] = groups;
    context->saved_data["silu"] = silu;
    return y;
  }

  // u = x·gain + offset, for a piece's sample
  static void gains(const Pieces &p, int64_t piece, int64_t first, const float *stats, int64_t groups, const float *scale,
                    const float *shift, bool shared, float *gain, float *offset) {
    if (piece != first && piece % p.a_sample != 0) return;  // as the piece before
    int64_t n = p.sample(piece), row = shared ? 0 : n / p.inner, width = p.channels / groups;
    const float *mean = stats + n * 2 * groups, *inverse = mean + groups;
    for (int64_t g = 0, c = 0; g < groups; g++)
      for (; c < (g + 1) * width; c++) {
        gain[c] = inverse[g] * scale[row * p.channels + c];
        offset[c] = shift[row * p.channels + c] - mean[g] * gain[c];
      }
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto x = saved[0], scale = saved[1], shift = saved[2], stats = saved[3];
    int64_t groups = context->saved_data["groups"].toInt();
    bool silu = context->saved_data["silu"].toBool();
    auto dy = gradients[0].contiguous();
    Pieces p(x);
    int64_t C = p.channels, width = C / groups;
    auto dx = at::empty_like(x);
    auto sums = at::empty({p.count(), 2, C}, x.options());  // Σ du, Σ du·x̂
    auto dscale = at::zeros({scale.size(0), C}, x.options().dtype(at::kDouble)), dshift = at::zeros_like(dscale);
    const float *px = x.const_data_ptr<float>(), *pa = scale.const_data_ptr<float>(), *pb = shift.const_data_ptr<float>();
    const float *pm = stats.const_data_ptr<float>(), *pdy = dy.const_data_ptr<float>();
    float *pdx = dx.data_ptr<float>(), *ps = sums.data_ptr<float>();
    double *pda = dscale.data_ptr<double>(), *pdb = dshift.data_ptr<double>();
    bool shared = scale.size(0) == 1;
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), offset(C), inverse(C), centre(C);
      for (int64_t piece = from; piece < to; piece++) {
        gains(p, piece, from, pm, groups, pa, pb, shared, gain.data(), offset.data());
        const float *mean = pm + p.sample(piece) * 2 * groups;
        for (int64_t c = 0; c < C; c++) {
          inverse[c] = mean[groups + c / width];
          centre[c] = mean[c / width] * inverse[c];
        }
        rows().norm_sums_back(px + p.begin(piece), pdy + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), offset.data(),
                       inverse.data(), centre.data(), silu, pdx + p.begin(piece), ps + piece * 2 * C, ps + piece * 2 * C + C);
      }
    });
    // per sample and group the means of dx̂ and dx̂·x̂
    std::vector<float> means(p.samples() * 2 * groups);
    double count = static_cast<double>(p.steps * width);
    std::vector<double> sum(C), along(C);
    for (int64_t n = 0; n < p.samples(); n++) {
      int64_t row = shared ? 0 : n / p.inner;
      std::fill(sum.begin(), sum.end(), 0), std::fill(along.begin(), along.end(), 0);
      for (int64_t k = n * p.a_sample; k < (n + 1) * p.a_sample; k++)
        for (int64_t c = 0; c < C; c++) sum[c] += ps[k * 2 * C + c], along[c] += ps[k * 2 * C + C + c];
      for (int64_t g = 0; g < groups; g++) {
        double of_one = 0, of_x = 0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
          pdb[row * C + c] += sum[c];
          pda[row * C + c] += along[c];
          of_one += sum[c] * pa[row * C + c];
          of_x += along[c] * pa[row * C + c];
        }
        means[n * 2 * groups + g] = static_cast<float>(of_one / count);
        means[n * 2 * groups + groups + g] = static_cast<float>(of_x / count);
      }
    }
    at::parallel_for(0, p.count(), p.grain(), [&](int64_t from, int64_t to) {
      std::vector<float> gain(C), of_one(C), of_x(C);
      for (int64_t piece = from; piece < to; piece++) {
        int64_t n = p.sample(piece), row = shared ? 0 : n / p.inner;
        const float *mean = pm + n * 2 * groups, *inverse = mean + groups, *m = means.data() + n * 2 * groups;
        for (int64_t g = 0, c = 0; g < groups; g++)
          for (; c < (g + 1) * width; c++) {
            // 1/σ·(du·scale − m₁ − x̂·m₂)
            gain[c] = inverse[g] * pa[row * C + c];
            of_x[c] = inverse[g] * inverse[g] * m[groups + g];
            of_one[c] = inverse[g] * m[g] - mean[g] * of_x[c];
          }
        rows().norm_back(px + p.begin(piece), p.rows(piece), p.stride(), C, gain.data(), of_one.data(), of_x.data(),
                       pdx + p.begin(piece));
      }
    });
    return {dx, dscale.to(at::kFloat), dshift.to(at::kFloat), {}, {}, {}};
  }
};

// ---- attention over the frames of each position, with relative positions --------------------------------------------

struct Shape {
  int64_t clips, frames, places, channels, heads, width;
  double alpha, beta;
  bool transposed;

  // where head h of place n of all clips' places begins in the first frame, of rows of `width` numbers
  int64_t begin(int64_t n, int64_t h, int64_t row) const {
    return ((n / places * frames) * places + n % places) * row + h * width;
  }
  FrameAttentionPlace place(int64_t n, int64_t h, const float *qkv, const float *keys, const float *values,
                            float *weights) const {
    return {frames, width, places * 3 * channels, channels, places * channels, static_cast<float>(alpha),
            static_cast<float>(beta), transposed, qkv + begin(n, h, 3 * channels), keys, values,
            weights + (n * heads + h) * frames * frames};
  }
};

constexpr int64_t PLACES = 16;  // of a piece

struct FrameAttention : torch::autograd::Function<FrameAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &qkv, const at::Tensor &keys,
                            const at::Tensor &values, int64_t heads, double alpha, double beta, bool transposed) {
    Shape s = shape(qkv, heads, alpha, beta, transposed);
    int64_t F = s.frames, C = s.channels, d = s.width;
    auto y = at::empty({s.clips, F, s.places, C}, qkv.options());
    auto weights = at::empty({s.clips * s.places, heads, F, F}, qkv.options());
    const float *px = qkv.const_data_ptr<float>(), *pk = keys.const_data_ptr<float>(), *pv = values.const_data_ptr<float>();
    float *py = y.data_ptr<float>(), *pw = weights.data_ptr<float>();
    at::parallel_for(0, s.clips * s.places, PLACES, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; n++)
        for (int64_t h = 0; h < heads; h++) rows().attend(s.place(n, h, px, pk, pv, pw), py + s.begin(n, h, C));
    });
    context->save_for_backward({qkv, keys, values, weights});
    context->saved_data["heads"] = heads;
    context->saved_data["alpha"] = alpha;
    context->saved_data["beta"] = beta;
    context->saved_data["transposed"] = transposed;
    return y;
  }

  static Shape shape(const at::Tensor &qkv, int64_t heads, double alpha, double beta, bool transposed) {
    int64_t channels = qkv.size(3) / 3;
    return {qkv.size(0), qkv.size(1), qkv.size(2), channels, heads, channels / heads, alpha, beta, transposed};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto qkv = saved[0], keys = saved[1], values = saved[2], weights = saved[3];
    auto &data = context->saved_data;
    Shape s = shape(qkv, data["heads"].toInt(), data["alpha"].toDouble(), data["beta"].toDouble(),
                    data["transposed"].toBool());
    int64_t F = s.frames, C = s.channels, d = s.width, all = s.clips * s.places, table = F * F * d;
    int64_t pieces = (all + PLACES - 1) / PLACES;
    auto dy = gradients[0].contiguous();
    auto dqkv = at::zeros_like(qkv);
    auto dtables = at::zeros({pieces, 2, F, F, d}, qkv.options());
    const float *px = qkv.const_data_ptr<float>(), *pk = keys.const_data_ptr<float>(), *pv = values.const_data_ptr<float>();
    const float *pg = dy.const_data_ptr<float>();
    float *pw = weights.data_ptr<float>(), *pd = dqkv.data_ptr<float>(), *pt = dtables.data_ptr<float>();
    at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
      std::vector<float> ds(F);
      for (int64_t piece = from; piece < to; piece++)
        for (int64_t n = piece * PLACES; n < std::min(all, (piece + 1) * PLACES); n++)
          for (int64_t h = 0; h < s.heads; h++) {
            float *dkeys = pt + piece * 2 * table, *dvalues = dkeys + table;
            rows().attend_back(s.place(n, h, px, pk, pv, pw), pg + s.begin(n, h, C), ds.data(), pd + s.begin(n, h, 3 * C),
                               dkeys, dvalues);
          }
    });
    auto sum = dtables.sum(0);
    return {dqkv, sum[0], sum[1], {}, {}, {}, {}};
  }
};

// ---- repeated edges ------------------------------------------------------------------------------------------------

// The places of a padded axis at which place i of n stands.
struct Copies {
  int64_t begin, end;

  Copies(int64_t i, int64_t n, int64_t front, int64_t back)
      : begin(i == 0 ? 0 : i + front), end(i == n - 1 ? n + front + back : i + front + 1) {}
};

// x [B, C, F, H, W] with its channels last in memory; pads as LibTorch orders them (W, H, F, each in front and behind).
// LibTorch's kernel goes back through it with one thread a clip; this one shares the frames among threads.
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

// ---- transposed convolution ----------------------------------------------------------------------------------------

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

// ---- kernels laid out once ------------------------------------------------------------------------------------------

// oneDNN brings a convolution's kernel into an order of its own at every call. While weights stay as they are it is
// kept, in bfloat16 under autocast. The order depends on the sizes of the input.
struct Laid {
  at::Tensor weight;  // holds the memory that the key points to
  at::Tensor kernel;
  std::optional<at::Tensor> bias;
};

struct FixedWeights {
  int64_t depth = 0;
  std::map<std::tuple<const void *, at::ScalarType, int64_t, std::vector<int64_t>>, Laid> laid;
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
    laid.clear();
    seen.clear();
    seen_bytes = kept_bytes = 0;
  }
};

thread_local FixedWeights fixed_weights;

using Pointwise = at::Tensor(const at::Tensor &, const at::Tensor &, const std::optional<at::Tensor> &, at::IntArrayRef,
                             at::IntArrayRef, at::IntArrayRef, int64_t, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

bool weights_are_fixed() { return fixed_weights.depth > 0 && !at::GradMode::is_enabled(); }

// The weight as autocast would cast it at every call, kept while weights are fixed.
at::Tensor fixed_cast(const at::Tensor &weight) {
  auto device = weight.device().type();
  if (!weights_are_fixed() || !at::autocast::is_autocast_enabled(device)) return weight;
  auto kind = at::autocast::get_autocast_dtype(device);
  if (weight.scalar_type() != at::kFloat) return weight;
  std::tuple key{weight.const_data_ptr(), kind, int64_t{0}, std::vector<int64_t>{}};
  if (auto found = fixed_weights.laid.find(key); found != fixed_weights.laid.end()) return found->second.kernel;
  if (device == at::kCPU && !fixed_weights.has_room(weight, weight.numel() * c10::elementSize(kind))) return weight;
  auto cast = weight.to(kind);
  fixed_weights.laid[key] = {weight, cast, {}};
  return cast;
}

// An undefined tensor where the kernel is not to be kept, or there is no room.
at::Tensor fixed_conv(const at::Tensor &x, const at::Tensor &weight, const std::optional<at::Tensor> &bias,
                      int64_t stride, int64_t padding, bool in_float32, bool in_bfloat16) {
  bool mixed = at::autocast::is_autocast_enabled(at::kCPU);
  if (!weights_are_fixed() || !(mixed ? in_bfloat16 : in_float32)) return {};
  auto kind = mixed ? at::kBFloat16 : at::kFloat;
  std::vector<int64_t> strides{stride, stride}, paddings{padding, padding}, ones{1, 1};
  std::tuple key{weight.const_data_ptr(), kind, stride, x.sizes().vec()};
  auto found = fixed_weights.laid.find(key);
  if (found == fixed_weights.laid.end()) {
    if (!fixed_weights.has_room(weight, weight.numel() * c10::elementSize(kind))) return {};
    auto kernel = at::mkldnn_reorder_conv2d_weight(weight.to(kind).to_mkldnn(), paddings, strides, ones, 1, x.sizes());
    auto offset = bias ? std::optional(bias->to(kind)) : std::nullopt;
    found = fixed_weights.laid.emplace(key, Laid{weight, kernel, offset}).first;
  }
  auto &[held, kernel, offset] = found->second;
  static auto convolution = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("mkldnn::_convolution_pointwise", "")
                                .typed<Pointwise>();
  return convolution.call(x.to(kind), kernel, offset, paddings, strides, ones, 1, "none", c10::List<std::optional<at::Scalar>>(),
                          std::nullopt);
}

}  // namespace

// *y <- x [O, S, I, C] normalised over S and each group of channels, times scale plus shift ([1 or O, C]), then SiLU
extern "C" char *lvdm_group_norm(const at::Tensor *x, const at::Tensor *scale, const at::Tensor *shift, int64_t groups,
                                 double eps, bool silu, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(Norm::apply(*x, *scale, *shift, groups, eps, silu)); });
}

// *y <- [B, F, P, C]: attention over F of qkv [B, F, P, 3·C] with key and value rows [F, F, d] of relative positions
extern "C" char *lvdm_frame_attention(const at::Tensor *qkv, const at::Tensor *keys, const at::Tensor *values,
                                      int64_t heads, double alpha, double beta, bool transposed, at::Tensor **y) {
  return guarded(
      [&] { *y = new at::Tensor(FrameAttention::apply(*qkv, *keys, *values, heads, alpha, beta, transposed)); });
}

extern "C" char *lvdm_repeat_edges(const at::Tensor *x, const int64_t *pads, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(RepeatEdges::apply(*x, std::vector<int64_t>(pads, pads + 6))); });
}

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

// While `begin` calls outnumber the others, this thread's weights stay as they are: whether they do from now on.
extern "C" bool lvdm_fixed_weights(bool begin) {
  fixed_weights.depth += begin ? 1 : -1;
  if (fixed_weights.depth == 0) fixed_weights.clear();
  return fixed_weights.depth > 0;
}

extern "C" bool lvdm_weights_are_fixed() { return weights_are_fixed(); }

extern "C" char *lvdm_fixed_cast(const at::Tensor *weight, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(fixed_cast(*weight)); });
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
