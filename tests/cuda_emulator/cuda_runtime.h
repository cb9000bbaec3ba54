// Stands in for CUDA's header of the same name when the kernels of csrc/kernels/cuda are compiled by a C++ compiler for
// the tests: vector types, intrinsics, tensor cores (mma.h), and launches that run on the host (emulator.cpp). Not
// covered: races between blocks, weak memory, fast-math, asynchronous copies. The kernels use none of the last two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define CARERL_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
  unsigned x, y, z;
};
struct Position {
  Index thread, block, block_dim, grid_dim;
};
extern thread_local Position position __attribute__((tls_model("initial-exec")));

// Runs `body` once per thread, block after block; throws std::runtime_error for what a GPU would not forgive.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
unsigned char* shared();
void barrier(int line);
// What a lane brings to an operation of its warp: the operands of a tensor core at most.
constexpr int kWords = 3;
struct Words {
  uint64_t word[kWords];
};
// Waits until all lanes of `mask` have come with the same operation, and returns what each of them brought.
const Words* exchange(unsigned mask, int line, const Words& own);
int lane();

template <class T>
Words to_words(const T& value) {
  static_assert(sizeof(T) <= sizeof(Words));
  Words words = {};
  std::memcpy(&words, &value, sizeof(value));
  return words;
}
template <class T>
T from_words(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof(value));
  return value;
}
template <class T>
uint64_t to_word(T value) {
  return to_words(value).word[0];
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}
template <class T>
T shuffle_xor(unsigned mask, T value, int offset, int line) {
  return from_words<T>(exchange(mask, line, to_words(value))[lane() ^ offset]);
}
unsigned ballot(unsigned mask, bool vote, int line);

}  // namespace emulator

#define threadIdx (emulator::position.thread)
#define blockIdx (emulator::position.block)
#define blockDim (emulator::position.block_dim)
#define gridDim (emulator::position.grid_dim)
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncwarp() ((void)emulator::exchange(~0u, __LINE__, {}))
#define __shfl_xor_sync(mask, value, offset) emulator::shuffle_xor(mask, value, offset, __LINE__)
#define __ballot_sync(mask, vote) emulator::ballot(mask, vote, __LINE__)
#define __any_sync(mask, vote) (emulator::ballot(mask, vote, __LINE__) != 0)
#define __all_sync(mask, vote) (emulator::ballot(mask, !(vote), __LINE__) == 0)
#define CARERL_SHARED(name) unsigned char* const name = emulator::shared()
#define CARERL_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), emulator::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))

inline unsigned __float_as_uint(float x) { return emulator::from_word<unsigned>(emulator::to_word(x)); }
inline float __uint_as_float(unsigned x) { return emulator::from_word<float>(emulator::to_word(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
namespace emulator {
inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); }
}  // namespace emulator
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline int atomicAnd(int* p, int value) { return __atomic_fetch_and(p, value, __ATOMIC_RELAXED); }

// ------------------------------------------------------------------------------------------------ the runtime's calls

typedef void* cudaStream_t;
enum cudaError_t {
  cudaSuccess,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorInsufficientDriver
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrSingleToDoublePrecisionPerfRatio
};
#define CUDART_VERSION 13000
namespace emulator {
extern cudaError_t pending;  // what the next cudaGetLastError returns
}
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
