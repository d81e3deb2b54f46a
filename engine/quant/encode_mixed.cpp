#include "engine/quant/encode_mixed.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "engine/weight/codec.h"

namespace engine {
namespace {

class Encoder {
 public:
  Encoder(GroupPass& pass, const MixedCodes& codes) : pass_(pass), c_(codes) {}

  SiteResult run() {
    const std::int64_t rows = c_.codes.rows, cols = c_.codes.cols;
    r_.weight.rows = rows;
    r_.weight.cols = cols;
    const Arena::Scope scope(pass_.arena);
    compact_ = pass_.arena.make(MemTag::solver, DType::u8, 1, rows * cols);
    packed_ = pass_.arena.make(MemTag::solver, DType::u8, 1, rows * cols);
    if (!pass_.dry()) {
      std::int64_t bytes = 0;
      for (const auto& [bits, groups] : widths()) bytes += rows * row_bytes(bits, groups);
      r_.codes = Buffer(host_memory(), pass_.ledger, MemTag::staging, DType::u8, 1, bytes);
    }
    for (const auto& [bits, groups] : widths()) {
      Term term;
      term.bits = bits;
      term.kind = bits == 1 ? TermKind::sign : TermKind::affine;
      term.grid.kind = GridKind::group;
      term.grid.group = c_.group;
      // Roles name the planes in the file and must differ.
      suffix_ = everywhere(groups) ? "" : std::to_string(bits);
      add_support(term, groups);
      term.codes_plane = add_codes(bits, groups);
      if (bits == 1) {
        add_sign_grid(term, groups);
      } else {
        add_affine_grid(term.grid);
      }
      r_.weight.terms.push_back(term);
    }
    return std::move(r_);
  }

 private:
  using Groups = std::vector<std::int64_t>;

  // The groups of each width that occurs, narrow ones first.
  [[nodiscard]] std::vector<std::pair<int, Groups>> widths() const {
    std::vector<std::pair<int, Groups>> out;
    for (int bits = 1; bits <= 8; ++bits) {
      Groups groups;
      for (std::size_t g = 0; g < c_.bits.size(); ++g) {
        if (c_.bits[g] == bits) groups.push_back(static_cast<std::int64_t>(g));
      }
      if (!groups.empty()) out.emplace_back(bits, std::move(groups));
    }
    return out;
  }

  [[nodiscard]] std::int64_t columns(const Groups& groups) const {
    return static_cast<std::int64_t>(groups.size()) * c_.group;
  }
  [[nodiscard]] std::int64_t row_bytes(int bits, const Groups& groups) const {
    return static_cast<std::int64_t>(
        packed_row_bytes(static_cast<std::uint64_t>(columns(groups)), static_cast<unsigned>(bits)));
  }
  [[nodiscard]] bool everywhere(const Groups& groups) const {
    return groups.size() == c_.bits.size();
  }

  int describe(const std::string& role, DType dtype, int bits, std::int64_t rows,
               std::int64_t cols) {
    r_.weight.planes.push_back(
        {.role = role, .dtype = dtype, .bits = bits, .rows = rows, .cols = cols, .data = {}});
    return static_cast<int>(r_.weight.planes.size()) - 1;
  }

  int add(OwnedPlane owned) {
    r_.small.push_back(std::move(owned.bytes));
    r_.weight.planes.push_back(std::move(owned.plane));
    return static_cast<int>(r_.weight.planes.size()) - 1;
  }

  void add_support(Term& term, const Groups& groups) {
    if (everywhere(groups)) return;
    std::vector<std::int32_t> ids;
    for (const std::int64_t g : groups) {
      for (std::int64_t j = 0; j < c_.group; ++j) {
        ids.push_back(static_cast<std::int32_t>(g * c_.group + j));
      }
    }
    term.support.columns = Select::in;
    term.support.columns_plane = add(indices_plane(ids, "columns" + suffix_));
    term.support.compact = true;
  }

  int add_codes(int bits, const Groups& groups) {
    const std::int64_t rows = c_.codes.rows, cols = columns(groups);
    const int index = describe("codes" + suffix_, DType::u8, bits, rows, cols);
    if (pass_.dry()) return index;
    const View compact = compact_.col_range(0, rows * cols).reshape(rows, cols);
    for (std::size_t k = 0; k < groups.size(); ++k) {
      pass_.ops.copy(c_.codes.col_range(groups[k] * c_.group, c_.group),
                     compact.col_range(static_cast<std::int64_t>(k) * c_.group, c_.group));
    }
    const std::int64_t bytes = row_bytes(bits, groups);
    const View packed = packed_.col_range(0, rows * bytes).reshape(rows, bytes);
    pass_.ops.pack_codes(compact, bits, packed);
    const View host = r_.codes.view().col_range(written_, rows * bytes);
    written_ += rows * bytes;
    pass_.ops.download(packed, host.reshape(rows, bytes));
    r_.weight.planes[static_cast<std::size_t>(index)].data =
        make_view(host.data, DType::u8, DeviceKind::cpu, 1, rows * bytes);
    return index;
  }

  // The plane of all affine terms; slots of 1-bit groups mean nothing and hold 0.
  void add_affine_grid(Grid& grid) {
    if (scales_ < 0) {
      const std::int64_t rows = c_.scales.rows, groups = c_.scales.cols;
      const int zero_bits = *std::max_element(c_.bits.begin(), c_.bits.end());
      if (pass_.dry()) {
        scales_ = describe("scales", c_.scale_dtype, 0, rows, groups);
        zeros_ = describe("zeros", DType::u8, zero_bits, rows, groups);
      } else {
        std::vector<float> scales = to_host<float>(c_.scales);
        std::vector<std::int32_t> zeros = to_host<std::int32_t>(c_.zeros);
        for (std::size_t i = 0; i < scales.size(); ++i) {
          if (c_.bits[i % c_.bits.size()] != 1) continue;
          scales[i] = 0.0F;
          zeros[i] = 0;
        }
        scales_ = add(scales_plane(host_view(scales.data(), rows, groups), c_.scale_dtype));
        zeros_ = add(pack_zeros(host_view(zeros.data(), rows, groups), zero_bits));
      }
    }
    grid.scale_plane = scales_;
    grid.zero_plane = zeros_;
  }

  // Coefficients of the 1-bit groups only, found through a plane of column groups.
  void add_sign_grid(Term& term, const Groups& groups) {
    term.grid.scale_plane = add_columns("scales" + suffix_, c_.scales, groups);
    term.mu_plane = add_columns("mu" + suffix_, c_.means, groups);
    if (everywhere(groups)) return;
    std::vector<std::int32_t> rank(static_cast<std::size_t>(c_.codes.cols), 0);
    for (std::size_t k = 0; k < groups.size(); ++k) {
      std::fill_n(rank.begin() + groups[k] * c_.group, c_.group, static_cast<std::int32_t>(k));
    }
    term.grid.column_group_plane = add(indices_plane(rank, "column_groups"));
  }

  int add_columns(const std::string& role, const View& values, const Groups& groups) {
    const auto n = static_cast<std::int64_t>(groups.size());
    if (pass_.dry()) return describe(role, c_.scale_dtype, 0, values.rows, n);
    const std::vector<float> all = to_host<float>(values);
    std::vector<float> some;
    for (std::int64_t r = 0; r < values.rows; ++r) {
      for (const std::int64_t g : groups) {
        some.push_back(all[static_cast<std::size_t>(r * values.cols + g)]);
      }
    }
    return add(floats_plane(host_view(some.data(), values.rows, n), c_.scale_dtype, role));
  }

  template <class T>
  std::vector<T> to_host(const View& device) {
    std::vector<T> host(static_cast<std::size_t>(device.count()));
    pass_.ops.download(device, host_view(host.data(), device.rows, device.cols));
    return host;
  }

  GroupPass& pass_;
  const MixedCodes& c_;
  SiteResult r_;
  View compact_;  // the codes of one width, side by side
  View packed_;
  std::string suffix_;
  std::int64_t written_ = 0;  // bytes of r_.codes in use
  int scales_ = -1;
  int zeros_ = -1;
};

}  // namespace

SiteResult encode_mixed(GroupPass& pass, const MixedCodes& codes) {
  REQUIRE(static_cast<std::int64_t>(codes.bits.size()) * codes.group == codes.codes.cols,
          "a width for each group of " + codes.codes.shape());
  return Encoder(pass, codes).run();
}

}  // namespace engine
