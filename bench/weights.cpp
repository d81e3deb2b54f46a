#include "bench/weights.h"

#include <algorithm>

namespace engine {
namespace {

// Records and row units start at multiples of this in every copy.
constexpr std::int64_t alignment = 256;

std::int64_t aligned(std::int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// Bytes [copy * size, + n) of a row.
View slice(const View& v, std::int64_t copy, std::int64_t size, std::int64_t n) {
  return v.col_range(copy * size, n);
}

}  // namespace

std::string WeightSpec::name() const {
  if (!packed) return "dense";
  const std::string group = "g" + std::to_string(shape.group);
  switch (shape.kind) {
    case PackedKind::codebook:
      return "codebook" + std::to_string(shape.bits) + group;
    case PackedKind::binary2:
      return "binary2" + group;
    default:
      break;
  }
  return "b" + std::to_string(shape.bits) + group + (shape.zeros ? "" : "s");
}

std::int64_t copies_beyond_cache(Ops& ops, std::int64_t bytes) {
  if (ops.kind() != DeviceKind::cuda) return 1;
  constexpr std::int64_t beyond = std::int64_t{192} << 20;  // three times 64 MiB
  constexpr std::int64_t most = 256;
  const std::int64_t wanted = std::clamp<std::int64_t>((beyond + bytes - 1) / bytes, 2, most);
  return std::clamp<std::int64_t>(ops.info().free_bytes / 4 / bytes, 1, wanted);
}

WeightCopies::WeightCopies(Ops& ops, Ledger& ledger, const WeightSpec& spec, std::int64_t copies) {
  if (spec.packed) {
    fill_packed(ops, ledger, spec.shape, copies);
  } else {
    fill_dense(ops, ledger, spec, copies);
  }
}

void WeightCopies::fill_dense(Ops& ops, Ledger& ledger, const WeightSpec& spec,
                              std::int64_t copies) {
  const std::int64_t rows = spec.shape.rows;
  data_ = Buffer(ops.memory(), ledger, MemTag::weights, spec.dense, copies * rows, spec.shape.cols);
  ops.fill_bell(data_.view().row_range(0, rows), 1, 1, 0.02F, 0.0F);
  for (std::int64_t i = 0; i < copies; ++i) {
    Linear w;
    w.dense = data_.view().row_range(i * rows, rows);
    if (i > 0) ops.copy(linears_.front().dense, w.dense);
    linears_.push_back(w);
  }
}

void WeightCopies::fill_packed(Ops& ops, Ledger& ledger, const PackedShape& shape,
                               std::int64_t copies) {
  const auto make = [&](DType dtype, std::int64_t rows, std::int64_t cols) {
    return Buffer(ops.memory(), ledger, MemTag::weights, dtype, rows, cols);
  };
  const std::int64_t records = aligned(shape.records_bytes());
  const std::int64_t row_units = aligned(shape.row_unit_bytes());
  data_ = make(DType::u8, 1, copies * records);
  if (row_units > 0) row_units_ = make(DType::u8, 1, copies * row_units);
  if (shape.kind == PackedKind::codebook) {
    book_ = make(DType::f32, 1, 16);
    ops.fill_bell(book_.view(), 1, 2, 1.0F, 0.0F);
  }
  for (std::int64_t i = 0; i < copies; ++i) {
    Linear w;
    w.packed.shape = shape;
    w.packed.records = slice(data_.view(), i, records, shape.records_bytes());
    if (row_units > 0) {
      w.packed.row_units = slice(row_units_.view(), i, row_units, shape.row_unit_bytes());
    }
    w.packed.book = book_.view();
    linears_.push_back(w);
  }
  {
    // Two terms take the coefficients of one-bit grids, the same for both.
    GridSpec grid;
    grid.bits = shape.bits;
    grid.group = shape.group;
    grid.symmetric = shape.kind == PackedKind::affine && !shape.zeros;
    grid.scale_dtype = shape.scale_dtype;
    const std::int64_t groups = shape.groups();
    const Buffer weights = make(DType::f32, shape.rows, shape.cols);
    const Buffer codes = make(DType::u8, shape.rows, shape.cols);
    const Buffer scales = make(DType::f32, shape.rows * shape.terms(), groups);
    const Buffer zeros = make(DType::i32, shape.rows * shape.terms(), groups);
    ops.fill_bell(weights.view(), 1, 1, 0.02F, 0.0F);
    const View first_scales = scales.view().row_range(0, shape.rows);
    const View first_zeros = zeros.view().row_range(0, shape.rows);
    ops.find_grid(weights.view(), grid, first_scales, first_zeros);
    ops.quantize_codes(weights.view(), grid, first_scales, first_zeros, View(), codes.view());
    if (shape.terms() == 2) {
      ops.copy(first_scales, scales.view().row_range(shape.rows, shape.rows));
      ops.copy(first_zeros, zeros.view().row_range(shape.rows, shape.rows));
    }
    ops.repack(codes.view(), scales.view(), shape.zeros ? zeros.view() : View(),
               linears_.front().packed);
    ops.synchronize();
  }
  for (std::size_t i = 1; i < linears_.size(); ++i) {
    const PackedWeight& from = linears_.front().packed;
    ops.copy(from.records, linears_[i].packed.records);
    if (row_units > 0) ops.copy(from.row_units, linears_[i].packed.row_units);
  }
  ops.synchronize();
}

}  // namespace engine
