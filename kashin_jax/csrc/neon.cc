// NEON, which every 64-bit ARM has: a table is the 64 bytes that one look-up reaches.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "transposed.h"

namespace kashin {
namespace {

struct Neon {
  // Of 32 registers: sixteen sums, eight of indices and a table, or 6 x 4 sums of decoded
  // blocks with four columns and a factor.
  static constexpr int kLanes = 4, kReach = 16, kSums = 16, kDenseRows = 6;
  using Values = float32x4_t;
  using Bytes = uint8x16_t;  // of 16 columns
  using Table = uint8x16x4_t;

  // A code lies within two bytes: which, and how far each is shifted towards the code's
  // place. A shift by eight gives zero.
  struct Controls {
    Controls(int bits, const Field*) {
      for (int bit = 0; bit < 8; ++bit) {
        uint8_t bytes[2][16];
        int8_t shifts[2][16];
        for (int i = 0; i < 16; ++i) {
          const int at = bit + i * bits;
          for (int next = 0; next < 2; ++next) {
            bytes[next][i] = static_cast<uint8_t>(at / 8 + next);
            shifts[next][i] = static_cast<int8_t>(8 * next - at % 8);
          }
        }
        for (int next = 0; next < 2; ++next) {
          gather[bit][next] = vld1q_u8(bytes[next]);
          shift[bit][next] = vld1q_s8(shifts[next]);
        }
      }
    }
    Bytes gather[8][2];
    int8x16_t shift[8][2];
  };

  static Values zero() { return all(0.0f); }
  static Values all(float a) { return vdupq_n_f32(a); }
  static Values load(const float* a) { return vld1q_f32(a); }
  static void store(float* to, Values a) { vst1q_f32(to, a); }
  static Values plus(Values a, Values b) { return vaddq_f32(a, b); }
  static Values minus(Values a, Values b) { return vsubq_f32(a, b); }
  static Values times(Values a, Values b) { return vmulq_f32(a, b); }
  static Values add_product(Values a, Values b, Values c) { return vfmaq_f32(c, a, b); }

  static Bytes no_bytes() { return vdupq_n_u8(0); }

  // Each code at the beginning of a byte, with bits of its neighbours above.
  static Bytes spread(const uint8_t* codes, const Controls& controls, int bit) {
    const Bytes own = vld1q_u8(codes);
    const Bytes low = vqtbl1q_u8(own, controls.gather[bit][0]);
    const Bytes high = vqtbl1q_u8(own, controls.gather[bit][1]);
    return vorrq_u8(vshlq_u8(low, controls.shift[bit][0]),
                    vshlq_u8(high, controls.shift[bit][1]));
  }

  template <int kUp>
  static Bytes place(Bytes codes, const Controls&, int, int) {
    return up<kUp>(codes);
  }

  template <int kMask>
  static Bytes merge(Bytes a, Bytes b) {
    return choose<kMask>(a, b);
  }

  static Bytes bytes(const uint8_t* codes) { return vld1q_u8(codes); }

  // Bits moved up or down.
  template <int kUp>
  static Bytes up(Bytes a) {
    if constexpr (kUp >= 0)
      return vshlq_n_u8(a, kUp);
    else
      return vshrq_n_u8(a, -kUp);
  }

  // Bits of a where each byte of the mask has them, else of b.
  template <int kMask>
  static Bytes choose(Bytes a, Bytes b) {
    return vbslq_u8(vdupq_n_u8(kMask), a, b);
  }

  // Where in a table the four bytes of a sum are, by the number from some bit of each lane
  // on: once for all rows of x that are looked up together.
  static Bytes index(Bytes own, int shift) {
    const uint32x4_t from = vshlq_u32(vreinterpretq_u32_u8(own), vdupq_n_s32(-shift));
    const uint32x4_t number = vandq_u32(from, vdupq_n_u32(15));
    const uint32x4_t first = vdupq_n_u32(0x03020100);
    return vreinterpretq_u8_u32(vmlaq_u32(first, number, vdupq_n_u32(0x04040404)));
  }

  static Table table(const float* sums) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(sums);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
  }
  static Values look_up(Table table, Bytes index) {
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, index));
  }

  // The first two steps of a Hadamard transform, within a register.
  static Values hadamard(Values a) {
    const Values signs1 = {1, -1, 1, -1}, signs2 = {1, 1, -1, -1};
    a = vfmaq_f32(vrev64q_f32(a), a, signs1);
    return vfmaq_f32(vextq_f32(a, a, 2), a, signs2);
  }
};

}  // namespace

const Kernels kNeon = {product<Neon>, transposed<Neon>, rotate<Neon>};

}  // namespace kashin

#endif
