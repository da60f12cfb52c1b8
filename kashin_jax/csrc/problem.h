// What a product is asked for: shared by the handler and every instruction set.
#pragma once

#include <cstdint>

namespace kashin {

// Bits of a code that choose a level: of u, of v, or of a grid.
struct Field {
  int bits = 0;
  int shift = 0;
  const float* levels = nullptr;  // 2^bits of them
};

// Codes of one width, row after row without gaps, least significant bit first. Half
// widths have two streams, of the rows of even and of odd index.
struct Stream {
  const uint8_t* codes = nullptr;
  int64_t bytes = 0;
  int bits = 0;
  Field fields[2];
};

// Signs of a randomized Hadamard basis of a power of two, or null for the identity.
using Signs = const int8_t*;

// y = x U + ((x Q1) V) Q2^T, less the transforms on the side of x, which have been applied:
// `x` holds what each factor is multiplied by. Or y = x W^T, where Q1 and Q2 change sides.
struct Problem {
  int64_t rows = 0, inputs = 0, outputs = 0;  // of x; of W
  bool is_transposed = false;
  int64_t block_height = 0, block_width = 0;  // of W, for one scale; the last may be short
  int fields = 0, streams = 0;
  Stream stream[2];
  const float* scale = nullptr;  // [blocks along inputs, blocks along outputs]
  // By field: [rows, streams, inputs / streams]; [rows, outputs] for the transposed.
  const float* x[2] = {nullptr, nullptr};
  // One result, u and v summed after the transforms on the side of y, or two apart.
  bool is_summed = false;
  Signs out_basis = nullptr, out_rotation = nullptr;
  // For many rows blocks of W are decoded, transforms and all: x is that of u, and Q1 is
  // applied to V. Blocks are at most 64 high and a power of two wide, from 64 to 256.
  bool is_decoded = false;
  Signs left_basis = nullptr;
  float* y[2] = {nullptr, nullptr};
};

// What an instruction set offers.
struct Kernels {
  // Columns [first, last) of the product; false if it has no such widths of fields.
  // Throws std::bad_alloc.
  bool (*product)(const Problem& problem, int64_t first, int64_t last);
  // The same of rows [first, last), whole blocks, for the transposed.
  bool (*transposed)(const Problem& problem, int64_t first, int64_t last);
  // a <- (a * signs) H / sqrt(n), for n a power of two.
  void (*rotate)(float* a, int64_t n, Signs signs);
};

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace kashin
