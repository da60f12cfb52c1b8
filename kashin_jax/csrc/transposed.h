// x @ W^T for packed codes: the logits of a head that is an embedding, too.
//
// A row of W gives one number. Its codes are looked up in the levels of each field, a
// vector of columns at a time, and what is found multiplies those columns of x; lanes are
// added up last. Scales go into x, once for all rows of a block.
#pragma once

#include "method.h"

namespace kashin {
namespace {

constexpr int kAtATime = 4;  // rows of x that a level, once looked up, multiplies
// Columns of all these rows and fields for which x stays in the nearest cache: with eight
// rows of 2048 columns it does not, and products take twice as long.
constexpr int kNear = 4096;

// Levels of a field by the lowest four bits of a code, from a bit of it on.
struct Nibble {
  explicit Nibble(const Field& field, int code_bits) : shift(code_bits > 4 ? field.shift : 0) {
    for (int c = 0; c < kTable; ++c)
      levels[c] = field.levels[(c >> (field.shift - shift)) & ((1 << field.bits) - 1)];
  }
  alignas(64) float levels[kTable];
  int shift;
};

// A strip's columns in the order of vectors: column 4 l + k is lane l of vector k.
template <class V, class Use>
void for_columns(Use use) {
  for (int k = 0; k < 4; ++k)
    for (int lane = 0; lane < V::kLanes; ++lane) use(k * V::kLanes + lane, 4 * lane + k);
}

// What the lanes of a stored vector amount to; it is changed.
template <class V>
float lanes_added(float* of) {
  for (int n = V::kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) of[i] += of[i + n];
  return of[0];
}

// Rows of x, by field, that a row of W is multiplied by.
struct Factors {
  const float* x;
  int64_t field_stride, row_stride;
};

// Adds a row of W, of field f, times kRows rows of x to `sums`, vector r of field f.
template <class V, int kFields, int kRows, bool kSimple>
void multiply_row(const Place& place, const typename V::Controls& controls, const Nibble* nibbles,
                  const Factors& factors, float* sums, int64_t field_stride) {
  // Sums that do not wait for each other, as many as there are registers for.
  constexpr int kOwn = kFields * kRows;
  constexpr int kApart = kOwn * 4 <= V::kSums ? 4 : kOwn * 2 <= V::kSums ? 2 : 1;
  typename V::Values sum[kFields][kRows][kApart];
  typename V::Table table[kFields];
  for (int f = 0; f < kFields; ++f) {
    table[f] = V::table(nibbles[f].levels);
    for (auto& row : sum[f])
      for (auto& part : row) part = V::zero();
  }
  const int64_t first = place.first_bit;
  for (int strip = 0; strip < place.strips; ++strip) {
    const int64_t bit = first + strip * place.strip_bits;
    alignas(64) uint8_t copy[V::kReach];
    const uint8_t* codes = place.codes + bit / 8;
    if constexpr (!kSimple) codes = readable<V>(codes, place.end, copy);
    const auto spread = V::spread(codes, controls, kSimple ? 0 : static_cast<int>(bit % 8));
    const auto own = V::template place<0>(spread, controls, kFields - 1, 0);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const float* x = factors.x + strip * 4 * V::kLanes + k * V::kLanes;
#pragma GCC unroll 2
      for (int f = 0; f < kFields; ++f) {
        const auto level = V::look_up(table[f], V::index(own, 8 * k + nibbles[f].shift));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto columns = V::load(x + f * factors.field_stride + r * factors.row_stride);
          sum[f][r][k % kApart] = V::add_product(level, columns, sum[f][r][k % kApart]);
        }
      }
    }
  }
  for (int f = 0; f < kFields; ++f)
    for (int r = 0; r < kRows; ++r) {
      auto all = sum[f][r][0];
      for (int part = 1; part < kApart; ++part) all = V::plus(all, sum[f][r][part]);
      float* to = sums + f * field_stride + r * V::kLanes;
      V::store(to, V::plus(V::load(to), all));
    }
}

// Some rows of x, and a block row's products with them.
template <class V, int kFields>
class Rows {
 public:
  Rows(const Problem& problem, int64_t row0, int rows)
      : p_(problem), row0_(row0), rows_(rows), across_(problem.outputs / problem.block_width),
        is_uniform_(problem.block_width % kStrip<V> == 0),
        strips_((problem.outputs + kStrip<V> - 1) / kStrip<V>), width_(strips_ * kStrip<V>),
        x_(kFields * rows * width_), scaled_(kFields * rows * width_),
        sums_(V::kLanes * kFields * rows * problem.block_height), y_(2 * problem.block_height) {
    for (int f = 0; f < kFields; ++f)
      for (int r = 0; r < rows; ++r) {
        const float* from = p_.x[f] + (row0 + r) * p_.outputs;
        float* to = x_.get() + (f * rows + r) * width_;
        for (int64_t first = 0; first < width_; first += kStrip<V>)
          for_columns<V>([&](int at, int column) {
            const bool is_there = first + column < p_.outputs;
            to[first + at] = is_there ? from[first + column] : 0.0f;
          });
      }
  }

  void add_block(int64_t block) {
    scale(block);
    std::memset(sums_.get(), 0, sizeof(float) * V::kLanes * kFields * rows_ * p_.block_height);
    const int64_t top = block * p_.block_height;
    const int64_t size = smaller(p_.block_height, p_.inputs - top);
    const int64_t band = kNear / (kFields * rows_ * kStrip<V>);
    for (int64_t strip = 0; strip < strips_; strip += band)
      for (int s = 0; s < p_.streams; ++s) {
        const Stream& stream = p_.stream[s];
        const typename V::Controls controls(stream.bits, stream.fields);
        const Nibble nibbles[2] = {Nibble(stream.fields[0], stream.bits),
                                   Nibble(stream.fields[kFields - 1], stream.bits)};
        for (int64_t i = 0; i < size / p_.streams; ++i) {
          const int64_t row = top / p_.streams + i;
          const int64_t bit = (row * p_.outputs + strip * kStrip<V>) * stream.bits;
          const Place place{stream.codes, stream.codes + stream.bytes, bit, 0, kSet,
                            static_cast<int>(smaller(band, strips_ - strip)),
                            kStrip<V> * stream.bits};
          multiply(place, controls, nibbles, strip, i * p_.streams + s);
        }
      }
    finish(top, size);
  }

 private:
  // x times the scales of a block row.
  void scale(int64_t block) {
    const float* own = p_.scale + block * across_;
    const auto width = static_cast<uint32_t>(p_.block_width);
    alignas(64) float of[kStrip<V>];
    for (int64_t first = 0; first < width_; first += kStrip<V>) {
      if (is_uniform_)
        for (float& each : of) each = own[static_cast<uint32_t>(first) / width];
      else
        for_columns<V>([&](int at, int column) {
          of[at] = own[static_cast<uint32_t>(smaller(first + column, p_.outputs - 1)) / width];
        });
      for (int64_t r = 0; r < kFields * rows_; ++r)
        for (int k = 0; k < kStrip<V>; k += V::kLanes) {
          const int64_t at = r * width_ + first + k;
          V::store(scaled_.get() + at, V::times(V::load(x_.get() + at), V::load(of + k)));
        }
    }
  }

  // A row of a block times all rows of x.
  void multiply(const Place& place, const typename V::Controls& controls, const Nibble* nibbles,
                int64_t strip, int64_t row) {
    const bool is_simple = place.template is_simple<V>();
    for (int r = 0; r < rows_;) {
      const Factors factors{scaled_.get() + r * width_ + strip * kStrip<V>, rows_ * width_, width_};
      float* sums = sums_.get() + (row * kFields * rows_ + r) * V::kLanes;
      const auto add = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        if (is_simple)
          multiply_row<V, kFields, kRows, true>(place, controls, nibbles, factors, sums,
                                                rows_ * V::kLanes);
        else
          multiply_row<V, kFields, kRows, false>(place, controls, nibbles, factors, sums,
                                                 rows_ * V::kLanes);
        r += kRows;
      };
      const int together = rows_together(rows_ - r);
      if (together == 4)
        add(Count<4>{});
      else if (together == 2)
        add(Count<2>{});
      else
        add(Count<1>{});
    }
  }

  template <int kValue>
  struct Count {
    static constexpr int value = kValue;
  };

  // Writes the sums of a block row, transformed.
  void finish(int64_t top, int64_t size) {
    for (int r = 0; r < rows_; ++r) {
      float* y[2] = {y_.get(), y_.get() + p_.block_height};
      for (int f = 0; f < kFields; ++f)
        for (int64_t i = 0; i < size; ++i)
          y[f][i] = lanes_added<V>(sums_.get() + ((i * kFields + f) * rows_ + r) * V::kLanes);
      if (kFields > 1 && p_.is_summed) {
        if (p_.out_basis != nullptr) rotate_back(y[1], size, p_.out_basis);
        for (int64_t i = 0; i < size; ++i) y[0][i] += y[1][i];
      }
      if (p_.out_rotation != nullptr) rotate_back(y[0], size, p_.out_rotation);
      for (int f = 0; f < (p_.is_summed ? 1 : kFields); ++f)
        std::memcpy(p_.y[f] + (row0_ + r) * p_.inputs + top, y[f], sizeof(float) * size);
    }
  }

  static void rotate_back(float* a, int64_t n, Signs signs) {
    hadamard<V>(a, n);
    times_signs(a, n, signs);
  }

  const Problem& p_;
  const int64_t row0_;
  const int rows_;
  const int64_t across_;
  const bool is_uniform_;  // a strip has one scale
  const int64_t strips_, width_;
  Floats x_, scaled_, sums_, y_;
};

template <class V, int kFields>
void transposed_of(const Problem& p, int64_t first, int64_t last) {
  for (int64_t row0 = 0; row0 < p.rows; row0 += kAtATime) {
    const int rows = static_cast<int>(smaller<int64_t>(kAtATime, p.rows - row0));
    Rows<V, kFields> own(p, row0, rows);
    for (int64_t row = first; row < last; row += p.block_height)
      own.add_block(row / p.block_height);
  }
}

// Rows [first, last) of W, whole blocks.
template <class V>
bool transposed(const Problem& p, int64_t first, int64_t last) {
  for (int s = 0; s < p.streams; ++s)
    for (int f = 0; f < p.fields; ++f)
      if (p.stream[s].fields[f].bits > 4) return false;
  if (p.fields == 2)
    transposed_of<V, 2>(p, first, last);
  else
    transposed_of<V, 1>(p, first, last);
  return true;
}

}  // namespace
}  // namespace kashin
