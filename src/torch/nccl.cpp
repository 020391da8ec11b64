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
    options->timeout = std::chrono::milliseconds(timeout);
    auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(
        c10::make_intrusive<c10d::PrefixStore>("nccl", *store), rank, size, options);
    nccl->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *backend = new c10::intrusive_ptr<c10d::Backend>(std::move(nccl));
  });
}
