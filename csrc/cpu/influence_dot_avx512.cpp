#define LANES 16
#define ROWS 16
#define UNIT_NAME influence_unit_avx512
#include "influence_dot_kernel.h"
