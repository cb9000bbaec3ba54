// Included into copies of the kernels in which MUTANT(i) switches their i-th mistake on (see test_cuda_emulator.py).
#pragma once

#include <cstdlib>

inline int chosen_mutant() {
  static const char* chosen = std::getenv("CARERL_MUTANT");
  return chosen ? std::atoi(chosen) : -1;
}
#define MUTANT(i) (chosen_mutant() == (i))
