#define LANES 8
#define ROWS 4
#define UNIT_NAME influence_unit_avx2
#include "influence_dot_kernel.h"
