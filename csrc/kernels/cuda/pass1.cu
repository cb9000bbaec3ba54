// Launches of pass 1: project and gram.
#include <algorithm>

#include "gram.cuh"
#include "launch.h"
#include "project.cuh"
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

template <int kBatch>
void launch_project(const char* op, const Call& call, const Plan& plan, int tile, double* partials) {
  switch (call.basis.dtype) {
    case DType::kF32:
      return launch_project<F32, kBatch>(op, call, plan, tile, partials);
    case DType::kBF16:
      return launch_project<BF16, kBatch>(op, call, plan, tile, partials);
    case DType::kF16:
      return launch_project<F16, kBatch>(op, call, plan, tile, partials);
    case DType::kI8:
      return launch_project<I8, kBatch>(op, call, plan, tile, partials);
    case DType::kF8:
      return launch_project<F8, kBatch>(op, call, plan, tile, partials);
  }
}

template <class Out>
void project_turns(const char* op, const Call& call, Out* coefficients) {
  const int64_t rows = call.basis.rows;
  for (int64_t b = 0; b < call.batch; b += kTurnBatch) {
    Call turn = part_of_batch(call, b, std::min(call.batch - b, kTurnBatch));
    const int tile = turn.batch == 1 ? kProjectTile : turn.batch == 2 ? kProjectTile / 2 : kSmallestTile;
    for (int64_t row = 0; row < rows; row += kTurnRows) {
      turn.basis.rows = std::min(rows - row, kTurnRows);
      turn.basis.data = static_cast<char*>(call.basis.data) + row * call.basis.stride * element_size(call.basis.dtype);
      if (call.basis.scales) turn.basis.scales = call.basis.scales + row * call.basis.blocks;
      const int64_t outputs = turn.batch * turn.basis.rows;
      const Plan plan = make_plan(turn, tile, std::clamp<int64_t>(kPartialBytes / (outputs * 8), 512, kSlots));
      double* partials = allocate<double>(call.device, plan.slots * outputs);
      if (turn.batch == 1)
        launch_project<1>(op, turn, plan, tile, partials);
      else if (turn.batch <= 4)
        launch_project<4>(op, turn, plan, tile, partials);
      else
        launch_project<16>(op, turn, plan, tile, partials);
      reduce(op, turn, plan, Outputs{turn.batch, turn.basis.rows, b, row, call.batch, rows, 0}, partials, coefficients);
    }
  }
}

}  // namespace

void project(const char* op, const Call& call, double* coefficients) { project_turns(op, call, coefficients); }
void project(const char* op, const Call& call, float* coefficients) { project_turns(op, call, coefficients); }

void gram(const char* op, const Call& call, double* out) {
  const int64_t size = call.basis.rows + call.batch;
  if (size == 0) return;
  const Sides shape = sides_of(static_cast<int>(size));
  const int64_t parts = ceil_div(shape.pairs, kGramWarps), pairs = ceil_div(shape.pairs, parts);
  int tile = 256;
  const auto bytes = [&] { return shape.sides * shape.eights * 8 * (tile + 4) * static_cast<int64_t>(sizeof(float)); };
  while (tile > 16 && bytes() > kSharedAlways) tile /= 2;
  const int64_t shared = std::max<int64_t>(bytes(), kGramWarps * 64 * sizeof(double));
  allow_shared(op, gram_kernel, shared);
  const int64_t width = size * size;
  const Plan plan = make_plan(call, tile, std::clamp<int64_t>(kPartialBytes / (width * 8), 64, kSlots));
  double* partials = allocate<double>(call.device, plan.slots * width);
  for (const Table& table : plan.tables) {
    if (table.slots == 0) continue;
    const dim3 grid(static_cast<unsigned>(table.slots), static_cast<unsigned>(parts));
    const dim3 block(static_cast<unsigned>(32 * pairs * (kGramWarps / pairs)));
    CARERL_LAUNCH(gram_kernel, grid, block, shared, stream_of(call.device), table.spans, call.basis, tile,
                  static_cast<int>(pairs), partials);
    check_launch(op);
  }
  reduce(op, call, plan, Outputs{0, 0, 0, 0, 0, 0, size}, partials, out);
}

}  // namespace carerl::cuda
