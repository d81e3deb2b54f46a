#include "engine/model/packed_install.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/model/install.h"
#include "engine/ops/rotation.h"
#include "engine/weight/packed_layout.h"
#include "engine/weight/pattern.h"
#include "engine/weight/plane_read.h"
#include "engine/weight/row_decoder.h"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

std::int64_t aligned(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

PackedPattern pattern_of(const LinearWeight& w) {
  const auto pattern = match_packable(w);
  REQUIRE(pattern.has_value(), "not packable: " + scheme_name(w));
  return *pattern;
}

// Spreads the bits of a byte: bit i moves to bit 2i.
constexpr std::array<std::uint16_t, 256> make_spread() {
  std::array<std::uint16_t, 256> table{};
  for (unsigned b = 0; b < 256; ++b) {
    unsigned wide = 0;
    for (unsigned i = 0; i < 8; ++i) wide |= (b >> i & 1U) << (2 * i);
    table[b] = static_cast<std::uint16_t>(wide);
  }
  return table;
}
constexpr std::array<std::uint16_t, 256> spread = make_spread();

// Rows of one-bit codes c0, c1 -> rows of two-bit codes c0 + 2 * c1.
void interleave(const Plane& low, const Plane& high, const std::byte* base_low,
                const std::byte* base_high, std::byte* out) {
  const std::int64_t from = low.row_bytes(), to = (high.cols * 2 + 7) / 8;
  for (std::int64_t r = 0; r < low.rows; ++r) {
    for (std::int64_t i = 0; i < from; ++i) {
      const auto c0 = std::to_integer<std::size_t>(base_low[r * from + i]);
      const auto c1 = std::to_integer<std::size_t>(base_high[r * from + i]);
      const unsigned both = static_cast<unsigned>(spread[c0]) | static_cast<unsigned>(spread[c1])
                                                                    << 1U;
      out[r * to + 2 * i] = static_cast<std::byte>(both & 255U);
      if (2 * i + 1 < to) out[r * to + 2 * i + 1] = static_cast<std::byte>(both >> 8U);
    }
  }
}

// Values of `width` bytes whose bits under `exponent` are all set are NaN or infinite.
template <class Word>
std::int64_t count_nonfinite(const std::byte* bytes, std::int64_t count, Word exponent) {
  std::int64_t bad = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, bytes + i * static_cast<std::int64_t>(sizeof word), sizeof word);
    bad += (word & exponent) == exponent ? 1 : 0;
  }
  return bad;
}

void check_finite(const Plane& plane, const std::byte* bytes, const std::string& name) {
  const std::int64_t count = plane.rows * plane.cols;
  const std::int64_t bad =
      plane.dtype == DType::f32   ? count_nonfinite<std::uint32_t>(bytes, count, 0x7F800000U)
      : plane.dtype == DType::f16 ? count_nonfinite<std::uint16_t>(bytes, count, 0x7C00U)
                                  : count_nonfinite<std::uint16_t>(bytes, count, 0x7F80U);
  if (bad != 0) {
    throw Error(ErrorCode::numeric, name + ": expected finite weights, found " +
                                        std::to_string(bad) + " NaN or infinite " + plane.role);
  }
}

void check_zeros(std::span<const std::int32_t> zeros, const std::string& name) {
  const auto [low, high] = std::minmax_element(zeros.begin(), zeros.end());
  if (*low >= 0 && *high <= 255) return;
  throw Error(ErrorCode::usage, name + ": packed kernels: expected zeros of 0 to 255, found " +
                                    std::to_string(*low < 0 ? *low : *high) +
                                    "; use --exec decoded");
}

// inverse[perm[j]] = j; column c of W must be in group c / group.
void invert(const PackedPattern& p, const std::int32_t* perm, const std::int32_t* groups,
            std::int32_t* inverse, const std::string& name) {
  for (std::int64_t j = 0; j < p.shape.cols; ++j) {
    const std::int64_t c = perm[j];
    inverse[c] = static_cast<std::int32_t>(j);
    if (groups[j] == c / p.shape.group) continue;
    throw Error(ErrorCode::usage, name + ": packed kernels: expected column " + std::to_string(c) +
                                      " in group " + std::to_string(c / p.shape.group) +
                                      ", found group " + std::to_string(groups[j]) +
                                      "; use --exec decoded");
  }
}

struct Scratch {
  View packed, codes, ordered, inverse, scales_raw, scales, zeros;
};

Scratch make_scratch(const LinearWeight& w, const PackedPattern& p, Arena& arena) {
  const PackedShape& shape = p.shape;
  const std::int64_t units = shape.rows * shape.terms();
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return arena.make(MemTag::staging, dtype, r, c);
  };
  Scratch s;
  s.packed = make(DType::u8, w.rows, (w.cols * shape.bits + 7) / 8);
  s.codes = make(DType::u8, w.rows, w.cols);
  if (p.column_groups >= 0) {
    s.ordered = make(DType::u8, w.rows, w.cols);
    s.inverse = make(DType::i32, 1, w.cols);
  }
  if (shape.scale_dtype != DType::f32)
    s.scales_raw = make(shape.scale_dtype, units, shape.groups());
  s.scales = make(DType::f32, units, shape.groups());
  if (shape.zeros) s.zeros = make(DType::i32, units, shape.groups());
  return s;
}

// A host view of the shape and dtype of `like`.
View host_like(const std::byte* bytes, const View& like) {
  return make_view(const_cast<std::byte*>(bytes), like.dtype, DeviceKind::cpu, like.rows,
                   like.cols);
}

template <class T>
std::vector<T> to_host(Ops& ops, const View& device) {
  std::vector<T> host(static_cast<std::size_t>(device.count()));
  ops.download(device, host_view(host.data(), device.rows, device.cols));
  return host;
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void verify(Loader& loader, const std::string& name, View codes, View scales, View zeros,
            const PackedWeight& w) {
  Arena& arena = loader.arena();
  const Arena::Scope scope(arena);
  const View codes_back = arena.make(MemTag::staging, DType::u8, codes.rows, codes.cols);
  const View scales_back = arena.make(MemTag::staging, DType::f32, scales.rows, scales.cols);
  View zeros_back;
  if (w.shape.kind != PackedKind::codebook) {
    zeros_back = arena.make(MemTag::staging, DType::i32, scales.rows, scales.cols);
  }
  if (arena.is_measuring()) return;
  Ops& ops = loader.ops();
  ops.unpack(w, codes_back, scales_back, zeros_back);
  const auto fail = [&](const char* what) {
    throw Error(ErrorCode::internal, name + ": the packed " + what + " are not those of the file");
  };
  if (!same_bytes(to_host<std::uint8_t>(ops, codes), to_host<std::uint8_t>(ops, codes_back))) {
    fail("codes");
  }
  if (!same_bytes(to_host<float>(ops, scales), to_host<float>(ops, scales_back))) fail("scales");
  if (zeros_back.empty()) return;
  const std::vector<std::int32_t> expected =
      zeros.empty() ? std::vector<std::int32_t>(static_cast<std::size_t>(zeros_back.count()),
                                                implicit_zero(w.shape))
                    : to_host<std::int32_t>(ops, zeros);
  if (!same_bytes(expected, to_host<std::int32_t>(ops, zeros_back))) fail("zeros");
}

// What the device makes of the records is what the reference decodes.
void verify_scheme(Loader& loader, const StagedLinear& s, const std::byte* base,
                   const PackedWeight& w) {
  Arena& arena = loader.arena();
  const Arena::Scope scope(arena);
  const View out = arena.make(MemTag::staging, DType::f32, s.scheme->rows, s.scheme->cols);
  if (arena.is_measuring()) return;
  loader.ops().expand(w, out);
  const std::vector<float> found = to_host<float>(loader.ops(), out);
  const LinearWeight weight = staged_weight(s, const_cast<std::byte*>(base));
  const RowDecoder decoder(weight);
  std::vector<float> row(static_cast<std::size_t>(out.cols));
  for (std::int64_t r = 0; r < out.rows; ++r) {
    const View to = host_view(row.data(), 1, out.cols);
    s.scheme->rotated() ? decoder.decode_terms(r, to) : decoder.decode(r, to);
    if (std::memcmp(row.data(), found.data() + r * out.cols, row.size() * sizeof(float)) != 0) {
      throw Error(ErrorCode::internal, s.name + ": row " + std::to_string(r) +
                                           " of the packed weight is not that of the file");
    }
  }
}

}  // namespace

std::optional<PackedLayout> packed_layout_of(const LinearWeight& w, const std::string& name) {
  if (match_dense(w)) return std::nullopt;
  const auto pattern = match_packable(w);
  if (!pattern) {
    if (const auto scheme = match_scheme(w)) return PackedLayout{*scheme, false};
    throw Error(ErrorCode::usage, name + ": no packed kernel for the scheme " + scheme_name(w) +
                                      "; use --exec decoded");
  }
  // With groups of W's columns the codes are brought into W's order at load.
  return PackedLayout{pattern->shape, pattern->permutation >= 0 && pattern->column_groups < 0};
}

StagedLinear stage_layout(const LinearWeight& w, std::string name) {
  StagedLinear s;
  s.described = &w;
  s.name = std::move(name);
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t at = s.bytes;
    s.bytes += aligned(bytes);
    return at;
  };
  for (const Plane& plane : w.planes) s.plane.push_back(take(plane.raw_bytes()));
  const auto pattern = match_packable(w);
  if (!pattern) s.scheme = match_scheme(w);
  if (s.scheme) {
    s.records = take(scheme_bytes(*s.scheme));
    return s;
  }
  const PackedPattern p = pattern_of(w);
  if (p.shape.kind == PackedKind::binary2) s.codes = take(w.rows * ((w.cols * 2 + 7) / 8));
  if (p.shape.zeros) s.zeros = take(4 * w.rows * p.shape.terms() * p.shape.groups());
  if (p.column_groups >= 0) s.inverse = take(4 * w.cols);
  if (p.book >= 0) s.book = take(4 * 16);
  return s;
}

LinearWeight staged_weight(const StagedLinear& s, std::byte* base) {
  LinearWeight w = *s.described;
  for (std::size_t i = 0; i < w.planes.size(); ++i) {
    Plane& plane = w.planes[i];
    plane.data = make_view(base + s.plane[i], DType::u8, DeviceKind::cpu, 1, plane.raw_bytes());
  }
  return w;
}

std::int64_t build_tiles(const StagedLinear& s) { return s.scheme ? s.scheme->row_tiles() : 0; }

void build_staged(const StagedLinear& s, std::byte* base, std::int64_t first, std::int64_t last) {
  build_scheme(staged_weight(s, base), *s.scheme, first, last, base + s.records);
}

void prepare_staged(const StagedLinear& s, std::byte* base) {
  const LinearWeight& w = *s.described;
  if (s.scheme) {
    for (std::size_t i = 0; i < w.planes.size(); ++i) {
      const Plane& plane = w.planes[i];
      if (!plane.packed() && plane.dtype != DType::i32 && plane.dtype != DType::i16) {
        check_finite(plane, base + s.plane[i], s.name);
      }
    }
    return prepare_scheme(staged_weight(s, base), *s.scheme, s.name, base + s.records);
  }
  const PackedPattern p = pattern_of(w);
  const auto bytes = [&](int plane) { return base + s.plane[static_cast<std::size_t>(plane)]; };
  const auto integers = [&](std::int64_t at) { return reinterpret_cast<std::int32_t*>(base + at); };
  for (int t = 0; t < p.shape.terms(); ++t) {
    const auto term = static_cast<std::size_t>(t);
    check_finite(w.plane(p.scales[term]), bytes(p.scales[term]), s.name);
    if (!p.shape.zeros) continue;
    const std::int64_t count = w.rows * p.shape.groups();
    const std::span<std::int32_t> zeros(integers(s.zeros) + t * count,
                                        static_cast<std::size_t>(count));
    read_zeros(w.plane(p.zeros[term]), bytes(p.zeros[term]), zeros);
    check_zeros(zeros, s.name);
  }
  if (p.shape.kind == PackedKind::binary2) {
    interleave(w.plane(p.codes[0]), w.plane(p.codes[1]), bytes(p.codes[0]), bytes(p.codes[1]),
               base + s.codes);
  }
  if (p.column_groups >= 0) {
    invert(p, reinterpret_cast<const std::int32_t*>(bytes(p.permutation)),
           reinterpret_cast<const std::int32_t*>(bytes(p.column_groups)), integers(s.inverse),
           s.name);
  }
  if (p.book >= 0) {
    Plane book = w.plane(p.book);
    book.data = make_view(bytes(p.book), DType::u8, DeviceKind::cpu, 1, book.raw_bytes());
    check_finite(book, bytes(p.book), s.name);
    auto* to = reinterpret_cast<float*>(base + s.book);
    for (std::int64_t i = 0; i < 16; ++i) to[i] = read_float(book, 0, i);
  }
}

void install_packed(const StagedLinear& s, const std::byte* base, Loader& loader,
                    const PackedWeight& out) {
  const LinearWeight& w = *s.described;
  if (s.scheme) {
    if (!loader.arena().is_measuring()) {
      REQUIRE(out.shape.rows == w.rows && out.shape.cols == w.cols, s.name + ": shape");
      loader.ops().upload(host_like(base + s.records, out.records), out.records);
      if (s.scheme->rotated()) {
        fill_rotation(loader.ops(), out.rotation, staged_weight(s, const_cast<std::byte*>(base)),
                      0);
      }
    }
    if (loader.verify) verify_scheme(loader, s, base, out);
    return;
  }
  const PackedPattern p = pattern_of(w);
  const Arena::Scope scope(loader.arena());
  const Scratch scratch = make_scratch(w, p, loader.arena());
  const View codes = p.column_groups >= 0 ? scratch.ordered : scratch.codes;
  if (loader.arena().is_measuring()) {
    repack(loader, s.name, codes, scratch.scales, scratch.zeros, out);
    return;
  }
  REQUIRE(out.shape.rows == w.rows && out.shape.cols == w.cols, s.name + ": shape");
  Ops& ops = loader.ops();
  const auto plane = [&](int index) { return base + s.plane[static_cast<std::size_t>(index)]; };

  const bool binary = p.shape.kind == PackedKind::binary2;
  ops.upload(host_like(binary ? base + s.codes : plane(p.codes[0]), scratch.packed),
             scratch.packed);
  ops.unpack_codes(scratch.packed, p.shape.bits, scratch.codes);
  if (p.column_groups >= 0) {
    ops.upload(host_like(base + s.inverse, scratch.inverse), scratch.inverse);
    ops.gather_columns(scratch.codes, scratch.inverse, View{}, scratch.ordered);
  }
  const View raw = scratch.scales_raw.empty() ? scratch.scales : scratch.scales_raw;
  for (int t = 0; t < p.shape.terms(); ++t) {
    const View rows = raw.row_range(t * w.rows, w.rows);
    ops.upload(host_like(plane(p.scales[static_cast<std::size_t>(t)]), rows), rows);
  }
  if (!scratch.scales_raw.empty()) ops.convert(scratch.scales_raw, scratch.scales);
  if (p.shape.zeros) ops.upload(host_like(base + s.zeros, scratch.zeros), scratch.zeros);
  if (!out.book.empty()) ops.upload(host_like(base + s.book, out.book), out.book);
  if (!out.permutation.empty()) {
    ops.upload(host_like(plane(p.permutation), out.permutation), out.permutation);
  }
  repack(loader, s.name, codes, scratch.scales, scratch.zeros, out);
}

void repack(Loader& loader, const std::string& name, View codes, View scales, View zeros,
            const PackedWeight& out) {
  if (!loader.arena().is_measuring()) loader.ops().repack(codes, scales, zeros, out);
  if (loader.verify) verify(loader, name, codes, scales, zeros, out);
}

}  // namespace engine
