// Last include of a translation unit: its kernels as a table.
#pragma once

#include "all_finite.h"
#include "block.h"
#include "gram.h"
#include "input.h"
#include "packed_times.h"
#include "project.h"
#include "quantize_bases.h"
#include "rotate.h"
#include "token_logprobs.h"

#define CARERL_STRING_(x) #x
#define CARERL_STRING(x) CARERL_STRING_(x)

namespace carerl::cpu::CARERL_ISA {
extern const KernelTable table;
const KernelTable table = {CARERL_STRING(CARERL_ISA),
                           project,
                           gram,
                           edit,
                           rotate,
                           edit_rotate,
                           quantize,
                           block_project,
                           block_edit,
                           input_block,
                           input_project,
                           input_edit,
                           packed_times,
                           finite,
                           logprobs,
                           logprobs_backward};
}  // namespace carerl::cpu::CARERL_ISA
