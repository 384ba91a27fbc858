#define LANES 16
#define BLOCKS_NAME sketch_blocks_avx512
#include "sketch_matrix_kernel.h"
