// How a call is cut into pieces for threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"

namespace carerl::cpu {

// Elements [begin, begin + length) of one span; its totals go to `slot`.
struct Piece {
  int32_t span, slot;
  int64_t begin, length;
};

// Pieces in order of memory, grouped into slots. A slot is worked on by one thread and has its own fp64 totals, which
// are added up slot after slot. Where the borders lie depends on shapes alone, so results do not depend on the number
// of threads.
struct Plan {
  std::vector<Piece> pieces;
  std::vector<int64_t> slots;    // first piece of each slot, and the number of pieces
  std::vector<int64_t> weights;  // work before each slot, and all of it

  int64_t slot_count() const { return static_cast<int64_t>(slots.size()) - 1; }
};

// `values`: doubles of totals a slot has; many of them make slots fewer. With `apart`, no slot spans two tensors.
Plan make_plan(const Call& call, int64_t values, bool apart);

// Runs body(piece) for all of them, each slot on one thread; inline when the work is too little to wake one up.
template <class Body>
void for_each_piece(const Call& call, const Plan& plan, const Body& body) {
  const int64_t total = plan.weights.back();
  // Waking the pool costs 3 to 5 us, in which one core reads about 64 Ki elements out of a cache.
  const int64_t bytes = total * (call.basis.rows + 2 * call.batch()) * 2;
  const int64_t useful = bytes < (int64_t{1} << 17) ? 1 : 1 + bytes / (int64_t{1} << 16);
  int64_t threads = call.pool.threads;
  if (threads > useful) threads = useful;
  if (threads > plan.slot_count()) threads = plan.slot_count();
  struct Context {
    const Plan& plan;
    const Body& body;
    int64_t threads;
  } context{plan, body, threads};
  auto work = [](void* raw, int thread) {
    const Context& c = *static_cast<Context*>(raw);
    const int64_t total = c.plan.weights.back();
    for (int64_t slot = 0; slot < c.plan.slot_count(); ++slot) {
      // The thread in whose share of the work the middle of the slot lies; shares are contiguous in memory.
      const double middle = 0.5 * static_cast<double>(c.plan.weights[slot] + c.plan.weights[slot + 1]);
      const int64_t owner = static_cast<int64_t>(middle / static_cast<double>(total) * static_cast<double>(c.threads));
      if (owner != thread) continue;
      for (int64_t piece = c.plan.slots[slot]; piece < c.plan.slots[slot + 1]; ++piece) c.body(c.plan.pieces[piece]);
    }
  };
  if (threads <= 1) {
    for (const Piece& piece : plan.pieces) body(piece);
  } else {
    call.pool.run(static_cast<int>(threads), work, &context);
  }
}

// The span of a piece.
inline Span span_of(const Call& call, const Piece& piece) {
  Span span = call.spans[piece.span];
  span.grads = static_cast<char*>(span.grads) + piece.begin * element_size(span.dtype);
  span.column += piece.begin;
  span.length = piece.length;
  return span;
}

}  // namespace carerl::cpu
