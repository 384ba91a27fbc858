#define LANES 4
#define BLOCKS_NAME sketch_blocks_base
#include "sketch_matrix_kernel.h"
