#include "engine/model/install.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/core/parallel.h"
#include "engine/model/install_mixed.h"
#include "engine/model/install_pbllm.h"
#include "engine/model/install_transform.h"
#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"
#include "engine/weight/row_decoder.h"
#include "formats/bits.h"

namespace engine {
namespace {

struct AffineScratch {
  View packed, codes, scales_raw, scales, zeros, permutation, column_group;
};

AffineScratch make_scratch(const LinearWeight& w, const AffinePattern& p, Arena& arena) {
  const std::int64_t groups = p.grid.groups(w.cols);
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return arena.make(MemTag::staging, dtype, r, c);
  };
  AffineScratch s;
  s.packed = make(DType::u8, w.rows, w.plane(p.codes).row_bytes());
  s.codes = make(DType::u8, w.rows, w.cols);
  s.scales_raw = make(p.grid.scale_dtype, w.rows, groups);
  s.scales = make(DType::f32, w.rows, groups);
  s.zeros = make(DType::i32, w.rows, groups);
  if (p.permutation >= 0) s.permutation = make(DType::i32, 1, w.cols);
  if (p.column_groups >= 0) s.column_group = make(DType::i32, 1, w.cols);
  return s;
}

// The plane's bytes as a host view of the shape and dtype of `like`.
View bytes_of(const Plane& plane, const View& like) {
  return make_view(plane.data.data, like.dtype, DeviceKind::cpu, like.rows, like.cols);
}

std::vector<std::int32_t> host_zeros(const LinearWeight& w, const AffinePattern& p) {
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(w.rows * p.grid.groups(w.cols)),
                                  1 << (p.grid.bits - 1));
  if (p.zeros >= 0) {
    const Plane& plane = w.plane(p.zeros);
    read_zeros(plane, static_cast<const std::byte*>(plane.data.data), zeros);
  }
  return zeros;
}

// Decoded rows that wait for the device at a time, at least one row.
constexpr std::int64_t max_slice_bytes = std::int64_t{16} << 20U;

// Any weight: decoded on the host in slices of rows, which need no memory on the device. While one
// slice travels the next is decoded.
void install_by_rows(const LinearWeight& w, const std::string& name, Loader& loader, View out,
                     int threads) {
  validate(w, "memory", name);  // a plane of a wrong size must not be read past its end
  const RowDecoder decoder(w);
  const std::int64_t row_bytes = out.cols * static_cast<std::int64_t>(dtype_bytes(out.dtype));
  const std::int64_t slice = std::clamp<std::int64_t>(max_slice_bytes / row_bytes, 1, w.rows);
  const std::int64_t grain = std::max<std::int64_t>(1, std::min<std::int64_t>(slice / 64, 16));
  ThreadPool pool(threads);
  for (std::int64_t first = 0; first < w.rows; first += slice) {
    const std::int64_t n = std::min(slice, w.rows - first);
    const View host =
        make_view(loader.stage(slice * row_bytes), out.dtype, DeviceKind::cpu, n, out.cols);
    pool.run(n, grain, [&](std::int64_t begin, std::int64_t end) {
      decoder.decode(first + begin, host.row_range(begin, end - begin));
    });
    loader.ops().upload(host, out.row_range(first, n));
    loader.staged();
  }
}

}  // namespace

void read_zeros(const Plane& plane, const std::byte* bytes, std::span<std::int32_t> out) {
  REQUIRE(static_cast<std::int64_t>(out.size()) == plane.rows * plane.cols, "room for the zeros");
  if (!plane.packed()) {
    if (plane.dtype == DType::i32) {
      std::memcpy(out.data(), bytes, out.size() * sizeof(std::int32_t));
      return;
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      std::int16_t z = 0;
      std::memcpy(&z, bytes + 2 * i, 2);
      out[i] = z;
    }
    return;
  }
  const auto row_bytes = static_cast<std::size_t>(plane.row_bytes());
  const auto cols = static_cast<std::size_t>(plane.cols);
  std::vector<std::uint8_t> row(cols);
  for (std::size_t r = 0; r < static_cast<std::size_t>(plane.rows); ++r) {
    unpack_row({bytes + r * row_bytes, row_bytes}, static_cast<unsigned>(plane.bits), row);
    std::copy(row.begin(), row.end(), out.begin() + static_cast<std::ptrdiff_t>(r * cols));
  }
}

void plan_install(const LinearWeight& w, Arena& arena) {
  const Arena::Scope scope(arena);
  if (match_dense(w)) return;
  if (needs_transform_install(w)) return plan_install_transformed(w, arena);
  if (const auto affine = match_affine(w)) make_scratch(w, *affine, arena);
  if (const auto pbllm = match_pbllm(w)) plan_install_pbllm(w, *pbllm, arena);
  if (is_mixed(w)) plan_install_mixed(w, arena);
}

void install_linear(const LinearWeight& w, const std::string& name, Loader& loader, View out,
                    int threads) {
  if (loader.arena().is_measuring()) {
    plan_install(w, loader.arena());
    return;
  }
  REQUIRE(out.rows == w.rows && out.cols == w.cols, name + " is not " + out.shape());
  Ops& ops = loader.ops();
  if (const auto dense = match_dense(w)) {
    const Plane& plane = w.plane(dense->dense);
    loader.put({static_cast<const std::byte*>(plane.data.data),
                static_cast<std::size_t>(plane.raw_bytes())},
               plane.dtype, out);
    ops.synchronize();
    return;
  }
  if (const auto pbllm = match_pbllm(w)) {
    install_pbllm(w, *pbllm, name, loader, out);
    return;
  }
  if (is_mixed(w) && install_mixed(w, name, loader, out)) return;
  if (needs_transform_install(w)) return install_transformed(w, name, loader, out, threads);
  const auto affine = match_affine(w);
  if (!affine) {
    install_by_rows(w, name, loader, out, threads);
    ops.synchronize();
    return;
  }
  const AffinePattern& p = *affine;
  const Arena::Scope scope(loader.arena());
  const AffineScratch s = make_scratch(w, p, loader.arena());
  const std::vector<std::int32_t> zeros = host_zeros(w, p);
  ops.upload(bytes_of(w.plane(p.codes), s.packed), s.packed);
  ops.upload(bytes_of(w.plane(p.scales), s.scales_raw), s.scales_raw);
  ops.upload(host_view(zeros.data(), s.zeros.rows, s.zeros.cols), s.zeros);
  if (p.permutation >= 0)
    ops.upload(bytes_of(w.plane(p.permutation), s.permutation), s.permutation);
  if (p.column_groups >= 0) {
    ops.upload(bytes_of(w.plane(p.column_groups), s.column_group), s.column_group);
  }
  ops.convert(s.scales_raw, s.scales);
  ops.unpack_codes(s.packed, p.grid.bits, s.codes);
  ops.dequantize_codes(s.codes, p.grid, s.scales, s.zeros, s.column_group, s.permutation, out);
  ops.synchronize();  // the host bytes may go now
}

}  // namespace engine
