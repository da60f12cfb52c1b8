// AVX-512 with VBMI: 16 sums of a table are one register, looked up by one permutation.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(                                                           \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma")
#endif

#include "transposed.h"

namespace kashin {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16, kReach = 64, kSums = 16, kDenseRows = 6;
  using Values = __m512;
  using Bytes = __m512i;  // of 64 columns
  using Table = __m512;

  // Which bytes eight columns lie in, and where a field of theirs begins.
  struct Controls {
    Controls(int bits, const Field* fields) {
      alignas(64) uint8_t bytes[64];
      for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
      gather = _mm512_load_si512(bytes);
      for (int f = 0; f < 2; ++f)
        for (int row = 0; row < 8 && fields[f].bits > 0; ++row) {
          if (row >= 2 * rows_of_nibble(fields[f].bits)) break;
          const int up = place_of(fields[f].bits, row) - fields[f].shift;
          for (int i = 0; i < 64; ++i)
            bytes[i] = static_cast<uint8_t>((i % 8 * bits - up) & 63);
          begin[f][row] = _mm512_load_si512(bytes);
        }
    }
    Bytes gather;
    Bytes begin[2][8];
  };

  static Values zero() { return _mm512_setzero_ps(); }
  static Values all(float a) { return _mm512_set1_ps(a); }
  static Values load(const float* a) { return _mm512_loadu_ps(a); }
  static void store(float* to, Values a) { _mm512_storeu_ps(to, a); }
  static Values plus(Values a, Values b) { return _mm512_add_ps(a, b); }
  static Values minus(Values a, Values b) { return _mm512_sub_ps(a, b); }
  static Values times(Values a, Values b) { return _mm512_mul_ps(a, b); }
  static Values add_product(Values a, Values b, Values c) { return _mm512_fmadd_ps(a, b, c); }

  static Bytes no_bytes() { return _mm512_setzero_si512(); }

  // The codes of each eight columns at the beginning of a 64-bit lane.
  static Bytes spread(const uint8_t* codes, const Controls& controls, int bit) {
    const Bytes own = _mm512_permutexvar_epi8(controls.gather, _mm512_loadu_si512(codes));
    return bit == 0 ? own : _mm512_srl_epi64(own, _mm_cvtsi32_si128(bit));
  }

  template <int kUp>
  static Bytes place(Bytes codes, const Controls& controls, int field, int row) {
    return _mm512_multishift_epi64_epi8(controls.begin[field][row], codes);
  }

  template <int kMask>
  static Bytes merge(Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(kMask)), a, b, 0xCA);
  }

  static Bytes bytes(const uint8_t* codes) { return _mm512_loadu_si512(codes); }

  // Bits moved up or down, those of neighbours coming in.
  template <int kUp>
  static Bytes up(Bytes a) {
    if constexpr (kUp >= 0)
      return _mm512_slli_epi32(a, kUp);
    else
      return _mm512_srli_epi32(a, -kUp);
  }

  // Bits of a where each byte of the mask has them, else of b.
  template <int kMask>
  static Bytes choose(Bytes a, Bytes b) {
    return merge<kMask>(a, b);
  }

  // Numbers from some bit of each lane on; look-ups use the lowest four.
  static Bytes index(Bytes own, int shift) { return _mm512_srli_epi32(own, shift); }

  static Table table(const float* sums) { return _mm512_load_ps(sums); }
  static Values look_up(Table table, Bytes index) { return _mm512_permutexvar_ps(index, table); }

  // The first four steps of a Hadamard transform, within a register.
  static Values hadamard(Values a) {
    const Values none = _mm512_setzero_ps();
    const __m512i eight = _mm512_xor_si512(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(8));
    a = _mm512_add_ps(_mm512_mask_sub_ps(a, 0xAAAA, none, a), _mm512_permute_ps(a, 0xB1));
    a = _mm512_add_ps(_mm512_mask_sub_ps(a, 0xCCCC, none, a), _mm512_permute_ps(a, 0x4E));
    a = _mm512_add_ps(_mm512_mask_sub_ps(a, 0xF0F0, none, a),
                      _mm512_shuffle_f32x4(a, a, 0xB1));
    return _mm512_add_ps(_mm512_mask_sub_ps(a, 0xFF00, none, a),
                         _mm512_permutexvar_ps(eight, a));
  }
};

}  // namespace

const Kernels kAvx512 = {product<Avx512>, transposed<Avx512>, rotate<Avx512>};

}  // namespace kashin

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
