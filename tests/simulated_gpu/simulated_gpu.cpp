// A GPU that is not there: registers a second device under LibTorch's name CUDA, whose memory the host may not touch and
// whose kernels are the CPU's. On a machine without a GPU it shows whether a program puts every tensor where it belongs,
// never reads device memory from the host, waits for nothing, and keeps nothing in thread-local state that autograd's
// device threads would miss; and it counts kernels and the bytes they move. It records graphs as CUDA does: what is queued
// meanwhile is not done, may not come from the host or go there, and is done with the same memory at each launch. It says
// nothing of precision, cuDNN, streams or NCCL, and its times are a roofline, no measurement.
//
//   g++ -std=c++20 -O1 -shared -fPIC -I$LIBTORCH/include -I$LIBTORCH/include/torch/csrc/api/include simulated_gpu.cpp \
//       -o FOLDER/libtorch_cuda.so -L$LIBTORCH/lib -ltorch_cpu -lc10
//   LD_LIBRARY_PATH=FOLDER lvdm …     it is loaded in place of LibTorch's CUDA half
//
//   SIMULATED_GPUS=N            number of devices (1)
//   SIMULATED_GPU_OPEN=1        leaves device memory readable by the host: faster, and checks less
//   SIMULATED_GPU_COUNTS=FILE   at the end appends a line of JSON: what crossed between host and device, and what the host
//                               waited for (see Counts)
//   SIMULATED_GPU_LOG=1         at the end on stderr: the same; calls, bytes and products of every operation, and how long
//                               they would take at an H100's achievable rates (SIMULATED_GPU_TF32=1: float32 products as TF32)
//
// Kernels that LibTorch has for a GPU only are run in pieces here (`foreach`, group norm's parts), attention as one.
// Memory-bound work of a real GPU is at least the bytes counted; a host that starts kernels one by one needs some
// microseconds for each.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace {

bool flag(const char *name) {
  const char *value = std::getenv(name);
  return value != nullptr && *value != 0 && *value != '0';
}
c10::DeviceIndex devices() {
  static const int n = std::getenv("SIMULATED_GPUS") ? std::atoi(std::getenv("SIMULATED_GPUS")) : 1;
  return static_cast<c10::DeviceIndex>(n);
}
thread_local c10::DeviceIndex current = 0;

// ---- memory -------------------------------------------------------------------------------------

std::mutex &lock() {
  static auto *m = new std::mutex;
  return *m;
}

// Every block has two addresses. Where the program's pointers lead nothing may be touched; the bytes lie elsewhere, as
// far from there for all blocks, and the kernels of this file find them.
constexpr size_t PAGE = 4096, ROOM = size_t(1) << 38;  // of addresses, not of memory
struct Addresses {
  char *shown, *real;
  size_t next = 0;

  static char *reserve() {
    void *p = mmap(nullptr, ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "simulated GPU: there are no ", ROOM, " bytes of addresses");
    return static_cast<char *>(p);
  }
  Addresses() : shown(reserve()), real(flag("SIMULATED_GPU_OPEN") ? shown : reserve()) {}
};
Addresses &addresses() {
  static auto *a = new Addresses;
  return *a;
}

// Where the host may find what a pointer of either side leads to.
char *real(const void *p) {
  auto &[shown, real, next] = addresses();
  auto *c = const_cast<char *>(static_cast<const char *>(p));
  return c >= shown && c < shown + ROOM ? real + (c - shown) : c;
}

struct Block {
  size_t bytes;
  c10::DeviceIndex device;
};
std::map<char *, Block> &blocks() {
  static auto *b = new std::map<char *, Block>;
  return *b;
}
int64_t used[16], peak[16];

// Blocks that are free again, by the power of two that holds them.
std::vector<char *> spare[64];
int size_class(size_t bytes) { return 64 - __builtin_clzll(bytes - 1); }

void release(void *p) {
  if (p == nullptr) return;
  std::lock_guard guard(lock());
  auto it = blocks().find(static_cast<char *>(p));
  if (it == blocks().end()) return;
  auto [bytes, device] = it->second;
  used[device] -= static_cast<int64_t>(bytes);
  if (bytes > (1 << 20)) madvise(real(p), bytes, MADV_DONTNEED);
  spare[size_class(bytes)].push_back(it->first);
  blocks().erase(it);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Device device(c10::kCUDA, current);
    if (n == 0) return {nullptr, nullptr, &release, device};
    size_t bytes = (n + PAGE - 1) / PAGE * PAGE;
    std::lock_guard guard(lock());
    char *p;
    if (auto &same = spare[size_class(bytes)]; !same.empty()) {
      p = same.back();
      same.pop_back();
    } else {
      auto &[shown, real, next] = addresses();
      size_t whole = size_t(1) << size_class(bytes);
      TORCH_CHECK(next + whole <= ROOM && mprotect(real + next, whole, PROT_READ | PROT_WRITE) == 0,
                  "simulated GPU: out of memory: ", bytes, " bytes beside ", used[current]);
      p = shown + next;
      next += whole;
    }
    blocks()[p] = {bytes, current};
    used[current] += static_cast<int64_t>(bytes);
    peak[current] = std::max(peak[current], used[current]);
    return {p, p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, std::size_t n) const override;
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr &, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats{};
    stats.allocated_bytes[0].current = used[device];
    stats.allocated_bytes[0].peak = peak[device];
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { peak[device] = used[device]; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {size_t(60) << 30, size_t(80) << 30}; }
};
DeviceMemory device_memory;

void DeviceMemory::copy_data(void *to, const void *from, std::size_t n) const { default_copy_data(real(to), real(from), n); }

std::map<const char *, size_t> &pinned() {
  static auto *m = new std::map<const char *, size_t>;
  return *m;
}
bool is_pinned(const void *p) {
  std::lock_guard guard(lock());
  auto it = pinned().upper_bound(static_cast<const char *>(p));
  return it != pinned().begin() && (--it, p < it->first + it->second);
}
struct PinnedMemory final : c10::Allocator {
  static void release_pinned(void *p) {
    { std::lock_guard guard(lock()); pinned().erase(static_cast<char *>(p)); }
    std::free(p);
  }
  c10::DataPtr allocate(size_t n) override {
    size_t bytes = (n + 63) / 64 * 64 + 64;
    void *p = std::aligned_alloc(64, bytes);
    std::lock_guard guard(lock());
    pinned()[static_cast<char *>(p)] = bytes;
    return {p, p, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void *to, const void *from, std::size_t n) const override { default_copy_data(to, from, n); }
};
PinnedMemory pinned_memory;

// ---- what is counted ------------------------------------------------------------------------------

struct Counts {
  std::atomic<long> launches{0};          // operations that ran
  std::atomic<long> up{0}, down{0};       // copies from the host to the device, and back
  std::atomic<long> blocking_up{0};       // of these, for which the host waits: because the caller says so, or because
  std::atomic<long> blocking_down{0};     //   the host's memory is not pinned
  std::atomic<long> reads{0};             // values that the host reads to go on: scalars, and sizes of results
  std::atomic<long> autotuned{0};         // convolutions for which cuDNN would time its kernels
  std::atomic<long> tf32{0};              // convolutions whose float32 products might be rounded to TF32
  std::atomic<long> stalls{0};            // waits for an event after which nothing was launched, or for all
  std::atomic<long> graphs{0};            // launches of graphs, which are launches too
  std::atomic<long> allocations{0};       // of memory, but for graphs and inside of kernels
} counts;

// What a graph is made of: each does one of its kernels again, with the tensors that it had when it was recorded.
struct Recording {
  std::vector<std::function<void()>> kernels;
};
Recording *recording = nullptr;  // that is being made: by this thread or by those of autograd that it waits for

void count_launch() {
  if (recording == nullptr) counts.launches++;
}
void may_not_be_recorded(const char *what) {
  TORCH_CHECK(recording == nullptr, "CUDA error: ", what, " is not permitted when a stream is capturing");
}

// ---- device ---------------------------------------------------------------------------------------

// An event is the number of launches before it.
struct Event {
  long launches;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() < devices(), "CUDA error: invalid device ordinal ", int(d.index()));
    if (d.index() >= 0) current = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  c10::Stream stream(c10::Device d) const noexcept {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kCUDA, d.index() < 0 ? current : d.index()));
  }
  c10::Stream getStream(c10::Device d) const override { return stream(d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(d); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return stream(d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return stream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void destroyEvent(void *event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event *>(event); }
  void record(void **event, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event *>(*event)->launches = counts.launches;
  }
  void block(void *, const c10::Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices(); }
  bool queryStream(const c10::Stream &) const override { return true; }
  void synchronizeStream(const c10::Stream &) const override { counts.stalls++; }
  void synchronizeEvent(void *event) const override {
    if (event != nullptr && static_cast<Event *>(event)->launches == counts.launches) counts.stalls++;
  }
  void synchronizeDevice(const c10::DeviceIndex) const override { counts.stalls++; }
  void recordDataPtrOnStream(const c10::DataPtr &, const c10::Stream &) const override {}
  double elapsedTime(void *, void *, const c10::DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices(); }
  int getNumGPUs() const override { return devices(); }
  void deviceSynchronize(DeviceIndex) const override { counts.stalls++; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto b = current; current = d; return b; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { auto b = current; if (d >= 0) current = d; return b; }
  bool isPinnedPtr(const void *p) const override { return is_pinned(p); }
  Allocator *getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator *getCUDADeviceAllocator() const override { return &device_memory; }
  Device getDeviceFromPtr(void *p) const override {
    std::lock_guard guard(lock());
    auto it = blocks().upper_bound(static_cast<char *>(p));
    return {kCUDA, it == blocks().begin() ? DeviceIndex(0) : (--it)->second.device};
  }
  std::string showConfig() const override { return "a simulated GPU"; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---- operations -----------------------------------------------------------------------------------

namespace {

struct Cost {
  long calls = 0;
  double bytes = 0, flops = 0, seconds = 0;
};
std::map<std::string, Cost> &ran() {
  static auto *m = new std::map<std::string, Cost>;
  return *m;
}
// what an H100 reaches in practice: bytes a second, products a second, seconds to start a kernel
constexpr double MEMORY = 2.6e12, START = 2e-6;
double rate(at::ScalarType kind) {
  return kind == at::kBFloat16 || kind == at::kHalf ? 600e12 : kind == at::kDouble ? 50e12 : flag("SIMULATED_GPU_TF32") ? 300e12 : 45e12;
}
void charge(const std::string &name, double bytes, double flops, at::ScalarType kind) {
  std::lock_guard guard(lock());
  auto &cost = ran()[name];
  cost.calls++;
  cost.bytes += bytes;
  cost.flops += flops;
  cost.seconds += START + std::max(bytes / MEMORY, flops / rate(kind));
}
struct AtEnd {
  ~AtEnd() {
    char line[640];
    int length = std::snprintf(line, sizeof line,
                               "{\"launches\": %ld, \"up\": %ld, \"blocking_up\": %ld, \"down\": %ld, \"blocking_down\": %ld, "
                               "\"reads\": %ld, \"stalls\": %ld, \"autotuned\": %ld, \"tf32\": %ld, \"graphs\": %ld, "
                               "\"allocations\": %ld}\n",
                               counts.launches.load(), counts.up.load(), counts.blocking_up.load(), counts.down.load(),
                               counts.blocking_down.load(), counts.reads.load(), counts.stalls.load(),
                               counts.autotuned.load(), counts.tf32.load(), counts.graphs.load(), counts.allocations.load());
    if (const char *path = std::getenv("SIMULATED_GPU_COUNTS")) {
      // in one call: several processes may write to one file
      if (int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644); file >= 0) {
        if (write(file, line, length) != length) std::perror(path);
        close(file);
      }
    }
    if (!flag("SIMULATED_GPU_LOG")) return;
    std::fprintf(stderr, "simulated GPU: %s", line);
    Cost all;
    for (auto &[name, c] : ran()) {
      std::fprintf(stderr, "simulated GPU: %8ld calls %10.3f GB %12.3f GFLOP %10.3f ms %s\n", c.calls, c.bytes / 1e9, c.flops / 1e9,
                   c.seconds * 1e3, name.c_str());
      all.calls += c.calls, all.bytes += c.bytes, all.flops += c.flops, all.seconds += c.seconds;
    }
    std::fprintf(stderr, "simulated GPU: in all %ld calls %.3f GB %.3f GFLOP %.3f ms\n", all.calls, all.bytes / 1e9, all.flops / 1e9,
                 all.seconds * 1e3);
  }
} at_end;

at::Tensor host_view(const at::Tensor &t) {
  if (t.is_cpu()) return t;
  auto *p = real(t.storage().data()) + t.storage_offset() * t.element_size();
  return at::from_blob(p, t.sizes(), t.strides(), t.options().device(at::kCPU));
}

// Kernels run on copies: what crosses there is no traffic of the program's.
thread_local int in_a_kernel = 0;

at::Tensor &move(at::Tensor &to, const at::Tensor &from, bool non_blocking) {
  if (to.numel() == 0) return to;
  if (in_a_kernel) {
  } else if (to.is_cpu() && from.is_cuda()) {
    may_not_be_recorded("a copy to the host");
    counts.down++;
    if (!non_blocking || !is_pinned(to.storage().data())) counts.blocking_down++;
  } else if (to.is_cuda() && from.is_cpu()) {
    may_not_be_recorded("a copy from the host");
    counts.up++;
    if (!non_blocking || !is_pinned(from.storage().data())) counts.blocking_up++;
  } else {
    count_launch();
    if (recording) recording->kernels.push_back([to, from]() mutable { move(to, from, true); });
  }
  if (to.is_cuda() && from.is_cuda() && flag("SIMULATED_GPU_LOG")) charge("aten::copy_", double(to.nbytes()) + from.numel() * from.element_size(), 0, at::kFloat);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::NoGradGuard no_grad;
  auto target = host_view(to);
  target.copy_(host_view(from));
  return to;
}

void count_allocation() {
  if (recording == nullptr && in_a_kernel == 0) counts.allocations++;
}
at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  count_allocation();
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  count_allocation();
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}
at::Tensor as_strided(const at::Tensor &self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
at::Tensor view(const at::Tensor &self, at::IntArrayRef size) { return at::native::view(self, size); }
at::Tensor reshape_alias(const at::Tensor &self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
at::Tensor unfold(const at::Tensor &self, int64_t d, int64_t size, int64_t step) {
  return at::native::unfold(self, d, size, step);
}
const at::Tensor &resize_(const at::Tensor &self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto *impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (impl->storage_offset() + impl->numel()) * self.element_size();
  auto &storage = impl->unsafe_storage();
  if (bytes > storage.nbytes()) {
    auto old = storage.nbytes();
    c10::DeviceGuard guard(self.device());
    auto fresh = device_memory.allocate(bytes);
    if (old > 0) std::memcpy(real(fresh.get()), real(storage.data()), old);
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
  if (format && *format != at::MemoryFormat::Contiguous) impl->empty_tensor_restride(*format);
  return self;
}
at::Tensor &set_storage(at::Tensor &self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto *impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) impl->set_sizes_contiguous(size);
  else impl->set_sizes_and_strides(size, stride);
  return self;
}
at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool non_blocking) {
  auto target = to;
  return move(target, from, non_blocking);
}
at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
  if (to.sizes() != from.sizes()) resize_(to, from.sizes(), std::nullopt);
  auto target = to;
  return move(target, from, true);
}
at::Tensor &copy_(at::Tensor &self, const at::Tensor &src, bool non_blocking) {
  auto from = src.sizes() == self.sizes() ? src : src.expand(self.sizes());
  return move(self, from, non_blocking);
}
at::Scalar local_scalar(const at::Tensor &self) {
  may_not_be_recorded("a read of a value");
  counts.reads++;
  return host_view(self).item();
}

const std::set<std::string> &may_mix() {
  static const std::set<std::string> names = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                              "aten::index_put", "aten::_to_copy"};
  return names;
}

// On a GPU the host waits for these: the sizes of their results, or the results themselves, depend on values.
bool reads_values(const std::string &name, const std::vector<at::Tensor> &all) {
  static const std::set<std::string> names = {
      "aten::nonzero",            "aten::masked_select", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::bincount",      "aten::equal",    "aten::repeat_interleave.Tensor"};
  if (names.count(name)) return true;
  if (name.find("aten::index.") != 0 && name.find("aten::index_put") != 0 && name.find("aten::_index_put") != 0) return false;
  for (size_t i = 1; i < all.size(); i++)
    if (all[i].scalar_type() == at::kBool && all[i].dim() > 0) return true;
  return false;
}

// Puts what a kernel of a graph gave this time where it gave it when it was recorded.
void put(const at::Tensor &there, const at::Tensor &now) {
  if (!now.defined() || now.unsafeGetTensorImpl() == there.unsafeGetTensorImpl()) return;
  host_view(there).copy_(host_view(now));
}
void put(const c10::IValue &there, const c10::IValue &now) {
  if (now.isTensor()) return put(there.toTensor(), now.toTensor());
  if (!now.isTensorList()) return;
  auto tensors = now.toTensorVector(), places = there.toTensorVector();
  for (size_t i = 0; i < tensors.size(); i++) put(places[i], tensors[i]);
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  auto name = toString(op.operator_name());
  double bytes = 0, flops = 0;
  auto kind = at::kFloat;
  std::vector<at::Tensor> all;  // its tensors, first those that come in
  std::optional<c10::Device> device;
  auto look = [&](const at::Tensor &t, bool &host) {
    if (!t.defined()) return;
    all.push_back(t);
    if (t.is_cuda()) {
      TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but ", name,
                  " got ", *device, " and ", t.device());
      device = t.device();
    } else if (t.dim() > 0) {
      host = true;
    }
  };
  bool host = false;
  auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (auto &v : arguments) {
    if (v.isTensor()) look(v.toTensor(), host);
    else if (v.isTensorList()) for (const at::Tensor &t : v.toTensorList()) look(t, host);
    else if (v.isOptionalTensorList()) for (auto &&t : v.toOptionalTensorVector()) if (t) look(*t, host);
  }
  TORCH_CHECK(!(host && device) || may_mix().count(name),
              "Expected all tensors to be on the same device, but ", name, " got cpu and ", *device);
  if (host && device) {  // as indices: they go to the device first
    may_not_be_recorded("a copy from the host");
    counts.up++;
    counts.blocking_up++;
  }
  if (reads_values(name, all)) {
    may_not_be_recorded("a read of a value");
    counts.reads++;
  }
  count_launch();
  if (name == "aten::convolution") {
    counts.autotuned += at::globalContext().benchmarkCuDNN();
    counts.tf32 += at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  }
  auto given = recording ? arguments.vec() : std::vector<c10::IValue>();
  in_a_kernel++;
  try {
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  } catch (...) {
    in_a_kernel--;
    throw;
  }
  in_a_kernel--;
  if (recording && in_a_kernel == 0) {
    auto found = torch::jit::last(*stack, op.schema().returns().size()).vec();
    recording->kernels.push_back([op, given, found] {
      torch::jit::Stack again(given);
      at::native::cpu_fallback(op, &again, /*error_on_views=*/true);
      for (size_t i = 0; i < found.size(); i++) put(found[i], again[i]);
    });
  }
  if (!flag("SIMULATED_GPU_LOG") || all.empty()) return;
  size_t came = all.size();
  for (auto &v : torch::jit::last(*stack, op.schema().returns().size())) {
    if (v.isTensor() && v.toTensor().defined()) all.push_back(v.toTensor());
    else if (v.isTensorList()) for (const at::Tensor &t : v.toTensorList()) all.push_back(t);
  }
  std::set<void *> seen;
  for (auto &t : all) {
    bool floating = at::isFloatingType(t.scalar_type());
    if (t.is_cuda() && seen.insert(t.unsafeGetTensorImpl()).second) bytes += t.numel() * t.element_size();
    if (floating && &t == &all[0]) kind = t.scalar_type();
  }
  auto n = [&](size_t i) { return double(all[i].numel()); };
  if (name.find("aten::convolution_backward") == 0 && came >= 3) {  // gradient, input, weight
    flops = 2 * 2 * n(0) * n(2) / all[2].size(0);
  } else if (name == "aten::convolution" && came >= 2 && all.size() > came) {
    flops = 2 * n(came) * n(1) / all[1].size(0);
  } else if ((name.find("aten::mm") == 0 || name.find("aten::bmm") == 0) && came >= 2) {
    flops = 2 * n(0) * all[1].size(-1);
  } else if ((name.find("aten::addmm") == 0 || name.find("aten::baddbmm") == 0) && came >= 3) {
    flops = 2 * n(1) * all[2].size(-1);
  }
  charge(name, bytes, flops, kind);
}

// Its schema does not say that it moves the running statistics, which the fallback would then leave as they were.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor &x, const std::optional<at::Tensor> &weight, const std::optional<at::Tensor> &bias,
    const std::optional<at::Tensor> &mean, const std::optional<at::Tensor> &variance, bool training, double momentum,
    double eps) {
  if (!mean || !mean->defined() || !variance || !variance->defined())
    return at::_native_batch_norm_legit(x, weight, bias, training, momentum, eps);
  auto running_mean = *mean, running_variance = *variance;
  return at::_native_batch_norm_legit(x, weight, bias, running_mean, running_variance, training, momentum, eps);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("native_batch_norm", batch_norm);
  // composed for all devices, of parts that only real ones have
  for (auto *name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// ---- attention in one kernel, as a GPU has it --------------------------------------------------------

int64_t one_kernel(const at::Tensor &, const at::Tensor &, const at::Tensor &, const std::optional<at::Tensor> &, double,
                   bool, std::optional<double>, bool) {
  return 4;  // sdp::SDPBackend::overrideable
}
at::Tensor to_host(const at::Tensor &t) {
  if (!t.defined()) return t;
  auto copy = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
  at::NoGradGuard no_grad;
  copy.copy_(host_view(t));
  return copy;
}
at::Tensor to_gpu(const at::Tensor &t, c10::Device device) {
  if (!t.defined()) return t;
  auto copy = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, device, {});
  at::NoGradGuard no_grad;
  host_view(copy).copy_(t);
  return copy;
}
void charge_attention(const char *name, const at::Tensor &q, const at::Tensor &k, double passes) {
  count_launch();
  if (flag("SIMULATED_GPU_LOG"))
    charge(name, passes * 2 * (q.nbytes() + k.nbytes()), passes * 4 * double(q.numel()) * k.size(-2), q.scalar_type());
}
using Attention = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>;
Attention attend(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const std::optional<at::Tensor> &bias,
                 double dropout, bool causal, bool, std::optional<double> scale) {
  TORCH_CHECK(q.device() == k.device() && q.device() == v.device(), "Expected all tensors to be on the same device");
  std::optional<at::Tensor> host_bias;
  if (bias && bias->defined()) host_bias = to_host(*bias);
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(to_host(q), to_host(k), to_host(v), dropout, causal, host_bias, scale);
  charge_attention("attention", q, k, 1);
  auto device = q.device();
  auto found = std::tuple(to_gpu(out, device), to_gpu(lse, device));
  if (recording)
    recording->kernels.push_back([=] {
      auto again = attend(q, k, v, bias, dropout, causal, false, scale);
      put(std::get<0>(found), std::get<0>(again)), put(std::get<1>(found), std::get<1>(again));
    });
  return {std::get<0>(found), std::get<1>(found), at::Tensor(), at::Tensor(), q.size(2), k.size(2), at::Tensor(), at::Tensor(), at::Tensor()};
}
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attend_backward(
    const at::Tensor &gradient, const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &bias,
    std::array<bool, 4>, const at::Tensor &out, const at::Tensor &lse, const at::Tensor &, const at::Tensor &, c10::SymInt,
    c10::SymInt, double dropout, bool causal, const at::Tensor &, const at::Tensor &, std::optional<double> scale) {
  std::optional<at::Tensor> host_bias;
  if (bias.defined()) host_bias = to_host(bias);
  auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      to_host(gradient), to_host(q), to_host(k), to_host(v), to_host(out), to_host(lse), dropout, causal, host_bias, scale);
  charge_attention("attention backward", q, k, 2.5);
  auto device = q.device();
  std::array<at::Tensor, 3> found{to_gpu(gq, device), to_gpu(gk, device), to_gpu(gv, device)};
  if (recording)
    recording->kernels.push_back([=] {
      at::Tensor none;
      auto [q_again, k_again, v_again, unused] =
          attend_backward(gradient, q, k, v, bias, {}, out, lse, none, none, q.size(2), k.size(2), dropout, causal, none, none, scale);
      put(found[0], q_again), put(found[1], k_again), put(found[2], v_again);
    });
  return {found[0], found[1], found[2], at::Tensor()};
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", attend);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attend_backward);
}

// ---- graphs, as `src/torch/graph.cpp` has them ---------------------------------------------------------

// All memory as it was: what is recorded is not done.
struct Untouched {
  std::map<char *, std::vector<char>> before;

  Untouched() {
    std::lock_guard guard(lock());
    for (auto &[p, block] : blocks()) before[p].assign(real(p), real(p) + block.bytes);
  }
  ~Untouched() {
    std::lock_guard guard(lock());
    for (auto &[p, bytes] : before)
      if (auto it = blocks().find(p); it != blocks().end() && it->second.bytes == bytes.size())
        std::memcpy(real(p), bytes.data(), bytes.size());
  }
};
struct Ready {
  Ready() { c10::SetAllocator(c10::kCUDA, &device_memory, 100); }
} ready;

}  // namespace

extern "C" char *lvdm_graph_capture(int, void *data, char *(*body)(void *), Recording **graph) {
  auto made = std::make_unique<Recording>();
  char *words;
  {
    Untouched memory;
    recording = made.get();
    words = body(data);
    recording = nullptr;
  }
  if (words == nullptr) *graph = made.release();
  return words;
}
extern "C" char *lvdm_graph_replay(Recording *graph) {
  counts.launches++, counts.graphs++;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::AutoDispatchBelowADInplaceOrView below;
  at::NoGradGuard no_grad;
  in_a_kernel++;
  char *words = nullptr;
  try {
    for (auto &kernel : graph->kernels) kernel();
  } catch (const std::exception &error) {
    words = strdup(error.what());
  }
  in_a_kernel--;
  return words;
}
extern "C" void lvdm_graph_free(Recording *graph) { delete graph; }

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &one_kernel)
}