#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace carerl::cpu {
namespace {

constexpr int64_t kUnit = 4096;  // piece borders are multiples: whole tiles and whole int8 blocks of the usual sizes
constexpr int64_t kSmallest = 1 << 15;  // elements a slot has at least, so that its overhead does not show
constexpr int64_t kOverhead = 64;       // of a piece, in elements

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

void* scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, rounded));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

Plan make_plan(const Call& call, int64_t values, bool apart) {
  int64_t total = 0;
  for (const Span& span : call.spans) total += span.length;
  // 512 KiB of totals at most, but 64 slots at least where there is work for them.
  const int64_t most = std::clamp<int64_t>((512 << 10) / 8 / std::max<int64_t>(values, 1), 64, 1024);
  const int64_t even = (total + most - 1) / most;
  const int64_t size = std::max(kSmallest, (even + kUnit - 1) / kUnit * kUnit);

  Plan plan;
  plan.pieces.reserve(call.spans.size() + static_cast<size_t>(total / size) + 1);
  plan.slots = {0};
  plan.weights = {0};
  int64_t filled = 0, weight = 0;
  auto close = [&] {
    if (static_cast<int64_t>(plan.pieces.size()) == plan.slots.back()) return;
    plan.slots.push_back(static_cast<int64_t>(plan.pieces.size()));
    plan.weights.push_back(weight);
    filled = 0;
  };
  for (size_t s = 0; s < call.spans.size(); ++s) {
    const int64_t length = call.spans[s].length;
    for (int64_t begin = 0; begin < length; begin += size) {
      const Piece piece{static_cast<int32_t>(s), static_cast<int32_t>(plan.slot_count()), begin,
                        std::min(size, length - begin)};
      plan.pieces.push_back(piece);
      filled += piece.length;
      weight += piece.length + kOverhead;
      if (filled >= size) close();
    }
    if (apart) close();
  }
  close();
  return plan;
}

}  // namespace carerl::cpu
