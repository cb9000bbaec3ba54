// Which instruction set the kernels use: the best one the CPU and the operating system support, or a lower one on
// request.
#pragma once

#include <string>
#include <vector>

namespace carerl::cpu {

// Lowest first; "generic" is always there.
std::vector<std::string> supported_isas();

// The last of supported_isas(), or what the environment variable CARERL_CPU_ISA names.
// Throws std::runtime_error where that is unknown or not supported here.
std::string select_isa();

}  // namespace carerl::cpu
