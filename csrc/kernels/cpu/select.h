// The kernels of the instruction set in use.
#pragma once

#include "types.h"

namespace carerl::cpu {

const KernelTable& kernels();  // throws as select_isa() does

}  // namespace carerl::cpu
