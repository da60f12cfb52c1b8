// x @ W for packed codes by look-ups, for any instruction set V and any width of codes.
//
// A nibble of regrouped codes indexes a table of 16 sums of x: four rows of W where a
// field has one bit, two where it has two, one where it has three or four. A tile of
// W, a strip of columns and some rows of one block, is multiplied in two steps:
//
//   regroup  codes as stored -> bytes, one for each column, with two nibbles of the
//            field: those of the first rows in the low half, of the next in the high;
//   look up  each nibble in the tables of each row of x, and add.
//
// Scales of blocks go into the sums of a tile. The file is included once for each
// instruction set, after the pragma that turns it on: all names are local, and templates
// of the standard library are not used, of which the linker keeps any one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "problem.h"

namespace kashin {
namespace {

constexpr int kSet = 8;        // rows of W regrouped together: two nibbles of one bit each
constexpr int kTileRows = 64;  // of W at most: its tables stay in the nearest cache
constexpr int kPass = 32;      // rows of x for which a tile is regrouped once
constexpr int kTogether = 4;   // strips regrouped together at most
constexpr int kDecodedPass = 512;  // rows of x for which a tile is decoded once
constexpr int kTable = 16;     // sums in a table

constexpr int rows_of_nibble(int bits) { return bits > 2 ? 1 : 4 / bits; }
constexpr int vectors_of_set(int bits) { return kSet / (2 * rows_of_nibble(bits)); }
// Where row i of a byte has its bits.
constexpr int place_of(int bits, int i) {
  const int q = rows_of_nibble(bits);
  return i < q ? bits * i : 4 + bits * (i - q);
}

template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}

// Memory in whole cache lines. Throws std::bad_alloc.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * count, kLine))) {}
  ~Floats() { ::operator delete(data_, kLine); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

// ------------------------------------------------------------------------ regrouping

// Row i of the bytes of a field, and those after it, merged into `bytes`.
template <class V, int kBits, int kShift, int kRow>
typename V::Bytes merged(const typename V::Bytes* rows, const typename V::Controls& controls,
                         int field, typename V::Bytes bytes) {
  constexpr int place = place_of(kBits, kRow);
  constexpr int mask = ((1 << kBits) - 1) << place;
  const auto own = V::template place<place - kShift>(rows[kRow], controls, field, kRow);
  bytes = V::template merge<mask>(own, bytes);
  if constexpr (kRow + 1 < 2 * rows_of_nibble(kBits))
    return merged<V, kBits, kShift, kRow + 1>(rows, controls, field, bytes);
  else
    return bytes;
}

template <class V, int kBits, int kShift>
void regroup_field(const typename V::Bytes* rows, const typename V::Controls& controls,
                   int field, typename V::Bytes* out) {
  for (int j = 0; j < vectors_of_set(kBits); ++j) {
    const auto* own = rows + j * 2 * rows_of_nibble(kBits);
    out[j] = merged<V, kBits, kShift, 0>(own, controls, field, V::no_bytes());
  }
}

// Codes of a strip from here on. Beyond the last code there is nothing to read.
template <class V>
const uint8_t* readable(const uint8_t* codes, const uint8_t* end, uint8_t* copy) {
  if (end - codes >= V::kReach) return codes;
  std::memset(copy, 0, V::kReach);
  if (codes < end) std::memcpy(copy, codes, end - codes);
  return copy;
}

// Widths of the fields of a code: of the upper one and where it begins, of the lower.
template <int kUpper, int kUpperShift, int kLower>
struct Widths {
  static constexpr int upper = kUpper, shift = kUpperShift, lower = kLower;
  // With a table for each row of W, those of fewer rows fit the nearest cache.
  static constexpr int tile_rows = kUpper > 2 ? kTileRows / 2 : kTileRows;
  static constexpr int bits[2] = {kUpper, kLower};
  // Of a code, and the codes in a byte where these and their fields fill it evenly.
  static constexpr int code = kUpperShift > 0 ? kUpper + kLower : kUpper;
  static constexpr bool is_even = (code == 2 || code == 4) && (kUpperShift == 0 || kUpper == kLower);
  static constexpr int codes_of_byte = is_even ? 8 / code : 1;
};

// Where the codes of some strips are, side by side.
struct Place {
  const uint8_t* codes;
  const uint8_t* end;
  int64_t first_bit, row_bits;
  int rows, strips, strip_bits;

  // Whether every row of a strip begins with a byte and may be read without care.
  template <class V>
  bool is_simple() const {
    const int64_t last = first_bit + (rows - 1) * row_bits + (strips - 1) * strip_bits;
    return rows % kSet == 0 && first_bit % 8 == 0 && row_bits % 8 == 0 &&
           end - codes - last / 8 >= V::kReach;
  }

  // Asks for a part of the codes below: rows are far from each other, and no hardware
  // follows 64. Inlined, since GCC drops calls of what does nothing but prefetch.
  __attribute__((always_inline)) void fetch_below(int part, int parts) const {
    const int64_t stride = row_bits / 8;
    const uint8_t* row = codes + first_bit / 8 + (rows + rows * part / parts) * stride;
    for (int i = rows * part / parts; i < rows * (part + 1) / parts; ++i, row += stride)
      for (int at = 0; at < strips * strip_bits / 8; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
};

template <class V, bool kSimple>
void spread_set(const Place& place, const typename V::Controls& controls, int set, int strip,
                typename V::Bytes* spread) {
  const int64_t first = place.first_bit + set * place.row_bits + strip * place.strip_bits;
  if constexpr (kSimple) {
    const uint8_t* codes = place.codes + first / 8;
    const int64_t stride = place.row_bits / 8;
#pragma GCC unroll 8
    for (int i = 0; i < kSet; ++i) spread[i] = V::spread(codes + i * stride, controls, 0);
  } else {
    for (int i = 0; i < kSet; ++i) {
      alignas(64) uint8_t copy[V::kReach];
      const int64_t bit = first + i * place.row_bits;
      spread[i] = V::no_bytes();
      if (set + i >= place.rows) continue;
      const uint8_t* codes = readable<V>(place.codes + bit / 8, place.end, copy);
      spread[i] = V::spread(codes, controls, static_cast<int>(bit % 8));
    }
  }
}

// The bytes of a tile by strip: of the upper field, and of the lower one if any.
template <class V, class W>
struct Regrouped {
  static constexpr int kSets = kTileRows / kSet;
  static constexpr int kLower = W::lower > 0 ? vectors_of_set(W::bits[W::lower > 0]) : 1;
  alignas(64) typename V::Bytes upper[kTogether][kSets * vectors_of_set(W::upper)];
  alignas(64) typename V::Bytes lower[kTogether][kSets * kLower];
};

template <class V, class W, bool kSimple>
void regroup(const Place& place, const typename V::Controls& controls, Regrouped<V, W>& out) {
  for (int set = 0; set * kSet < place.rows; ++set)
    for (int strip = 0; strip < place.strips; ++strip) {
      typename V::Bytes spread[kSet];
      spread_set<V, kSimple>(place, controls, set * kSet, strip, spread);
      regroup_field<V, W::upper, W::shift>(spread, controls, 0,
                                           out.upper[strip] + set * vectors_of_set(W::upper));
      if constexpr (W::lower > 0)
        regroup_field<V, W::lower, 0>(spread, controls, 1,
                                      out.lower[strip] + set * vectors_of_set(W::lower));
    }
}

// Two or four codes in a byte are not unpacked at all: the bits that say which code of a
// byte, and which field, change places with those that say which row. A tile then has as
// many strips side by side, of every second or fourth column.

// Bit `kBit` of the position in a byte changes places with the row a or b.
template <class V, int kBit>
inline __attribute__((always_inline)) void exchange(typename V::Bytes& a, typename V::Bytes& b) {
  constexpr int low = kBit == 0 ? 0x55 : kBit == 1 ? 0x33 : 0x0F;
  const auto both = V::template choose<low>(a, V::template up<1 << kBit>(b));
  b = V::template choose<low>(V::template up<-(1 << kBit)>(a), b);
  a = both;
}

// Rows of a byte of the field, changed for the codes and fields of a byte.
template <class V, int kRows>
inline __attribute__((always_inline)) void transpose(typename V::Bytes* rows) {
  for (int i = 0; i < kRows / 2; ++i) exchange<V, 2>(rows[i], rows[i + kRows / 2]);
  if constexpr (kRows >= 4)
    for (int i = 0; i < kRows; ++i)
      if ((i & kRows / 4) == 0) exchange<V, 1>(rows[i], rows[i + kRows / 4]);
  if constexpr (kRows == 8)
    for (int i = 0; i < kRows; i += 2) exchange<V, 0>(rows[i], rows[i + 1]);
}

template <class V, class W>
void regroup_even(const Place& place, Regrouped<V, W>& out) {
  constexpr int kRows = 2 * rows_of_nibble(W::upper);
  constexpr int kStrips = W::codes_of_byte;
  const uint8_t* codes = place.codes + place.first_bit / 8;
  const int64_t stride = place.row_bits / 8;
  for (int row = 0, j = 0; row < place.rows; row += kRows, ++j) {
    typename V::Bytes own[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) own[i] = V::bytes(codes + (row + i) * stride);
    transpose<V, kRows>(own);
#pragma GCC unroll 4
    for (int strip = 0; strip < kStrips; ++strip) {
      constexpr bool is_split = W::shift > 0;
      out.upper[strip][j] = own[is_split ? 2 * strip + 1 : strip];
      if constexpr (W::lower > 0) out.lower[strip][j] = own[is_split ? 2 * strip : strip];
    }
  }
}

// ---------------------------------------------------------------------------- tables

// The levels of each row of a nibble, by the value of the nibble.
struct Levels {
  alignas(64) float of[4][kTable];
};

Levels levels_of(const Field& field) {
  Levels levels;
  for (int i = 0; i < rows_of_nibble(field.bits); ++i)
    for (int c = 0; c < kTable; ++c)
      levels.of[i][c] = field.levels[(c >> (i * field.bits)) & ((1 << field.bits) - 1)];
  return levels;
}

template <class V, int kBits>
void fill_tables(const float* x, int count, const Levels& levels, int64_t stride,
                 float* tables) {
  constexpr int q = rows_of_nibble(kBits);
  for (int t = 0; t < count; ++t)
    for (int c = 0; c < kTable; c += V::kLanes) {
      auto sum = V::times(V::all(x[t * q]), V::load(levels.of[0] + c));
      for (int i = 1; i < q; ++i)
        sum = V::add_product(V::all(x[t * q + i]), V::load(levels.of[i] + c), sum);
      V::store(tables + t * stride + c, sum);
    }
}

// -------------------------------------------------------------------------- look-ups

// What look-ups of a tile are added to, and the factors of its columns. Column 4 l + k
// of a strip is lane l of vector k.
struct Sums {
  float* totals;
  int64_t row_stride;
  const float* scale;  // of the strip, in the order of the totals
};

// Vectors [kFirst, kFirst + kCount) of the strip, for kRows rows of x, whose tables take
// turns: far from each other, they would share few lines of the nearest cache.
template <class V, int kRows, int kFirst, int kCount>
void look_up_part(const typename V::Bytes* bytes, int count, const float* tables,
                  const Sums& sums) {
  typename V::Values sum[kRows][kCount];
  for (auto& row : sum)
    for (auto& each : row) each = V::zero();
  for (int j = 0; j < count; ++j) {
    const auto own = bytes[j];
    typename V::Bytes index[2][kCount];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) index[half][k] = V::index(own, 8 * (kFirst + k) + 4 * half);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto table = V::table(tables + ((2 * j + half) * kRows + r) * kTable);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k)
          sum[r][k] = V::plus(sum[r][k], V::look_up(table, index[half][k]));
      }
  }
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kCount; ++k) {
      const int at = (kFirst + k) * V::kLanes;
      float* to = sums.totals + r * sums.row_stride + at;
      V::store(to, V::add_product(sum[r][k], V::load(sums.scale + at), V::load(to)));
    }
}

template <class V, int kRows>
void look_up(const typename V::Bytes* bytes, int count, const float* tables,
             const Sums& sums) {
  // As many sums at a time as there are registers for.
  constexpr int kCount = kRows * 4 <= V::kSums ? 4 : kRows * 2 <= V::kSums ? 2 : 1;
  look_up_part<V, kRows, 0, kCount>(bytes, count, tables, sums);
  if constexpr (kCount <= 2)
    look_up_part<V, kRows, 2, kCount>(bytes, count, tables, sums);
  if constexpr (kCount == 1) {
    look_up_part<V, kRows, 1, kCount>(bytes, count, tables, sums);
    look_up_part<V, kRows, 3, kCount>(bytes, count, tables, sums);
  }
}

// How many of the rows of x that are left are looked up together. Four with all columns
// of a strip are 5 to 8 % faster than eight with half of them, by AVX-512.
inline int rows_together(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

template <class V>
void look_up_rows(const typename V::Bytes* bytes, int count, const float* tables, int rows,
                  Sums sums) {
  for (int r = 0; r < rows;) {
    const float* own = tables + r * kTileRows * kTable;
    const int together = rows_together(rows - r);
    if (together == 4) {
      look_up<V, 4>(bytes, count, own, sums);
    } else if (together == 2) {
      look_up<V, 2>(bytes, count, own, sums);
    } else {
      look_up<V, 1>(bytes, count, own, sums);
    }
    sums.totals += together * sums.row_stride;
    r += together;
  }
}

// ------------------------------------------------------------------------ transforms

template <class V>
void hadamard(float* a, int64_t n) {
  int64_t done = 1;
  if (n >= V::kLanes) {
    for (int64_t i = 0; i < n; i += V::kLanes) V::store(a + i, V::hadamard(V::load(a + i)));
    done = V::kLanes;
  }
  for (int64_t h = done; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const float low = a[j], high = a[j + h];
        a[j] = low + high;
        a[j + h] = low - high;
      }
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int64_t i = 0; i < n; ++i) a[i] *= scale;
}

inline void times_signs(float* a, int64_t n, Signs signs) {
  for (int64_t i = 0; i < n; ++i) a[i] *= static_cast<float>(signs[i]);
}

template <class V>
void rotate(float* a, int64_t n, Signs signs) {
  times_signs(a, n, signs);
  hadamard<V>(a, n);
}

// ------------------------------------------------------------------- many rows of x
//
// A tile of W is decoded and multiplied as dense ones are. Its columns stay in the order
// of look-ups, in which a Hadamard transform is the same: only bits of indices move.

constexpr int kMostWide = 256;  // columns of a block that is decoded

template <class V, int kBits>
void decode_strip(const typename V::Bytes* bytes, int rows, const Levels& levels, float* w,
                  int64_t stride) {
  constexpr int q = rows_of_nibble(kBits);
  const auto table = V::table(levels.of[0]);
  for (int j = 0; 2 * q * j < rows; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < 2 * q; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        V::store(w + (2 * q * j + i) * stride + k * V::kLanes,
                 V::look_up(table, V::index(bytes[j], 8 * k + place_of(kBits, i))));
}

// Rows a, a + step, ... of a tile: three steps of a transform along its rows at once.
template <class V>
void hadamard8(float* a, int64_t step, int64_t columns) {
  for (int64_t c = 0; c < columns; c += V::kLanes) {
    typename V::Values z[8];
    for (int i = 0; i < 8; ++i) z[i] = V::load(a + i * step + c);
#pragma GCC unroll 3
    for (int h = 1; h < 8; h *= 2)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        if ((i & h) == 0) {
          const auto low = z[i], high = z[i + h];
          z[i] = V::plus(low, high);
          z[i + h] = V::minus(low, high);
        }
    for (int i = 0; i < 8; ++i) V::store(a + i * step + c, z[i]);
  }
}

// The transform of every column of a tile of some rows, a power of two.
template <class V>
void hadamard_columns(float* a, int64_t rows, int64_t stride, int64_t columns) {
  int64_t h = 1;
  for (; 8 * h <= rows; h *= 8)
    for (int64_t i = 0; i < rows; i += 8 * h)
      for (int64_t j = i; j < i + h; ++j) hadamard8<V>(a + j * stride, h * stride, columns);
  for (; h < rows; h *= 2)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns && (i & h) == 0; c += V::kLanes) {
        const auto low = V::load(a + i * stride + c), high = V::load(a + (i + h) * stride + c);
        V::store(a + i * stride + c, V::plus(low, high));
        V::store(a + (i + h) * stride + c, V::minus(low, high));
      }
}

// totals += x w, for kRows rows of x and a strip of w.
template <class V, int kRows>
void multiply_rows(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int depth,
                   float* totals, int64_t total_stride) {
  typename V::Values sum[kRows][4];
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < 4; ++k) sum[r][k] = V::load(totals + r * total_stride + k * V::kLanes);
  for (int i = 0; i < depth; ++i) {
    typename V::Values own[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) own[k] = V::load(w + i * w_stride + k * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto all = V::all(x[r * x_stride + i]);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[r][k] = V::add_product(all, own[k], sum[r][k]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < 4; ++k) V::store(totals + r * total_stride + k * V::kLanes, sum[r][k]);
}

template <class V>
void multiply(const float* x, int64_t x_stride, int rows, const float* w, int64_t w_stride,
              int depth, float* totals, int64_t total_stride) {
  int r = 0;
  for (; r + V::kDenseRows <= rows; r += V::kDenseRows)
    multiply_rows<V, V::kDenseRows>(x + r * x_stride, x_stride, w, w_stride, depth,
                                    totals + r * total_stride, total_stride);
  for (; r < rows; ++r)
    multiply_rows<V, 1>(x + r * x_stride, x_stride, w, w_stride, depth,
                        totals + r * total_stride, total_stride);
}

// ----------------------------------------------------------------- columns of a product

template <class V>
constexpr int kStrip = 4 * V::kLanes;  // columns

// Room for some columns and rows of a product, and what all its tiles share.
template <class V, int kFields>
class Columns {
 public:
  Columns(const Problem& problem, int64_t first, int64_t last, int rows)
      : p_(problem), first_(first), last_(last), rows_(rows),
        across_(problem.outputs / problem.block_width),
        is_uniform_(problem.block_width % kStrip<V> == 0),
        spread_(spread_of(problem, last - first)),
        strips_((last - first + kStrip<V> - 1) / kStrip<V>), width_(strips_ * kStrip<V>),
        tables_(kFields * kPass * kTileRows * kTable),
        totals_(kFields * rows * width_), y_(2 * width_) {
    std::memset(totals_.get(), 0, sizeof(float) * kFields * rows * width_);
  }

  template <class W>
  void add_stream(int s, int64_t row0) {
    const Stream& stream = p_.stream[s];
    const int64_t inputs = p_.inputs / p_.streams, height = p_.block_height / p_.streams;
    const typename V::Controls controls(stream.bits, stream.fields);
    const Levels upper = levels_of(stream.fields[0]);
    const Levels lower = kFields > 1 ? levels_of(stream.fields[1]) : upper;
    for (int64_t block = 0; block * height < inputs; ++block) {
      const int64_t end = smaller((block + 1) * height, inputs);
      for (int64_t row = block * height; row < end; row += W::tile_rows) {
        const int rows = static_cast<int>(smaller<int64_t>(W::tile_rows, end - row));
        prepare<W::upper>(0, upper, s, row0, row, rows);
        if constexpr (kFields > 1) prepare<W::lower>(1, lower, s, row0, row, rows);
        add_tiles<W>(stream, controls, block, row, rows);
      }
    }
  }

  // Decodes and multiplies block after block: `use(s, f)` calls f with the widths of a
  // stream's fields. False if there are none.
  template <class Known>
  bool add_decoded(int64_t row0) {
    const int64_t inputs = p_.inputs / p_.streams, height = p_.block_height / p_.streams;
    const int64_t stride = is_transformed() ? p_.block_width : kStrip<V>;
    Floats u(kTileRows * kMostWide), v(kFields > 1 ? kTileRows * kMostWide : 0);
    for (int64_t block = 0; block * height < inputs; ++block)
      for (int64_t row = block * height; row < smaller((block + 1) * height, inputs);
           row += kTileRows) {
        const int rows = static_cast<int>(
            smaller<int64_t>(kTileRows, smaller((block + 1) * height, inputs) - row));
        for (int64_t column = first_; column < last_; column += stride) {
          for (int s = 0; s < p_.streams; ++s)
            if (!decode<Known>(s, row, rows, column, stride, u.get(), v.get())) return false;
          finish_tile(block, rows * p_.streams, column, stride, u.get(), v.get());
          multiply_tile(row0, row, rows, column, stride, u.get());
        }
      }
    return true;
  }

  // Writes the totals as rows of y.
  void finish(int64_t row0) {
    for (int r = 0; r < rows_; ++r) {
      float* y[2] = {y_.get(), y_.get() + width_};
      const int fields = p_.is_decoded ? 1 : kFields;
      for (int f = 0; f < fields; ++f) ordered(totals_.get() + (f * rows_ + r) * width_, y[f]);
      if (fields > 1 && p_.is_summed) sum(y[0], y[1]);
      if (p_.is_summed) rotate_back(y[0]);
      const int results = p_.is_summed ? 1 : kFields;
      for (int f = 0; f < results; ++f)
        std::memcpy(p_.y[f] + (row0 + r) * p_.outputs + first_, y[f],
                    sizeof(float) * (last_ - first_));
    }
  }

 private:
  using Bytes = typename V::Bytes;

  // The tables of some rows of W, for every row of x.
  template <int kBits>
  void prepare(int f, const Levels& levels, int s, int64_t row0, int64_t row, int rows) {
    const int64_t inputs = p_.inputs / p_.streams;
    const int sets = (rows + kSet - 1) / kSet;
    float* tables = tables_.get() + f * kPass * kTileRows * kTable;
    for (int r = 0, first = 0, together = 0; r < rows_; ++r) {
      if (r == first + together) first = r, together = rows_together(rows_ - r);
      alignas(64) float x[kTileRows] = {};
      const float* from = p_.x[f] + ((row0 + r) * p_.streams + s) * inputs + row;
      std::memcpy(x, from, sizeof(float) * rows);
      fill_tables<V, kBits>(x, sets * kSet / rows_of_nibble(kBits), levels, together * kTable,
                            tables + (first * kTileRows + r - first) * kTable);
    }
  }

  template <class W>
  void add_tiles(const Stream& stream, const typename V::Controls& controls, int64_t block,
                 int64_t row, int rows) {
    const int sets = (rows + kSet - 1) / kSet;
    const int strip_bits = kStrip<V> * stream.bits;
    // Strips that share cache lines of W are regrouped together.
    const int lines = smaller(kTogether, (512 + strip_bits - 1) / strip_bits);
    const int together = spread_ > 1 ? spread_ : lines;
    Regrouped<V, W> bytes;
    for (int64_t strip = 0; strip < strips_; strip += together) {
      const int here = static_cast<int>(smaller<int64_t>(together, strips_ - strip));
      const int64_t first_bit = (row * p_.outputs + first_ + strip * kStrip<V>) * stream.bits;
      const Place place{stream.codes, stream.codes + stream.bytes, first_bit,
                        p_.outputs * stream.bits, rows, here, strip_bits};
      if (spread_ > 1 && rows % kSet == 0) {
        if constexpr (W::is_even) regroup_even<V, W>(place, bytes);
      } else if (place.template is_simple<V>()) {
        regroup<V, W, true>(place, controls, bytes);
      } else {
        regroup<V, W, false>(place, controls, bytes);
      }
      for (int k = 0; k < here; ++k) {
        alignas(64) float scale[kStrip<V>];
        scale_of(block, first_ + strip * kStrip<V>, k, scale);
        // A few lines at a time: the memory works on them while sums are looked up.
        place.fetch_below(kFields * k, kFields * here);
        add_field(0, bytes.upper[k], sets * vectors_of_set(W::upper), strip + k, scale);
        if constexpr (kFields > 1) place.fetch_below(kFields * k + 1, kFields * here);
        if constexpr (kFields > 1)
          add_field(1, bytes.lower[k], sets * vectors_of_set(W::lower), strip + k, scale);
      }
    }
  }

  bool is_transformed() const { return p_.left_basis != nullptr || p_.out_basis != nullptr; }

  // U and V of some rows of a stream, side by side with those of the other.
  template <class Known>
  bool decode(int s, int64_t row, int rows, int64_t column, int64_t stride, float* u, float* v) {
    const Stream& stream = p_.stream[s];
    const int strip_bits = kStrip<V> * stream.bits;
    return Known::with(stream.fields, [&](auto widths) {
      using W = decltype(widths);
      const typename V::Controls controls(stream.bits, stream.fields);
      const Levels upper = levels_of(stream.fields[0]);
      Regrouped<V, W> bytes;
      for (int64_t c = 0; c < stride; c += kStrip<V>) {
        const Place place{stream.codes, stream.codes + stream.bytes,
                          (row * p_.outputs + column + c) * stream.bits,
                          p_.outputs * stream.bits, rows, 1, strip_bits};
        place.fetch_below(0, 1);
        if (place.template is_simple<V>())
          regroup<V, W, true>(place, controls, bytes);
        else
          regroup<V, W, false>(place, controls, bytes);
        decode_strip<V, W::upper>(bytes.upper[0], rows, upper, u + s * rows * stride + c, stride);
        if constexpr (kFields > 1)
          decode_strip<V, W::lower>(bytes.lower[0], rows, levels_of(stream.fields[1]),
                                    v + s * rows * stride + c, stride);
      }
    });
  }

  // u <- scale (u + Q1 v Q2^T).
  void finish_tile(int64_t block, int rows, int64_t column, int64_t stride, float* u, float* v) {
    if constexpr (kFields > 1) {
      if (p_.out_basis != nullptr)
        for (int i = 0; i < rows; ++i) hadamard<V>(v + i * stride, stride);
      if (p_.left_basis != nullptr) hadamard_columns<V>(v, rows, stride, stride);
    }
    const float root = p_.left_basis == nullptr ? 1.0f : 1.0f / std::sqrt(static_cast<float>(rows));
    for (int64_t c = 0; c < stride; c += kStrip<V>) {
      alignas(64) float scale[kStrip<V>], signs[kStrip<V>];
      scale_of(block, column + c, 0, scale);
      for (int i = 0; i < kStrip<V>; ++i)
        signs[i % 4 * V::kLanes + i / 4] =
            root * (p_.out_basis == nullptr ? 1.0f : p_.out_basis[c + i]);
      for (int i = 0; i < rows; ++i) {
        // Rows of a stream lie together; those of a block take turns.
        const int own = i % (rows / p_.streams) * p_.streams + i / (rows / p_.streams);
        const auto sign = V::all(p_.left_basis == nullptr ? 1.0f : p_.left_basis[own]);
        for (int k = 0; k < kStrip<V>; k += V::kLanes) {
          auto w = V::load(u + i * stride + c + k);
          if constexpr (kFields > 1)
            w = V::add_product(V::times(sign, V::load(signs + k)), V::load(v + i * stride + c + k), w);
          V::store(u + i * stride + c + k, V::times(w, V::load(scale + k)));
        }
      }
    }
  }

  void multiply_tile(int64_t row0, int64_t row, int rows, int64_t column, int64_t stride,
                     const float* w) {
    const int64_t inputs = p_.inputs / p_.streams;
    for (int s = 0; s < p_.streams; ++s)
      for (int64_t c = 0; c < stride; c += kStrip<V>)
        multiply<V>(p_.x[0] + (row0 * p_.streams + s) * inputs + row, p_.inputs, rows_,
                    w + s * rows * stride + c, stride, rows,
                    totals_.get() + column - first_ + c, width_);
  }

  void add_field(int f, const Bytes* bytes, int count, int64_t strip, const float* scale) {
    const Sums sums{totals_.get() + f * rows_ * width_ + strip * kStrip<V>, width_, scale};
    const float* tables = tables_.get() + f * kPass * kTileRows * kTable;
    look_up_rows<V>(bytes, count, tables, rows_, sums);
  }

  // Strips side by side where a byte has several codes, all rows begin with a byte, and
  // nothing is left over at the right.
  static int spread_of(const Problem& p, int64_t columns) {
    const Stream& s = p.stream[0];
    const bool is_even = (s.bits == 2 || s.bits == 4) &&
                         (s.fields[0].shift == 0 || 2 * s.fields[0].shift == s.bits);
    const int spread = is_even ? 8 / s.bits : 1;
    const bool fits = p.streams == 1 && !p.is_decoded && p.outputs * s.bits % 8 == 0 &&
                      columns % (spread * kStrip<V>) == 0 &&
                      p.block_height % kSet == 0 && p.inputs % kSet == 0;
    return fits ? spread : 1;
  }

  // The column of a lane of a strip's vector k, counted from the first of those beside.
  int64_t column_of(int strip, int lane, int k) const {
    return spread_ == 1 ? strip * kStrip<V> + 4 * lane + k : (4 * lane + k) * spread_ + strip;
  }

  // Scales of a strip: that many after `column`, which begins all of those side by side.
  void scale_of(int64_t block, int64_t column, int strip, float* scale) const {
    const float* own = p_.scale + block * across_;
    const auto width = static_cast<uint32_t>(p_.block_width);
    const int64_t first = column + (spread_ == 1 ? strip * kStrip<V> : 0);
    if (is_uniform_ && spread_ == 1) {
      const auto all = V::all(own[static_cast<uint32_t>(first) / width]);
      for (int c = 0; c < kStrip<V>; c += V::kLanes) V::store(scale + c, all);
    } else if (is_uniform_) {
      // Lanes next to each other share blocks.
      const uint32_t lanes = smaller<int64_t>(width / (4 * spread_), V::kLanes);
      own += static_cast<uint32_t>(first) / width;
      for (uint32_t lane = 0; lane < V::kLanes; ++own)
        for (uint32_t end = lane + lanes; lane < end; ++lane)
          for (int k = 0; k < 4; ++k) scale[k * V::kLanes + lane] = *own;
    } else {
      for (int lane = 0; lane < V::kLanes; ++lane)
        for (int k = 0; k < 4; ++k) {
          const int64_t at = smaller(column + column_of(strip, lane, k), p_.outputs - 1);
          scale[k * V::kLanes + lane] = own[static_cast<uint32_t>(at) / width];
        }
    }
  }

  // From the order of the look-ups to that of the columns.
  void ordered(const float* totals, float* y) const {
    for (int64_t strip = 0; strip < strips_; strip += spread_)
      for (int s = 0; s < spread_; ++s)
        for (int k = 0; k < 4; ++k)
          for (int lane = 0; lane < V::kLanes; ++lane)
            y[strip * kStrip<V> + (4 * lane + k) * spread_ + s] =
                totals[(strip + s) * kStrip<V> + k * V::kLanes + lane];
  }

  // u <- u + v Q2^T, block by block.
  void sum(float* u, float* v) const {
    const int64_t n = p_.block_width, size = last_ - first_;
    if (p_.out_basis != nullptr)
      for (int64_t c = 0; c < size; c += n) {
        hadamard<V>(v + c, n);
        times_signs(v + c, n, p_.out_basis);
      }
    for (int64_t c = 0; c < size; ++c) u[c] += v[c];
  }

  void rotate_back(float* u) const {
    const int64_t n = p_.block_width, size = last_ - first_;
    if (p_.out_rotation != nullptr)
      for (int64_t c = 0; c < size; c += n) {
        hadamard<V>(u + c, n);
        times_signs(u + c, n, p_.out_rotation);
      }
  }

  const Problem& p_;
  const int64_t first_, last_;
  const int rows_;
  const int64_t across_;
  const bool is_uniform_;  // a strip has one scale
  const int spread_;       // strips side by side, each of every second or fourth column
  const int64_t strips_, width_;
  Floats tables_, totals_, y_;
};

// ---------------------------------------------------------------------------- widths

template <class... All>
struct Choices {
  // Calls `use` with the widths of a code's fields; false if they are not among `All`.
  template <class Use>
  static bool with(const Field* fields, Use use) {
    return (with_one<All>(fields, use) || ...);
  }

 private:
  template <class W, class Use>
  static bool with_one(const Field* fields, Use use) {
    const bool is_it = fields[0].bits == W::upper && fields[0].shift == W::shift &&
                       fields[1].bits == W::lower;
    if (is_it) use(W{});
    return is_it;
  }
};

// u above v where they are coded apart; whole codes twice where they stand for pairs.
using TwoFields = Choices<Widths<1, 1, 1>, Widths<2, 1, 1>, Widths<3, 1, 1>, Widths<1, 2, 2>,
                          Widths<2, 2, 2>, Widths<3, 2, 2>, Widths<1, 3, 3>, Widths<2, 3, 3>,
                          Widths<1, 0, 1>, Widths<2, 0, 2>, Widths<3, 0, 3>, Widths<4, 0, 4>>;
// Grids and scalar codebooks.
using OneField = Choices<Widths<1, 0, 0>, Widths<2, 0, 0>, Widths<3, 0, 0>, Widths<4, 0, 0>>;

template <class V, int kFields, class Known>
bool product_of(const Problem& p, int64_t first, int64_t last) {
  bool is_known = true;
  const int pass = p.is_decoded ? kDecodedPass : kPass;
  for (int64_t row0 = 0; row0 < p.rows && is_known; row0 += pass) {
    const int rows = static_cast<int>(smaller<int64_t>(pass, p.rows - row0));
    Columns<V, kFields> columns(p, first, last, rows);
    if (p.is_decoded) is_known = columns.template add_decoded<Known>(row0);
    for (int s = p.is_decoded ? p.streams : 0; s < p.streams && is_known; ++s)
      is_known = Known::with(p.stream[s].fields, [&](auto widths) {
        columns.template add_stream<decltype(widths)>(s, row0);
      });
    if (is_known) columns.finish(row0);
  }
  return is_known;
}

template <class V>
bool product(const Problem& p, int64_t first, int64_t last) {
  return p.fields == 2 ? product_of<V, 2, TwoFields>(p, first, last)
                       : product_of<V, 1, OneField>(p, first, last);
}

}  // namespace
}  // namespace kashin
