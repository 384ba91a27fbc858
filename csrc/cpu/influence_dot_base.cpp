#define LANES 4
#define ROWS 2
#define UNIT_NAME influence_unit_base
#include "influence_dot_kernel.h"
