// CpuOps: grids, codes, packing and column gathers.
#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"
#include "engine/weight/grid.h"
#include "formats/bits.h"

namespace engine {

namespace {

constexpr std::int64_t row_grain = 8;

void require_shape(const View& v, DType dtype, std::int64_t rows, std::int64_t cols,
                   const char* what) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(what) + " expected " + dtype_name(dtype) + " [" + std::to_string(rows) +
              ", " + std::to_string(cols) + "], found " + v.shape());
}

// The grids of every row, and which of them a column uses.
struct GridTable {
  const float* scales;
  const std::int32_t* zeros;
  std::int64_t scale_stride;
  std::int64_t zero_stride;
  std::vector<std::int64_t> unit;  // of column j

  GridTable(const GridSpec& spec, const View& s, const View& z, const View& column_group,
            std::int64_t rows, std::int64_t cols)
      : scales(s.host<float>()),
        zeros(z.host<std::int32_t>()),
        scale_stride(s.stride),
        zero_stride(z.stride),
        unit(static_cast<std::size_t>(cols)) {
    check_grid_spec(spec);
    const std::int64_t groups = spec.groups(cols);
    require_shape(s, DType::f32, rows, groups, "scales");
    require_shape(z, DType::i32, rows, groups, "zeros");
    const std::int32_t* given = column_group.empty()
                                    ? nullptr
                                    : checked_indices(column_group, cols, groups, "column group");
    for (std::int64_t j = 0; j < cols; ++j) {
      unit[static_cast<std::size_t>(j)] = given != nullptr ? given[j] : j / spec.unit(cols);
    }
  }

  [[nodiscard]] UnitGrid at(std::int64_t row, std::int64_t col) const {
    const std::int64_t u = unit[static_cast<std::size_t>(col)];
    return {scales[row * scale_stride + u], zeros[row * zero_stride + u]};
  }
};

}  // namespace

void CpuOps::find_grid(View w, const GridSpec& spec, View scales, View zeros) {
  check_grid_spec(spec);
  require_shape(scales, DType::f32, w.rows, spec.groups(w.cols), "scales");
  require_shape(zeros, DType::i32, w.rows, spec.groups(w.cols), "zeros");
  auto* scale = scales.host<float>();
  auto* zero = zeros.host<std::int32_t>();
  pool_.run(w.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(w.cols));
    for (std::int64_t r = begin; r < end; ++r) {
      load_row(w, r, 0, w.cols, row.data());
      for (std::int64_t u = 0; u < spec.groups(w.cols); ++u) {
        const std::int64_t first = u * spec.unit(w.cols);
        const std::int64_t n = std::min(spec.unit(w.cols), w.cols - first);
        const UnitGrid grid =
            find_unit_grid({row.data() + first, static_cast<std::size_t>(n)}, spec);
        scale[r * scales.stride + u] = grid.scale;
        zero[r * zeros.stride + u] = grid.zero;
      }
    }
  });
}

void CpuOps::quantize_codes(View w, const GridSpec& spec, View scales, View zeros,
                            View column_group, View codes) {
  require_shape(codes, DType::u8, w.rows, w.cols, "codes");
  const GridTable grids(spec, scales, zeros, column_group, w.rows, w.cols);
  auto* out = codes.host<std::uint8_t>();
  pool_.run(w.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(w.cols));
    for (std::int64_t r = begin; r < end; ++r) {
      load_row(w, r, 0, w.cols, row.data());
      for (std::int64_t j = 0; j < w.cols; ++j) {
        out[r * codes.stride + j] =
            quantize_value(row[static_cast<std::size_t>(j)], grids.at(r, j), spec);
      }
    }
  });
}

void CpuOps::dequantize_codes(View codes, const GridSpec& spec, View scales, View zeros,
                              View column_group, View perm, View out) {
  require_shape(out, out.dtype, codes.rows, codes.cols, "dequantized weights");
  const GridTable grids(spec, scales, zeros, column_group, codes.rows, codes.cols);
  const std::int32_t* to = perm.empty() ? nullptr : checked_permutation(perm, codes.cols);
  const auto* in = codes.host<std::uint8_t>();
  const auto write = [&](auto* data) {
    pool_.run(codes.rows, row_grain, [&, data](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        for (std::int64_t j = 0; j < codes.cols; ++j) {
          const float v = dequantize_value(in[r * codes.stride + j], grids.at(r, j), spec);
          store(data[r * out.stride + (to != nullptr ? to[j] : j)], v);
        }
      }
    });
  };
  switch (out.dtype) {
    case DType::f32:
      return write(out.host<float>());
    case DType::f16:
      return write(out.host<f16>());
    case DType::bf16:
      return write(out.host<bf16>());
    default:
      REQUIRE(false, "expected f32, f16 or bf16, found " + out.shape());
  }
}

void CpuOps::pack_codes(View codes, int bits, View packed) {
  const auto width = static_cast<unsigned>(bits);
  const auto row_bytes =
      static_cast<std::int64_t>(packed_row_bytes(static_cast<std::uint64_t>(codes.cols), width));
  require_shape(packed, DType::u8, codes.rows, row_bytes, "packed codes");
  const auto* in = codes.host<std::uint8_t>();
  auto* out = packed.host<std::uint8_t>();
  pool_.run(codes.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::span row(out + r * packed.stride, static_cast<std::size_t>(row_bytes));
      pack_row({in + r * codes.stride, static_cast<std::size_t>(codes.cols)}, width,
               std::as_writable_bytes(row));
    }
  });
}

void CpuOps::unpack_codes(View packed, int bits, View codes) {
  const auto width = static_cast<unsigned>(bits);
  const auto row_bytes =
      static_cast<std::int64_t>(packed_row_bytes(static_cast<std::uint64_t>(codes.cols), width));
  require_shape(packed, DType::u8, codes.rows, row_bytes, "packed codes");
  const auto* in = packed.host<std::uint8_t>();
  auto* out = codes.host<std::uint8_t>();
  pool_.run(codes.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::span row(in + r * packed.stride, static_cast<std::size_t>(row_bytes));
      unpack_row(std::as_bytes(row), width,
                 {out + r * codes.stride, static_cast<std::size_t>(codes.cols)});
    }
  });
}

void CpuOps::gather_columns(View in, View perm, View dead, View out) {
  const std::int32_t* from =
      perm.empty() ? nullptr : checked_indices(perm, in.cols, in.cols, "gathered column");
  if (in.dtype == DType::u8) {  // codes
    require_shape(out, DType::u8, in.rows, in.cols, "gathered codes");
    REQUIRE(dead.empty(), "codes have no dead columns");
    const auto* codes = in.host<std::uint8_t>();
    auto* gathered = out.host<std::uint8_t>();
    pool_.run(in.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        for (std::int64_t j = 0; j < in.cols; ++j) {
          gathered[r * out.stride + j] = codes[r * in.stride + (from != nullptr ? from[j] : j)];
        }
      }
    });
    return;
  }
  require_shape(out, DType::f32, in.rows, in.cols, "gathered columns");
  if (!dead.empty()) require_shape(dead, DType::u8, 1, in.cols, "dead columns");
  const auto* zeroed = dead.empty() ? nullptr : dead.host<std::uint8_t>();
  auto* to = out.host<float>();
  pool_.run(in.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(in.cols));
    for (std::int64_t r = begin; r < end; ++r) {
      load_row(in, r, 0, in.cols, row.data());
      for (std::int64_t j = 0; j < in.cols; ++j) {
        const auto source = static_cast<std::size_t>(from != nullptr ? from[j] : j);
        to[r * out.stride + j] = zeroed != nullptr && zeroed[j] != 0 ? 0.0F : row[source];
      }
    }
  });
}

void CpuOps::diagonal(View h, View out) {
  REQUIRE(h.rows == h.cols, "expected a square matrix, found " + h.shape());
  require_shape(out, DType::f32, 1, h.cols, "diagonal");
  const auto* in = h.host<float>();
  auto* to = out.host<float>();
  for (std::int64_t i = 0; i < h.rows; ++i) to[i] = in[i * h.stride + i];
}

}  // namespace engine
