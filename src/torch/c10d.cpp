// Processes that train together: c10d's store and process groups, sums that autograd sees, and
// gradients that are reduced in buckets while the backward pass still runs.
// Errors as in core.cpp.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <atomic>
#include <chrono>
#include <mutex>
#include <sstream>
#include <thread>

#include "guarded.h"
#include "readback.h"

extern int FLAGS_caffe2_log_level;  // of libc10: what is below it is not printed

using Store = c10::intrusive_ptr<c10d::Store>;
using Backend = c10::intrusive_ptr<c10d::Backend>;
using Work = c10::intrusive_ptr<c10d::Work>;
using Milliseconds = std::chrono::milliseconds;

// ---- store ------------------------------------------------------------------------------------

namespace {

// While it lives, LibTorch prints nothing, and afterwards no warnings, unless the user has said what it prints.
struct Quiet {
  const bool unsaid = !getenv("TORCH_CPP_LOG_LEVEL");
  Quiet() { set(3); }
  ~Quiet() { set(2); }
  void set(int level) {
    if (unsaid) FLAGS_caffe2_log_level = level;
  }
};

}  // namespace

// Port 0 lets a server choose one.
extern "C" char *lvdm_store_open(const char *host, uint16_t port, bool server, int64_t timeout, Store **store,
                                 uint16_t *chosen) {
  return guarded([&] {
    // what goes wrong here, or later with a server that is gone, is an error that the caller tells in one line: no
    // warning with a backtrace beside it
    Quiet quiet;
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = Milliseconds(timeout);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *chosen = tcp->getPort();
    *store = new Store(std::move(tcp));
  });
}

extern "C" char *lvdm_store_under(const Store *store, const char *prefix, Store **under) {
  return guarded([&] { *under = new Store(c10::make_intrusive<c10d::PrefixStore>(prefix, *store)); });
}

extern "C" void lvdm_store_free(Store *store) { delete store; }

extern "C" char *lvdm_store_set(const Store *store, const char *key, const uint8_t *value, size_t length) {
  return guarded([&] { (*store)->set(key, std::vector<uint8_t>(value, value + length)); });
}

// Waits until there is such a key. The value is the caller's, to be freed with `free`.
extern "C" char *lvdm_store_get(const Store *store, const char *key, uint8_t **value, size_t *length) {
  return guarded([&] {
    auto found = (*store)->get(key);
    *length = found.size();
    *value = static_cast<uint8_t *>(malloc(std::max<size_t>(found.size(), 1)));
    std::copy(found.begin(), found.end(), *value);
  });
}

extern "C" char *lvdm_store_has(const Store *store, const char *key, bool *has) {
  return guarded([&] { *has = (*store)->check({key}); });
}

// ---- group ------------------------------------------------------------------------------------

namespace {

// A call under way: the tensor becomes the sum over ranks, or that of one of them.
struct Call {
  at::Tensor tensor;
  std::optional<int> root;          // whose tensor it becomes; none for the sum
  std::optional<Readback> by_host;  // of a GPU's tensor that goes by way of the host
  Work work;
};

struct Group {
  Backend host;
  Backend device;        // none without a GPU
  bool by_host = false;  // tensors of a GPU are summed and broadcast on the host
  int size;
  Milliseconds timeout;
  std::atomic<bool> failed = false;  // a call was not answered

  ~Group() {
    if (!device) return;
    // NCCL's threads end before what they use; where ranks are lost, what is under way never will
    try {
      if (failed)
        device->abort();
      else
        device->shutdown();
    } catch (const std::exception &) {  // nobody is left to be told
    }
  }

  c10d::Backend &of(const at::Tensor &tensor) const {
    if (!tensor.is_cuda()) return *host;
    TORCH_CHECK(device, "this group of ranks was opened for the CPU, and was given a tensor of a GPU");
    return *device;
  }

  // Runs a call of the backends, and remembers where it failed.
  template <typename F>
  auto call(F body) -> decltype(body()) {
    try {
      return body();
    } catch (...) {
      failed = true;
      throw;
    }
  }

  Call begin(const at::Tensor &tensor, std::optional<int> root = {}) {
    Call made{tensor, root, {}, {}};
    if (by_host && tensor.is_cuda())
      made.by_host.emplace(tensor);
    else
      made.work = start(tensor, root);
    return made;
  }

  // What is queued afterwards finds the result of a call. The host waits for it only where the tensor is its own: NCCL's
  // `wait` orders streams, and neither waits nor tells of an error. `settle` does, later.
  void wait(const Work &work, const at::Tensor &tensor) {
    call([&] { work->wait(); });
    if (!tensor.is_cuda()) return;
    std::lock_guard lock(mutex);
    queued.push_back(work);
  }

  // What has been queued so far is what `settle` will wait for.
  void mark() {
    std::lock_guard lock(mutex);
    marked.insert(marked.end(), queued.begin(), queued.end());
    queued.clear();
  }

  // Waits until the marked calls are answered. Called when a step's work is queued, for the calls before it, this keeps
  // no GPU waiting, and no rank ever waits in the driver for a sum that does not come.
  void settle() {
    std::vector<Work> works;
    {
      std::lock_guard lock(mutex);
      works.swap(marked);
    }
    call([&] {
      auto last = std::chrono::steady_clock::now() + timeout;
      for (auto &work : works) {
        while (!work->isCompleted()) {
          TORCH_CHECK(std::chrono::steady_clock::now() < last, "a sum over the GPUs has not come within ",
                      timeout.count() / 1000, " s");
          std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
        if (auto error = work->exception()) std::rethrow_exception(error);
      }
    });
  }

  // The tensor is the result when this is over. By way of the host that is copied back without waiting for it.
  void wait(Call &made) {
    if (!made.by_host) return wait(made.work, made.tensor);
    auto &host = made.by_host->wait();
    auto work = start(host, made.root);
    call([&] { work->wait(); });
    made.tensor.copy_(host, /*non_blocking=*/true);
  }

 private:
  std::mutex mutex;  // sums within a backward pass are queued by its thread
  std::vector<Work> queued, marked;

  Work start(const at::Tensor &tensor, std::optional<int> root) {
    std::vector<at::Tensor> list = {tensor};
    c10d::BroadcastOptions options;
    if (root) options.rootRank = *root;
    return call([&] { return root ? of(tensor).broadcast(list, options) : of(tensor).allreduce(list); });
  }
};

}  // namespace

using SharedGroup = std::shared_ptr<Group>;

using Devices = std::vector<std::shared_ptr<::gloo::transport::Device>>;

// Gloo listens on the interfaces that are named, between commas, else at the address.
extern "C" char *lvdm_gloo_listen(const char *interfaces, const char *address, Devices **devices) {
  return guarded([&] {
    auto made = std::make_unique<Devices>();
    if (interfaces) {
      std::stringstream names(interfaces);
      for (std::string name; std::getline(names, name, ',');)
        made->push_back(c10d::ProcessGroupGloo::createDeviceForInterface(name));
    } else {
      made->push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
    }
    *devices = made.release();
  });
}

extern "C" void lvdm_gloo_free(Devices *devices) { delete devices; }

extern "C" char *lvdm_group_open(const Store *store, int rank, int size, int64_t timeout, const Devices *devices,
                                 SharedGroup **group) {
  return guarded([&] {
    auto options = c10d::ProcessGroupGloo::Options::create(Milliseconds(timeout));
    options->devices = *devices;
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::PrefixStore>("gloo", *store), rank, size, options);
    auto made = std::make_shared<Group>();
    made->host = std::move(gloo);
    made->size = size;
    made->timeout = Milliseconds(timeout);
    *group = new SharedGroup(std::move(made));
  });
}

// Takes over a backend for tensors of a GPU.
extern "C" void lvdm_group_add_device(SharedGroup *group, Backend *device) {
  (*group)->device = std::move(*device);
  delete device;
}

// From here on Gloo sums and broadcasts a GPU's tensors too, by way of the host.
extern "C" void lvdm_group_sum_by_host(const SharedGroup *group) { (*group)->by_host = true; }

extern "C" void lvdm_group_free(SharedGroup *group) { delete group; }

extern "C" bool lvdm_group_failed(const SharedGroup *group) { return (*group)->failed; }

extern "C" char *lvdm_group_abort(const SharedGroup *group) {
  return guarded([&] {
    (*group)->host->abort();
    if ((*group)->device) (*group)->device->abort();
  });
}

extern "C" char *lvdm_group_sum(const SharedGroup *group, at::Tensor *tensor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto sum = (*group)->begin(*tensor);
    (*group)->wait(sum);
  });
}

extern "C" char *lvdm_group_broadcast(const SharedGroup *group, at::Tensor *tensor, int root) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto broadcast = (*group)->begin(*tensor, root);
    (*group)->wait(broadcast);
  });
}

// Waits until a GPU's calls so far are answered.
extern "C" char *lvdm_group_settle(const SharedGroup *group) {
  return guarded([&] {
    (*group)->mark();
    (*group)->settle();
  });
}

// all[r] <- the tensor of rank r
extern "C" char *lvdm_group_gather(const SharedGroup *group, at::Tensor *tensor, at::Tensor *const *all) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int rank = 0; rank < (*group)->size; rank++) outputs[0].push_back(*all[rank]);
    std::vector<at::Tensor> inputs = {*tensor};
    (*group)->wait((*group)->call([&] { return (*group)->of(*tensor).allgather(outputs, inputs); }), *tensor);
  });
}

// On rank `root`: all[r] <- the tensor of rank r. The others have no `all`.
extern "C" char *lvdm_group_gather_to(const SharedGroup *group, at::Tensor *tensor, int root, at::Tensor *const *all) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    c10d::GatherOptions options;
    options.rootRank = root;
    std::vector<std::vector<at::Tensor>> outputs(all ? 1 : 0);
    for (int rank = 0; all && rank < (*group)->size; rank++) outputs[0].push_back(*all[rank]);
    std::vector<at::Tensor> inputs = {*tensor};
    (*group)->call([&] { (*group)->of(*tensor).gather(outputs, inputs, options)->wait(); });
  });
}

// ---- a sum that autograd sees -------------------------------------------------------------------

namespace {

struct Handle : torch::CustomClassHolder {
  SharedGroup group;
  explicit Handle(SharedGroup group) : group(std::move(group)) {}
};

// y = sum of all ranks' x. Where the loss is the sum of the ranks' losses, so is the gradient by x.
struct SumOverRanks : torch::autograd::Function<SumOverRanks> {
  static at::Tensor sum(const SharedGroup &group, const at::Tensor &x) {
    auto total = x.detach().clone(at::MemoryFormat::Contiguous);
    auto under_way = group->begin(total);
    group->wait(under_way);
    // in x's order in memory: what is summed up afterwards rounds as it does without a group
    return at::empty_like(x).copy_(total);
  }

  static at::Tensor forward(torch::autograd::AutogradContext *context, const at::Tensor &x, SharedGroup group) {
    context->saved_data["group"] = c10::IValue::make_capsule(c10::make_intrusive<Handle>(group));
    return sum(group, x);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    auto handle = c10::static_intrusive_pointer_cast<Handle>(context->saved_data["group"].toCapsule());
    return {sum(handle->group, gradients[0]), at::Tensor()};
  }
};

}  // namespace

extern "C" char *lvdm_group_sum_with_gradient(const SharedGroup *group, const at::Tensor *x, at::Tensor **y) {
  return guarded([&] { *y = new at::Tensor(SumOverRanks::apply(*x, *group)); });
}

// ---- gradients in buckets -----------------------------------------------------------------------

namespace {

// Means of gradients over ranks. A bucket is sent as soon as the backward pass has made all its
// gradients, in the order of the buckets, which is the same on all ranks and in every step: so the
// sums are the same to the bit whether or not a run was interrupted. (c10d::Reducer orders its
// buckets anew after the first step, and cannot know which parameters a loss leaves out when the
// loss is made within the step.)
struct Buckets : std::enable_shared_from_this<Buckets> {
  struct Bucket {
    std::vector<size_t> members;
    at::Tensor flat;
    std::vector<at::Tensor> views;
    size_t waiting;
    bool again;  // a gradient changed after it was sent
    std::optional<Call> sum;
  };

  SharedGroup group;
  std::vector<at::Tensor> parameters;
  std::vector<size_t> bucket_of;
  std::vector<Bucket> buckets;
  std::vector<bool> ready;
  size_t next = 0, early = 0;
  bool armed = false;
  std::exception_ptr failure;
  std::mutex mutex;  // on a GPU the hooks run on the backward thread

  // Bucket b holds the next counts[b] parameters, from the last one to the first, and sums their gradients in flats[b].
  Buckets(SharedGroup group, std::vector<at::Tensor> list, const std::vector<at::Tensor> &flats, const int64_t *counts)
      : group(std::move(group)), parameters(std::move(list)), bucket_of(parameters.size()), ready(parameters.size()) {
    size_t next = parameters.size();
    for (size_t b = 0; b < flats.size(); b++) {
      Bucket bucket{{}, flats[b], {}, 0, false, {}};
      int64_t at = 0;
      for (int64_t k = 0; k < counts[b]; k++) {
        auto &p = parameters[--next];
        bucket_of[next] = b;
        bucket.members.push_back(next);
        bucket.views.push_back(bucket.flat.narrow(0, at, p.numel()).view(p.sizes()));
        at += p.numel();
      }
      buckets.push_back(std::move(bucket));
    }
  }

  struct Hook : torch::autograd::PostAccumulateGradHook {
    std::weak_ptr<Buckets> owner;
    size_t index;
    Hook(std::weak_ptr<Buckets> owner, size_t index) : owner(std::move(owner)), index(index) {}
    void operator()(const torch::autograd::Variable &) override {
      if (auto buckets = owner.lock()) buckets->made(index);
    }
  };

  void attach() {
    for (size_t i = 0; i < parameters.size(); i++)
      torch::autograd::impl::set_post_acc_grad_hooks(parameters[i], std::make_unique<Hook>(weak_from_this(), i));
  }

  ~Buckets() {
    for (auto &parameter : parameters) torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
  }

  void arm() {
    group->mark();
    std::lock_guard lock(mutex);
    next = early = 0;
    failure = nullptr;
    std::fill(ready.begin(), ready.end(), false);
    for (auto &bucket : buckets) {
      bucket.waiting = bucket.members.size();
      bucket.again = false;
      bucket.sum.reset();
    }
    armed = true;
  }

  void made(size_t index) {
    std::lock_guard lock(mutex);
    if (!armed) return;
    auto &bucket = buckets[bucket_of[index]];
    if (ready[index]) {
      bucket.again = true;
      return;
    }
    ready[index] = true;
    bucket.waiting--;
    // what goes wrong here is told by `finish`: an exception would leave the backward pass half done
    try {
      while (!failure && next < buckets.size() && buckets[next].waiting == 0) {
        send(buckets[next++]);
        early++;
      }
    } catch (...) {
      failure = std::current_exception();
    }
  }

  // The mean is the sum of parts, each of which is divided before it is rounded to the type in which the bucket travels.
  void send(Bucket &bucket) {
    at::NoGradGuard no_grad;
    auto ranks = at::scalar_tensor(int64_t{group->size}, at::kLong);
    for (size_t k = 0; k < bucket.members.size(); k++) {
      auto &gradient = parameters[bucket.members[k]].grad();
      // a parameter that took no part has a gradient of zero
      if (gradient.defined())
        at::div_out(bucket.views[k], gradient, ranks);
      else
        bucket.views[k].zero_();
    }
    bucket.sum = group->begin(bucket.flat);
  }

  // Sends what is left, waits for all and puts the means into the parameters' gradients.
  void finish() {
    std::lock_guard lock(mutex);
    at::NoGradGuard no_grad;
    armed = false;
    if (failure) std::rethrow_exception(failure);
    while (next < buckets.size()) send(buckets[next++]);
    for (auto &bucket : buckets) {
      group->wait(*bucket.sum);
      if (bucket.again) {
        send(bucket);
        group->wait(*bucket.sum);
      }
      bucket.sum.reset();
    }
    group->settle();
    for (auto &bucket : buckets)
      for (size_t k = 0; k < bucket.members.size(); k++) {
        auto &parameter = parameters[bucket.members[k]];
        auto &gradient = parameter.mutable_grad();
        if (gradient.defined())
          gradient.copy_(bucket.views[k]);
        else
          gradient = bucket.views[k].to(parameter.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
      }
  }
};

}  // namespace

using SharedBuckets = std::shared_ptr<Buckets>;

extern "C" char *lvdm_buckets_new(const SharedGroup *group, at::Tensor *const *parameters, int64_t count,
                                  at::Tensor *const *flats, const int64_t *counts, int64_t buckets_count,
                                  SharedBuckets **buckets) {
  return guarded([&] {
    std::vector<at::Tensor> list, memory;
    for (int64_t i = 0; i < count; i++) list.push_back(*parameters[i]);
    for (int64_t b = 0; b < buckets_count; b++) memory.push_back(*flats[b]);
    auto made = std::make_shared<Buckets>(*group, std::move(list), memory, counts);
    made->attach();
    *buckets = new SharedBuckets(std::move(made));
  });
}

extern "C" void lvdm_buckets_free(SharedBuckets *buckets) { delete buckets; }

extern "C" void lvdm_buckets_arm(const SharedBuckets *buckets) { (*buckets)->arm(); }

// What a reduction was.
struct Reduced {
  int64_t early, all, bytes;
};

extern "C" char *lvdm_buckets_finish(const SharedBuckets *buckets, Reduced *reduced) {
  return guarded([&] {
    (*buckets)->finish();
    int64_t bytes = 0;
    for (auto &bucket : (*buckets)->buckets) bytes += bucket.flat.nbytes();
    *reduced = {int64_t((*buckets)->early), int64_t((*buckets)->buckets.size()), bytes};
  });
}
