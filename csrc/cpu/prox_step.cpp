// The fused proximal step on a CPU: one pass over memory, noise included. Within a chunk each stage is a plain loop over arrays that
// stay in the L1 cache.
#include "../common/prox_step.h"

#include "chunks.h"

namespace proxt2i {
namespace {

template <typename T, typename E>
struct Step : StepArgs<T, E> {
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    const int64_t at = image * this->per_image + offset;
    const StepRow<T> row = this->row(image);
    const T* y = this->y + at;
    const E* eps_cond = this->eps_cond + at;
    T eps[chunk_size], x[chunk_size];
    if (this->eps_uncond != nullptr) {
      const E* eps_uncond = this->eps_uncond + at;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        eps[i] = guide(static_cast<T>(widen(eps_cond[i])), static_cast<T>(widen(eps_uncond[i])), row.guidance_scale);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) eps[i] = static_cast<T>(widen(eps_cond[i]));
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) x[i] = prox(y[i], eps[i], row.sqrt_lam);
    const auto bytes = sizeof(T) * static_cast<size_t>(length);
    if (this->x != nullptr) __builtin_memcpy(this->x + at, x, bytes);
    if (this->y_next != nullptr) renoise_chunk<isa>(row, image, offset, length, x);  // x becomes y_next
    if (this->clean_next != nullptr || this->remembers()) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) eps[i] = clean_image(y[i], eps[i], row.clean_y, row.clean_eps);
      if (this->clean_next != nullptr) __builtin_memcpy(this->clean_next + at, eps, bytes);
    }
    if (this->y_next == nullptr) return;
    if (this->remembers()) {
      const T* before = this->clean + at;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) x[i] = remember(x[i], eps[i], before[i], row.memory);
    }
    __builtin_memcpy(this->y_next + at, x, bytes);
  }

  // What the chunk after this one reads and writes.
  PROXT2I_INLINE Ahead next_chunk(int64_t image, int64_t offset) const {
    const int64_t at = image * this->per_image + offset + chunk_size;
    Ahead ahead;
    ahead.add(this->y + at, chunk_size);
    ahead.add(this->eps_cond + at, chunk_size);
    if (this->eps_uncond != nullptr) ahead.add(this->eps_uncond + at, chunk_size);
    ahead.add(this->y_next + at, chunk_size);
    return ahead;
  }

  template <Isa isa>
  PROXT2I_INLINE void renoise_chunk(const StepRow<T>& row, int64_t image, int64_t offset, int64_t length, T* x) const {
    if (row.b == 0 || (this->noise == nullptr && this->seeds == nullptr)) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) x[i] = row.a * x[i];
      return;
    }
    T drawn[chunk_size];
    const T* z = drawn;
    if (this->noise != nullptr) {
      z = this->noise + image * this->per_image + offset;
    } else {
      draw_chunk<isa>(this->seeds[image], static_cast<int64_t>(row.draw), offset, length, drawn, next_chunk(image, offset));
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) x[i] = renoise(x[i], z[i], row.a, row.b);
  }
};

struct Normals : NormalArgs {
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    float z[chunk_size];
    draw_chunk<isa>(seeds[image], step, offset, length, z);
    __builtin_memcpy(out + image * per_image + offset, z, sizeof(float) * static_cast<size_t>(length));
  }
};

struct Cpu {
  template <typename T, typename E>
  void step(const StepArgs<T, E>& args) const {
    run_parallel(Step<T, E>{args});
  }
  void normals(const NormalArgs& args) const { run_parallel(Normals{args}); }
};

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor, Tensor> prox_step_cpu(const Tensor& y, const Tensor& eps_cond, Optional eps_uncond, Optional clean,
                                                 Optional noise, Optional seeds, const Tensor& coefficients, bool want_x,
                                                 bool want_next, bool want_clean) {
  return prox_step(Cpu{}, {y, eps_cond, eps_uncond, clean, noise, seeds, coefficients, want_x, want_next, want_clean});
}

Tensor philox_normal_cpu(const Tensor& seeds, int64_t step, int64_t count) { return philox_normal(Cpu{}, seeds, step, count); }

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("prox_step", TORCH_BOX(&proxt2i::prox_step_cpu));
  m.impl("philox_normal", TORCH_BOX(&proxt2i::philox_normal_cpu));
}
