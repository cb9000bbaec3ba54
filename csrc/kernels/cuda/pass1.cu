// Launches of pass 1: project and gram.
#include <algorithm>

#include "gram.cuh"
#include "gram_float.cuh"
#include "launch.h"
#include "project.cuh"
#include "project_mma.cuh"
#include "reduce.cuh"

namespace carerl::cuda {
namespace {

constexpr int64_t kSlots = 2048;             // most slots of a call: four waves of an H100 with four blocks an SM
constexpr int64_t kPartialBytes = 32 << 20;  // of the partials of a call, unless that leaves too few slots
constexpr int64_t kTurnRows = 256, kTurnBatch = 16;

// Sums of the partials of all slots, per tensor or in all.
template <class Out>
void reduce(const char* op, const Call& call, const Plan& plan, const Outputs& shape, const double* partials,
            Out* out) {
  const int64_t width = shape.square ? shape.square * shape.square : shape.batch * shape.rows;
  const dim3 block(kReduceColumns, kReduceSlices);
  const int64_t shared = kReduceColumns * kReduceSlices * sizeof(double);
  for (size_t i = 0; i < plan.tables.size(); ++i) {
    if (i > 0 && !call.per_tensor) break;  // one sum over the slots of all launches
    const Spans& spans = plan.tables[i].spans;
    // The last tensor of a launch ends where the next launch begins.
    const int64_t end =
        i + 1 < plan.tables.size() && call.per_tensor ? plan.tables[i + 1].spans.span[0].first_slot : plan.slots;
    const dim3 grid(static_cast<unsigned>(ceil_div(width, kReduceColumns)), call.per_tensor ? spans.count : 1);
    CARERL_LAUNCH(reduce_kernel<Out>, grid, block, shared, stream_of(call.device), spans, end, shape, partials, out);
    check_launch(op);
  }
}

template <class E, int kBatch>
void launch_project(const char* op, const Call& call, const Plan& plan, int tile, double* partials) {
  const int64_t tiles = kBatch == 1 ? 1 : round_up(call.batch, 4);
  const int64_t shared = round_up(call.batch * call.basis.rows, 2) * sizeof(double) + tiles * tile * sizeof(float);
  allow_shared(op, project_kernel<E, kBatch>, shared);
  // As many warps as have rows, evenly: 10 groups of rows are two rounds of five warps.
  const int64_t groups = ceil_div(call.basis.rows, kProjectRows), rounds = ceil_div(groups, project_warps(kBatch));
  const unsigned threads = static_cast<unsigned>(32 * ceil_div(groups, rounds));
  for (const Table& table : plan.tables) {
    if (table.slots == 0) continue;
    CARERL_LAUNCH((project_kernel<E, kBatch>), dim3(static_cast<unsigned>(table.slots)), dim3(threads), shared,
                  stream_of(call.device), table.spans, call.basis, tile, partials);
    check_launch(op);
  }
}

// Whether the products of a call are products of 16 bits: fp16 bases beside gradients of a wider range are not.
bool in_tensor_cores(const Call& call) {
  if (call.batch == 1 || call.basis.dtype == DType::kF32) return false;
  return call.basis.dtype != DType::kF16 || call.dtype == DType::kF16;
}

template <int kBatch>
void launch_project(const char* op, const Call& call, const Plan& plan, int tile, double* partials) {
  if (call.basis.dtype == DType::kF32) return launch_project<F32, kBatch>(op, call, plan, tile, partials);
  if (call.basis.dtype == DType::kF16) return launch_project<F16, kBatch>(op, call, plan, tile, partials);
  if constexpr (kBatch == 1) {
    if (call.basis.dtype == DType::kBF16) return launch_project<BF16, 1>(op, call, plan, tile, partials);
    if (call.basis.dtype == DType::kI8) return launch_project<I8, 1>(op, call, plan, tile, partials);
    launch_project<F8, 1>(op, call, plan, tile, partials);
  }
}

template <class E, class G, int kTiles>
void launch_project_mma(const char* op, const Call& call, const Plan& plan, double* partials) {
  const RowGroups shape = row_groups(static_cast<int>(call.basis.rows));
  const int64_t shared = shape.sums(kTiles) * shape.threads() * static_cast<int64_t>(sizeof(double));
  for (const Table& table : plan.tables) {
    if (table.slots == 0) continue;
    CARERL_LAUNCH((project_mma_kernel<E, G, kTiles>), dim3(static_cast<unsigned>(table.slots)),
                  dim3(static_cast<unsigned>(shape.threads())), shared, stream_of(call.device), table.spans, call.basis,
                  partials);
    check_launch(op);
  }
}

template <class E, int kTiles>
void launch_project_mma(const char* op, const Call& call, const Plan& plan, double* partials) {
  if (call.dtype == DType::kF32) return launch_project_mma<E, F32, kTiles>(op, call, plan, partials);
  if (call.dtype == DType::kBF16) return launch_project_mma<E, BF16, kTiles>(op, call, plan, partials);
  launch_project_mma<E, F16, kTiles>(op, call, plan, partials);
}

template <int kTiles>
void launch_project_mma(const char* op, const Call& call, const Plan& plan, double* partials) {
  if (call.basis.dtype == DType::kF16) return launch_project_mma<F16, F16, kTiles>(op, call, plan, partials);
  if (call.basis.dtype == DType::kBF16) return launch_project_mma<BF16, kTiles>(op, call, plan, partials);
  if (call.basis.dtype == DType::kI8) return launch_project_mma<I8, kTiles>(op, call, plan, partials);
  launch_project_mma<F8, kTiles>(op, call, plan, partials);
}

template <class Out>
void project_turns(const char* op, const Call& call, Out* coefficients) {
  const int64_t rows = call.basis.rows;
  for (int64_t b = 0; b < call.batch; b += kTurnBatch) {
    Call turn = part_of_batch(call, b, std::min(call.batch - b, kTurnBatch));
    const bool tensor_cores = in_tensor_cores(turn);
    const int tile = tensor_cores      ? kMmaWarps * kMmaRun
                     : turn.batch == 1 ? kProjectTile
                     : turn.batch == 2 ? kProjectTile / 2
                                       : kSmallestTile;
    for (int64_t row = 0; row < rows; row += kTurnRows) {
      turn.basis.rows = std::min(rows - row, kTurnRows);
      turn.basis.data = static_cast<char*>(call.basis.data) + row * call.basis.stride * element_size(call.basis.dtype);
      if (call.basis.scales) turn.basis.scales = call.basis.scales + row * call.basis.blocks;
      const int64_t outputs = turn.batch * turn.basis.rows;
      const Plan plan = make_plan(turn, tile, std::clamp<int64_t>(kPartialBytes / (outputs * 8), 512, kSlots));
      double* partials = allocate<double>(call.device, plan.slots * outputs);
      if (tensor_cores && turn.batch <= 8)
        launch_project_mma<1>(op, turn, plan, partials);
      else if (tensor_cores)
        launch_project_mma<2>(op, turn, plan, partials);
      else if (turn.batch == 1)
        launch_project<1>(op, turn, plan, tile, partials);
      else if (turn.batch <= 4)
        launch_project<4>(op, turn, plan, tile, partials);
      else
        launch_project<16>(op, turn, plan, tile, partials);
      reduce(op, turn, plan, Outputs{turn.batch, turn.basis.rows, b, row, call.batch, rows, 0}, partials, coefficients);
    }
  }
}

// Whether fp64 runs at a small part of the rate of fp32 on this GPU: 1/2 on A100 to B200, 1/32 or 1/64 on those for
// graphics, whatever binary of this build they load.
bool doubles_are_slow() {
  int device = 0, ratio = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  return ratio > 4;
}

// The most columns, a power of two of at least `least`, for which the shared memory of a block is always there.
template <class Bytes>
int widest_tile(int least, const Bytes& bytes) {
  int tile = 256;
  while (tile > least && bytes(tile) > kSharedAlways) tile /= 2;
  return tile;
}

int64_t gram_bytes(const Sides& shape, int tile) {
  return std::max<int64_t>(shape.sides * shape.eights * 8 * (tile + 4) * sizeof(float),
                           kGramWarps * 64 * sizeof(double));
}

void launch_gram(const char* op, const Call& call, const Plan& plan, const Sides& shape, int tile, double* partials) {
  const int64_t parts = ceil_div(shape.pairs, kGramWarps), pairs = ceil_div(shape.pairs, parts);
  const int64_t shared = gram_bytes(shape, tile);
  allow_shared(op, gram_kernel, shared);
  for (const Table& table : plan.tables) {
    if (table.slots == 0) continue;
    const dim3 grid(static_cast<unsigned>(table.slots), static_cast<unsigned>(parts));
    const dim3 block(static_cast<unsigned>(32 * pairs * (kGramWarps / pairs)));
    CARERL_LAUNCH(gram_kernel, grid, block, shared, stream_of(call.device), table.spans, call.basis, tile,
                  static_cast<int>(pairs), partials);
    check_launch(op);
  }
}

void launch_gram_float(const char* op, const Call& call, const Plan& plan, int size, int tile, double* partials) {
  const int64_t parts = ceil_div(units_of(size), kFloatWarps), units = ceil_div(units_of(size), parts);
  const int64_t shared = gram_float_bytes(size, tile);
  allow_shared(op, gram_float_kernel, shared);
  for (const Table& table : plan.tables) {
    if (table.slots == 0) continue;
    const dim3 grid(
        static_cast<unsigned>(table.slots * parts));  // the parts of a slot side by side: they share its rows
    const dim3 block(static_cast<unsigned>(32 * units * (kFloatWarps / units)));
    CARERL_LAUNCH(gram_float_kernel, grid, block, shared, stream_of(call.device), table.spans, call.basis, tile,
                  static_cast<int>(parts), static_cast<int>(units), partials);
    check_launch(op);
  }
}

}  // namespace

void project(const char* op, const Call& call, double* coefficients) { project_turns(op, call, coefficients); }
void project(const char* op, const Call& call, float* coefficients) { project_turns(op, call, coefficients); }

void gram(const char* op, const Call& call, double* out) {
  const int size = static_cast<int>(call.basis.rows + call.batch);
  if (size == 0) return;
  const bool in_floats = doubles_are_slow() && gram_float_bytes(size, 32) <= kSharedMost;
  const Sides shape = sides_of(size);
  const int tile = in_floats ? widest_tile(32, [&](int columns) { return gram_float_bytes(size, columns); })
                             : widest_tile(16, [&](int columns) { return gram_bytes(shape, columns); });
  const int64_t width = static_cast<int64_t>(size) * size;
  const Plan plan = make_plan(call, tile, std::clamp<int64_t>(kPartialBytes / (width * 8), 64, kSlots));
  double* partials = allocate<double>(call.device, plan.slots * width);
  if (in_floats)
    launch_gram_float(op, call, plan, size, tile, partials);
  else
    launch_gram(op, call, plan, shape, tile, partials);
  reduce(op, call, plan, Outputs{0, 0, 0, 0, 0, 0, size}, partials, out);
}

}  // namespace carerl::cuda
