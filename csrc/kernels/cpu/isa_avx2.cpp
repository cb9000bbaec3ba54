#define CARERL_ISA avx2
#include "table.h"
