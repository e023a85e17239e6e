// Noise by common/math.h's functions alone, for machines without the vectors of normals_avx2.cpp and normals_avx512.cpp.
#include "normals.h"

#include "../common/math.h"

namespace proxt2i {

void draw_normals_baseline(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead) {
  for (int64_t first = 0; first < num_blocks; first += normal_batch) {
    ahead.ask(first);
    for (int64_t i = first; i < first + normal_batch; ++i) {
      philox_normal4(seed, step, first_block + static_cast<uint64_t>(i), z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3]);
    }
  }
}

}  // namespace proxt2i
