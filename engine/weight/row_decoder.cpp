#include "engine/weight/row_decoder.h"

#include <span>

#include "formats/bits.h"

namespace engine {

struct RowDecoder::Scratch {
  std::vector<float> sum;
  std::vector<std::uint8_t> covered;  // the sum has begun
  std::vector<std::int32_t> columns;  // supported by the current term, in order
  std::vector<std::uint8_t> codes;    // of the row's slots
  std::vector<float> scales, mus;     // of the row's units
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

void store_row(View out, std::int64_t r, std::int64_t c, float value) {
  const std::int64_t at = r * out.stride + c;
  switch (out.dtype) {
    case DType::f32:
      return store(out.host<float>()[at], value);
    case DType::f16:
      return store(out.host<f16>()[at], value);
    case DType::bf16:
      return store(out.host<bf16>()[at], value);
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
  s.columns.clear();
  for (std::int64_t c = 0; c < w_.cols; ++c) {
    if (plan.mask.test(r, c)) s.columns.push_back(static_cast<std::int32_t>(c));
  }
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
  const std::int64_t grid_row = t.grid.kind == GridKind::tensor ? 0 : r;
  read_floats(w_.plane(t.grid.scale_plane), grid_row, s.scales);
  const auto unit = [&](std::size_t c) {
    return plan.unit.empty() ? std::size_t{0} : static_cast<std::size_t>(plan.unit[c]);
  };
  const DType product = t.grid.product;
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
        const auto difference = static_cast<float>(s.codes[slot] - s.zeros[u]);
        return round_to(product, s.scales[u] * round_to(product, difference));
      });
    case TermKind::codebook:
      return add([&](std::size_t slot, std::size_t c) {
        return round_to(product, s.scales[unit(c)] * plan.book[s.codes[slot]]);
      });
    case TermKind::sign:
      if (t.mu_plane >= 0) read_floats(w_.plane(t.mu_plane), grid_row, s.mus);
      return add([&](std::size_t slot, std::size_t c) {
        const std::size_t u = unit(c);
        const float value = s.codes[slot] == 1 ? s.scales[u] : -s.scales[u];
        return round_to(product, t.mu_plane >= 0 ? s.mus[u] + value : value);
      });
    case TermKind::dense:
      break;
  }
  throw Error(ErrorCode::internal, "unknown term kind");
}

void RowDecoder::decode(std::int64_t first, View out) const {
  REQUIRE(first >= 0 && first + out.rows <= w_.rows && out.cols == w_.cols,
          "RowDecoder: out is " + out.shape());
  Scratch s(w_.cols);
  for (std::int64_t r = 0; r < out.rows; ++r) {
    s.sum.assign(s.sum.size(), 0.0F);
    s.covered.assign(s.covered.size(), 0);
    for (const TermPlan& plan : terms_) add_term(plan, first + r, s);
    for (std::size_t j = 0; j < s.sum.size(); ++j) {
      const std::size_t k = permutation_.empty() ? j : static_cast<std::size_t>(permutation_[j]);
      const float value = diagonal_.empty() ? s.sum[j] : s.sum[j] * diagonal_[k];
      store_row(out, r, static_cast<std::int64_t>(k), value);
    }
  }
}

}  // namespace engine
