// NCCL, in a shared object of its own that is opened after libtorch_cuda: a binary built beside
// LibTorch for the CPU must start without it.
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "guarded.h"

extern "C" char *lvdm_nccl_open(const c10::intrusive_ptr<c10d::Store> *store, int rank, int size, int64_t timeout,
                                int device, c10::intrusive_ptr<c10d::Backend> **backend) {
  return guarded([&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto options = c10d::ProcessGroupNCCL::Options::create();
    // far behind the limits of the exchange on the host and of `Group::settle`, whose errors name a rank: at this one
    // NCCL's watchdog ends the process
    options->timeout = 2 * std::chrono::milliseconds(timeout) + std::chrono::minutes(10);
    auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(
        c10::make_intrusive<c10d::PrefixStore>("nccl", *store), rank, size, options);
    at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    nccl->setBoundDeviceId(gpu);
    nccl->eagerConnectSingleDevice(gpu);  // what is wrong shows now, not in the first step
    *backend = new c10::intrusive_ptr<c10d::Backend>(std::move(nccl));
  });
}
