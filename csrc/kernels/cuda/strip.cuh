// Outputs of a weight matrix between memory and shared memory, a tile at a time; a thread carries the vectors of the
// next tile in registers while the block computes.
#pragma once

#include <type_traits>

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kInputWarps = 4, kInputThreads = 32 * kInputWarps;
constexpr int kStrip = 16 * kInputWarps;  // outputs of a block
constexpr int kDepth = 32;                // inputs of a tile
constexpr int kDirections = 32;           // multiplied at a time
// Pitches for which the lanes of a fragment find their numbers in different banks.
constexpr int kDepthPitch = kDepth + 4, kStripPitch = kStrip + 8;

__host__ __device__ constexpr int64_t input_shared(int groups) {
  const int tile = kStrip * kDepthPitch > kDepth * kStripPitch ? kStrip * kDepthPitch : kDepth * kStripPitch;
  return kInputWarps * sizeof(double) + (groups * kDirections * kDepthPitch + tile) * sizeof(float) +
         kStrip * sizeof(int);
}

// [rows, kColumns] from p on, `stride` elements apart, of which `columns` exist; zeros elsewhere. Vector v of a thread
// is the v-th after those of all threads.
template <class E, int kColumns, int kVectors>
CARERL_DEVICE void fetch(const typename E::Type* p, int64_t stride, int64_t rows, int64_t columns, bool aligned,
                         uint4 (&raw)[kVectors]) {
  constexpr int kAcross = kColumns / E::kWidth;
  const int row = threadIdx.x / kAcross, x = threadIdx.x % kAcross * E::kWidth;
  p += row * stride + x;
  if (aligned && columns >= kColumns && rows >= kVectors * kInputThreads / kAcross) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw[v] = load_aligned<E>(p + v * (kInputThreads / kAcross) * stride);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int down = v * (kInputThreads / kAcross);
    raw[v] = make_uint4(0, 0, 0, 0);
    if (row + down < rows) raw[v] = load<E>(p + down * stride, columns - x, aligned);
  }
}

// Vectors of `fetch` as floats in shared memory.
template <class E, int kColumns, int kVectors>
CARERL_DEVICE void put(const uint4 (&raw)[kVectors], float* tile, int pitch) {
  constexpr int kAcross = kColumns / E::kWidth;
  float* to = tile + threadIdx.x / kAcross * pitch + threadIdx.x % kAcross * E::kWidth;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int q = 0; q < E::kWidth / 4; ++q) {
      float four[4];
      E::quad(raw[v], q, four);
      *reinterpret_cast<float4*>(to + v * (kInputThreads / kAcross) * pitch + 4 * q) =
          make_float4(four[0], four[1], four[2], four[3]);
    }
  }
}

// The outputs [first, first + there) of a matrix, and tiles of them. kTerms is 2 for fp32, else 1.
template <int kTerms>
struct Strip {
  using Raw = std::conditional_t<kTerms == 2, F32, BF16>;  // as far as moving its bits goes
  using Type = typename Raw::Type;
  static constexpr int kVectors = kStrip * kDepth / Raw::kWidth / kInputThreads;

  Type* origin;              // first output, first input
  int64_t stride;            // between rows of the matrix
  int64_t inputs;            // of an output
  int64_t there;             // outputs
  bool left, aligned, half;  // half: 16 bits are fp16

  __device__ __forceinline__ int pitch() const { return left ? kStripPitch : kDepthPitch; }
  __device__ __forceinline__ int place(int output, int input) const {
    return left ? input * kStripPitch + output : output * kDepthPitch + input;
  }
  __device__ __forceinline__ Type* at(int64_t input) const { return origin + (left ? input * stride : input); }

  __device__ __forceinline__ void fetch(int64_t input, uint4 (&raw)[kVectors]) const {
    if (left)
      cuda::fetch<Raw, kStrip>(at(input), stride, inputs - input, there, aligned, raw);
    else
      cuda::fetch<Raw, kDepth>(at(input), stride, there, inputs - input, aligned, raw);
  }
  template <class E>
  __device__ __forceinline__ void put_as(const uint4 (&raw)[kVectors], float* tile) const {
    if (left)
      cuda::put<E, kStrip>(raw, tile, kStripPitch);
    else
      cuda::put<E, kDepth>(raw, tile, kDepthPitch);
  }
  __device__ __forceinline__ void put(const uint4 (&raw)[kVectors], float* tile) const {
    if constexpr (kTerms == 2)
      put_as<F32>(raw, tile);
    else if (half)
      put_as<F16>(raw, tile);
    else
      put_as<BF16>(raw, tile);
  }
  // A tile back to memory, those outputs that moved.
  __device__ __forceinline__ void store(int64_t input, const float* tile, const int* moved) const {
    if constexpr (kTerms == 2)
      store_as<F32>(input, tile, moved);
    else if (half)
      store_as<F16>(input, tile, moved);
    else
      store_as<BF16>(input, tile, moved);
  }
  template <class E>
  __device__ __forceinline__ void store_as(int64_t input, const float* tile, const int* moved) const {
    constexpr int W = E::kWidth;
    const int across = (left ? kStrip : kDepth) / W;
    const int64_t rows = left ? inputs - input : there, columns = left ? there : inputs - input;
#pragma unroll 1
    for (int i = threadIdx.x; i < kVectors * kInputThreads; i += kInputThreads) {
      const int row = i / across, x = i % across * W;
      if (row >= rows || x >= columns) continue;
      const float* from = tile + row * pitch() + x;
      Type* to = at(input) + row * stride + x;
      int count = W;
      if (left) {
        count = 0;
#pragma unroll
        for (int e = 0; e < W; ++e) count += moved[x + e];
      } else if (!moved[row]) {
        continue;
      }
      if (count == W) {
        store_values<E, W>(to, columns - x, aligned, [&](int e) { return E::narrow(from[e]); });
        continue;
      }
#pragma unroll 1
      for (int e = 0; e < W; ++e) {  // outputs that stay keep their bits; those beyond the edge have not moved either
        if (!moved[x + e]) continue;
        const uint32_t bits = E::narrow(from[e]);
        if constexpr (kTerms == 2)
          to[e] = __uint_as_float(bits);
        else
          to[e] = static_cast<Type>(bits);
      }
    }
  }
};

}  // namespace carerl::cuda
