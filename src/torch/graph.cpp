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

// Where this thread records on a GPU. The default stream cannot be recorded; one other serves all graphs, since cuBLAS
// keeps a workspace for each. One pool of memory serves all, too: graphs are launched one at a time, and what they
// answer is copied. The memory of graphs that are gone is used again only while the pool is in use, so one graph stays.
struct Studio {
  c10::cuda::CUDAStream stream;
  at::MempoolId_t pool;

  explicit Studio(c10::DeviceIndex device)
      : stream(c10::cuda::getStreamFromPool(false, device)), pool(at::cuda::graph_pool_handle()) {
    c10::cuda::CUDAStreamGuard guard(stream);
    auto *stays = new at::cuda::CUDAGraph();
    stays->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    at::zeros({1}, at::Device(at::kCUDA, device));
    stays->capture_end();
  }
};

Studio &studio(int device) {
  thread_local std::map<int, Studio> studios;
  auto found = studios.find(device);
  if (found == studios.end()) found = studios.emplace(device, Studio(static_cast<c10::DeviceIndex>(device))).first;
  return found->second;
}

}  // namespace

// Records what `body` queues on a GPU. `body` returns nullptr, or an error's text that is freed here. After a recording
// that failed everything is as before it: nothing was computed, and memory is handed out as ever.
extern "C" char *lvdm_graph_capture(int device, void *data, char *(*body)(void *), at::cuda::CUDAGraph **graph) {
  return guarded([&] {
    auto recorded = std::make_unique<at::cuda::CUDAGraph>();
    auto &[stream, pool] = studio(device);
    c10::cuda::CUDAStreamGuard guard(stream);
    c10::cuda::device_synchronize();
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
      // A recording that LibTorch did not end leaves its allocator asking the graph whose memory this is: that must stop,
      // and the graph must stay where it lies.
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

// Queues what was recorded on this thread's stream.
extern "C" char *lvdm_graph_replay(at::cuda::CUDAGraph *graph) {
  return guarded([&] { graph->replay(); });
}

extern "C" void lvdm_graph_free(at::cuda::CUDAGraph *graph) { delete graph; }
