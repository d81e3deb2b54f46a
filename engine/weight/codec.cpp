// Reference decoding (engine/weight/linear_weight.h has the equation) and encoding of planes.
#include "engine/weight/codec.h"

#include <array>
#include <cstring>
#include <limits>

#include "engine/weight/plane_read.h"

namespace engine {
namespace {

// Where a weight's coefficient lies in the scale, zero and mu planes of its term.
struct Unit {
  std::int64_t row;
  std::int64_t col;
};

Unit unit_of(const LinearWeight& w, const Grid& grid, std::int64_t r, std::int64_t c) {
  switch (grid.kind) {
    case GridKind::tensor:
      return {0, 0};
    case GridKind::row:
      return {r, 0};
    case GridKind::group:
      if (grid.column_group_plane >= 0) {
        return {r, read_element<std::int32_t>(w.plane(grid.column_group_plane), 0, c)};
      }
      return {r, c / grid.group};
  }
  throw Error(ErrorCode::internal, "unknown grid kind");
}

// The value of one weight under one term; (slot_row, slot_col) is the place of its code.
float term_value(const LinearWeight& w, const Term& t, std::int64_t r, std::int64_t c,
                 std::int64_t slot_row, std::int64_t slot_col) {
  const Plane& codes = w.plane(t.codes_plane);
  if (t.kind == TermKind::dense) return read_float(codes, slot_row, slot_col);

  const Unit u = unit_of(w, t.grid, r, c);
  const float scale = read_float(w.plane(t.grid.scale_plane), u.row, u.col);
  float value = 0.0F;
  if (t.kind == TermKind::lattice) {
    std::array<float, lattice_columns> point{};
    read_point(w, t, r, c / lattice_columns, point);
    value = scale * point[static_cast<std::size_t>(c % lattice_columns)];
    return round_to(t.grid.product, value);
  }
  const unsigned code = read_code(codes, slot_row, slot_col);
  switch (t.kind) {
    case TermKind::affine: {
      const std::int64_t zero = t.grid.zero_plane < 0
                                    ? std::int64_t{1} << (t.bits - 1)
                                    : read_integer(w.plane(t.grid.zero_plane), u.row, u.col);
      auto difference = static_cast<float>(static_cast<std::int64_t>(code) - zero);
      if (t.grid.midrise) difference += 0.5F;
      // As the ops compute it: under f16 arithmetic the difference is rounded as well.
      value = scale * round_to(t.grid.product, difference);
      break;
    }
    case TermKind::codebook:
      value = scale * read_float(w.plane(t.codebook_plane), 0, code);
      break;
    case TermKind::sign:
      value = code == 1 ? scale : -scale;
      if (t.mu_plane >= 0) value = read_float(w.plane(t.mu_plane), u.row, u.col) + value;
      break;
    case TermKind::dense:
    case TermKind::lattice:
      break;  // returned above
  }
  return round_to(t.grid.product, value);
}

// Adds one term to t_sum, f32 [rows, cols]; `covered` tells which sums have begun, so that the
// first term is taken as it is (0 + -0 would lose a sign).
void add_term(const LinearWeight& w, const Term& t, std::vector<float>& t_sum,
              std::vector<char>& covered) {
  const SupportMask mask(w, t.support);
  std::int64_t rank = 0;  // supported slots before this one, within the codes plane's current row
  for (std::int64_t r = 0; r < w.rows; ++r) {
    if (t.support.compact && t.support.bitmap == Select::all) rank = 0;
    for (std::int64_t c = 0; c < w.cols; ++c) {
      if (!mask.test(r, c)) continue;
      std::int64_t slot_row = r;
      std::int64_t slot_col = c;
      if (t.support.compact) {
        slot_row = t.support.bitmap == Select::all ? r : 0;
        slot_col = rank++;
      }
      const float value = term_value(w, t, r, c, slot_row, slot_col);
      const auto at = static_cast<std::size_t>(r * w.cols + c);
      t_sum[at] = covered[at] != 0 ? t_sum[at] + value : value;
      covered[at] = 1;
    }
  }
}

void store_element(View out, std::int64_t r, std::int64_t c, float value) {
  const std::int64_t at = r * out.stride + c;
  switch (out.dtype) {
    case DType::f32:
      return store(out.host<float>()[at], value);
    case DType::f16:
      return store(out.host<f16>()[at], value);
    case DType::bf16:
      return store(out.host<bf16>()[at], value);
    default:
      throw Error(ErrorCode::internal, "decode_linear: out is " + out.shape());
  }
}

// x [rows, cols]: every row, or every column, by the inverse of the transform.
void undo_transform(const LinearWeight& w, const Transform& t, bool by_rows,
                    std::vector<float>& x) {
  if (t.kind == TransformKind::none) return;
  const std::int64_t d = by_rows ? w.cols : w.rows, m = by_rows ? w.rows : w.cols;
  const HostTransform transform(t, read_signs(w, t), d, 1);
  std::vector<double> vector(static_cast<std::size_t>(d));
  for (std::int64_t k = 0; k < m; ++k) {
    const auto at = [&](std::size_t i) {
      return by_rows ? static_cast<std::size_t>(k * d) + i
                     : i * static_cast<std::size_t>(m) + static_cast<std::size_t>(k);
    };
    for (std::size_t i = 0; i < vector.size(); ++i) vector[i] = static_cast<double>(x[at(i)]);
    transform.apply(vector, true);
    for (std::size_t i = 0; i < vector.size(); ++i) x[at(i)] = static_cast<float>(vector[i]);
  }
}

}  // namespace

void decode_linear(const LinearWeight& w, View out) {
  REQUIRE(out.rows == w.rows && out.cols == w.cols && out.data != nullptr,
          "decode_linear: out is " + out.shape());
  validate(w, "memory", "linear");

  const auto count = static_cast<std::size_t>(w.rows * w.cols);
  std::vector<float> t_sum(count, 0.0F);
  std::vector<char> covered(count, 0);
  for (const Term& t : w.terms) add_term(w, t, t_sum, covered);
  undo_transform(w, w.right, true, t_sum);
  undo_transform(w, w.left, false, t_sum);

  for (std::int64_t j = 0; j < w.cols; ++j) {
    const std::int64_t k = w.permutation_plane < 0
                               ? j
                               : read_element<std::int32_t>(w.plane(w.permutation_plane), 0, j);
    for (std::int64_t r = 0; r < w.rows; ++r) {
      float value = t_sum[static_cast<std::size_t>(r * w.cols + j)];
      if (w.diagonal_plane >= 0) value *= read_float(w.plane(w.diagonal_plane), 0, k);
      store_element(out, r, k, value);
    }
  }
}

namespace {

OwnedPlane make_plane(const std::string& role, DType dtype, int bits, std::int64_t rows,
                      std::int64_t cols) {
  REQUIRE(rows >= 1 && cols >= 1, "empty plane: " + role);
  OwnedPlane out;
  out.plane = {role, dtype, bits, rows, cols, {}};
  out.bytes.resize(static_cast<std::size_t>(out.plane.raw_bytes()));
  out.plane.data = make_view(out.bytes.data(), DType::u8, DeviceKind::cpu, 1,
                             static_cast<std::int64_t>(out.bytes.size()));
  return out;
}

std::span<std::byte> row_span(OwnedPlane& out, std::int64_t r) {
  const auto bytes = static_cast<std::size_t>(out.plane.row_bytes());
  return std::span(out.bytes).subspan(static_cast<std::size_t>(r) * bytes, bytes);
}

[[noreturn]] void refuse(const std::string& role, std::int64_t r, std::int64_t c,
                         const std::string& expected, const std::string& found) {
  throw Error(ErrorCode::mismatch, "plane " + role + ": [" + std::to_string(r) + ", " +
                                       std::to_string(c) + "]: expected " + expected + ", found " +
                                       found);
}

}  // namespace

int OwnedLinear::add(OwnedPlane owned) {
  weight.planes.push_back(std::move(owned.plane));
  bytes.push_back(std::move(owned.bytes));
  return static_cast<int>(weight.planes.size()) - 1;
}

OwnedPlane pack_codes_plane(View codes, int bits, const std::string& role) {
  OwnedPlane out = make_plane(role, DType::u8, bits, codes.rows, codes.cols);
  for (std::int64_t r = 0; r < codes.rows; ++r) {
    const std::uint8_t* row = codes.host<std::uint8_t>() + r * codes.stride;
    pack_row({row, static_cast<std::size_t>(codes.cols)}, static_cast<unsigned>(bits),
             row_span(out, r));
  }
  return out;
}

OwnedPlane pack_zeros(View zeros, int bits) {
  OwnedPlane out = make_plane("zeros", DType::u8, bits, zeros.rows, zeros.cols);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(zeros.cols));
  for (std::int64_t r = 0; r < zeros.rows; ++r) {
    for (std::int64_t c = 0; c < zeros.cols; ++c) {
      const std::int32_t zero = zeros.host<std::int32_t>()[r * zeros.stride + c];
      if (zero < 0 || zero >= (1 << bits)) {
        refuse("zeros", r, c, "a zero of " + std::to_string(bits) + " bits", std::to_string(zero));
      }
      codes[static_cast<std::size_t>(c)] = static_cast<std::uint8_t>(zero);
    }
    pack_row(codes, static_cast<unsigned>(bits), row_span(out, r));
  }
  return out;
}

OwnedPlane zeros_plane(View zeros, DType dtype) {
  REQUIRE(dtype == DType::i16 || dtype == DType::i32, "zeros are packed, i16 or i32");
  OwnedPlane out = make_plane("zeros", dtype, 0, zeros.rows, zeros.cols);
  for (std::int64_t r = 0; r < zeros.rows; ++r) {
    for (std::int64_t c = 0; c < zeros.cols; ++c) {
      const std::int32_t zero = zeros.host<std::int32_t>()[r * zeros.stride + c];
      std::byte* to = row_span(out, r).data() + c * static_cast<std::int64_t>(dtype_bytes(dtype));
      if (dtype == DType::i32) {
        std::memcpy(to, &zero, sizeof zero);
        continue;
      }
      const auto narrow = static_cast<std::int16_t>(zero);
      if (narrow != zero) refuse("zeros", r, c, "a value of i16", std::to_string(zero));
      std::memcpy(to, &narrow, sizeof narrow);
    }
  }
  return out;
}

OwnedPlane floats_plane(View values, DType dtype, const std::string& role) {
  REQUIRE(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16,
          "a float plane is f32, f16 or bf16");
  OwnedPlane out = make_plane(role, dtype, 0, values.rows, values.cols);
  const auto size = static_cast<std::int64_t>(dtype_bytes(dtype));
  for (std::int64_t r = 0; r < values.rows; ++r) {
    const float* row = values.host<float>() + r * values.stride;
    std::byte* to = row_span(out, r).data();
    for (std::int64_t c = 0; c < values.cols; ++c, to += size) {
      const float value = row[c];
      if (!(round_to(dtype, value) == value)) {  // also true for NaN
        refuse(role, r, c, std::string("a value of ") + dtype_name(dtype), std::to_string(value));
      }
      if (dtype == DType::f32) {
        std::memcpy(to, &value, sizeof value);
      } else {
        const std::uint16_t half = dtype == DType::f16 ? to_f16(value).bits : to_bf16(value).bits;
        std::memcpy(to, &half, sizeof half);
      }
    }
  }
  return out;
}

OwnedPlane lattice_codes_plane(View codes) {
  if (codes.dtype == DType::u8) return pack_codes_plane(codes, 8);
  OwnedPlane out = make_plane("codes", DType::i16, 0, codes.rows, codes.cols);
  for (std::int64_t r = 0; r < codes.rows; ++r) {
    const auto to = row_span(out, r);
    std::memcpy(to.data(), codes.host<std::int16_t>() + r * codes.stride, to.size());
  }
  return out;
}

OwnedPlane signs_plane(std::span<const float> signs) {
  std::vector<std::uint8_t> bits(signs.size());
  for (std::size_t i = 0; i < signs.size(); ++i) {
    if (signs[i] != 1.0F && signs[i] != -1.0F) {
      refuse("signs", 0, static_cast<std::int64_t>(i), "1 or -1", std::to_string(signs[i]));
    }
    bits[i] = signs[i] < 0.0F ? 1 : 0;
  }
  return pack_codes_plane(host_view(bits.data(), 1, static_cast<std::int64_t>(bits.size())), 1,
                          "signs");
}

OwnedPlane indices_plane(std::span<const std::int32_t> ids, const std::string& role) {
  OwnedPlane out = make_plane(role, DType::i32, 0, 1, static_cast<std::int64_t>(ids.size()));
  std::memcpy(out.bytes.data(), ids.data(), ids.size_bytes());
  return out;
}

OwnedPlane dense_plane(View w) {
  REQUIRE(is_float(w.dtype) && w.dtype != DType::f64 && w.device == DeviceKind::cpu,
          "a dense plane is f32, f16 or bf16 on the host");
  OwnedPlane out = make_plane("dense", w.dtype, 0, w.rows, w.cols);
  const auto element = static_cast<std::int64_t>(dtype_bytes(w.dtype));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const auto to = row_span(out, r);
    std::memcpy(to.data(), static_cast<const std::byte*>(w.data) + r * w.stride * element,
                to.size());
  }
  return out;
}

OwnedLinear dense_linear(View w) {
  OwnedLinear out;
  out.weight.rows = w.rows;
  out.weight.cols = w.cols;
  Term term;
  term.kind = TermKind::dense;
  term.codes_plane = out.add(dense_plane(w));
  out.weight.terms.push_back(term);
  return out;
}

}  // namespace engine
