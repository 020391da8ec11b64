// Kernels of our own for the CPU, each in a header of its own. They are compiled together, since every compilation reads
// LibTorch's headers anew, which takes longer than all the kernels do.
#include "fused/fixed_weights.h"
#include "fused/frame_attention.h"
#include "fused/group_norm.h"
#include "fused/repeat_edges.h"
#include "fused/transposed_conv.h"

#include <ATen/Version.h>

#include <string>

// Those for the instructions that LibTorch's own kernels use here, which ATEN_CPU_CAPABILITY can lower.
const Rows &rows() {
#ifdef __x86_64__
  static const Rows &chosen = []() -> const Rows & {
    std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? rows_avx512 : capability == "AVX2" ? rows_avx2 : rows_plain;
  }();
  return chosen;
#else
  return rows_plain;
#endif
}
