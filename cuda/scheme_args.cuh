// What the kernels behind scheme_product are told.
#pragma once

#include <cstdint>

#include "cuda/scheme.h"

namespace engine {

constexpr int scheme_warps = 16;  // of a block; they divide the columns
constexpr int scheme_threads = 32 * scheme_warps;
constexpr int scheme_rows = 8;  // of x at a time
// Whether a kernel's registers leave room for two blocks on a multiprocessor.
constexpr bool scheme_shares(PackedKind kind, std::int64_t rows) {
  return kind == PackedKind::mixed || kind == PackedKind::regions || kind == PackedKind::midrise ||
         (kind == PackedKind::salient && rows <= 1);
}

struct SchemeWeight {
  const unsigned char* base;     // PackedWeight::records
  const unsigned char* table;    // the u32s, scheme_layout.h
  const unsigned char* records;  // the first one
  const void* x;
  void* out;
  std::int64_t out_stride;
  std::int64_t tile_bytes;  // mixed, regions
  int rows;
};

template <class T>
struct SchemeArgs {
  std::int64_t x_stride;  // of the parts' x
  int x_vectors;          // rows of x can be read by 16 bytes
  int rows;               // of x, 1..scheme_rows
  int cols, blocks;
  int units;             // records of a row tile
  int scale_kind;        // load_scale_pair: 0 f32, 1 f16, 2 bf16
  int row_units, fixed;  // scheme_places
  int order;             // regions: bytes from base to the columns by place
  int by_row;            // salient: alpha and mu by row
  int shares;  // blocks of a multiprocessor, 1 or 2; the second one is gridDim.x / 2 further on
  int stages, stage_bytes;
  int x_row_bytes;                                        // 64 modulo 128
  int sum_offset, red_offset, ring_offset, table_offset;  // bytes of shared memory
  int out_f32, add;
  int parts;
  int first_tile[scheme_max_parts + 1];  // of each part among the row tiles of all
  SchemeWeight part[scheme_max_parts];
};

template <class T>
using SchemeKernel = void (*)(SchemeArgs<T>);

// The kernels by kind; salient ones for 1, 2, 4 or 8 rows of x.
template <class T>
SchemeKernel<T> scheme_kernel_mixed();
template <class T>
SchemeKernel<T> scheme_kernel_salient(int rows);
template <class T>
SchemeKernel<T> scheme_kernel_regions();
// By bits.
template <class T>
SchemeKernel<T> scheme_kernel_midrise(int bits);
template <class T>
SchemeKernel<T> scheme_kernel_lattice(int bits);

}  // namespace engine
