#include "engine/weight/row_decoder.h"

#include <algorithm>
#include <array>
#include <span>

#include "formats/bits.h"

namespace engine {

struct RowDecoder::Scratch {
  std::vector<float> sum;
  std::vector<std::uint8_t> covered;  // the sum has begun
  std::vector<std::int32_t> columns;  // supported by the current term, in order
  std::vector<std::uint8_t> codes;    // of the row's slots
  std::vector<float> scales, mus;     // of the row's units
  std::vector<float> signed_values;   // of a sign term: of codes 0 and 1 in each unit
  std::vector<std::int64_t> zeros;

  explicit Scratch(std::int64_t cols)
      : sum(static_cast<std::size_t>(cols)),
        covered(static_cast<std::size_t>(cols)),
        codes(static_cast<std::size_t>(cols)) {
    columns.reserve(static_cast<std::size_t>(cols));
  }
};

namespace {

std::vector<std::int32_t> read_ids(const Plane& p) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(p.cols));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = read_element<std::int32_t>(p, 0, static_cast<std::int64_t>(i));
  }
  return ids;
}

void read_floats(const Plane& p, std::int64_t r, std::vector<float>& out) {
  out.resize(static_cast<std::size_t>(p.cols));
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = read_float(p, r, static_cast<std::int64_t>(i));
  }
}

// Calls body(row) with row the first element of row r.
template <class Body>
void with_row(const View& out, std::int64_t r, Body&& body) {
  const std::int64_t at = r * out.stride;
  switch (out.dtype) {
    case DType::f32:
      return body(out.host<float>() + at);
    case DType::f16:
      return body(out.host<f16>() + at);
    case DType::bf16:
      return body(out.host<bf16>() + at);
    default:
      throw Error(ErrorCode::internal, "RowDecoder: out is " + out.shape());
  }
}

}  // namespace

RowDecoder::RowDecoder(const LinearWeight& weight) : w_(weight) {
  for (const Term& t : w_.terms) {
    TermPlan plan{.term = &t, .mask = {w_, t.support}, .unit = {}, .book = {}, .starts = {}};
    if (t.kind != TermKind::dense && t.grid.kind == GridKind::group) {
      if (t.grid.column_group_plane >= 0) {
        plan.unit = read_ids(w_.plane(t.grid.column_group_plane));
      } else {
        plan.unit.resize(static_cast<std::size_t>(w_.cols));
        for (std::int64_t c = 0; c < w_.cols; ++c) {
          plan.unit[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(c / t.grid.group);
        }
      }
    }
    if (t.kind == TermKind::codebook) read_floats(w_.plane(t.codebook_plane), 0, plan.book);
    if (t.support.compact && t.support.bitmap != Select::all) {
      plan.starts.resize(static_cast<std::size_t>(w_.rows));
      std::int64_t before = 0;
      for (std::int64_t r = 0; r < w_.rows; ++r) {
        plan.starts[static_cast<std::size_t>(r)] = before;
        before += plan.mask.count_row(r);
      }
    }
    terms_.push_back(std::move(plan));
  }
  if (w_.permutation_plane >= 0) permutation_ = read_ids(w_.plane(w_.permutation_plane));
  if (w_.diagonal_plane >= 0) read_floats(w_.plane(w_.diagonal_plane), 0, diagonal_);
}

// Adds one term to the row's sums. The first term that covers a weight is taken as it is: 0 + -0
// would lose a sign.
void RowDecoder::add_term(const TermPlan& plan, std::int64_t r, Scratch& s) const {
  const Term& t = *plan.term;
  plan.mask.find_row(r, s.columns);
  const Plane& codes = w_.plane(t.codes_plane);
  const bool one_row = !plan.starts.empty();  // the codes of all rows in one
  const std::int64_t code_row = one_row ? 0 : r;
  const std::int64_t start = one_row ? plan.starts[static_cast<std::size_t>(r)] : 0;

  // Calls value(code, unit), or value(element) for a dense term, for each supported weight.
  const auto add = [&](auto&& value) {
    for (std::size_t i = 0; i < s.columns.size(); ++i) {
      const auto c = static_cast<std::size_t>(s.columns[i]);
      const float v = value(t.support.compact ? i : c, c);
      s.sum[c] = s.covered[c] != 0 ? s.sum[c] + v : v;
      s.covered[c] = 1;
    }
  };
  if (t.kind == TermKind::dense) {
    add([&](std::size_t slot, std::size_t) {
      return read_float(codes, code_row, start + static_cast<std::int64_t>(slot));
    });
    return;
  }

  const std::int64_t grid_row = t.grid.kind == GridKind::tensor ? 0 : r;
  read_floats(w_.plane(t.grid.scale_plane), grid_row, s.scales);
  const DType product = t.grid.product;
  if (t.kind == TermKind::lattice) {  // everywhere, with one scale per row
    std::array<float, lattice_columns> point{};
    return add([&](std::size_t slot, std::size_t) {
      if (slot % point.size() == 0) {
        read_point(w_, t, r, static_cast<std::int64_t>(slot / point.size()), point);
      }
      return round_to(product, s.scales[0] * point[slot % point.size()]);
    });
  }

  if (one_row) {
    for (std::size_t i = 0; i < s.columns.size(); ++i) {
      s.codes[i] =
          static_cast<std::uint8_t>(read_code(codes, 0, start + static_cast<std::int64_t>(i)));
    }
  } else {
    unpack_row({plane_row(codes, r), static_cast<std::size_t>(codes.row_bytes())},
               static_cast<unsigned>(codes.bits),
               std::span(s.codes).first(static_cast<std::size_t>(codes.cols)));
  }
  const auto unit = [&](std::size_t c) {
    return plan.unit.empty() ? std::size_t{0} : static_cast<std::size_t>(plan.unit[c]);
  };
  switch (t.kind) {
    case TermKind::affine:
      s.zeros.assign(s.scales.size(), std::int64_t{1} << (t.bits - 1));
      if (t.grid.zero_plane >= 0) {
        for (std::size_t u = 0; u < s.zeros.size(); ++u) {
          s.zeros[u] =
              read_integer(w_.plane(t.grid.zero_plane), grid_row, static_cast<std::int64_t>(u));
        }
      }
      return add([&](std::size_t slot, std::size_t c) {
        const std::size_t u = unit(c);
        auto difference = static_cast<float>(s.codes[slot] - s.zeros[u]);
        if (t.grid.midrise) difference += 0.5F;
        return round_to(product, s.scales[u] * round_to(product, difference));
      });
    case TermKind::codebook:
      return add([&](std::size_t slot, std::size_t c) {
        return round_to(product, s.scales[unit(c)] * plan.book[s.codes[slot]]);
      });
    case TermKind::sign:
      if (t.mu_plane >= 0) read_floats(w_.plane(t.mu_plane), grid_row, s.mus);
      s.signed_values.resize(2 * s.scales.size());
      for (std::size_t u = 0; u < s.scales.size(); ++u) {
        for (const bool up : {false, true}) {
          const float value = up ? s.scales[u] : -s.scales[u];
          s.signed_values[2 * u + (up ? 1 : 0)] =
              round_to(product, t.mu_plane >= 0 ? s.mus[u] + value : value);
        }
      }
      return add([&](std::size_t slot, std::size_t c) {
        return s.signed_values[2 * unit(c) + s.codes[slot]];
      });
    case TermKind::dense:
    case TermKind::lattice:
      break;  // returned above
  }
  throw Error(ErrorCode::internal, "unknown term kind");
}

void RowDecoder::sum_terms(std::int64_t r, Scratch& s) const {
  s.sum.assign(s.sum.size(), 0.0F);
  s.covered.assign(s.covered.size(), 0);
  for (const TermPlan& plan : terms_) add_term(plan, r, s);
}

void RowDecoder::decode_terms(std::int64_t first, View out) const {
  REQUIRE(first >= 0 && first + out.rows <= w_.rows && out.cols == w_.cols,
          "RowDecoder: out is " + out.shape());
  Scratch s(w_.cols);
  for (std::int64_t r = 0; r < out.rows; ++r) {
    sum_terms(first + r, s);
    std::copy(s.sum.begin(), s.sum.end(), out.host<float>() + r * out.stride);
  }
}

void RowDecoder::decode(std::int64_t first, View out) const {
  REQUIRE(w_.left.kind == TransformKind::none && w_.right.kind == TransformKind::none,
          "rows of a weight with transforms");
  REQUIRE(first >= 0 && first + out.rows <= w_.rows && out.cols == w_.cols,
          "RowDecoder: out is " + out.shape());
  Scratch s(w_.cols);
  for (std::int64_t r = 0; r < out.rows; ++r) {
    sum_terms(first + r, s);
    with_row(out, r, [&](auto* row) {
      for (std::size_t j = 0; j < s.sum.size(); ++j) {
        const std::size_t k = permutation_.empty() ? j : static_cast<std::size_t>(permutation_[j]);
        store(row[k], diagonal_.empty() ? s.sum[j] : s.sum[j] * diagonal_[k]);
      }
    });
  }
}

}  // namespace engine
