// How operators launch a kernel: on the CPU as a loop over its blocks, on a GPU by the driver, on Meta, where there are shapes
// alone, not at all.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block.h"

namespace operators {

using Launch = int (*)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void *stream,
                       void **arguments, void **extra);  // cuLaunchKernel
inline Launch launch_on_gpu = nullptr;
inline int (*make_current)(int device) = nullptr;  // the GPU for the driver's calls of this thread
constexpr int INVALID_CONTEXT = 201;

// A kernel as the driver knows it, by its name in `gpu`.
struct Compiled {
  const char *name;
  void **function;
};
template <class Kernel>
inline void *function_of = nullptr;

using gpu::bfloat16;

constexpr int64_t SHARED_BYTES = 48 << 10;  // that every GPU gives a block of its shared memory

// `shared` numbers of kind A for each block.
template <class A, class Kernel>
void launch(const Kernel &kernel, c10::Device device, int64_t blocks, int threads, int64_t shared) {
  if (blocks == 0) return;
  int64_t bytes = shared * static_cast<int64_t>(sizeof(A));
  TORCH_CHECK(blocks < int64_t{1} << 31 && threads <= gpu::MOST_THREADS && bytes <= SHARED_BYTES, "a kernel of ", blocks, " blocks of ",
              threads, " threads with ", bytes, " bytes");
  if (device.is_meta()) return;
  if (device.is_cpu()) {
    at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
      std::vector<double> memory((bytes + sizeof(double) - 1) / sizeof(double));
      for (int64_t at = from; at < to; at++) kernel(gpu::Block{at, blocks, threads, memory.data()});
    });
    return;
  }
  TORCH_CHECK(launch_on_gpu && function_of<Kernel>, "the kernels for GPUs are not compiled");
  c10::impl::VirtualGuardImpl guard(device.type());
  auto before = guard.exchangeDevice(device);
  void *stream = guard.getStreamNativeHandle(guard.getStream(device));
  void *arguments[] = {const_cast<Kernel *>(&kernel)};
  auto queue = [&] {
    return launch_on_gpu(function_of<Kernel>, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, static_cast<unsigned>(bytes),
                         stream, arguments, nullptr);
  };
  int failed = queue();
  if (failed == INVALID_CONTEXT && make_current(device.index()) == 0) failed = queue();
  guard.exchangeDevice(before);
  TORCH_CHECK(failed == 0, "CUDA error ", failed, " at the launch of a kernel of ", blocks, " blocks of ", threads, " threads");
}

template <class T>
struct memory_of {
  using type = T;
};
template <>
struct memory_of<bfloat16> {
  using type = at::BFloat16;
};

// A tensor of the device Meta has no memory.
template <class T>
const T *in(const at::Tensor &x) {
  return x.is_meta() ? nullptr : reinterpret_cast<const T *>(x.const_data_ptr<typename memory_of<T>::type>());
}
template <class T>
T *out(const at::Tensor &x) {
  return x.is_meta() ? nullptr : reinterpret_cast<T *>(x.mutable_data_ptr<typename memory_of<T>::type>());
}
template <class T>
const T *in(const std::optional<at::Tensor> &x) {
  return x && x->defined() ? in<T>(*x) : nullptr;
}

// body(T{}) for the kind that x has.
template <class Body>
void by_kind(const at::Tensor &x, Body body) {
  switch (x.scalar_type()) {
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(bfloat16{});
    case at::kDouble: return body(double{});
    default: TORCH_CHECK(false, "kernels for GPUs take float32, bfloat16 and float64, not ", x.scalar_type());
  }
}
// body(std::integral_constant) for how many values are moved as one: 16 bytes where all rows allow it.
template <class T, class Body>
void together(bool whole, Body body) {
  constexpr int most = std::is_same_v<T, float> ? 4 : std::is_same_v<T, bfloat16> ? 8 : 1;
  if (whole && most > 1) body(std::integral_constant<int, most>{});
  else body(std::integral_constant<int, 1>{});
}
inline bool is_aligned(std::initializer_list<std::optional<at::Tensor>> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const std::optional<at::Tensor> &x) {
    return !x || !x->defined() || x->is_meta() || reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0;
  });
}
inline int64_t in_a_pack(const at::Tensor &x) { return x.scalar_type() == at::kDouble ? 1 : 16 / x.element_size(); }
inline bool has(const std::optional<at::Tensor> &x) { return x && x->defined(); }

}  // namespace operators
