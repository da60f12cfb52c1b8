// Plain C++: slow, for tests of the others and on processors without them.
#include "transposed.h"

namespace kashin {
namespace {

struct Plain {
  static constexpr int kLanes = 4, kReach = 16, kSums = 4, kDenseRows = 2;
  struct Values {
    float of[kLanes];
  };
  struct Bytes {
    uint8_t of[4 * kLanes];
  };
  using Table = const float*;

  struct Controls {
    Controls(int width, const Field*) : bits(width) {}
    int bits;
  };

  static Values zero() { return all(0.0f); }
  static Values all(float a) { return {{a, a, a, a}}; }
  static Values load(const float* a) { return {{a[0], a[1], a[2], a[3]}}; }
  static void store(float* to, Values a) { std::memcpy(to, a.of, sizeof a.of); }
  static Values plus(Values a, Values b) { return add_product(a, all(1.0f), b); }
  static Values minus(Values a, Values b) { return add_product(b, all(-1.0f), a); }
  static Values times(Values a, Values b) { return add_product(a, b, zero()); }
  static Values add_product(Values a, Values b, Values c) {
    for (int i = 0; i < kLanes; ++i) c.of[i] += a.of[i] * b.of[i];
    return c;
  }

  static Bytes no_bytes() { return {}; }

  // Each code at the beginning of a byte, with bits of its neighbours above.
  static Bytes spread(const uint8_t* codes, const Controls& controls, int bit) {
    Bytes own;
    for (int i = 0; i < 4 * kLanes; ++i) {
      const int at = bit + i * controls.bits;
      own.of[i] = static_cast<uint8_t>((codes[at / 8] | codes[at / 8 + 1] << 8) >> (at % 8));
    }
    return own;
  }

  template <int kUp>
  static Bytes place(Bytes codes, const Controls&, int, int) {
    for (auto& each : codes.of)
      each = static_cast<uint8_t>(kUp >= 0 ? each << (kUp & 7) : each >> (-kUp & 7));
    return codes;
  }

  template <int kMask>
  static Bytes merge(Bytes a, Bytes b) {
    for (int i = 0; i < 4 * kLanes; ++i) b.of[i] |= a.of[i] & kMask;
    return b;
  }

  static Bytes bytes(const uint8_t* codes) {
    Bytes own;
    std::memcpy(own.of, codes, sizeof own.of);
    return own;
  }

  // Bits moved up or down.
  template <int kUp>
  static Bytes up(Bytes a) {
    return place<kUp>(a, Controls(1, nullptr), 0, 0);
  }

  // Bits of a where each byte of the mask has them, else of b.
  template <int kMask>
  static Bytes choose(Bytes a, Bytes b) {
    for (int i = 0; i < 4 * kLanes; ++i)
      b.of[i] = static_cast<uint8_t>((a.of[i] & kMask) | (b.of[i] & ~kMask));
    return b;
  }

  // Numbers from some bit of every four bytes on; look-ups use the lowest four.
  static Bytes index(Bytes own, int shift) {
    for (int i = 0; i < kLanes; ++i) own.of[i] = own.of[4 * i + shift / 8] >> (shift % 8) & 15;
    return own;
  }

  static Table table(const float* sums) { return sums; }
  static Values look_up(Table table, Bytes index) {
    return {{table[index.of[0]], table[index.of[1]], table[index.of[2]], table[index.of[3]]}};
  }

  static Values hadamard(Values a) {
    const float *of = a.of, s = of[0] + of[1], d = of[0] - of[1], t = of[2] + of[3],
                e = of[2] - of[3];
    return {{s + t, d + e, s - t, d - e}};
  }
};

}  // namespace

const Kernels kPlain = {product<Plain>, transposed<Plain>, rotate<Plain>};

}  // namespace kashin
