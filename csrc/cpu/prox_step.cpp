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
    T eps[chunk_size], kept[chunk_size];
    T* x = this->x != nullptr ? this->x + at : kept;
    const bool cleans = this->clean_next != nullptr || this->remembers();
    if (this->eps_uncond != nullptr) {
      cleans ? prox_chunk<true, true>(row, at, length, eps, x) : prox_chunk<true, false>(row, at, length, eps, x);
    } else {
      cleans ? prox_chunk<false, true>(row, at, length, eps, x) : prox_chunk<false, false>(row, at, length, eps, x);
    }
    if (this->y_next != nullptr) renoise_chunk<isa>(row, image, offset, length, x, this->y_next + at);
    if (!cleans) return;
    T* clean = this->clean_next != nullptr ? this->clean_next + at : eps;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) clean[i] = clean_image(y[i], eps[i], row.clean_y, row.clean_eps);
    if (!this->remembers()) return;
    const T* before = this->clean + at;
    T* y_next = this->y_next + at;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y_next[i] = remember(y_next[i], clean[i], before[i], row.memory);
  }

  // x, and eps for those who need it.
  template <bool guided, bool keeps_eps>
  PROXT2I_INLINE void prox_chunk(const StepRow<T>& row, int64_t at, int64_t length, T* eps, T* x) const {
    const T* y = this->y + at;
    const E *eps_cond = this->eps_cond + at, *eps_uncond = guided ? this->eps_uncond + at : nullptr;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      T e = static_cast<T>(widen(eps_cond[i]));
      if constexpr (guided) e = guide(e, static_cast<T>(widen(eps_uncond[i])), row.guidance_scale);
      if constexpr (keeps_eps) eps[i] = e;
      x[i] = prox(y[i], e, row.sqrt_lam);
    }
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
  PROXT2I_INLINE void renoise_chunk(const StepRow<T>& row, int64_t image, int64_t offset, int64_t length, const T* x, T* y_next) const {
    if (row.b == 0 || (this->noise == nullptr && this->seeds == nullptr)) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) y_next[i] = row.a * x[i];
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
    for (int64_t i = 0; i < length; ++i) y_next[i] = renoise(x[i], z[i], row.a, row.b);
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
