// scheme_product: the host side.
#include <algorithm>

#include "cuda/chain.h"
#include "cuda/scheme.h"
#include "cuda/scheme_args.cuh"
#include "cuda/types.cuh"
#include "engine/weight/packed_layout.h"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

constexpr std::int64_t align_up(std::int64_t v, std::int64_t to) { return ceil_div(v, to) * to; }

// Bytes of shared memory for a product with so many rows of x.
struct Plan {
  bool fits = false;
  int shares = 1;  // blocks of a multiprocessor
  int stages = 0;
  std::int64_t stage = 0, x_row = 0, sums = 0, red = 0, table = 0, ring = 0, total = 0;
};

bool has_one_scale(const PackedShape& s) {
  return s.kind == PackedKind::midrise || s.kind == PackedKind::lattice;
}

// The tables of LatticeCodec (scheme_lattice.cu).
std::int64_t table_bytes(const PackedShape& s) {
  if (s.kind != PackedKind::lattice) return 0;
  return 256 * 4 * (2 * 32 + (s.bits == 3 ? 8 : 0));
}

std::int64_t stage_bytes(const PackedShape& s, const SchemePlaces& places) {
  if (s.kind == PackedKind::regions || has_one_scale(s)) return places.fixed;
  if (s.kind == PackedKind::mixed) {
    std::int64_t most = 0;
    for (int width = 0; width <= 8; ++width) {
      if (s.width_blocks[static_cast<std::size_t>(width)] > 0) {
        most = std::max(most, mixed_record_bytes(s, width));
      }
    }
    return most;
  }
  // Half as many entries again as there are on average; those of a record with more are read
  // straight from memory.
  const std::int64_t mean = s.salient / (s.row_tiles() * places.units);
  return places.fixed + align_up(std::min<std::int64_t>(3 * mean + 128, 8192), 16);
}

Plan plan_shared(const PackedShape& s, std::int64_t rows, const SchemeDevice& device) {
  const SchemePlaces places = scheme_places(s);
  const std::int64_t blocks = s.kind == PackedKind::salient ? 2 * places.units : places.units;
  Plan p;
  p.stage = stage_bytes(s, places);
  p.x_row = blocks * 256 + 64;
  p.sums = align_up(rows * p.x_row, 128);
  p.red = p.sums + blocks * scheme_rows * 4;
  p.table = align_up(p.red + 2 * scheme_warps * 16 * rows * 4, 128);
  p.ring = p.table + table_bytes(s);
  const auto try_stages = [&](int shares, int stages) {
    p.shares = shares;
    p.stages = stages;
    // Entries are asked for one turn ahead, beyond the last ones too.
    p.total = p.ring + scheme_warps * stages * p.stage + 16;
    // Each block takes 1024 bytes more than it may have.
    p.fits = p.total <= (device.shared_bytes + 1024) / shares - 1024;
    return p.fits;
  };
  // Two blocks rather than long rings: kernels wait for one another's instructions, not for memory.
  for (int shares = scheme_shares(s.kind, rows) ? 2 : 1; shares > 0; --shares) {
    for (const int stages : {6, 4, 3, 2}) {
      if (try_stages(shares, stages)) return p;
    }
  }
  // Two short stages for a single row of x rather than none.
  const std::int64_t room = (device.shared_bytes - p.ring - 16) / (2 * scheme_warps) / 16 * 16;
  if (s.kind == PackedKind::salient && rows == 1 && room >= places.fixed) {
    p.stage = room;
    try_stages(1, 2);
  }
  return p;
}

int scale_kind(DType dtype) { return dtype == DType::f32 ? 0 : dtype == DType::f16 ? 1 : 2; }

template <class T>
SchemeKernel<T> kernel_of(PackedKind kind, int bits, std::int64_t rows) {
  if (kind == PackedKind::midrise) return scheme_kernel_midrise<T>(bits);
  if (kind == PackedKind::lattice) return scheme_kernel_lattice<T>(bits);
  if (kind == PackedKind::mixed) return scheme_kernel_mixed<T>();
  if (kind == PackedKind::regions) return scheme_kernel_regions<T>();
  return scheme_kernel_salient<T>(static_cast<int>(rows));
}

// Parts may differ in what a stage has to hold.
Plan plan_parts(std::span<const SchemePart> parts, std::int64_t rows, const SchemeDevice& device) {
  Plan best;
  for (const SchemePart& part : parts) {
    const Plan p = plan_shared(part.w->shape, rows, device);
    if (!p.fits) return p;
    if (best.stage < p.stage) best = p;
  }
  return best;
}

template <class T>
void run(std::int64_t first, std::int64_t rows, std::span<const SchemePart> parts, bool accumulate,
         const Plan& plan, const SchemeDevice& device, cudaStream_t stream) {
  const PackedShape& s = parts[0].w->shape;
  const SchemePlaces places = scheme_places(s);
  SchemeArgs<T> a{};
  a.x_stride = parts[0].x.stride;
  a.x_vectors = 1;
  a.rows = static_cast<int>(rows);
  a.cols = static_cast<int>(s.cols);
  a.blocks = static_cast<int>(s.col_blocks());
  a.units = static_cast<int>(places.units);
  a.scale_kind = scale_kind(s.scale_dtype);
  a.row_units = static_cast<int>(places.row_units);
  a.fixed = static_cast<int>(places.fixed);
  a.order = static_cast<int>(places.order);
  a.by_row = s.group == 0 ? 1 : 0;
  a.stages = plan.stages;
  a.stage_bytes = static_cast<int>(plan.stage);
  a.x_row_bytes = static_cast<int>(plan.x_row);
  a.sum_offset = static_cast<int>(plan.sums);
  a.red_offset = static_cast<int>(plan.red);
  a.ring_offset = static_cast<int>(plan.ring);
  a.table_offset = static_cast<int>(plan.table);
  a.out_f32 = parts[0].out.dtype == DType::f32 ? 1 : 0;
  a.add = accumulate ? 1 : 0;
  a.parts = static_cast<int>(parts.size());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const PackedShape& own = parts[i].w->shape;
    const SchemePlaces own_places = scheme_places(own);
    const auto* base = static_cast<const unsigned char*>(parts[i].w->records.data);
    const View out = parts[i].out.row_range(first, rows);
    if (!aligned_rows(parts[i].x, 16, 1)) a.x_vectors = 0;
    a.part[i] = {base,
                 base + own_places.table,
                 base + own_places.records,
                 parts[i].x.row_range(first, rows).data,
                 out.data,
                 out.stride,
                 own_places.tile_bytes,
                 static_cast<int>(own.rows)};
    a.first_tile[i + 1] = a.first_tile[i] + static_cast<int>(own.row_tiles());
  }
  const int tiles = a.first_tile[parts.size()];
  a.shares = tiles > device.multiprocessors ? plan.shares : 1;
  // A block alone asks for more than half of the memory, so that no two share a multiprocessor.
  const std::int64_t least = a.shares == 2 ? 0 : device.shared_bytes / 2 + 1024;
  launch_chained("scheme_product", kernel_of<T>(s.kind, s.bits, rows),
                 dim3(static_cast<unsigned>(a.shares * std::min(tiles, device.multiprocessors))),
                 dim3(scheme_threads), static_cast<std::size_t>(std::max(plan.total, least)),
                 stream, a);
}

}  // namespace

bool scheme_fits(const PackedShape& shape, const SchemeDevice& device) {
  return plan_shared(shape, 1, device).fits;
}

bool scheme_compatible(const PackedShape& a, const PackedShape& b) {
  return !is_record_kind(a.kind) && a.kind == b.kind && a.cols == b.cols && a.group == b.group &&
         a.scale_dtype == b.scale_dtype && (!has_one_scale(a) || a.bits == b.bits);
}

void scheme_product(View x, std::span<const SchemePart> parts, bool accumulate,
                    const SchemeDevice& device, cudaStream_t stream) {
  REQUIRE(!parts.empty() && parts.size() <= scheme_max_parts, "scheme_product: parts");
  REQUIRE(x.dtype == DType::f16 || x.dtype == DType::bf16, "scheme_product of " + x.shape());
  for (const SchemePart& part : parts) {
    check_packed_weight("scheme_product", *part.w, DeviceKind::cuda);
    require_cuda("scheme_product", {part.x, part.out});
    REQUIRE(part.x.rows == x.rows && part.x.cols == x.cols && part.x.dtype == x.dtype &&
                (part.x.data == x.data || has_one_scale(part.w->shape)) &&
                (x.rows == 1 || part.x.stride == parts[0].x.stride),
            "scheme_product of " + x.shape() + " and " + part.x.shape());
    REQUIRE(scheme_compatible(part.w->shape, parts[0].w->shape) && x.cols == part.w->shape.cols &&
                part.out.rows == x.rows && part.out.cols == part.w->shape.rows &&
                part.out.dtype == parts[0].out.dtype &&
                (part.out.dtype == x.dtype || part.out.dtype == DType::f32),
            "scheme_product of " + x.shape() + " into " + part.out.shape());
  }
  std::int64_t most = scheme_rows;
  while (most > 1 && (most / 2 >= x.rows || !plan_parts(parts, most, device).fits)) most /= 2;
  for (std::int64_t r = 0; r < x.rows; r += most) {
    const std::int64_t n = std::min(most, x.rows - r);
    const Plan plan = plan_parts(parts, n, device);
    REQUIRE(plan.fits, "scheme_product: no room for a row of " + x.shape());
    if (x.dtype == DType::f16) {
      run<__half>(r, n, parts, accumulate, plan, device, stream);
    } else {
      run<__nv_bfloat16>(r, n, parts, accumulate, plan, device, stream);
    }
  }
}

}  // namespace engine
