#define CARERL_ISA avx512_bf16
#include "pairs.h"

namespace carerl::cpu {

namespace avx512 {
extern const KernelTable table;
}

namespace avx512_bf16 {

static void project(const Basis& basis, const Span& span, double* totals) {
  const bool pairs = basis.dtype == DType::kBF16 && span.dtype == DType::kBF16;
  (pairs ? project_pairs : avx512::table.project)(basis, span, totals);
}

// All others are AVX-512's.
const KernelTable& table() {
  static const KernelTable all = [] {
    KernelTable own = avx512::table;
    own.name = "avx512_bf16";
    own.project = project;
    return own;
  }();
  return all;
}

}  // namespace avx512_bf16
}  // namespace carerl::cpu
