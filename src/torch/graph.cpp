// CUDA graphs, in a shared object of its own that is opened after libtorch_cuda: a binary built beside
// LibTorch for the CPU must start without it.
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>

#include <map>
#include <memory>

#include "guarded.h"

namespace {

// The stream and the pool of memory with which this thread captures graphs on one GPU. The default stream cannot be captured;
// one other stream serves all graphs, since cuBLAS keeps a workspace for each stream. One pool serves all graphs too, since
// they are launched one at a time and their outputs are copied. LibTorch reuses the memory of deleted graphs only while the
// pool is in use, and so the context holds one small graph that is never deleted.
struct CaptureContext {
  c10::cuda::CUDAStream stream;
  at::MempoolId_t pool;

  explicit CaptureContext(c10::DeviceIndex device)
      : stream(c10::cuda::getStreamFromPool(false, device)), pool(at::cuda::graph_pool_handle()) {
    c10::cuda::CUDAStreamGuard guard(stream);
    auto *stays = new at::cuda::CUDAGraph();
    stays->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    at::zeros({1}, at::Device(at::kCUDA, device));
    stays->capture_end();
  }
};

CaptureContext &capture_context(int device) {
  thread_local std::map<int, CaptureContext> contexts;
  auto found = contexts.find(device);
  if (found == contexts.end()) found = contexts.emplace(device, CaptureContext(static_cast<c10::DeviceIndex>(device))).first;
  return found->second;
}

}  // namespace

// Captures what `body` queues on a GPU. `body` returns nullptr, or the text of an error, which is freed here. After a capture
// that failed everything is as it was before: nothing was computed, and the allocator works as usual.
extern "C" char *lvdm_graph_capture(int device, void *data, char *(*body)(void *), at::cuda::CUDAGraph **graph) {
  return guarded([&] {
    auto recorded = std::make_unique<at::cuda::CUDAGraph>();
    auto &[stream, pool] = capture_context(device);
    c10::cuda::CUDAStreamGuard guard(stream);
    c10::cuda::device_synchronize();
    // what LibTorch keeps for other work is not for the graph
    c10::cuda::CUDACachingAllocator::emptyCache();
    try {
      // other threads may go on meanwhile
      recorded->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      std::unique_ptr<char, decltype(&free)> words(body(data), &free);
      try {
        recorded->capture_end();
      } catch (const c10::Error &) {
        if (!words) throw;  // else the body's own words say more
      }
      TORCH_CHECK(!words, words.get());
    } catch (...) {
      // A capture that LibTorch did not end leaves its allocator asking the graph for each piece of memory. The allocator must
      // stop doing so, and the graph must not be freed.
      try {
        c10::cuda::CUDACachingAllocator::endAllocateToPool(static_cast<c10::DeviceIndex>(device), pool);
      } catch (const c10::Error &) {
        // it was ended
      }
      recorded.release();
      throw;
    }
    *graph = recorded.release();
  });
}

// Launches the captured work on this thread's stream.
extern "C" char *lvdm_graph_replay(at::cuda::CUDAGraph *graph) {
  return guarded([&] { graph->replay(); });
}

extern "C" void lvdm_graph_free(at::cuda::CUDAGraph *graph) { delete graph; }
