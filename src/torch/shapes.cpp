// Operations that run for the shapes of their results alone, and a list of the kernels that they would start. Inside of
// `lvdm_by_shapes` the dispatcher hands every operation to `run`, below autograd and mixed precision. A tensor without memory
// is one of the CPU whose storage has a size and no address; what comes of such a tensor has none either. Tensors with memory
// are computed with as ever, so that tables of indices and the like are what they should be.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/ConvUtils.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "guarded.h"

namespace {

using torch::jit::Stack;
using Tensors = std::vector<at::Tensor>;

// What is told of a kernel: its operation, bytes that it reads and writes, operations of products, whether in bfloat16.
using Take = void (*)(void *data, const char *name, int64_t bytes, int64_t flops, bool half);

struct Shapes {
  Take take;
  void *data;
  int64_t held = 0, peak = 0;  // bytes of tensors without memory
};
thread_local std::shared_ptr<Shapes> shapes;

// ---- tensors without memory --------------------------------------------------------------------------------------------

struct Held {
  std::shared_ptr<Shapes> of;
  int64_t bytes;
};

at::Tensor without_memory(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType kind) {
  auto type = c10::scalarTypeToTypeMeta(kind);
  int64_t bytes = static_cast<int64_t>(at::detail::computeStorageNbytes(sizes, strides, type.itemsize()));
  if (shapes) {
    shapes->held += bytes;
    shapes->peak = std::max(shapes->peak, shapes->held);
  }
  auto let_go = [](void *held) {
    auto *its = static_cast<Held *>(held);
    if (its->of) its->of->held -= its->bytes;
    delete its;
  };
  c10::DataPtr nowhere(nullptr, new Held{shapes, bytes}, let_go, at::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(nowhere), nullptr, /*resizable=*/false);
  auto x = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), type);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return x;
}

bool has_memory(const at::Tensor &x) { return !x.has_storage() || x.storage().data() != nullptr || x.storage().nbytes() == 0; }

// A tensor that is one everywhere reads that one alone.
int64_t bytes_of(const at::Tensor &x) {
  int64_t count = x.numel() > 0;
  for (int64_t axis = 0; axis < x.dim(); axis++)
    if (x.stride(axis) != 0) count *= x.size(axis);
  return count * x.element_size();
}

// ---- what an operation takes and gives -------------------------------------------------------------------------------------

template <class F>
void of_each_tensor(const c10::IValue &value, F f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor &x : value.toTensorList()) f(x);
  } else if (value.isOptionalTensorList()) {
    for (auto &&x : value.toOptionalTensorVector())
      if (x && x->defined()) f(*x);
  }
}

template <class F>
c10::IValue mapped(const c10::IValue &value, F f) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor &x : value.toTensorList()) list.push_back(f(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (auto &&x : value.toOptionalTensorVector()) list.push_back(x && x->defined() ? std::optional(f(*x)) : x);
    return list;
  }
  return value;
}

bool is_written(const c10::Argument &argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

// A kernel that reads and writes these.
void tell(const std::string &name, const Tensors &tensors, int64_t flops = 0) {
  if (!shapes->take) return;
  int64_t bytes = 0;
  for (auto &x : tensors) bytes += x.defined() ? bytes_of(x) : 0;
  bool half = !tensors.empty() && tensors[0].scalar_type() == at::kBFloat16;
  shapes->take(shapes->data, name.c_str(), bytes, flops, half);
}

// ---- operations by hand: products whose sizes no kernel of LibTorch's tells without memory -----------------------------------

// In the order in memory that cuDNN gives an output of these.
at::Tensor of_convolution(at::IntArrayRef sizes, const at::Tensor &x, const at::Tensor &weight) {
  auto last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  bool is_last = x.suggest_memory_format() == last || weight.suggest_memory_format() == last;
  auto like = at::empty(sizes, at::TensorOptions(at::kMeta).memory_format(is_last ? last : at::MemoryFormat::Contiguous));
  return without_memory(sizes, like.strides(), x.scalar_type());
}

// All numbers of the kernel meet each place of the tensor whose channels are its first axis.
int64_t convolution_flops(const at::Tensor &weight, const at::Tensor &y) { return 2 * weight.numel() * (y.numel() / y.size(1)); }

// One number stands for all axes.
c10::DimVector of_axes(const c10::IValue &value, const at::Tensor &x) {
  auto numbers = value.toDimVector();
  if (numbers.size() == 1) numbers.resize(x.dim() - 2, numbers[0]);
  return numbers;
}

std::vector<c10::IValue> convolution(const std::vector<c10::IValue> &given) {
  auto x = given[0].toTensor(), weight = given[1].toTensor();
  auto bias = given[2].isTensor() ? given[2].toTensor() : at::Tensor();
  auto stride = of_axes(given[3], x), padding = of_axes(given[4], x), dilation = of_axes(given[5], x);
  bool transposed = given[6].toBool();
  auto sizes = transposed ? at::native::conv_input_size(x.sizes(), weight.sizes(), padding, of_axes(given[7], x), stride, dilation,
                                                        given[8].toInt())
                          : at::native::conv_output_size(x.sizes(), weight.sizes(), padding, stride, dilation);
  auto y = of_convolution(sizes, x, weight);
  tell("convolution", {x, weight, y}, convolution_flops(weight, transposed ? x : y));
  if (bias.defined()) tell("bias", {y, bias, y});
  return {y};
}

std::vector<c10::IValue> convolution_backward(const std::vector<c10::IValue> &given) {
  auto dy = given[0].toTensor(), x = given[1].toTensor(), weight = given[2].toTensor();
  auto mask = given[10].toBoolList();
  int64_t flops = convolution_flops(weight, given[7].toBool() ? x : dy);
  at::Tensor dx, dweight, dbias;
  if (mask.get(0)) {
    dx = of_convolution(x.sizes(), x, weight);
    tell("convolution, gradient of its input", {dy, weight, dx}, flops);
  }
  if (mask.get(1)) {
    dweight = of_convolution(weight.sizes(), weight, x);
    tell("convolution, gradient of its weight", {dy, x, dweight}, flops);
  }
  if (mask.get(2)) {
    dbias = without_memory({dy.size(1)}, {1}, dy.scalar_type());
    tell("bias, gradient", {dy, dbias});
  }
  return {dx, dweight, dbias};
}

// [N, heads, T, d] as kernels of attention give it: tokens before heads in memory.
at::Tensor of_attention(const at::Tensor &like) {
  auto n = like.size(0), heads = like.size(1), tokens = like.size(2), width = like.size(3);
  return without_memory(like.sizes(), {tokens * heads * width, width, heads * width, 1}, like.scalar_type());
}

std::vector<c10::IValue> attention(const std::vector<c10::IValue> &given) {
  auto q = given[0].toTensor(), k = given[1].toTensor(), v = given[2].toTensor();
  auto mask = given[5].isTensor() ? given[5].toTensor() : at::Tensor();
  auto y = of_attention(q);
  auto sums = without_memory({q.size(0), q.size(2), q.size(1)}, {q.size(2) * q.size(1), q.size(1), 1}, at::kFloat);
  tell("attention", {q, k, v, mask, y}, 4 * q.numel() * k.size(2));
  return {y, sums.transpose(1, 2)};
}

// Five products in place of two: the scores once more.
std::vector<c10::IValue> attention_backward(const std::vector<c10::IValue> &given) {
  auto dy = given[0].toTensor(), q = given[1].toTensor(), k = given[2].toTensor(), v = given[3].toTensor(), y = given[4].toTensor();
  auto dq = of_attention(q), dk = of_attention(k), dv = of_attention(v);
  tell("attention, gradient", {dy, q, k, v, y, dq, dk, dv}, 10 * q.numel() * k.size(2));
  return {dq, dk, dv};
}

at::Tensor like(const at::Tensor &x) {
  auto strides = x.is_non_overlapping_and_dense() ? x.strides().vec() : at::detail::defaultStrides(x.sizes());
  return without_memory(x.sizes(), strides, x.scalar_type());
}
at::Tensor in_order(at::IntArrayRef sizes, at::ScalarType kind) {
  return without_memory(sizes, at::detail::defaultStrides(sizes), kind);
}

// Operations whose shapes LibTorch does not tell, and that need not run for them. Empty for all others.
Tensors by_rule(const std::string &name, const std::vector<c10::IValue> &given) {
  auto x = [&](size_t i) { return given[i].toTensor(); };
  auto channels = [&](const at::Tensor &t) { return in_order({t.size(1)}, at::kFloat); };
  if (name == "aten::native_batch_norm") return {like(x(0)), channels(x(0)), channels(x(0))};
  if (name == "aten::native_batch_norm_backward") return {like(x(1)), channels(x(1)), channels(x(1))};
  if (name == "aten::native_group_norm") {
    std::vector<int64_t> groups{given[3].toInt(), given[6].toInt()};
    return {like(x(0)), in_order(groups, x(0).scalar_type()), in_order(groups, x(0).scalar_type())};
  }
  if (name == "aten::native_group_norm_backward") return {like(x(1)), channels(x(1)), channels(x(1))};
  if (name == "aten::native_layer_norm") {
    auto rows = x(0).sizes().vec();
    std::fill(rows.end() - given[1].toDimVector().size(), rows.end(), 1);
    return {like(x(0)), in_order(rows, at::kFloat), in_order(rows, at::kFloat)};
  }
  if (name == "aten::native_layer_norm_backward") {
    auto factors = in_order(given[2].toDimVector(), x(1).scalar_type());
    return {like(x(1)), factors, like(factors)};
  }
  if (name == "aten::embedding" || name == "aten::index_select") {
    bool is_select = name == "aten::index_select";
    auto table = x(0), index = x(is_select ? 2 : 1);
    auto axis = is_select ? at::maybe_wrap_dim(given[1].toInt(), table.dim()) : 0;
    auto sizes = table.sizes().vec();
    sizes.erase(sizes.begin() + axis);
    sizes.insert(sizes.begin() + axis, index.sizes().begin(), index.sizes().end());
    return {in_order(sizes, table.scalar_type())};
  }
  if (name == "aten::embedding_dense_backward") return {in_order({given[2].toInt(), x(0).size(-1)}, x(0).scalar_type())};
  if (name == "aten::where" && given.size() == 3) {
    auto sizes = at::infer_size(at::infer_size(x(0).sizes(), x(1).sizes()), x(2).sizes());
    auto whole = std::find_if(given.begin() + 1, given.end(), [&](auto &value) { return value.toTensor().sizes() == sizes; });
    auto kind = at::result_type(x(1), x(2));
    if (whole == given.end()) return {in_order(sizes, kind)};
    return {without_memory(sizes, like(whole->toTensor()).strides(), kind)};
  }
  if (name == "aten::flip" || name == "aten::roll" || name == "aten::_safe_softmax") return {like(x(0))};
  if (name == "aten::replication_pad3d_backward") return {like(x(1))};
  return {};
}

// The products of the operations that are matrix products.
int64_t product_flops(const std::string &name, const Tensors &in, const Tensors &out) {
  if (out.empty()) return 0;
  bool adds = name == "aten::addmm" || name == "aten::baddbmm" || name == "aten::addmv";
  if (!adds && name != "aten::mm" && name != "aten::bmm" && name != "aten::mv" && name != "aten::dot") return 0;
  return 2 * out[0].numel() * in[adds ? 1 : 0].sizes().back();
}

// ---- all operations ----------------------------------------------------------------------------------------------------------

// Where LibTorch has shapes without memory (`meta`), those; else the operation runs on zeros.
Stack results(const c10::OperatorHandle &op, const std::vector<c10::IValue> &given) {
  Stack stack;
  try {
    for (auto &value : given)
      stack.push_back(value.isDevice() ? c10::IValue(c10::Device(at::kMeta)) : mapped(value, [](const at::Tensor &x) {
        auto meta = at::empty({0}, x.options().device(at::kMeta).requires_grad(false));
        meta.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides());
        if (x.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
        return meta;
      }));
    op.callBoxed(stack);
    return stack;
  } catch (const c10::NotImplementedError &) {
  }
  stack.clear();
  for (auto &value : given)
    stack.push_back(mapped(value, [](const at::Tensor &x) {
      if (has_memory(x)) return x;
      auto zeros = at::empty_strided(x.sizes(), x.strides(), x.options().requires_grad(false));
      return zeros.zero_();
    }));
  op.callBoxed(stack);
  return stack;
}

void run(const c10::OperatorHandle &op, c10::DispatchKeySet keys, Stack *stack) {
  auto &schema = op.schema();
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
  }
  c10::impl::ExcludeDispatchKeyGuard as_ever(c10::DispatchKey::Fake);
  at::AutoDispatchBelowADInplaceOrView below;
  auto given = torch::jit::last(*stack, schema.arguments().size()).vec();
  auto name = schema.name();
  Tensors in, out;
  bool all_there = true, is_view = false, writes = false;
  for (auto &value : given)
    of_each_tensor(value, [&](const at::Tensor &x) { in.push_back(x), all_there &= has_memory(x); });
  for (auto &argument : schema.arguments()) {
    writes |= is_written(argument);
    is_view |= argument.alias_info() && !argument.alias_info()->isWrite();
  }
  bool asks = schema.returns().empty() || !std::any_of(schema.returns().begin(), schema.returns().end(), [](auto &value) {
    return value.type()->isSubtypeOf(*c10::TensorType::get()) || value.type()->kind() == c10::TypeKind::ListType;
  });
  if (all_there || (is_view && !writes) || name == "aten::_fused_sdp_choice") {
    op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Fake), stack);
    bool is_free = is_view || in.empty() || asks || name.find("aten::empty") == 0;
    if (!is_free) {
      for (auto &value : torch::jit::last(*stack, schema.returns().size()))
        of_each_tensor(value, [&](const at::Tensor &x) { out.push_back(x); });
      in.insert(in.end(), out.begin(), out.end());
      tell(name, in);
    }
    return;
  }
  TORCH_CHECK(!asks || writes, name, " reads the values of a tensor that has a shape alone");
  torch::jit::drop(*stack, given.size());
  bool by_hand = true;
  std::vector<c10::IValue> found;
  if (name == "aten::convolution") found = convolution(given);
  else if (name == "aten::convolution_backward") found = convolution_backward(given);
  else if (name == "aten::_scaled_dot_product_flash_attention_for_cpu") found = attention(given);
  else if (name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward") found = attention_backward(given);
  else by_hand = false;
  if (!by_hand) {
    Tensors made;
    out = by_rule(name, given);
    if (out.empty()) found = results(op, given);
    else found.assign(out.begin(), out.end());
    for (size_t i = 0; out.empty() && i < found.size(); i++) {
      auto *alias = schema.returns()[i].alias_info();
      auto same = std::find_if(schema.arguments().begin(), schema.arguments().end(), [&](auto &argument) {
        return alias && argument.alias_info() && *argument.alias_info() == *alias;
      });
      if (same != schema.arguments().end()) {
        found[i] = given[same - schema.arguments().begin()];
        continue;
      }
      found[i] = mapped(found[i], [&](const at::Tensor &x) {
        made.push_back(without_memory(x.sizes(), x.strides(), x.scalar_type()));
        return made.back();
      });
    }
    out.insert(out.end(), made.begin(), made.end());
    int64_t flops = product_flops(name, in, out);
    // what is written in place is read too, unless it is only overwritten
    bool overwrites = name == "aten::copy_" || name == "aten::zero_" || name == "aten::fill_" ||
                      name == "lvdm::cast_all_";
    Tensors moved = in;
    moved.insert(moved.end(), out.begin(), out.end());
    if (writes && !overwrites)
      for (size_t i = 0; i < given.size(); i++)
        if (is_written(schema.arguments()[i])) of_each_tensor(given[i], [&](const at::Tensor &x) { moved.push_back(x); });
    bool is_free = name.find("aten::empty") == 0 || name == "aten::new_empty" || name == "aten::new_empty_strided" ||
                   name == "aten::resize_" || name == "aten::set_" || name == "aten::_unsafe_view";
    if (!is_free) tell(name, moved, flops);
  }
  for (auto &value : found) stack->push_back(std::move(value));
}

TORCH_LIBRARY_IMPL(_, Fake, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

}  // namespace

// Runs `call(call_data)`; of each kernel that its operations would start `take(data, …)` hears, in their order. *peak is the most
// bytes of tensors without memory that were there at a time, beyond those before.
extern "C" char *lvdm_by_shapes(void *call_data, void (*call)(void *), void *data, Take take, int64_t *peak) {
  return guarded([&] {
    auto own = std::make_shared<Shapes>(Shapes{take, data});
    struct Before {
      std::shared_ptr<Shapes> before;
      ~Before() { shapes = before; }
    } before{std::exchange(shapes, own)};
    c10::impl::IncludeDispatchKeyGuard guard(c10::DispatchKey::Fake);
    call(call_data);
    own->take = nullptr;  // tensors may outlive the call
    *peak = own->peak;
  });
}

// The bytes of tensors without memory that the call inside `lvdm_by_shapes` which runs now holds; 0 outside of one.
extern "C" int64_t lvdm_held_by_shapes() { return shapes ? shapes->held : 0; }

// *x <- a tensor of this shape without memory.
extern "C" char *lvdm_without_memory(const int64_t *sizes, int64_t dimensions, int kind, at::Tensor **x) {
  return guarded([&] {
    at::IntArrayRef shape(sizes, dimensions);
    auto strides = at::detail::defaultStrides(shape);
    *x = new at::Tensor(without_memory(shape, strides, static_cast<at::ScalarType>(kind)));
  });
}
