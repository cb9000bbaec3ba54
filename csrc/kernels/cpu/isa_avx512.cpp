#define CARERL_ISA avx512
#include "table.h"
