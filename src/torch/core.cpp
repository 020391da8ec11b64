// What LibTorch has and tch does not expose. Every function returns nullptr, or an error's text
// that the caller frees with `free`. Tensors cross as `at::Tensor *`, owned by the caller.
#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/Utils.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "gpu/rounded_weights.h"
#include "guarded.h"
#include "readback.h"

namespace {

std::vector<at::Tensor> list(at::Tensor *const *tensors, int64_t count) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (int64_t i = 0; i < count; i++) result.push_back(*tensors[i]);
  return result;
}

}  // namespace

// ---- optimizer: one call for all parameters --------------------------------------------------

extern "C" char *lvdm_fused_adam(
    at::Tensor *const *parameters, at::Tensor *const *gradients, at::Tensor *const *first_moments,
    at::Tensor *const *second_moments, const at::Tensor *steps, int64_t count, bool decoupled,
    double learning_rate, double beta1, double beta2, double weight_decay, double eps, const at::Tensor *left_out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(parameters, count), g = list(gradients, count), m = list(first_moments, count),
         v = list(second_moments, count);
    std::vector<at::Tensor> s(count, *steps);  // one count for all
    std::optional<at::Tensor> none, out;
    if (left_out != nullptr) out = *left_out;
    if (decoupled)
      at::_fused_adamw_(p, g, m, v, {}, s, learning_rate, beta1, beta2, weight_decay, eps, false, false, none, out);
    else
      at::_fused_adam_(p, g, m, v, {}, s, learning_rate, beta1, beta2, weight_decay, eps, false, false, none, out);
  });
}

// a <- a + weight * (b - a), all tensors at once
extern "C" char *lvdm_foreach_lerp(at::Tensor *const *a, at::Tensor *const *b, int64_t count, double weight) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_lerp_(list(a, count), list(b, count), weight);
  });
}

extern "C" char *lvdm_foreach_mul(at::Tensor *const *a, int64_t count, const at::Tensor *factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(a, count), *factor);
  });
}

// gradients are forgotten: the next backward pass hands its own over instead of adding them to zeros
extern "C" char *lvdm_clear_gradients(at::Tensor *const *parameters, int64_t count) {
  return guarded([&] {
    for (int64_t i = 0; i < count; i++) parameters[i]->mutable_grad().reset();
  });
}

// *norm <- the L2 norm over the elements of all tensors, a scalar on their device
extern "C" char *lvdm_global_norm(at::Tensor *const *a, int64_t count, at::Tensor **norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *norm = new at::Tensor(at::linalg_vector_norm(at::stack(at::_foreach_norm(list(a, count))), 2));
  });
}

// ---- between host and device without waiting --------------------------------------------------

// *y <- a host tensor on a GPU, by way of pinned memory
extern "C" char *lvdm_upload(const at::Tensor *x, int device, at::Tensor **y) {
  return guarded([&] {
    at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    *y = new at::Tensor(x->pin_memory().to(gpu, x->scalar_type(), /*non_blocking=*/true));
  });
}

// *y <- a host tensor in pinned memory
extern "C" char *lvdm_pin(const at::Tensor *x, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(x->pin_memory()); });
}

// *y <- so many bytes of pinned memory
extern "C" char *lvdm_pinned(int64_t bytes, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(true))); });
}

// Copies from a GPU into pinned memory without waiting for it.
extern "C" char *lvdm_begin_copy(const at::Tensor *from, at::Tensor *to) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    to->copy_(*from, /*non_blocking=*/true);
  });
}

// Starts the way of a tensor to the host, without waiting for what computes it.
extern "C" char *lvdm_readback(const at::Tensor *values, Readback **readback) {
  return guarded([&] { *readback = new Readback(*values); });
}

// *values is the tensor, when it has arrived
extern "C" char *lvdm_readback_wait(const Readback *readback, at::Tensor **values) {
  return guarded([&] { *values = new at::Tensor(readback->wait()); });
}

extern "C" void lvdm_readback_free(Readback *readback) { delete readback; }

// ---- autocast ---------------------------------------------------------------------------------

extern "C" void lvdm_autocast_set(int device_type, bool enabled, bool bfloat16) {
  auto device = static_cast<at::DeviceType>(device_type);
  at::autocast::set_autocast_enabled(device, enabled);
  if (bfloat16) at::autocast::set_autocast_dtype(device, at::kBFloat16);
  if (!enabled) at::autocast::clear_cache();
}

extern "C" bool lvdm_autocast_get(int device_type) {
  return at::autocast::is_autocast_enabled(static_cast<at::DeviceType>(device_type));
}

// ---- recomputation of activations ---------------------------------------------------------------

namespace {

// A Rust closure from tensors to one tensor. `call` returns nullptr when the closure panicked, and its words, to be
// freed.
using Call = at::Tensor *(*)(void *data, at::Tensor *const *inputs, int64_t count, char **words);

struct Body {
  void *data;
  Call call;
  void (*drop)(void *data);
  Body(void *data, Call call, void (*drop)(void *))
      : data(data), call(call), drop(drop) {}
  Body(const Body &) = delete;
  ~Body() { drop(data); }

  at::Tensor operator()(const std::vector<at::Tensor> &inputs) const {
    std::vector<at::Tensor *> pointers;
    for (auto &input : inputs) pointers.push_back(new at::Tensor(input));
    char *words = nullptr;
    at::Tensor *output = call(data, pointers.data(), pointers.size(), &words);
    if (output == nullptr) {
      std::string text = words == nullptr ? "a recomputed block panicked" : words;
      free(words);
      TORCH_CHECK(false, text);
    }
    at::Tensor result = *output;
    delete output;
    return result;
  }
};

struct AutocastState {
  static constexpr at::DeviceType devices[2] = {at::kCPU, at::kCUDA};
  bool enabled[2];
  AutocastState() {
    for (int i = 0; i < 2; i++) enabled[i] = at::autocast::is_autocast_enabled(devices[i]);
  }
  void apply() const {
    for (int i = 0; i < 2; i++) at::autocast::set_autocast_enabled(devices[i], enabled[i]);
  }
};

// Runs `body` without keeping its activations, and once more in the backward pass. Gradients of
// the parameters that `body` uses are accumulated there, as in an ordinary backward pass. What it takes of the weights that a
// pass has rounded, the second run rounds at once.
struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(torch::autograd::AutogradContext *context, std::shared_ptr<Body> body,
                            at::TensorList inputs) {
    context->save_for_backward(inputs.vec());
    context->saved_data["body"] = c10::IValue::make_capsule(c10::make_intrusive<Held>(std::move(body)));
    auto kept = held(context);
    struct Learning {
      RoundedWeights *of = rounded_weights, *before = nullptr;
      explicit Learning(RoundedWeights *part) { if (of) before = std::exchange(of->part, part); }
      Learning(const Learning &) = delete;
      ~Learning() { if (of) of->part = before; }
    } learning(&kept->weights);
    return (*kept->body)({inputs.begin() + 1, inputs.end()});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto kept = held(context);
    std::vector<at::Tensor> inputs;
    at::Tensor output;
    {
      at::AutoGradMode with_grad(true);
      Inside inside(*kept);
      kept->weights.begin();
      for (size_t i = 1; i < saved.size(); i++)
        inputs.push_back(saved[i].detach().set_requires_grad(saved[i].requires_grad()));
      output = (*kept->body)(inputs);
    }
    // a block with nothing that is trained, behind inputs that are not: there is no gradient to make
    if (output.requires_grad()) torch::autograd::backward({output}, {gradients[0]});
    torch::autograd::variable_list result = {at::Tensor(), at::Tensor()};
    for (auto &input : inputs) result.push_back(input.grad());
    return result;
  }

  struct Held : torch::CustomClassHolder {
    std::shared_ptr<Body> body;
    AutocastState autocast;
    bool rounds = rounded_weights != nullptr;
    RoundedWeights weights;
    explicit Held(std::shared_ptr<Body> body) : body(std::move(body)) {}
  };

  // While it lives, this thread's precision is that of the first run, and the weights that it took are rounded.
  struct Inside {
    Held &kept;
    AutocastState outside;
    RoundedWeights *before;
    explicit Inside(Held &kept) : kept(kept), before(std::exchange(rounded_weights, kept.rounds ? &kept.weights : nullptr)) {
      kept.autocast.apply();
    }
    Inside(const Inside &) = delete;
    ~Inside() {
      kept.weights.forget();
      outside.apply();
      rounded_weights = before;
    }
  };

  static c10::intrusive_ptr<Held> held(torch::autograd::AutogradContext *context) {
    return c10::static_intrusive_pointer_cast<Held>(context->saved_data["body"].toCapsule());
  }
};

}  // namespace

extern "C" char *lvdm_recompute(void *data, Call call, void (*drop)(void *), at::Tensor *const *inputs,
                                int64_t count, at::Tensor **output) {
  auto body = std::make_shared<Body>(data, call, drop);
  return guarded([&] {
    // the first input only makes autograd record the block when no other input needs a gradient
    torch::autograd::variable_list all = {at::zeros({}).set_requires_grad(true)};
    for (int64_t i = 0; i < count; i++) all.push_back(*inputs[i]);
    // as a TensorList: autograd does not look into a vector, and would record nothing
    *output = new at::Tensor(Recompute::apply(body, at::TensorList(all)));
  });
}

// ---- memory: what tensors of this thread hold on the host -----------------------------------------

namespace {
struct HostMemory : c10::MemoryReportingInfoBase {
  int64_t now = 0, peak = 0;
  void reportMemoryUsage(void *, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    now += size;
    peak = std::max(peak, now);
  }
  bool memoryProfilingEnabled() const override { return true; }
};
}  // namespace

// Runs `call(data)`; *peak is the most bytes of host tensors that it held at a time, beyond those before.
extern "C" char *lvdm_peak_host_memory(void *data, void (*call)(void *), int64_t *peak) {
  return guarded([&] {
    auto memory = std::make_shared<HostMemory>();
    // of memory that was there before and is freed meanwhile, which does not count, LibTorch warns
    struct Quiet {
      int before = FLAGS_caffe2_log_level;
      Quiet() { FLAGS_caffe2_log_level = std::max(before, c10::GLOG_ERROR); }
      ~Quiet() { FLAGS_caffe2_log_level = before; }
    };
    {
      Quiet quiet;
      c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
      call(data);
    }
    *peak = memory->peak;
  });
}

// *peak is the most bytes of tensors that a GPU held since the last reset
extern "C" char *lvdm_device_memory(int index, bool reset, int64_t *peak) {
  return guarded([&] {
    auto *allocator = at::getDeviceAllocator(at::kCUDA);
    if (reset) allocator->resetPeakStats(static_cast<c10::DeviceIndex>(index));
    // of several kinds of statistics the first one is their sum
    *peak = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index)).allocated_bytes[0].peak;
  });
}

// ---- what the machine can do ------------------------------------------------------------------------

// *text <- "name\ncapability\nfeature feature …": the processor's name, the vector instructions that LibTorch's own
// kernels use, and the processor's features as LibTorch names them. To be freed.
extern "C" char *lvdm_processor(char **text) {
  return guarded([&] {
    std::string name, features;
    for (auto &[key, value] : at::cpu::get_cpu_capabilities()) {
      if (key == "cpu_name") name = value.toStringRef();
      if (value.isBool() && value.toBool()) features += key + " ";
    }
    *text = strdup((name + "\n" + at::get_cpu_capability() + "\n" + features).c_str());
  });
}

// Whether oneDNN is on, and *bfloat16 <- whether it computes in bfloat16 on this processor: what LibTorch asks before
// it calls oneDNN itself.
extern "C" char *lvdm_onednn(bool *on, bool *bfloat16) {
  return guarded([&] {
    *on = at::globalContext().userEnabledMkldnn() && at::hasMKLDNN();
    auto asks = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    torch::jit::Stack answer;
    if (asks) asks->callBoxed(answer);
    *bfloat16 = *on && !answer.empty() && answer.front().toBool();
  });
}

extern "C" void lvdm_attention_kernels(bool *flash, bool *memory_efficient, bool *math, bool *cudnn) {
  auto &context = at::globalContext();
  *flash = context.userEnabledFlashSDP();
  *memory_efficient = context.userEnabledMemEfficientSDP();
  *math = context.userEnabledMathSDP();
  *cudnn = context.userEnabledCuDNNSDP();
}

extern "C" void lvdm_deterministic() {
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);  // read when cuBLAS starts
  at::globalContext().setDeterministicAlgorithms(true, false);
  at::globalContext().setDeterministicCuDNN(true);
  at::globalContext().setBenchmarkCuDNN(false);
}

extern "C" bool lvdm_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

extern "C" bool lvdm_autotunes() { return at::globalContext().benchmarkCuDNN(); }

// cuDNN times its kernels and takes the fastest, or it takes those alone whose results repeat to the bit.
extern "C" void lvdm_autotune(bool on) {
  at::globalContext().setBenchmarkCuDNN(on);
  at::globalContext().setDeterministicCuDNN(!on);
}

extern "C" bool lvdm_tf32_is_allowed() { return at::globalContext().allowTF32CuDNN(); }

extern "C" void lvdm_allow_tf32(bool allow) {
  at::globalContext().setAllowTF32CuBLAS(allow);
  at::globalContext().setAllowTF32CuDNN(allow);
}
