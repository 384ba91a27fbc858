#define LANES 8
#define BLOCKS_NAME sketch_blocks_avx2
#include "sketch_matrix_kernel.h"
