#define CARERL_ISA amx_bf16
#include "input_tiles.h"

namespace carerl::cpu {

namespace avx512_bf16 {
const KernelTable& table();
}

namespace amx_bf16 {

// All others are those of AVX512-BF16.
const KernelTable& table() {
  static const KernelTable all = [] {
    KernelTable own = avx512_bf16::table();
    own.name = "amx_bf16";
    own.input_block = input_block;
    own.input_project = input_project;
    own.input_edit = input_edit;
    return own;
  }();
  return all;
}

}  // namespace amx_bf16
}  // namespace carerl::cpu
