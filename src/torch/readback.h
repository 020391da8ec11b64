// A tensor on its way to the host.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

namespace {

// Starts without waiting for what computes the tensor. A tensor of the host is there already.
struct Readback {
  at::Tensor host;
  std::optional<c10::Event> arrived;

  explicit Readback(const at::Tensor &values) : host(values) {
    if (values.is_cpu()) return;
    // pinned, as a copy that does not block asks for it
    host = values.to(at::kCPU, values.scalar_type(), /*non_blocking=*/true);
    arrived.emplace(values.device().type());
    arrived->record(c10::impl::VirtualGuardImpl(values.device().type()).getStream(values.device()));
  }

  // The tensor, when it has arrived.
  const at::Tensor &wait() const {
    if (arrived) arrived->synchronize();
    return host;
  }
};

}  // namespace
