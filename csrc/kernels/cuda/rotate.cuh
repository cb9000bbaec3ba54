// U <- Q [U; G] in place, alone or together with the edit of G.
//
// A block holds a tile of all rows of [U; G] in shared memory as floats, each row halved as `halved` says; a thread
// makes 8 rows x 8 columns of the product in registers, so that 64 multiply-adds need 10 shared-memory wavefronts.
// Bound by memory up to k of about 32 (bf16, H100) and by fp32 arithmetic beyond. No tensor cores: new rows have to
// stay orthonormal to 1e-5, which TF32 does not give, and this runs once per batch of gradients.
#pragma once

#include "edit.cuh"
#include "stage.cuh"

namespace carerl::cuda {

constexpr int kRotateRows = 8, kRotateColumns = 8;

// Two blocks an SM leave 128 registers or, where four gradients are edited at once, 168.
constexpr int rotate_threads(int gradients) { return gradients == 1 ? 256 : 192; }

// table [groups, depth, padded] = q [groups, rows, depth] transposed and padded with zeros; finite [groups]. One block
// each, of whole warps. Shared memory: one int.
static __global__ void __launch_bounds__(256)
    prepare_rotation_kernel(const float* q, int rows, int depth, int padded, float* table, int32_t* finite) {
  CARERL_SHARED(shared);
  int* all_finite = reinterpret_cast<int*>(shared);
  const int64_t group = blockIdx.x;
  q += group * rows * depth;
  table += group * depth * padded;
  if (threadIdx.x == 0) *all_finite = 1;
  __syncthreads();
  bool fine = true;
  for (int i = threadIdx.x; i < depth * padded; i += blockDim.x) {
    const int m = i / padded, row = i % padded;
    const float value = row < rows ? q[static_cast<int64_t>(row) * depth + m] : 0.0f;
    fine = fine && is_finite(value);
    table[i] = value;
  }
  fine = __all_sync(kAllLanes, fine);
  if (!fine && threadIdx.x % 32 == 0) atomicAnd(all_finite, 0);
  __syncthreads();
  if (threadIdx.x == 0) finite[group] = *all_finite;
}

// Finaliser of MurmurHash3 (Appleby, public domain).
CARERL_DEVICE uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Random bits of (row, column, 0), to which column i adds i * 0x9e3779b1; columns up to a multiple of 8 share the upper
// half of their position. The same bits as on every other backend (see csrc/kernels/cpu/tile.h).
CARERL_DEVICE uint32_t random_word(int64_t seed, int64_t row, int64_t column) {
  const uint32_t key = mix32(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32);
  return static_cast<uint32_t>(row + 1) * 0x85ebca77u + key + static_cast<uint32_t>(column >> 32) * 0xc2b2ae3du +
         static_cast<uint32_t>(column) * 0x9e3779b1u;
}

// Stochastic rounding: random bits below the last kept one, then truncation. Magnitudes below 2^-14 have fewer bits in
// fp16: lifted by 2^-14, the bits to drop are in their place again.
template <int kDropped>
CARERL_DEVICE float round_randomly(float value, uint32_t random) {
  const uint32_t noise = mix32(random) >> (32 - kDropped);
  const uint32_t bits = __float_as_uint(value), sign = bits & 0x80000000u;
  const float size = __uint_as_float(bits ^ sign);
  const float lift = kDropped == 13 && size < 0x1p-14f ? 0x1p-14f : 0.0f;
  const float kept = __uint_as_float((__float_as_uint(size + lift) + noise) & ~((1u << kDropped) - 1));
  return __uint_as_float(__float_as_uint(kept - lift) | sign);
}

template <class E>
CARERL_DEVICE uint32_t round_to(float value, int64_t seed, uint32_t random) {
  if constexpr (sizeof(typename E::Type) == 2) {
    if (seed != 0) value = round_randomly<E::kDropped>(value, random);
  }
  return E::narrow(value);
}

// 8 columns of one row back to storage.
CARERL_DEVICE void store_row(const Basis& basis, int64_t row, int64_t column, int64_t n, const float (&sums)[8],
                             int64_t seed) {
  const uint32_t random = random_word(seed, row, column);
  with_gradient_type(basis.dtype, [&](auto type) {
    using E = decltype(type);
    const bool aligned = rows_aligned(basis.data, basis.stride, sizeof(typename E::Type));
    store_values<E, 8>(static_cast<typename E::Type*>(basis.data) + row * basis.stride + column, n, aligned,
                       [&](int i) { return round_to<E>(sums[i], seed, random + i * 0x9e3779b1u); });
  });
}

// stack [depth, tile] of halved rows -> rows of the basis, columns [column, column + n).
CARERL_DEVICE void rotate_tile(const Basis& basis, const float* stack, int depth, int tile, const float* table,
                               int padded, int64_t column, int n, int64_t seed) {
  const int across = tile / kRotateColumns, down = (static_cast<int>(basis.rows) + kRotateRows - 1) / kRotateRows;
  for (int i = linear_thread(); i < across * down; i += linear_threads()) {
    const int row = i / across * kRotateRows, x = i % across * kRotateColumns;
    float sums[kRotateRows][kRotateColumns] = {};
    if (row < padded) {
      [[maybe_unused]] constexpr int kUnrolled = kFewRegisters ? 1 : 2;
#pragma unroll kUnrolled
      for (int m = 0; m < depth; ++m) {
        const float4* q = reinterpret_cast<const float4*>(table + static_cast<int64_t>(m) * padded + row);
        const float4* u = reinterpret_cast<const float4*>(stack + m * tile + x / 2);
        const float4 q0 = q[0], q1 = q[1], u0 = u[0], u1 = u[tile / 8];
        const float factor[kRotateRows] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
        const float value[kRotateColumns] = {u0.x, u0.y, u0.z, u0.w, u1.x, u1.y, u1.z, u1.w};
#pragma unroll
        for (int r = 0; r < kRotateRows; ++r) {
#pragma unroll
          for (int c = 0; c < kRotateColumns; ++c) sums[r][c] += factor[r] * value[c];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRotateRows; ++r) {
      if (row + r < basis.rows && x < n) store_row(basis, row + r, column + x, n - x, sums[r], seed);
    }
  }
}

// Without kEdit, `all` and `edit` are not looked at. With it, all threads edit the gradients of a tile between reading
// and writing the rows of the domain: from rows and gradients as they were. Shared memory: the tile [K + B, tile], then
// the plan of the edit.
template <int kGradients, bool kEdit>
__global__ void __launch_bounds__(rotate_threads(kGradients), 2)
    rotate_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis domain, const Rotation rotation,
                  int tile, const __grid_constant__ Basis all, const Edit edits) {
  CARERL_SHARED(shared);
  const Slot slot = find_slot(spans, slot_from_the_end(spans));
  const int rows = static_cast<int>(domain.rows), depth = rows + spans.batch;
  const bool rotates = rotation.finite[slot.group] != 0;
  float* stack = reinterpret_cast<float*>(shared);
  EditPlan plan;
  Edit edit;
  if constexpr (kEdit) {
    edit = edit_of(edits, slot, all.rows);
    plan = plan_edit<kGradients>(edit, static_cast<int>(all.rows), spans.batch,
                                 shared + static_cast<int64_t>(depth) * tile * sizeof(float));
  } else {
    if (!rotates) return;
  }
  const float* table = rotation.table + static_cast<int64_t>(slot.group) * depth * rotation.padded;
  for (int64_t begin = slot.begin; begin < slot.end; begin += tile) {
    const int n = static_cast<int>(min64(tile, slot.end - begin));
    __syncthreads();  // everybody is done with the tile before
    const auto put = [&](int row, int x, const float (&four)[4]) {
      *reinterpret_cast<float4*>(stack + row * tile + halved(x, tile)) =
          make_float4(four[0], four[1], four[2], four[3]);
    };
    stage_basis(domain, slot.column + begin, n, tile, put);
    stage_gradients(spans, slot, begin, n, tile, [&](int b, int x, const float (&four)[4]) { put(rows + b, x, four); });
    __syncthreads();
    if constexpr (kEdit) {
      if (plan.any) {
        with_gradient_type(all.dtype, [&](auto type) {
          edit_columns<decltype(type), kGradients>(spans, all, slot, begin, begin + n, plan, edit.scale);
        });
      }
      __syncthreads();  // nobody reads old rows of the domain any more
      if (!rotates) continue;
    }
    rotate_tile(domain, stack, depth, tile, table, rotation.padded, slot.column + begin, n, rotation.seed);
  }
}

}  // namespace carerl::cuda
