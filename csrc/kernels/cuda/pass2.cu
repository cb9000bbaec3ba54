// Launches of pass 2: edit, rotate and both at once, from the last columns to the first; dacsp, which is pass 1, the
// classes and pass 2.
#include <algorithm>

#include "dacsp.cuh"
#include "launch.h"
#include "rotate.cuh"

namespace carerl::cuda {
namespace {

constexpr int64_t kSlots = 8192;     // most slots of a call
constexpr int64_t kEditUnit = 4096;  // columns: a whole number of turns of a block for every type

constexpr int64_t kRotateRoom = 40 << 10;  // of the tile of a rotation: five blocks an SM or more, from sm_80 on

int gradients_of(int64_t batch) { return batch == 1 ? 1 : 4; }

// Threads over columns, and over groups of four gradients.
dim3 edit_block(int64_t batch, int64_t threads = 256) {
  const unsigned groups = batch <= 4 ? 1 : batch <= 8 ? 2 : 4;
  return dim3(static_cast<unsigned>(threads) / groups, groups);
}

template <class E, int kGradients>
void launch_edit(const char* op, const Call& call, const Plan& plan, const Edit& change) {
  const int64_t shared = edit_plan_bytes(call.basis.rows, call.batch, kGradients);
  allow_shared(op, edit_kernel<E, kGradients>, shared);
  for (auto table = plan.tables.rbegin(); table != plan.tables.rend(); ++table) {
    if (table->slots == 0) continue;
    CARERL_LAUNCH((edit_kernel<E, kGradients>), dim3(static_cast<unsigned>(table->slots)), edit_block(call.batch),
                  shared, stream_of(call.device), table->spans, call.basis, change);
    check_launch(op);
  }
}

template <int kGradients>
void launch_edit(const char* op, const Call& call, const Plan& plan, const Edit& change) {
  switch (call.basis.dtype) {
    case DType::kF32:
      return launch_edit<F32, kGradients>(op, call, plan, change);
    case DType::kBF16:
      return launch_edit<BF16, kGradients>(op, call, plan, change);
    case DType::kF16:
      return launch_edit<F16, kGradients>(op, call, plan, change);
    case DType::kI8:
      return launch_edit<I8, kGradients>(op, call, plan, change);
    case DType::kF8:
      return launch_edit<F8, kGradients>(op, call, plan, change);
  }
}

// The table of q and whether it is finite, for every group.
Rotation prepare(const char* op, const Call& call, int64_t domain_rows, const float* q, int64_t rows, int64_t seed) {
  const int64_t depth = domain_rows + call.batch, padded = round_up(rows, kRotateRows);
  float* table = allocate<float>(call.device, call.groups() * depth * padded);
  int32_t* finite = allocate<int32_t>(call.device, call.groups());
  if (call.groups() > 0) {
    CARERL_LAUNCH(prepare_rotation_kernel, dim3(static_cast<unsigned>(call.groups())), dim3(256), sizeof(int),
                  stream_of(call.device), q, static_cast<int>(rows), static_cast<int>(depth), static_cast<int>(padded),
                  table, finite);
    check_launch(op);
  }
  return {table, finite, static_cast<int32_t>(padded), seed};
}

template <int kGradients, bool kEdit>
void launch_rotate(const char* op, const Call& call, const Basis& domain, const Rotation& rotation,
                   const Edit& change) {
  const int64_t depth = domain.rows + call.batch;
  const int64_t extra = kEdit ? edit_plan_bytes(call.basis.rows, call.batch, kGradients) : 0;
  int tile = 1024;
  while (tile > 32 && depth * tile * 4 + extra > kRotateRoom) tile /= 2;
  const int64_t shared = depth * tile * 4 + extra;
  allow_shared(op, rotate_kernel<kGradients, kEdit>, shared);
  // As many threads as have a part of the product, evenly; and one for every vector of what is edited.
  const int64_t parts = tile / kRotateColumns * ceil_div(domain.rows, kRotateRows);
  int64_t threads = round_up(ceil_div(parts, ceil_div(parts, rotate_threads(kGradients))), 32);
  if (kEdit)
    threads = std::max<int64_t>(threads, tile * element_size(call.basis.dtype) / 16 * edit_block(call.batch).y);
  threads = std::clamp<int64_t>(threads, 128, rotate_threads(kGradients));
  const dim3 block = kEdit ? edit_block(call.batch, threads) : dim3(static_cast<unsigned>(threads));
  const Plan plan = make_plan(call, tile, kSlots);
  for (auto table = plan.tables.rbegin(); table != plan.tables.rend(); ++table) {
    if (table->slots == 0) continue;
    CARERL_LAUNCH((rotate_kernel<kGradients, kEdit>), dim3(static_cast<unsigned>(table->slots)), block, shared,
                  stream_of(call.device), table->spans, domain, rotation, tile, call.basis, change);
    check_launch(op);
  }
}

}  // namespace

void edit(const char* op, const Call& call, const Edit& change) {
  // As many gradients at a time as leave their factors in shared memory.
  const int64_t rows = call.basis.rows;
  const int64_t most = std::max<int64_t>((kSharedAlways - 1024) / 4 / std::max<int64_t>(rows, 1) - 1, 1);
  const int64_t turn = std::min<int64_t>(most >= 4 ? most / 4 * 4 : 1, 64);
  for (int64_t b = 0; b < call.batch; b += turn) {
    const Call part = part_of_batch(call, b, std::min(call.batch - b, turn));
    const Edit own{change.mix + b * rows, change.scale + b};
    const Plan plan = make_plan(part, kEditUnit, kSlots);
    if (gradients_of(part.batch) == 1)
      launch_edit<1>(op, part, plan, own);
    else
      launch_edit<4>(op, part, plan, own);
  }
}

void rotate(const char* op, const Call& call, const float* q, int64_t rows, int64_t seed) {
  if (call.basis.rows == 0) return;
  const Rotation rotation = prepare(op, call, call.basis.rows, q, rows, seed);
  launch_rotate<1, false>(op, call, call.basis, rotation, {});
}

void edit_rotate(const char* op, const Call& call, const Basis& domain, const Edit& change, const float* q,
                 int64_t rows, int64_t seed) {
  if (domain.rows == 0) return edit(op, call, change);
  const Rotation rotation = prepare(op, call, domain.rows, q, rows, seed);
  if (gradients_of(call.batch) == 1)
    launch_rotate<1, true>(op, call, domain, rotation, change);
  else
    launch_rotate<4, true>(op, call, domain, rotation, change);
}

void dacsp(const char* op, const Call& call, const Rule& rule, float* coefficients, int8_t* classes) {
  const int64_t k = call.basis.rows, count = call.groups() * call.batch;
  if (k * count == 0) return;
  double* c = allocate<double>(call.device, count * k);
  project(op, call, c);
  float* mix = allocate<float>(call.device, count * k);
  float* scale = allocate<float>(call.device, count);
  const int64_t shared = 2 * k * sizeof(double);
  allow_shared(op, classify_kernel, shared);
  CARERL_LAUNCH(classify_kernel, dim3(static_cast<unsigned>(count)), dim3(256), shared, stream_of(call.device), c, rule,
                static_cast<int>(k), coefficients, classes, mix, scale);
  check_launch(op);
  edit(op, call, {mix, scale});
}

}  // namespace carerl::cuda
