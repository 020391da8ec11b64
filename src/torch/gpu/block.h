// The subset of C++ in which kernels for GPUs are written. NVRTC compiles it for the card that is there, and the host's
// compiler for tensors on the CPU, as a simulated GPU and the tests have them.
//
// A kernel is a struct of its arguments, plain data, whose call operator is what one block of threads does, in phases:
// `block.each(body)` runs `body(thread)` for all threads of the block and ends when the last of them has. What threads
// keep from one phase to the next lies in the block's shared memory. Sums are taken in a fixed order.
#pragma once

#ifdef __CUDACC_RTC__
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <bit>
#include <cmath>
#include <cstdint>
#endif

namespace gpu {

constexpr int MOST_THREADS = 256;  // of a block

#ifdef __CUDACC_RTC__
inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
inline uint32_t as_bits(float x) { return __float_as_uint(x); }

struct Block {
  int64_t index() const { return blockIdx.x; }
  int64_t blocks() const { return gridDim.x; }
  int threads() const { return blockDim.x; }

  template <class Body>
  void each(Body body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class A>
  A *shared() const {
    extern __shared__ double shared_memory[];
    return reinterpret_cast<A *>(shared_memory);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(MOST_THREADS) run(const Kernel kernel) {
  kernel(Block());
}
#else
using std::erf, std::exp, std::pow, std::sqrt;

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

struct Block {
  int64_t at, of;
  int size;
  double *memory;

  int64_t index() const { return at; }
  int64_t blocks() const { return of; }
  int threads() const { return size; }

  template <class Body>
  void each(Body body) const {
    for (int thread = 0; thread < size; thread++) body(thread);
  }

  template <class A>
  A *shared() const {
    return reinterpret_cast<A *>(memory);
  }
};
#endif

inline uint64_t as_number(const void *pointer) { return reinterpret_cast<uint64_t>(pointer); }

// bfloat16 in memory; computed with in float.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t wide = as_bits(x);
    bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
    // to the nearest, and of two to the even one
    bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1)) >> 16);
  }
  explicit operator float() const { return as_float(static_cast<uint32_t>(bits) << 16); }
};

// What values of a kind are computed in.
template <class T>
struct computed_in {
  using type = float;
};
template <>
struct computed_in<double> {
  using type = double;
};
template <class T>
using computed = typename computed_in<T>::type;

// So many values that lie side by side, moved as one, or 16 bytes at a time.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <int N, class T>
inline void load(const T *from, computed<T> *to) {
  auto pack = *reinterpret_cast<const Pack<T, N> *>(from);
  for (int i = 0; i < N; i++) to[i] = static_cast<computed<T>>(pack.values[i]);
}

template <int N, class T>
inline void store(const computed<T> *from, T *to) {
  Pack<T, N> pack;
  for (int i = 0; i < N; i++) pack.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

// As it is in memory.
template <class T>
inline computed<T> rounded(computed<T> x) {
  return static_cast<computed<T>>(static_cast<T>(x));
}

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}
#ifdef __CUDACC_RTC__
// by the instructions of a GPU, to 2 parts in 10⁷
template <>
inline float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}
#endif
template <class A>
inline A silu(A x) {
  return x * sigmoid(x);
}
template <class A>
inline A silu_slope(A x) {
  A s = sigmoid(x);
  return s * (A(1) + x * (A(1) - s));
}

// The first of `slots` rows of `width` numbers becomes the sum of all, by halves; `slots` is a power of two.
template <class A>
inline void sum_slots(const Block &block, A *rows, int slots, int width) {
  for (int half = slots / 2; half > 0; half /= 2)
    block.each([&](int thread) {
      for (int i = thread; i < half * width; i += block.threads()) rows[i] += rows[i + half * width];
    });
}

}  // namespace gpu
