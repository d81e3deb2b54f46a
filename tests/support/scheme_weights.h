// Random weights of the schemes that scheme_layout.h lays out, as their methods store them.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "engine/core/rng.h"
#include "engine/weight/codec.h"
#include "engine/weight/scheme_layout.h"

namespace engine::test {

class SchemeWeights {
 public:
  SchemeWeights(std::int64_t rows, std::int64_t cols, DType dtype, std::uint64_t seed)
      : dtype_(dtype), seed_(seed) {
    out_.weight.rows = rows;
    out_.weight.cols = cols;
  }

  // A width for each 128 columns, 0 for signs; the affine ones share a plane of scales.
  OwnedLinear mixed(const std::vector<int>& widths) {
    const std::int64_t groups = std::ssize(widths);
    const bool affine = std::any_of(widths.begin(), widths.end(), [](int w) { return w != 0; });
    const int scales = affine ? floats("scales", groups, 0.01) : -1;
    const int zeros = affine ? codes("zeros", 4, groups) : -1;
    for (int width = 0; width <= 8; ++width) {
      std::vector<std::int32_t> ids, rank(static_cast<std::size_t>(cols()), 0);
      std::int32_t blocks = 0;
      for (std::int64_t b = 0; b < groups; ++b) {
        if (widths[static_cast<std::size_t>(b)] != width) continue;
        for (std::int64_t c = b * 128; c < b * 128 + 128; ++c) {
          ids.push_back(static_cast<std::int32_t>(c));
          rank[static_cast<std::size_t>(c)] = blocks;
        }
        ++blocks;
      }
      if (ids.empty()) continue;
      Term t;
      t.kind = width == 0 ? TermKind::sign : TermKind::affine;
      t.bits = std::max(width, 1);
      t.grid.kind = GridKind::group;
      t.grid.group = 128;
      const std::string suffix = std::to_string(width);
      if (std::ssize(ids) != cols()) {
        t.support.columns = Select::in;
        t.support.columns_plane = out_.add(indices_plane(ids, "columns" + suffix));
        t.support.compact = true;
      }
      t.codes_plane = codes("codes" + suffix, t.bits, std::ssize(ids));
      if (width == 0) {
        t.grid.scale_plane = floats("alpha", blocks, 0.05);
        t.mu_plane = floats("mu", blocks, 0.01);
        t.grid.column_group_plane = out_.add(indices_plane(rank, "column_groups"));
      } else {
        t.grid.scale_plane = scales;
        t.grid.zero_plane = zeros;
      }
      out_.weight.terms.push_back(t);
    }
    return std::move(out_);
  }

  // A share of the weights is salient; in the last third of the columns three times that.
  OwnedLinear salient(double share, std::int64_t group, int bits) {
    std::vector<std::uint8_t> on(static_cast<std::size_t>(rows() * cols()));
    for (std::size_t i = 0; i < on.size(); ++i) {
      const bool dense = static_cast<std::int64_t>(i) % cols() >= cols() * 2 / 3;
      on[i] = uniform_value(seed_, 90, i) < (dense ? 3 * share : share) ? 1 : 0;
    }
    REQUIRE(on.size() > 1, "room for both kinds");
    on.front() = 1;
    on.back() = 0;
    const auto high = static_cast<std::int64_t>(std::count(on.begin(), on.end(), 1));
    const int bitmap =
        out_.add(pack_codes_plane(host_view(on.data(), rows(), cols()), 1, "bitmap"));
    Term low, top;
    low.kind = TermKind::sign;
    low.bits = 1;
    low.grid.kind = group == 0 ? GridKind::row : GridKind::group;
    low.grid.group = group;
    const std::int64_t units = group == 0 ? 1 : (cols() + group - 1) / group;
    low.grid.scale_plane = floats("alpha", units, 0.05);
    low.mu_plane = floats("mu", units, 0.01);
    low.support = {.bitmap = Select::not_in, .bitmap_plane = bitmap, .compact = true};
    low.codes_plane = row_codes("signs", 1, rows() * cols() - high);
    top.kind = TermKind::affine;
    top.bits = bits;
    top.grid.kind = GridKind::row;
    top.grid.scale_plane = floats("salient_scales", 1, 0.004);
    top.grid.zero_plane = codes("salient_zeros", bits, 1);
    top.support = {.bitmap = Select::in, .bitmap_plane = bitmap, .compact = true};
    top.codes_plane = row_codes("salient_codes", bits, high);
    out_.weight.terms = {low, top};
    return std::move(out_);
  }

  // In every block of 128 columns some are salient, from one to all but one.
  OwnedLinear regions(bool means) {
    std::vector<std::int32_t> ids;
    std::vector<std::uint8_t> sparse(static_cast<std::size_t>(rows() * cols()));
    for (std::int64_t b = 0; b * 128 < cols(); ++b) {
      const double share = b % 5 == 4 ? 0.9 : 0.05 * static_cast<double>(b % 5 + 1);
      for (std::int64_t c = b * 128; c < std::min(b * 128 + 128, cols()); ++c) {
        const double u = uniform_value(seed_, 91, static_cast<std::uint64_t>(c));
        if (c == b * 128 + 7 || (u < share && c != b * 128)) {
          ids.push_back(static_cast<std::int32_t>(c));
        }
      }
    }
    for (std::size_t i = 0; i < sparse.size(); ++i) {
      sparse[i] = uniform_value(seed_, 92, i) < 0.2 ? 1 : 0;
    }
    const std::int64_t units = (cols() + 127) / 128;
    const int signs = codes("signs", 1, cols());
    const int bitmap =
        out_.add(pack_codes_plane(host_view(sparse.data(), rows(), cols()), 1, "sparse"));
    const int columns = out_.add(indices_plane(ids, "salient_columns"));
    const int residual = codes("residual_signs", 1, std::ssize(ids));
    const auto add = [&](int plane, const Support& support, const std::string& role) {
      Term t;
      t.kind = TermKind::sign;
      t.bits = 1;
      t.codes_plane = plane;
      t.grid.kind = GridKind::group;
      t.grid.group = 128;
      t.grid.scale_plane = floats(role + "_scales", units, 0.05);
      if (means) t.mu_plane = floats(role + "_means", units, 0.02);
      t.support = support;
      out_.weight.terms.push_back(t);
    };
    Support in, off;
    in.columns = Select::in;
    off.columns = Select::not_in;
    in.columns_plane = off.columns_plane = columns;
    add(signs, in, "salient");
    off.bitmap = Select::in;
    off.bitmap_plane = bitmap;
    add(signs, off, "sparse");
    off.bitmap = Select::not_in;
    add(signs, off, "concentrated");
    in.compact = true;
    add(residual, in, "residual");
    return std::move(out_);
  }

 private:
  [[nodiscard]] std::int64_t rows() const { return out_.weight.rows; }
  [[nodiscard]] std::int64_t cols() const { return out_.weight.cols; }

  int floats(const std::string& role, std::int64_t n, double size) {
    std::vector<float> values(static_cast<std::size_t>(rows() * n));
    const std::uint64_t stream = ++stream_;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double v = size * (0.5 + uniform_value(seed_, stream, i));
      values[i] = round_to(dtype_, static_cast<float>(i % 3 == 0 && role[0] == 'm' ? -v : v));
    }
    return out_.add(floats_plane(host_view(values.data(), rows(), n), dtype_, role));
  }
  int some_codes(const std::string& role, int bits, std::int64_t r, std::int64_t n) {
    std::vector<std::uint8_t> values(static_cast<std::size_t>(r * n));
    const std::uint64_t stream = ++stream_;
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<std::uint8_t>(uniform_value(seed_, stream, i) * (1 << bits));
    }
    return out_.add(pack_codes_plane(host_view(values.data(), r, n), bits, role));
  }
  int codes(const std::string& role, int bits, std::int64_t n) {
    return some_codes(role, bits, rows(), n);
  }
  int row_codes(const std::string& role, int bits, std::int64_t n) {
    return some_codes(role, bits, 1, n);
  }

  OwnedLinear out_;
  DType dtype_;
  std::uint64_t seed_, stream_ = 0;
};

// The bytes of PackedWeight::records, in pieces of a few row tiles.
inline std::vector<std::byte> scheme_records(const LinearWeight& w, const PackedShape& shape) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(scheme_bytes(shape)), std::byte{0xA5});
  prepare_scheme(w, shape, "w", bytes.data());
  for (std::int64_t t = shape.row_tiles(); t > 0; t -= 2) {
    build_scheme(w, shape, std::max<std::int64_t>(t - 2, 0), t, bytes.data());
  }
  return bytes;
}

}  // namespace engine::test
