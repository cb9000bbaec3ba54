// Launches of the ops on the inputs of weight matrices.
#include "input.cuh"

#include <algorithm>

#include "launch.h"

namespace carerl::cuda {
namespace {

constexpr int64_t kMostGroups = 3;     // of kDirections in registers, which a fourth would overflow: beyond, x goes
constexpr int64_t kKeepingGrid = 512;  // through memory, 12 MiB of it for every 96 directions, whatever the matrices

template <int kTerms, int kDirectionTerms, int kGroups>
void launch(const char* op, const InputCall& call, const InputRule& rule, float* out, double* partials) {
  constexpr auto* kernel = input_kernel<kTerms, kDirectionTerms, kGroups>;
  const int64_t strips = ceil_div(call.all.outputs, kStrip), count = static_cast<int64_t>(call.list.size());
  const int64_t blocks = ceil_div(call.all.count, kGroups * kDirections);
  const int64_t most = blocks > 1 ? std::min(kKeepingGrid, CARERL_SLOTS) : (int64_t{1} << 31) - 1;
  float* kept = nullptr;
  if (blocks > 1 && out == nullptr) {
    const int64_t grid = std::min(most, strips * std::min<int64_t>(count, kMatrices));
    kept = allocate<float>(call.device, grid * kInputThreads * blocks * kGroups * kDirections / 2);
  }
  for (int64_t first = 0; first < count; first += kMatrices) {
    Matrices some = call.all;
    some.first = static_cast<int32_t>(first);
    some.matrices = static_cast<int32_t>(std::min<int64_t>(count - first, kMatrices));
    std::copy_n(call.list.begin() + first, some.matrices, some.matrix);
    const dim3 grid(static_cast<unsigned>(std::min(most, strips * some.matrices)));
    CARERL_LAUNCH(kernel, grid, dim3(kInputThreads), input_shared(kGroups), stream_of(call.device), some, rule, out,
                  partials, kept);
    check_launch(op);
  }
}

template <int kTerms, int kDirectionTerms>
void launch(const char* op, const InputCall& call, const InputRule& rule, float* out, double* partials) {
  const int64_t groups = ceil_div(call.all.count, kDirections);
  if (groups <= 1)
    launch<kTerms, kDirectionTerms, 1>(op, call, rule, out, partials);
  else
    launch<kTerms, kDirectionTerms, kMostGroups>(op, call, rule, out, partials);
}

void run(const char* op, const InputCall& call, const InputRule& rule, float* out, double* partials) {
  if (call.list.empty() || call.all.outputs == 0 || call.all.count == 0) return;
  const bool split = call.all.dtype == DType::kF32, split_directions = call.all.direction_dtype == DType::kF32;
  if (split && split_directions)
    launch<2, 2>(op, call, rule, out, partials);
  else if (split)
    launch<2, 1>(op, call, rule, out, partials);
  else if (split_directions)
    launch<1, 2>(op, call, rule, out, partials);
  else
    launch<1, 1>(op, call, rule, out, partials);
}

}  // namespace

void input_project(const char* op, const InputCall& call, float* out) { run(op, call, {}, out, nullptr); }

void input_edit(const char* op, const InputCall& call, const InputRule& rule, double* energies) {
  const int64_t count = static_cast<int64_t>(call.list.size());
  const int64_t strips = call.all.count == 0 ? 0 : ceil_div(call.all.outputs, kStrip);
  double* partials = allocate<double>(call.device, count * strips);
  run(op, call, rule, nullptr, partials);
  if (count == 0) return;
  CARERL_LAUNCH(input_energy_kernel, dim3(static_cast<unsigned>(count)), dim3(32), 0, stream_of(call.device), partials,
                strips, energies);
  check_launch(op);
}

}  // namespace carerl::cuda
