// CUDA graphs, in a shared object of its own that is opened after libtorch_cuda: a binary built beside
// LibTorch for the CPU must start without it.
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>

#include <map>
#include <memory>

#include "guarded.h"

// Records what `body` queues on a GPU, in memory of the graph's own. `body` returns nullptr, or an error's text that is
// freed here.
extern "C" char *lvdm_graph_capture(int device, void *data, char *(*body)(void *), at::cuda::CUDAGraph **graph) {
  return guarded([&] {
    auto recorded = std::make_unique<at::cuda::CUDAGraph>();
    // the default stream cannot be recorded. One other for all: cuBLAS keeps a workspace for each
    thread_local std::map<int, c10::cuda::CUDAStream> streams;
    auto other = c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device));
    c10::cuda::CUDAStreamGuard stream(streams.try_emplace(device, other).first->second);
    c10::cuda::device_synchronize();
    // other threads may go on meanwhile
    recorded->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    std::unique_ptr<char, decltype(&free)> words(body(data), &free);
    try {
      recorded->capture_end();
    } catch (const c10::Error &) {
      if (!words) throw;  // else the body's own words say more
    }
    TORCH_CHECK(!words, words.get());
    *graph = recorded.release();
  });
}

// Queues what was recorded on this thread's stream.
extern "C" char *lvdm_graph_replay(at::cuda::CUDAGraph *graph) {
  return guarded([&] { graph->replay(); });
}

extern "C" void lvdm_graph_free(at::cuda::CUDAGraph *graph) { delete graph; }
