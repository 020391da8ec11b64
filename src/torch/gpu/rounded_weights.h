// Weights in bfloat16 for a pass that is trained through, all cast at once.
#pragma once
#include <ATen/core/Tensor.h>

// A parameter as such a pass of this thread takes it, with a gradient in float32; itself outside of one.
at::Tensor rounded_weight(const at::Tensor &weight);

// While one of these lives, this thread's weights are their own: what a way back computes again has a graph of its own.
struct NoRoundedWeights {
  void *before;
  NoRoundedWeights();
  NoRoundedWeights(const NoRoundedWeights &) = delete;
  ~NoRoundedWeights();
};
