// Weights in bfloat16 for a pass that is trained through, all cast at once.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <utility>
#include <vector>

// Some weights whose casts lie one after another along the first axis, as one tensor; most are alone.
using Joined = std::vector<at::Tensor>;

// The weights that a network's passes take in bfloat16, in the order in which they first did.
struct RoundedWeights {
  // A pass begins: what is known will be cast in few launches.
  void begin();
  // Its way back begins, or it is over: what the graph does not need is given back.
  void forget();
  const at::Tensor &of(const Joined &joined);

  // Also learns what is taken: it is of a part of the pass that is to run once more, in a graph of its own.
  RoundedWeights *part = nullptr;

 private:
  size_t place(const Joined &joined);
  void cast(size_t first, size_t last);

  std::vector<Joined> weights;
  std::vector<at::Tensor> casts;                  // undefined where it is not held
  std::vector<std::pair<size_t, size_t>> groups;  // for each that was known when the pass began, which are cast with it
  std::map<std::vector<const c10::TensorImpl *>, size_t> places;
};

// Those of this thread's pass, or none.
extern thread_local RoundedWeights *rounded_weights;

// Parameters, one behind the other along their first axis, as such a pass of this thread takes them, with gradients in float32;
// in their own kind outside of one, and where one of them is not trained.
at::Tensor rounded_weights_joined(const Joined &weights);
