#define CARERL_ISA generic
#include "table.h"
