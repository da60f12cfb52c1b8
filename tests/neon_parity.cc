// NEON against plain C++ and against float64, without JAX: `make neon` runs it emulated.
//
// Guards against codes looked up in the wrong bytes of a table, bits lost where a code
// crosses bytes, columns in another's place, and reads or writes beyond a buffer: each ends
// where the next byte cannot be touched.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "problem.h"

extern "C" int kashin_instruction_set();

namespace kashin {
namespace {

constexpr int kNeonSet = 3;  // as the handler numbers them
// Of a row's norm, as `test_cpu_kernel.py` asks of every instruction set. The norm is what
// the terms of its sums would give at random signs: where they cancel, as they may if there
// are few, float32 keeps no more.
constexpr double kTolerance = 1e-6;

// Splitmix64: the same numbers everywhere.
class Random {
 public:
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // Of either sign, as levels and activations are.
  float number() { return static_cast<float>(bits() >> 40) / (1 << 23) - 1.0f; }

 private:
  uint64_t state_ = 0;
};

// Memory after which there is none.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    const int64_t own = (size + page - 1) / page * page;
    mapped_ = own + page;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED || mprotect(static_cast<char*>(base_) + own, page, PROT_NONE) != 0) {
      std::perror("memory for a test");
      std::exit(2);
    }
    data_ = reinterpret_cast<T*>(static_cast<char*>(base_) + own - size);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_, mapped_;
  void* base_;
  T* data_;
};

// Bits of u and v in a code; v has -1 where whole codes stand for pairs, 0 for grids.
struct Kind {
  int u, v;
  bool is_half;  // rows of odd index have one bit of u less
  int fields() const { return v == 0 ? 1 : 2; }
  int bits(int stream) const { return std::max(v, 0) + u - stream; }
};

struct Shape {
  int64_t inputs, outputs, block_height, block_width;
};

enum Way { kLookUp, kDecode, kTranspose };
const char* const kWays[] = {"look-ups", "decoded", "transposed"};

// Which transforms of the side of y there are, and whether u and v are summed.
struct Options {
  bool has_basis, has_rotation, is_summed;
};

bool is_power_of_two(int64_t n) { return (n & (n - 1)) == 0; }

// a <- a H / sqrt(n).
void transform(double* a, int64_t n) {
  for (int64_t h = 1; h < n; h *= 2)
    for (int64_t i = 0; i < n; ++i)
      if ((i & h) == 0) {
        const double low = a[i], high = a[i + h];
        a[i] = low + high, a[i + h] = low - high;
      }
  for (int64_t i = 0; i < n; ++i) a[i] /= std::sqrt(static_cast<double>(n));
}

void transform_back(std::vector<double>& y, int64_t n, Signs signs) {
  for (size_t first = 0; first < y.size(); first += n) {
    transform(y.data() + first, n);
    for (int64_t i = 0; i < n; ++i) y[first + i] *= signs[i];
  }
}

// A row in float64, and the norm that its terms have at random signs.
struct Row {
  std::vector<double> y;
  double norm;
};

// A problem with buffers that are as short as may be.
class Case {
 public:
  Case(Random& random, const Kind& kind, const Shape& shape, int rows, Way way, Options options)
      : kind_(kind), shape_(shape), way_(way) {
    p.rows = rows, p.inputs = shape.inputs, p.outputs = shape.outputs;
    p.block_height = shape.block_height, p.block_width = shape.block_width;
    p.is_transposed = way == kTranspose, p.is_decoded = way == kDecode;
    p.is_summed = options.is_summed || kind.fields() == 1;
    p.fields = kind.fields(), p.streams = kind.is_half ? 2 : 1;
    for (int s = 0; s < p.streams; ++s) set_stream(random, s);
    const int64_t down = (shape.inputs + shape.block_height - 1) / shape.block_height;
    p.scale = numbers(random, down * (shape.outputs / shape.block_width));
    const int64_t size = rows * (p.is_transposed ? p.outputs : p.inputs);
    for (int f = 0; f < (p.is_decoded ? 1 : p.fields); ++f) p.x[f] = numbers(random, size);
    if (options.has_basis && p.fields == 2) p.out_basis = signs(random, mixed());
    if (options.has_rotation) p.out_rotation = signs(random, mixed());
    if (p.is_decoded && p.fields == 2) p.left_basis = signs(random, shape.block_height);
  }

  // Columns of a block of y.
  int64_t mixed() const { return p.is_transposed ? p.block_height : p.block_width; }
  int64_t columns() const { return p.is_transposed ? p.inputs : p.outputs; }
  int results() const { return p.is_summed ? 1 : 2; }

  // W of a field, less the transforms on the side of y unless they are decoded, too.
  std::vector<double> weights(int f) const {
    std::vector<double> w(p.inputs * p.outputs);
    for (int64_t i = 0; i < p.inputs; ++i)
      for (int64_t c = 0; c < p.outputs; ++c) {
        const Stream& stream = p.stream[i % p.streams];
        const int64_t first = (i / p.streams * p.outputs + c) * stream.bits;
        int code = 0;
        for (int b = 0; b < stream.bits; ++b)
          code |= (stream.codes[(first + b) / 8] >> ((first + b) % 8) & 1) << b;
        const Field& field = stream.fields[f];
        const int level = code >> field.shift & ((1 << field.bits) - 1);
        w[i * p.outputs + c] = static_cast<double>(field.levels[level]) * scale(i, c);
      }
    return w;
  }

  // The product in float64: one result after the other, rows of each.
  std::vector<Row> exact() const {
    std::vector<Row> rows;
    std::vector<double> w[2] = {weights(0), p.fields == 2 ? weights(1) : std::vector<double>()};
    if (p.is_decoded && p.fields == 2) add_transformed(w[0], w[1]);
    for (int f = 0; f < (p.is_decoded ? 1 : p.fields); ++f)
      for (int r = 0; r < p.rows; ++r) rows.push_back(row_of(w[f], f, r));
    if (!p.is_summed) return rows;
    for (int r = 0; r < p.rows; ++r) {
      Row& u = rows[r];
      if (rows.size() > static_cast<size_t>(p.rows)) {
        Row& v = rows[p.rows + r];
        if (p.out_basis != nullptr) transform_back(v.y, mixed(), p.out_basis);
        for (size_t c = 0; c < v.y.size(); ++c) u.y[c] += v.y[c];
        u.norm = std::hypot(u.norm, v.norm);
      }
      if (p.out_rotation != nullptr) transform_back(u.y, mixed(), p.out_rotation);
    }
    rows.resize(p.rows);
    return rows;
  }

  // What a kernel makes of it, in two parts where whole blocks and strips allow it.
  std::unique_ptr<Guarded<float>> product(const Kernels& kernels) {
    const int64_t size = p.rows * columns();
    auto y = std::make_unique<Guarded<float>>(results() * size);
    std::fill(y->get(), y->get() + y->size(), NAN);
    p.y[0] = y->get(), p.y[1] = y->get() + (p.is_summed ? 0 : size);
    const auto own = p.is_transposed ? kernels.transposed : kernels.product;
    const int64_t unit = p.is_transposed ? p.block_height : 256;
    const bool is_cut = columns() > unit && unit % mixed() == 0;
    const int64_t cut = is_cut ? unit : columns();
    if (!own(p, 0, cut) || (is_cut && !own(p, cut, columns()))) {
      std::printf("these widths are not known: ");
      return nullptr;
    }
    return y;
  }

  void print() const {
    std::printf("%s: u %d, v %d bits%s, %d x %d in blocks of %d x %d, %d rows\n", kWays[way_],
                kind_.u, kind_.v, kind_.is_half ? ", half a bit less" : "",
                static_cast<int>(p.inputs), static_cast<int>(p.outputs),
                static_cast<int>(p.block_height), static_cast<int>(p.block_width),
                static_cast<int>(p.rows));
  }

 private:
  void set_stream(Random& random, int s) {
    Stream& stream = p.stream[s];
    stream.bits = kind_.bits(s);
    stream.bytes = (shape_.inputs / p.streams * shape_.outputs * stream.bits + 7) / 8;
    codes_.push_back(std::make_unique<Guarded<uint8_t>>(stream.bytes));
    stream.codes = codes_.back()->get();
    for (int64_t i = 0; i < stream.bytes; ++i)
      (*codes_.back())[i] = static_cast<uint8_t>(random.bits());
    const int u = kind_.u - s, v = kind_.v < 0 ? u : kind_.v;
    stream.fields[0] = {u, std::max(kind_.v, 0), numbers(random, 1 << u)};
    stream.fields[1] = {v, 0, v == 0 ? nullptr : numbers(random, 1 << v)};
  }

  const float* numbers(Random& random, int64_t count) {
    floats_.push_back(std::make_unique<Guarded<float>>(count));
    for (int64_t i = 0; i < count; ++i) (*floats_.back())[i] = random.number();
    return floats_.back()->get();
  }

  Signs signs(Random& random, int64_t count) {
    signs_.push_back(std::make_unique<Guarded<int8_t>>(count));
    for (int64_t i = 0; i < count; ++i) (*signs_.back())[i] = random.bits() & 1 ? 1 : -1;
    return signs_.back()->get();
  }

  double scale(int64_t i, int64_t c) const {
    return p.scale[i / p.block_height * (p.outputs / p.block_width) + c / p.block_width];
  }

  // u <- u + Q1 v Q2^T, block by block.
  void add_transformed(std::vector<double>& u, const std::vector<double>& v) const {
    const int64_t h = p.block_height, n = p.block_width;
    std::vector<double> block(h * n), column(h);
    for (int64_t top = 0; top < p.inputs; top += h)
      for (int64_t left = 0; left < p.outputs; left += n) {
        for (int64_t i = 0; i < h; ++i) {
          std::copy_n(v.begin() + (top + i) * p.outputs + left, n, block.begin() + i * n);
          if (p.out_basis != nullptr) transform(block.data() + i * n, n);
        }
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t i = 0; i < h; ++i) column[i] = block[i * n + c];
          transform(column.data(), h);
          for (int64_t i = 0; i < h; ++i)
            u[(top + i) * p.outputs + left + c] +=
                column[i] * p.left_basis[i] * (p.out_basis == nullptr ? 1 : p.out_basis[c]);
        }
      }
  }

  Row row_of(const std::vector<double>& w, int f, int r) const {
    std::vector<double> y(columns());
    double squares = 0;
    for (int64_t i = 0; i < p.inputs; ++i)
      for (int64_t c = 0; c < p.outputs; ++c) {
        // Inputs of a stream lie together.
        const int64_t at = i % p.streams * (p.inputs / p.streams) + i / p.streams;
        const float x = p.is_transposed ? p.x[f][r * p.outputs + c] : p.x[f][r * p.inputs + at];
        const double term = x * w[i * p.outputs + c];
        y[p.is_transposed ? i : c] += term;
        squares += term * term;
      }
    return {y, std::sqrt(squares)};
  }

  Problem p;
  const Kind kind_;
  const Shape shape_;
  const Way way_;
  std::vector<std::unique_ptr<Guarded<uint8_t>>> codes_;
  std::vector<std::unique_ptr<Guarded<float>>> floats_;
  std::vector<std::unique_ptr<Guarded<int8_t>>> signs_;
};

// The norm of a difference over that of a row; infinite without a number.
template <class T>
double error(const float* found, const T* right, int64_t count, double norm) {
  double wrong = 0;
  for (int64_t i = 0; i < count; ++i)
    wrong += (found[i] - double{right[i]}) * (found[i] - double{right[i]});
  const double relative = std::sqrt(wrong) / norm;
  return std::isfinite(relative) ? relative : INFINITY;
}

// The largest errors so far: of NEON and of plain C++ against float64, between the two.
struct Errors {
  double neon = 0, plain = 0, apart = 0;
  int count = 0, failed = 0;

  bool add(double of_neon, double of_plain, double between) {
    neon = std::max(neon, of_neon), plain = std::max(plain, of_plain);
    apart = std::max(apart, between);
    return of_neon < kTolerance && of_plain < kTolerance && between < kTolerance;
  }
};

void compare(Case& own, Errors& errors) {
  const auto neon = own.product(kNeon), plain = own.product(kPlain);
  bool is_right = neon != nullptr && plain != nullptr;
  const auto exact = own.exact();
  const int64_t n = own.columns();
  for (size_t r = 0; r < exact.size() && is_right; ++r) {
    const float *a = neon->get() + r * n, *b = plain->get() + r * n;
    const Row& row = exact[r];
    is_right = errors.add(error(a, row.y.data(), n, row.norm), error(b, row.y.data(), n, row.norm),
                          error(a, b, n, row.norm));
  }
  ++errors.count;
  if (is_right) return;
  ++errors.failed;
  std::printf("wrong, ");
  own.print();
}

void compare_rotations(Random& random, Errors& errors) {
  for (int64_t n = 1; n <= 8192; n *= 2) {
    Guarded<float> neon(n), plain(n);
    Guarded<int8_t> signs(n);
    std::vector<double> exact(n);
    for (int64_t i = 0; i < n; ++i) {
      neon[i] = plain[i] = random.number();
      signs[i] = random.bits() & 1 ? 1 : -1;
      exact[i] = double{neon[i]} * signs[i];
    }
    transform(exact.data(), n);
    double squares = 0;
    for (double each : exact) squares += each * each;
    const double norm = std::sqrt(squares);
    kNeon.rotate(neon.get(), n, signs.get());
    kPlain.rotate(plain.get(), n, signs.get());
    ++errors.count;
    if (errors.add(error(neon.get(), exact.data(), n, norm),
                   error(plain.get(), exact.data(), n, norm),
                   error(neon.get(), plain.get(), n, norm)))
      continue;
    ++errors.failed;
    std::printf("wrong, a transform of %d\n", static_cast<int>(n));
  }
}

// Joint codes of 2 to 5 bits and halves between, general pairs, grids and codebooks.
const Kind kKinds[] = {
    {1, 1, false}, {2, 1, false}, {3, 1, false}, {1, 2, false}, {2, 2, false}, {3, 2, false},
    {1, 3, false}, {2, 3, false}, {2, 1, true},  {3, 1, true},  {2, 2, true},  {3, 2, true},
    {2, 3, true},  {1, -1, false}, {2, -1, false}, {3, -1, false}, {4, -1, false},
    {1, 0, false}, {2, 0, false}, {3, 0, false}, {4, 0, false}};

// Whole bytes and strips, several parts, bits across bytes, the last block short, less
// than a vector, one weight.
const Shape kShapes[] = {
    {64, 256, 64, 256}, {64, 512, 32, 128}, {128, 320, 64, 64}, {64, 32, 16, 8},
    {32, 256, 16, 8},   {48, 512, 16, 256}, {256, 256, 256, 256}, {128, 8, 64, 8},
    {30, 15, 10, 5},    {18, 9, 6, 3},      {44, 21, 12, 21},   {24, 20, 24, 20},
    {130, 33, 130, 33}, {66, 17, 2, 17},    {16, 272, 8, 16},   {16, 2224, 8, 16},
    {21, 33, 7, 3},     {5, 16, 1, 16},     {2, 4, 2, 4},       {2, 3, 2, 1},
    {1, 7, 1, 7},       {9, 1, 3, 1},       {1, 1, 1, 1}};

bool fits(const Kind& kind, const Shape& shape, Way way) {
  if (kind.is_half && (shape.inputs % 2 != 0 || shape.block_height % 2 != 0)) return false;
  if (way != kDecode || kind.fields() == 1) return true;
  return shape.block_height <= 64 && shape.block_width >= 64 && shape.block_width <= 256 &&
         is_power_of_two(shape.block_width) && is_power_of_two(shape.block_height) &&
         shape.inputs % shape.block_height == 0;
}

void compare_products(Random& random, Errors& errors) {
  int turn = 0;
  for (const Kind& kind : kKinds)
    for (const Shape& shape : kShapes)
      for (Way way : {kLookUp, kDecode, kTranspose}) {
        if (!fits(kind, shape, way)) continue;
        // 1 to 9, and more rows than a tile is regrouped or decoded once for.
        ++turn;
        const bool is_small = shape.inputs * shape.outputs <= 64 * 64;
        const int more = turn % 16 == 0 && is_small ? (way == kDecode ? 512 : 32) : 0;
        const int rows = turn % 9 + 1 + more;
        const int64_t mixed = way == kTranspose ? shape.block_height : shape.block_width;
        const bool can_mix = is_power_of_two(mixed) &&
                             (way != kTranspose || shape.inputs % shape.block_height == 0);
        const bool is_summed = way == kDecode || turn % 4 != 0;
        Case own(random, kind, shape, rows, way,
                 {can_mix && is_summed && turn % 2 == 0,
                  can_mix && is_summed && turn % 3 == 0, is_summed});
        compare(own, errors);
      }
}

void print(const char* what, const Errors& errors) {
  std::printf("%-12s %4d cases, %d wrong; largest error of a row: NEON %.1e, plain C++ %.1e, "
              "between them %.1e\n",
              what, errors.count, errors.failed, errors.neon, errors.plain, errors.apart);
}

}  // namespace
}  // namespace kashin

int main() {
  if (kashin_instruction_set() != kashin::kNeonSet) {
    std::printf("the handler chooses instruction set %d, not NEON\n", kashin_instruction_set());
    return 1;
  }
  kashin::Random random;
  kashin::Errors products, rotations;
  kashin::compare_products(random, products);
  kashin::compare_rotations(random, rotations);
  kashin::print("products", products);
  kashin::print("transforms", rotations);
  return products.failed + rotations.failed == 0 ? 0 : 1;
}
