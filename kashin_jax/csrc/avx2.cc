// AVX2: a table is two registers of eight sums, and the fourth bit chooses between them.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "transposed.h"

namespace kashin {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kReach = 32, kSums = 8, kDenseRows = 3;
  using Values = __m256;
  using Bytes = __m256i;  // of 32 columns
  struct Table {
    __m256 low, high;
  };

  // A code lies within 16 bits: which, and the factor that shifts it to their middle.
  struct Controls {
    Controls(int width, const Field*) : bits(width) {
      for (int bit = 0; bit < 8; ++bit)
        for (int odd = 0; odd < 2; ++odd) {
          alignas(32) uint8_t bytes[32];
          alignas(32) uint16_t factors[16];
          for (int i = 0; i < 16; ++i) {
            const int at = bit + bits * (2 * (i % 8) + odd);
            bytes[2 * i] = static_cast<uint8_t>(at / 8);
            bytes[2 * i + 1] = static_cast<uint8_t>(at / 8 + 1);
            factors[i] = static_cast<uint16_t>(1 << (8 - at % 8));
          }
          gather[bit][odd] = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
          factor[bit][odd] = _mm256_load_si256(reinterpret_cast<const __m256i*>(factors));
        }
    }
    int bits;
    Bytes gather[8][2], factor[8][2];
  };

  static Values zero() { return _mm256_setzero_ps(); }
  static Values all(float a) { return _mm256_set1_ps(a); }
  static Values load(const float* a) { return _mm256_loadu_ps(a); }
  static void store(float* to, Values a) { _mm256_storeu_ps(to, a); }
  static Values plus(Values a, Values b) { return _mm256_add_ps(a, b); }
  static Values minus(Values a, Values b) { return _mm256_sub_ps(a, b); }
  static Values times(Values a, Values b) { return _mm256_mul_ps(a, b); }
  static Values add_product(Values a, Values b, Values c) { return _mm256_fmadd_ps(a, b, c); }

  static Bytes no_bytes() { return _mm256_setzero_si256(); }

  // Each code at the beginning of a byte, with bits of its neighbours above.
  static Bytes spread(const uint8_t* codes, const Controls& controls, int bit) {
    const auto* low = reinterpret_cast<const __m128i*>(codes);
    const auto* high = reinterpret_cast<const __m128i*>(codes + 2 * controls.bits);
    const Bytes own = _mm256_loadu2_m128i(high, low);
    const Bytes even = _mm256_mullo_epi16(_mm256_shuffle_epi8(own, controls.gather[bit][0]),
                                          controls.factor[bit][0]);
    const Bytes odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(own, controls.gather[bit][1]),
                                         controls.factor[bit][1]);
    return _mm256_blendv_epi8(_mm256_srli_epi16(even, 8), odd, _mm256_set1_epi16(-256));
  }

  template <int kUp>
  static Bytes place(Bytes codes, const Controls&, int, int) {
    return up<kUp>(codes);
  }

  template <int kMask>
  static Bytes merge(Bytes a, Bytes b) {
    const Bytes mask = _mm256_set1_epi8(static_cast<char>(kMask));
    return _mm256_or_si256(_mm256_and_si256(mask, a), b);
  }

  static Bytes bytes(const uint8_t* codes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  }

  // Bits moved up or down, those of neighbours coming in.
  template <int kUp>
  static Bytes up(Bytes a) {
    if constexpr (kUp >= 0)
      return _mm256_slli_epi16(a, kUp);
    else
      return _mm256_srli_epi16(a, -kUp);
  }

  // Bits of a where each byte of the mask has them, else of b.
  template <int kMask>
  static Bytes choose(Bytes a, Bytes b) {
    const Bytes mask = _mm256_set1_epi8(static_cast<char>(kMask));
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }

  // Numbers from some bit of each lane on; look-ups use the lowest four.
  static Bytes index(Bytes own, int shift) { return _mm256_srli_epi32(own, shift); }

  static Table table(const float* sums) { return {load(sums), load(sums + 8)}; }
  static Values look_up(Table table, Bytes index) {
    const Values low = _mm256_permutevar8x32_ps(table.low, index);
    const Values high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  // The first three steps of a Hadamard transform, within a register.
  static Values hadamard(Values a) {
    const Values signs1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const Values signs2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const Values signs4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    a = _mm256_fmadd_ps(a, signs1, _mm256_permute_ps(a, 0xB1));
    a = _mm256_fmadd_ps(a, signs2, _mm256_permute_ps(a, 0x4E));
    return _mm256_fmadd_ps(a, signs4, _mm256_permute2f128_ps(a, a, 1));
  }
};

}  // namespace

const Kernels kAvx2 = {product<Avx2>, transposed<Avx2>, rotate<Avx2>};

}  // namespace kashin

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
