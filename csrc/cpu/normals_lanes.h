// Noise in the vectors of x86. Philox4x32-10 holds one block in each 64-bit lane, because there one widening multiplication (vpmuludq,
// which reads the low halves alone) gives both halves of the product: compilers do not find that form by themselves. Upper halves of
// the lanes hold rubbish, which multiplication and packing ignore. The normals are the plain loop over common/math.h's function, which
// compilers vectorise well.
//
// Vectors is a struct of one instruction set; whoever includes this is compiled for that set (normals_avx2.cpp, normals_avx512.cpp).
#pragma once

#include "../common/math.h"
#include "normals.h"

namespace proxt2i {

// Seed, step and the upper half of the block's number, which all blocks of a call share: what the first two rounds make of them is the
// same for all, so that each needs one product a block instead of two.
struct PhiloxKeys {
  uint32_t first[10], second[10];             // of each round
  uint32_t round0, round1_0, round1_2, round2;  // xored into counter words; the key of that round is in them

  PhiloxKeys(uint64_t seed, uint64_t step, uint64_t block) {
    for (uint32_t round = 0; round < 10; ++round) {
      first[round] = static_cast<uint32_t>(seed) + round * philox_increment0;
      second[round] = static_cast<uint32_t>(seed >> 32) + round * philox_increment1;
    }
    const uint64_t product1 = static_cast<uint64_t>(static_cast<uint32_t>(step)) * philox_multiplier1;
    const uint32_t word0 = static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(block >> 32) ^ first[0];
    const uint64_t product0 = static_cast<uint64_t>(word0) * philox_multiplier0;
    round0 = static_cast<uint32_t>(step >> 32) ^ second[0];
    round1_0 = static_cast<uint32_t>(product1) ^ first[1];
    round1_2 = static_cast<uint32_t>(product0 >> 32) ^ second[1];
    round2 = static_cast<uint32_t>(product0) ^ second[2];
  }
};

// Words 0 ... 3 of Vectors::chains * Vectors::lanes blocks: of so many vectors at once, because an instruction of a round waits for the
// one before. Two vectors are a group, whose blocks are in the order of Vectors::blocks.
template <typename Vectors>
inline void philox_words(const PhiloxKeys& keys, uint64_t first, uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  using V = Vectors;
  using Lanes = typename V::Lanes;
  constexpr int chains = V::chains;
  const Lanes multiplier0 = V::all(philox_multiplier0), multiplier1 = V::all(philox_multiplier1);
  Lanes c0[chains], c1[chains], c2[chains], c3[chains], product0[chains], product1[chains];
  const auto each = [](auto&& run) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) run(i);
  };
  each([&](int i) { product0[i] = V::multiply(V::blocks(static_cast<uint32_t>(first), i), multiplier0); });
  each([&](int i) {
    c2[i] = V::exclusive_or(V::high(product0[i]), V::all(keys.round0));
    c3[i] = V::exclusive_or(product0[i], V::all(keys.round1_2));  // counter word 2 of the round after the next
    product1[i] = V::multiply(c2[i], multiplier1);
  });
  each([&](int i) {
    c0[i] = V::exclusive_or(V::high(product1[i]), V::all(keys.round1_0));
    c1[i] = product1[i];
    c2[i] = c3[i];
  });
  each([&](int i) {
    product0[i] = V::multiply(c0[i], multiplier0);
    product1[i] = V::multiply(c2[i], multiplier1);
  });
  each([&](int i) {
    c0[i] = V::exclusive_or(V::high(product1[i]), c1[i], V::all(keys.first[2]));
    c2[i] = V::exclusive_or(V::high(product0[i]), V::all(keys.round2));
    c1[i] = product1[i];
    c3[i] = product0[i];
  });
#pragma GCC unroll 6
  for (int round = 3; round < 9; ++round) {
    each([&](int i) {
      product0[i] = V::multiply(c0[i], multiplier0);
      product1[i] = V::multiply(c2[i], multiplier1);
    });
    each([&](int i) {
      c0[i] = V::exclusive_or(V::high(product1[i]), c1[i], V::all(keys.first[round]));
      c2[i] = V::exclusive_or(V::high(product0[i]), c3[i], V::all(keys.second[round]));
      c1[i] = product1[i];
      c3[i] = product0[i];
    });
  }
  each([&](int i) {
    product0[i] = V::multiply(c0[i], multiplier0);
    product1[i] = V::multiply(c2[i], multiplier1);
  });
#pragma GCC unroll 2
  for (int i = 0; i < chains; i += 2) {  // the last round, for two vectors at once
    V::store(w0, V::exclusive_or(V::high_halves(product1[i], product1[i + 1]), V::low_halves(c1[i], c1[i + 1]), V::all32(keys.first[9])));
    V::store(w1, V::low_halves(product1[i], product1[i + 1]));
    V::store(w2, V::exclusive_or(V::high_halves(product0[i], product0[i + 1]), V::low_halves(c3[i], c3[i + 1]), V::all32(keys.second[9])));
    V::store(w3, V::low_halves(product0[i], product0[i + 1]));
    w0 += 2 * V::lanes, w1 += 2 * V::lanes, w2 += 2 * V::lanes, w3 += 2 * V::lanes;
  }
}

template <typename Vectors>
inline void draw_in_vectors(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead) {
  constexpr int group = 2 * Vectors::lanes;
  const PhiloxKeys keys(seed, step, first_block);
  for (int64_t first = 0; first < num_blocks; first += normal_batch) {
    ahead.ask(first);
    alignas(64) uint32_t w0[normal_batch], w1[normal_batch], w2[normal_batch], w3[normal_batch];
    alignas(64) float z0[normal_batch], z1[normal_batch], z2[normal_batch], z3[normal_batch];
    for (int i = 0; i < normal_batch; i += Vectors::chains * Vectors::lanes) {
      philox_words<Vectors>(keys, first_block + static_cast<uint64_t>(first + i), w0 + i, w1 + i, w2 + i, w3 + i);
    }
#pragma omp simd
    for (int i = 0; i < normal_batch; ++i) {
      box_muller(w0[i], w1[i], z0[i], z1[i]);
      box_muller(w2[i], w3[i], z2[i], z3[i]);
    }
    for (int i = 0; i < normal_batch; i += group) Vectors::interleave(z0 + i, z1 + i, z2 + i, z3 + i, z + 4 * (first + i));
  }
}

}  // namespace proxt2i
