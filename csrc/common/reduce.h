// Two sums over each image, in an order that depends on the image's size alone: not on the batch, the threads or the instruction set,
// and the same on a GPU. A chunk of chunk_size elements is summed by halving (v[i] += v[i + n] for n = chunk_size / 2, ..., 1; elements
// past the image's end are zeros), in the type of the terms. Chunk c of an image then goes to lane c % sum_lanes, in double and in
// order; the lanes are summed by halving.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace proxt2i {

constexpr int64_t chunk_size = 512;
constexpr int sum_lanes = 32;

constexpr int64_t chunks_in(int64_t elements) { return (elements + chunk_size - 1) / chunk_size; }

// partials: [num_images, chunks, 2].  first, second: [num_images], the sums over the chunks divided by the divisors.
template <typename T>
struct SumArgs {
  const T* partials;
  T *first, *second;
  int64_t num_images, num_chunks;
  double first_divisor, second_divisor;
};

// The shared part of an operator with two results an image: partial sums by compute(Types<T, E>, T* partials), then their sums.
template <typename Device, typename Compute>
std::tuple<Tensor, Tensor> sum_per_image(const Device& device, const Tensor& eps, double first_divisor, double second_divisor,
                                         const Compute& compute) {
  const int64_t num_images = images_of(eps), num_chunks = chunks_in(elements_per_image(eps));
  const Tensor first = empty_vector(eps, num_images, state_type(eps)), second = empty_vector(eps, num_images, state_type(eps));
  const Tensor partials = empty_vector(eps, 2 * num_images * num_chunks, state_type(eps));
  with_types(eps, [&]<typename T, typename E>(Types<T, E> types) {
    compute(types, output<T>(partials));
    device.sum(SumArgs<T>{output<T>(partials), output<T>(first), output<T>(second), num_images, num_chunks, first_divisor,
                          second_divisor});
  });
  return {first, second};
}

}  // namespace proxt2i
