// The entrances from XLA: checks every buffer, applies the transforms on the side of x and
// shares columns among threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace kashin {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using U8 = ffi::Buffer<ffi::U8>;
using S8 = ffi::Buffer<ffi::S8>;

constexpr int64_t kMostInputs = int64_t{1} << 31;  // products of two fit 64 bits
constexpr int kMostBits = 5;
// Columns of a task: whole strips of every instruction set, whole cache lines of codes.
constexpr int64_t kTaskColumns = 256;
constexpr int64_t kTaskRows = 64;
// Look-ups, about, that are worth waking a thread for.
constexpr int64_t kWorthATask = int64_t{1} << 18;

enum InstructionSet : int64_t { kUsePlain = 0, kUseAvx2 = 1, kUseAvx512 = 2, kUseNeon = 3 };

const Kernels* kernels_of(int64_t set) {
  if (set == kUsePlain) return &kPlain;
#if defined(__x86_64__)
  if (set == kUseAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &kAvx2;
  if (set == kUseAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi"))
    return &kAvx512;
#elif defined(__aarch64__)
  // A part of the architecture: there is nothing to ask the processor.
  if (set == kUseNeon) return &kNeon;
#endif
  return nullptr;
}

// Numbers that describe a product and are fixed when it is compiled.
struct Layout {
  int64_t bits;          // of a code; of rows of even index, where they differ
  int64_t v_bits;        // low bits that decide v; 0 without v, -1 where codes are pairs
  int64_t block_height;  // inputs that share scales
  int64_t instruction_set;
  int64_t way;           // how it is multiplied
};

enum Way : int64_t {
  kLookUp = 0,
  kDecode = 1,  // blocks are decoded, for many rows of x
  kTranspose = 2,  // x @ W^T
};

ffi::Error invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("kashin_product: " + message);
}

// So short that its text needs no memory.
ffi::Error out_of_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
}

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// Fields of a stream's codes; levels of u for streams before it are passed over.
bool set_fields(Stream& stream, int64_t bits, int64_t v_bits, const F32& u, const F32& v,
                int64_t u_before) {
  if (bits < 1 || bits > kMostBits || v_bits < -1 || v_bits >= bits) return false;
  const int64_t u_bits = v_bits > 0 ? bits - v_bits : bits;
  const int64_t own_v = v_bits > 0 ? v_bits : v_bits < 0 ? bits : 0;
  stream.bits = static_cast<int>(bits);
  stream.fields[0] = {static_cast<int>(u_bits), static_cast<int>(std::max<int64_t>(v_bits, 0)),
                      u.typed_data() + u_before};
  stream.fields[1] = {static_cast<int>(own_v), 0, v.typed_data()};
  const bool has_u = static_cast<int64_t>(u.element_count()) >= u_before + (1 << u_bits);
  const bool has_v = own_v == 0 || static_cast<int64_t>(v.element_count()) >= (1 << own_v);
  return has_u && has_v;
}

bool set_codes(Stream& stream, const U8& codes, int64_t rows, int64_t outputs) {
  int64_t size = 0;
  if (__builtin_mul_overflow(rows * stream.bits, outputs, &size)) return false;
  stream.codes = codes.typed_data();
  stream.bytes = static_cast<int64_t>(codes.element_count());
  return stream.bytes >= size / 8 + (size % 8 != 0);
}

// Null for an empty buffer; fails unless there is a sign for each of `n`, a power of two.
bool set_signs(Signs& signs, const S8& buffer, int64_t n) {
  signs = buffer.element_count() == 0 ? nullptr : buffer.typed_data();
  const bool fits = static_cast<int64_t>(buffer.element_count()) == n && is_power_of_two(n);
  return signs == nullptr || fits;
}

// x by field, transformed, inputs of a stream together.
class Inputs {
 public:
  Inputs(Problem& p, const F32& x, int64_t stacked, Signs rotation, Signs basis,
         const Kernels& kernels) {
    const int64_t size = p.rows * (p.is_transposed ? p.outputs : p.inputs);
    const int64_t block = p.is_transposed ? p.block_width : p.block_height;
    const bool is_parted = p.streams == 2 && !p.is_transposed;
    const float* given[2] = {x.typed_data(), x.typed_data() + (stacked > 1 ? size : 0)};
    p.x[0] = given[0], p.x[1] = given[1];
    const bool is_given = rotation == nullptr && basis == nullptr && !is_parted;
    if (is_given) return;
    for (int f = 0; f < (p.is_decoded ? 1 : p.fields); ++f) {
      data_[f].assign(given[f], given[f] + size);
      for (int64_t i = 0; i < size; i += block) {
        if (rotation != nullptr) kernels.rotate(data_[f].data() + i, block, rotation);
        if (basis != nullptr && f == 1) kernels.rotate(data_[f].data() + i, block, basis);
      }
      if (is_parted) part(data_[f], p.rows, p.inputs);
      p.x[f] = data_[f].data();
    }
  }

 private:
  // Even inputs of each row, then odd ones.
  static void part(std::vector<float>& data, int64_t rows, int64_t inputs) {
    std::vector<float> row(inputs);
    for (int64_t r = 0; r < rows; ++r) {
      float* own = data.data() + r * inputs;
      for (int64_t i = 0; i < inputs; ++i) row[i % 2 * (inputs / 2) + i / 2] = own[i];
      std::copy(row.begin(), row.end(), own);
    }
  }

  std::vector<float> data_[2];
};

// Tasks that the calling thread and those of a pool take one after the other: columns of
// a product, rows of W for the transposed.
class Tasks {
 public:
  Tasks(const Problem& problem, const Kernels& kernels, int64_t unit, int64_t count)
      : problem_(problem), product_(problem.is_transposed ? kernels.transposed : kernels.product),
        size_(problem.is_transposed ? problem.inputs : problem.outputs), unit_(unit),
        count_(count) {}

  void work() {
    for (int64_t task; (task = next_.fetch_add(1)) < count_;) {
      const int64_t units = (size_ + unit_ - 1) / unit_;
      const int64_t first = units * task / count_ * unit_;
      const int64_t last = std::min(units * (task + 1) / count_ * unit_, size_);
      // Nothing may be thrown into XLA, whose thread this may be.
      try {
        if (first < last && !product_(problem_, first, last)) is_unknown_ = true;
      } catch (const std::bad_alloc&) {
        is_out_of_memory_ = true;
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Threads that come late find no task and touch nothing of the problem.
  ffi::Error finish() {
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins)
      if (spins > 1000) std::this_thread::yield();
    if (is_out_of_memory_) return out_of_memory();
    return is_unknown_ ? invalid("no look-ups for these widths") : ffi::Error::Success();
  }

 private:
  const Problem problem_;
  bool (*const product_)(const Problem&, int64_t, int64_t);
  const int64_t size_, unit_, count_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> is_unknown_{false}, is_out_of_memory_{false};
};

// Columns, or rows of W, that a task has at least: whole blocks if y is transformed.
int64_t unit_of(const Problem& p) {
  if (p.is_transposed) return (kTaskRows + p.block_height - 1) / p.block_height * p.block_height;
  const bool is_whole =
      p.is_summed && (p.is_decoded || p.out_basis != nullptr || p.out_rotation != nullptr);
  return is_whole ? std::max(kTaskColumns, p.block_width) : kTaskColumns;
}

ffi::Error share(ffi::ThreadPool& pool, const Problem& p, const Kernels& kernels) {
  const int64_t unit = unit_of(p);
  const int64_t units = ((p.is_transposed ? p.inputs : p.outputs) + unit - 1) / unit;
  const int64_t worth = p.rows * p.inputs / 16 * p.outputs / kWorthATask + 1;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  // Two tasks a thread: one that is held up leaves half of its work to others.
  const int64_t count = std::min({units, worth, threads > 1 ? 2 * threads : 1});
  auto tasks = std::make_shared<Tasks>(p, kernels, unit, count);
  try {
    for (int64_t t = 1; t < std::min(threads, count); ++t) pool.Schedule([tasks] { tasks->work(); });
  } catch (const std::bad_alloc&) {
    // Threads that were asked already need what the caller holds: it does the rest.
  }
  tasks->work();
  return tasks->finish();
}

struct Buffers {
  F32 x;
  U8 codes, coarse;
  F32 scale, u_levels, v_levels;
  S8 left_rotation, left_basis, right_basis, right_rotation;
};

ffi::Error set_sizes(Problem& p, const Buffers& b, const F32& y, const Layout& layout) {
  const auto x = b.x.dimensions(), out = y.dimensions(), scale = b.scale.dimensions();
  if (x.size() != 3 || out.size() != 3 || scale.size() != 2)
    return invalid("x, y and scale need 3, 3 and 2 axes");
  p.is_transposed = layout.way == kTranspose;
  p.rows = x[1];
  p.inputs = p.is_transposed ? out[2] : x[2], p.outputs = p.is_transposed ? x[2] : out[2];
  p.fields = layout.v_bits == 0 ? 1 : 2;
  p.streams = b.coarse.element_count() > 0 ? 2 : 1;
  p.block_height = layout.block_height;
  if (p.inputs > kMostInputs || p.outputs > kMostInputs || p.rows > kMostInputs)
    return invalid("more than 2^31 rows, inputs or outputs");
  if (out[1] != p.rows || x[0] < 1 || x[0] > p.fields || out[0] < 1 || out[0] > p.fields)
    return invalid("x and y do not fit each other");
  if (p.outputs == 0 || p.rows == 0 || p.inputs == 0) return ffi::Error::Success();
  if (p.block_height < 1 || scale[0] != (p.inputs + p.block_height - 1) / p.block_height ||
      scale[1] < 1 || p.outputs % scale[1] != 0)
    return invalid("scales do not fit the blocks");
  p.block_width = p.outputs / scale[1];
  if (p.streams == 2 && (p.inputs % 2 != 0 || p.block_height % 2 != 0))
    return invalid("codes of two widths need an even number of inputs in a block");
  return ffi::Error::Success();
}

// Whether a block fits what is decoded at a time, if its rows and columns are mixed.
bool can_decode(const Problem& p, int64_t stacked) {
  const bool fits = p.block_height <= 64 && p.block_width >= 64 && p.block_width <= 256 &&
                    is_power_of_two(p.block_width) && p.inputs % p.block_height == 0;
  return p.fields == 1 || (fits && stacked == 1 && p.is_summed);
}

ffi::Error set_streams(Problem& p, const Buffers& b, const Layout& layout) {
  int64_t before = 0;
  for (int s = 0; s < p.streams; ++s) {
    const int64_t bits = layout.bits - s;
    if (!set_fields(p.stream[s], bits, layout.v_bits, b.u_levels, b.v_levels, before))
      return invalid("levels do not fit the width of the codes");
    before += int64_t{1} << p.stream[s].fields[0].bits;
    if (!set_codes(p.stream[s], s == 0 ? b.codes : b.coarse, p.inputs / p.streams, p.outputs))
      return invalid("there are fewer codes than weights");
  }
  return ffi::Error::Success();
}

// Signs of all bases; those of x are returned.
bool set_transforms(Problem& p, const Buffers& b, Signs& rotation, Signs& basis) {
  Signs left[2], right[2];  // rotation, Q1 or Q2
  const bool fits = set_signs(left[0], b.left_rotation, p.block_height) &&
                    set_signs(left[1], b.left_basis, p.block_height) &&
                    set_signs(right[0], b.right_rotation, p.block_width) &&
                    set_signs(right[1], b.right_basis, p.block_width);
  const bool is_left = left[0] != nullptr || left[1] != nullptr;
  if (!fits || (is_left && p.inputs % p.block_height != 0)) return false;
  const Signs *in = p.is_transposed ? right : left, *out = p.is_transposed ? left : right;
  rotation = in[0], basis = in[1];
  p.out_rotation = out[0], p.out_basis = out[1];
  return true;
}

ffi::Error run(ffi::ThreadPool& pool, const Buffers& b, const F32& y, const Layout& layout) {
  const Kernels* kernels = kernels_of(layout.instruction_set);
  if (kernels == nullptr) return invalid("this processor lacks the instruction set");
  Problem p;
  if (auto error = set_sizes(p, b, y, layout); error.failure()) return error;
  const int64_t stacked = y.dimensions()[0];
  p.is_summed = stacked == 1;
  if (p.outputs == 0 || p.rows == 0 || p.inputs == 0) {
    std::memset(y.typed_data(), 0, y.size_bytes());
    return ffi::Error::Success();
  }
  if (auto error = set_streams(p, b, layout); error.failure()) return error;
  Signs rotation = nullptr, basis = nullptr;
  if (!set_transforms(p, b, rotation, basis))
    return invalid("signs of the bases do not fit the blocks");
  p.scale = b.scale.typed_data();
  p.y[0] = y.typed_data();
  p.y[1] = y.typed_data() + (p.is_summed ? 0 : p.rows * (p.is_transposed ? p.inputs : p.outputs));
  p.is_decoded = layout.way == kDecode;
  if (p.is_decoded) {
    if (!can_decode(p, b.x.dimensions()[0])) return invalid("blocks of such sizes are not decoded");
    std::swap(p.left_basis, basis);
  }
  const Inputs inputs(p, b.x, b.x.dimensions()[0], rotation, basis, *kernels);
  return share(pool, p, *kernels);
}

ffi::Error product(ffi::ThreadPool pool, F32 x, U8 codes, U8 coarse, F32 scale, F32 u_levels,
                   F32 v_levels, S8 left_rotation, S8 left_basis, S8 right_basis,
                   S8 right_rotation, ffi::ResultBuffer<ffi::F32> y, int64_t bits,
                   int64_t v_bits, int64_t block_height, int64_t instruction_set,
                   int64_t way) try {
  const Buffers buffers{x, codes, coarse, scale, u_levels, v_levels,
                        left_rotation, left_basis, right_basis, right_rotation};
  return run(pool, buffers, *y, {bits, v_bits, block_height, instruction_set, way});
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

}  // namespace
}  // namespace kashin

#define KASHIN_EXPORTED extern "C" __attribute__((visibility("default")))

KASHIN_EXPORTED XLA_FFI_Error* kashin_product(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(kashin_product, kashin::product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<kashin::F32>()   // x [1 or fields, r, m]
                                  .Arg<kashin::U8>()    // codes
                                  .Arg<kashin::U8>()    // codes of odd rows, or none
                                  .Arg<kashin::F32>()   // scale
                                  .Arg<kashin::F32>()   // levels of u, of both widths
                                  .Arg<kashin::F32>()   // levels of v, or none
                                  .Arg<kashin::S8>()    // signs: left rotation
                                  .Arg<kashin::S8>()    // Q1
                                  .Arg<kashin::S8>()    // Q2
                                  .Arg<kashin::S8>()    // right rotation
                                  .Ret<kashin::F32>()   // y [1 or fields, r, n]
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("v_bits")
                                  .Attr<int64_t>("block_height")
                                  .Attr<int64_t>("instruction_set")
                                  .Attr<int64_t>("way"));

// Of the headers that this was built with: a runtime of an older one refuses to start.
KASHIN_EXPORTED int kashin_ffi_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}

// The best that this processor has; 0 for none that is worth using.
KASHIN_EXPORTED int kashin_instruction_set() {
  for (int64_t set : {kashin::kUseNeon, kashin::kUseAvx512, kashin::kUseAvx2})
    if (kashin::kernels_of(set) != nullptr) return static_cast<int>(set);
  return 0;
}
