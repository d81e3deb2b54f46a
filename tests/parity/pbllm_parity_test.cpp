// Parity of PB-LLM: the choice of salient weights, the sweep, and the compact codes there and back.
#include <algorithm>
#include <cmath>

#include "engine/weight/grid.h"
#include "formats/bits.h"
#include "tests/parity/parity_support.h"
#include "tests/parity/sweep_support.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

std::string share_name(double share) {
  return std::to_string(static_cast<int>(std::lround(share * 1000)));
}

// ---- pbllm_select ----

struct SelectCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::int64_t group = 0;
  double low_share = 0.9;
  PbllmMetric metric = PbllmMetric::hessian;
  bool ties = false;  // weights are multiples of 1/64: many equal ranks, and zeros
  DType factor = DType::f32;
  DType scale = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_g" + std::to_string(group) + "_low" +
           share_name(low_share) + (metric == PbllmMetric::hessian ? "_hessian" : "_magnitude") +
           (ties ? "_ties" : "") + "_" + dtype_name(factor) + "_s" + dtype_name(scale) + "_" +
           layout_name(layout);
  }
};

std::vector<SelectCase> select_cases() {
  std::vector<SelectCase> cases;
  const double shares[] = {0.9, 0.0, 0.857142, 0.5, 0.999};
  std::size_t turn = 0;
  const auto add = [&](std::int64_t rows, std::int64_t d, std::int64_t group) {
    cases.push_back({rows, d, group, shares[turn % 5],
                     turn % 4 == 3 || d > 4096 ? PbllmMetric::magnitude : PbllmMetric::hessian,
                     turn % 3 == 2, turn % 2 == 0 ? DType::f64 : DType::f32,
                     small_floats[turn % 7 % 3], all_layouts[turn / 2 % 3]});
    ++turn;
  };
  for (const std::int64_t rows : {1, 2, 5, 33, 200}) {
    for (const std::int64_t d : {1, 7, 131, 256, 1024, 1025}) add(rows, d, 0);
    for (const std::int64_t group : {1, 4, 16, 32, 64, 96, 128, 384}) add(rows, 768, group);
  }
  // Several blocks count for one group, and rows that a whole block averages.
  add(700, 2304, 0);
  add(3000, 256, 128);
  add(2, 14336, 0);
  add(5, 14336, 7168);
  add(6, 14336, 128);
  return cases;
}

class PbllmSelection : public ::testing::TestWithParam<SelectCase> {};
INSTANTIATE_TEST_SUITE_P(Pbllm, PbllmSelection, ::testing::ValuesIn(select_cases()),
                         case_name<SelectCase>);

Operand weights_of(Role role, std::int64_t rows, std::int64_t d, Layout layout, bool ties,
                   std::uint64_t seed) {
  Operand w = Operand(role, DType::f32, rows, d, layout).bell(seed, 0.05);
  if (!ties) return w;
  const Operand smooth = w;
  return w.fill(
      [&](std::int64_t r, std::int64_t j) { return std::round(smooth.get(r, j) * 64) / 64; });
}

PbllmSelect select_problem(const SelectCase& p) {
  PbllmSelect s;
  s.metric = p.metric;
  s.group = p.group;
  s.low_share = p.low_share;
  s.scale_dtype = p.scale;
  return s;
}

TEST_P(PbllmSelection, MasksAreExact) {
  const SelectCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t width = p.group == 0 ? p.d : p.group, groups = p.d / width;
  const Operand w = weights_of(Role::input, p.rows, p.d, p.layout, p.ties, seed);
  const std::int64_t factor_size = p.metric == PbllmMetric::hessian ? p.d : 0;
  Operand r(Role::input, p.factor, factor_size, factor_size, p.layout);
  r.fill([&](std::int64_t i, std::int64_t j) {
    return i == j ? 0.25 + 4.0 * uniform_value(seed, 3, at(i)) : (j > i ? 0.125 : 0.0);
  });
  const Operand salient(Role::output, DType::u8, p.rows, p.d, p.layout);
  const Operand means(Role::output, DType::f32, p.rows, groups, p.layout);
  const Operand scales(Role::output, DType::f32, p.rows, groups, p.layout);
  const Outcome o =
      run_both({&w, &r, &salient, &means, &scales}, [&](Ops& ops, const std::vector<View>& v) {
        const Scratch workspace(ops, ops.pbllm_select_bytes(p.rows, p.d, groups));
        PbllmSelect s = select_problem(p);
        s.w = v[0];
        s.r = v[1];
        s.salient = v[2];
        s.means = v[3];
        s.scales = v[4];
        s.workspace = workspace.view();
        ops.pbllm_select(s);
        ops.synchronize();
      });
  expect_exact(o, 2);

  // Masks by sorting, for the backend by itself.
  std::vector<float> ranks(at(p.rows * width));
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t row = 0; row < p.rows; ++row) {
      for (std::int64_t c = 0; c < width; ++c) {
        const std::int64_t j = g * width + c;
        const auto v = static_cast<float>(w.get(row, j));
        if (p.metric == PbllmMetric::magnitude) {
          ranks[at(row * width + c)] = std::fabs(v);
          continue;
        }
        const auto u = p.factor == DType::f64 ? static_cast<float>(1.0 / r.get(j, j))
                                              : 1.0F / static_cast<float>(r.get(j, j));
        ranks[at(row * width + c)] = v * v / (u * u);
      }
    }
    std::vector<float> sorted = ranks;
    const auto place = static_cast<std::int64_t>(static_cast<double>(p.rows * width) * p.low_share);
    std::nth_element(sorted.begin(), sorted.begin() + place, sorted.end());
    const float threshold = sorted[at(place)];
    for (std::int64_t row = 0; row < p.rows; ++row) {
      for (std::int64_t c = 0; c < width; ++c) {
        ASSERT_EQ(o.actual[2].get(row, g * width + c) != 0, ranks[at(row * width + c)] > threshold)
            << "row " << row << ", column " << g * width + c;
      }
    }
  }

  // Both sides sum in f64, in different orders: the sums differ by about 1e-16 of sum |w|, and
  // where one lies on the edge between two values of the stored type, by one of its steps. A mean
  // that does moves the distances from it as far.
  std::int64_t different = 0;
  for (std::int64_t row = 0; row < p.rows; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const double mean = o.expected[3].get(row, g), scale = o.expected[4].get(row, g);
      const double step = store_tolerance(p.scale, std::abs(mean)) + 1e-14;
      ASSERT_NEAR(o.actual[3].get(row, g), mean, step) << row << ", " << g;
      ASSERT_NEAR(o.actual[4].get(row, g), scale, step + store_tolerance(p.scale, scale))
          << row << ", " << g;
      const bool same = o.actual[3].get(row, g) == mean && o.actual[4].get(row, g) == scale;
      different += same ? 0 : 1;
    }
  }
  EXPECT_LE(different, 1 + p.rows * groups / 100);
  if (sides().same_backend) {
    expect_exact(o, 3);
    expect_exact(o, 4);
  }
}

// ---- pbllm_sweep ----

struct PbSweepCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::int64_t group = 0;
  std::int64_t block = 128;
  double low_share = 0.9;
  int high_bits = 8;
  bool compensate = true;
  DType factor = DType::f64;
  DType scale = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_g" + std::to_string(group) + "_blk" +
           std::to_string(block) + "_low" + share_name(low_share) + "_b" +
           std::to_string(high_bits) + (compensate ? "" : "_plain") + "_" + dtype_name(factor) +
           "_s" + dtype_name(scale) + "_" + layout_name(layout);
  }
};

std::vector<PbSweepCase> pb_sweep_cases() {
  std::vector<PbSweepCase> cases;
  const std::int64_t rows[] = {1, 2, 3, 4, 5, 17, 33, 129, 200};
  const double shares[] = {0.9, 0.857142, 0.5, 0.99};
  const int widths[] = {8, 8, 4, 2, 3};
  std::size_t turn = 0;
  const auto add = [&](std::int64_t d, std::int64_t group, std::int64_t block) {
    for (const bool compensate : {true, false}) {
      cases.push_back({rows[turn % 9], d, group, block, shares[turn % 4], widths[turn % 5],
                       compensate, turn % 2 == 0 ? DType::f64 : DType::f32,
                       turn % 5 < 3 ? DType::f32 : DType::f16, all_layouts[turn / 2 % 3]});
      ++turn;
    }
  };
  for (const std::int64_t d : {256, 384, 768}) {
    add(d, 0, 128);
    add(d, 128, 128);
    add(d, 64, 128);
    add(d, 32, 64);
    add(d, 4, 128);
  }
  add(768, 384, 128);
  add(768, 96, 96);
  // Widths that no block divides.
  add(131, 0, 128);
  add(300, 100, 50);
  add(7, 0, 3);
  cases.push_back({200, 768, 128, 128, 0.9, 8, true, DType::f64, DType::f32, Layout::tight});
  cases.push_back({129, 768, 0, 128, 0.9, 8, true, DType::f32, DType::f32, Layout::odd});
  return cases;
}

class PbllmSweeps : public ::testing::TestWithParam<PbSweepCase> {};
INSTANTIATE_TEST_SUITE_P(Pbllm, PbllmSweeps, ::testing::ValuesIn(pb_sweep_cases()),
                         case_name<PbSweepCase>);

// Sweep operands by position.
enum : std::size_t {
  pb_w,
  pb_r,
  pb_salient,
  pb_means,
  pb_scales,
  pb_high_scales,
  pb_high_zeros,
  pb_codes,
  pb_loss
};

// Mask and levels as the reference finds them, and the wide grids of whole rows.
void choose(const PbSweepCase& p, const GridSpec& high, Operand& w, Operand& r, Operand& salient,
            Operand& means, Operand& scales, Operand& high_scales, Operand& high_zeros) {
  Ops& ops = *sides().reference;
  const Scratch workspace(ops, ops.pbllm_select_bytes(p.rows, p.d, means.cols()));
  PbllmSelect s;
  s.group = p.group;
  s.low_share = p.low_share;
  s.scale_dtype = p.scale;
  s.w = w.host();
  s.r = r.host();
  s.salient = salient.host();
  s.means = means.host();
  s.scales = scales.host();
  s.workspace = workspace.view();
  ops.pbllm_select(s);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    std::vector<float> values;
    for (std::int64_t j = 0; j < p.d; ++j) values.push_back(static_cast<float>(w.get(row, j)));
    const UnitGrid grid = find_unit_grid(values, high);
    high_scales.put(row, 0, static_cast<double>(grid.scale));
    high_zeros.put(row, 0, static_cast<double>(grid.zero));
  }
}

class PbSweepCheck {
 public:
  PbSweepCheck(const PbSweepCase& p, const GridSpec& high, const Operand& w,
               const std::vector<double>& r)
      : p_(p), high_(high), w_(w), r_(r) {}

  // What holds for each side by itself.
  void own(const std::vector<Operand>& side, const char* name) const {
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      double plain = 0.0;
      for (std::int64_t j = 0; j < p_.d; ++j) {
        const double q = value(side, row, j), w = w_.get(row, j);
        // E = w^ - w, one subtraction.
        ASSERT_NEAR(side[pb_w].get(row, j), q - w,
                    2.0 * roundoff(DType::f32) * (std::abs(q) + std::abs(w)))
            << name << ": row " << row << ", column " << j;
        plain += std::pow((w - q) * r_[at(j * p_.d + j)], 2);
      }
      // With compensation the sum of the columns' errors is the objective of the row: an identity
      // of the method, whatever the codes. Without it the errors are those of the weights.
      const double objective = p_.compensate ? row_objective(side[pb_w], row, r_) : plain;
      ASSERT_NEAR(side[pb_loss].get(row, 0), objective, (p_.compensate ? 1e-3 : 1e-5) * objective)
          << name << ": row " << row;
    }
  }

  // Current weights agree to about 1e-7 of their size, so that one in a million lies between them
  // and the edge of two codes. Such a code may go either way, and since signs have no small errors,
  // much of the rest of its row follows. Rows do not influence each other.
  void both(const Outcome& o) const {
    const std::int64_t n = p_.rows * p_.d;
    const std::int64_t allowed = !p_.compensate ? 0 : p_.rows / 20 + (n >= 20000 ? 1 : 0);
    std::int64_t different = 0;
    double actual_loss = 0.0, expected_loss = 0.0;
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      const double loss = o.expected[pb_loss].get(row, 0);
      actual_loss += o.actual[pb_loss].get(row, 0);
      expected_loss += loss;
      bool same = true;
      for (std::int64_t j = 0; j < p_.d; ++j) {
        same = same && o.actual[pb_codes].get(row, j) == o.expected[pb_codes].get(row, j);
      }
      if (same) {
        ASSERT_NEAR(o.actual[pb_loss].get(row, 0), loss, 1e-4 * loss) << "loss of row " << row;
      } else {
        ++different;
      }
    }
    EXPECT_LE(different, allowed) << "rows with other codes";
    EXPECT_NEAR(actual_loss, expected_loss, 2e-2 * expected_loss) << "loss";
  }

 private:
  // What the code of a weight stands for.
  [[nodiscard]] double value(const std::vector<Operand>& side, std::int64_t row,
                             std::int64_t j) const {
    const auto code = static_cast<std::uint8_t>(side[pb_codes].get(row, j));
    if (side[pb_salient].get(row, j) != 0) {
      EXPECT_LE(code, high_.max_code());
      const UnitGrid grid{static_cast<float>(side[pb_high_scales].get(row, 0)),
                          static_cast<std::int32_t>(side[pb_high_zeros].get(row, 0))};
      return static_cast<double>(dequantize_value(code, grid, high_));
    }
    EXPECT_LE(code, 1);
    const std::int64_t unit = j / (p_.d / side[pb_means].cols());
    const auto mean = static_cast<float>(side[pb_means].get(row, unit));
    const auto scale = static_cast<float>(side[pb_scales].get(row, unit));
    return static_cast<double>(mean + (code != 0 ? scale : -scale));
  }

  const PbSweepCase& p_;
  const GridSpec& high_;
  const Operand& w_;
  const std::vector<double>& r_;
};

TEST_P(PbllmSweeps, AgreeUpToTiesOfRounding) {
  const PbSweepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  GridSpec high;
  high.bits = p.high_bits;
  high.group = 0;
  high.scale_dtype = p.scale;
  const std::int64_t groups = p.group == 0 ? 1 : p.d / p.group;

  Operand w = weights_of(Role::inout, p.rows, p.d, p.layout, false, seed);
  const std::vector<double> moment = factor_of_moment(p.d, seed);
  Operand r(Role::input, p.factor, p.d, p.d, p.layout);
  r.fill([&](std::int64_t i, std::int64_t j) { return moment[at(i * p.d + j)]; });
  Operand salient(Role::input, DType::u8, p.rows, p.d, p.layout);
  Operand means(Role::input, DType::f32, p.rows, groups, p.layout);
  Operand scales(Role::input, DType::f32, p.rows, groups, p.layout);
  Operand high_scales(Role::input, DType::f32, p.rows, 1, p.layout);
  Operand high_zeros(Role::input, DType::i32, p.rows, 1, p.layout);
  choose(p, high, w, r, salient, means, scales, high_scales, high_zeros);
  const Operand codes(Role::output, DType::u8, p.rows, p.d, p.layout);
  const Operand loss(Role::output, DType::f64, p.rows, 1, p.layout);

  const Outcome o = run_both(
      {&w, &r, &salient, &means, &scales, &high_scales, &high_zeros, &codes, &loss},
      [&](Ops& ops, const std::vector<View>& v) {
        const Scratch workspace(ops, ops.pbllm_workspace_bytes(p.rows, p.d, p.block, p.factor));
        PbllmProblem problem;
        problem.high = high;
        problem.block = p.block;
        problem.compensate = p.compensate;
        problem.w = v[pb_w];
        problem.r = v[pb_r];
        problem.salient = v[pb_salient];
        problem.means = v[pb_means];
        problem.scales = v[pb_scales];
        problem.high_scales = v[pb_high_scales];
        problem.high_zeros = v[pb_high_zeros];
        problem.codes = v[pb_codes];
        problem.loss = v[pb_loss];
        problem.workspace = workspace.view();
        ops.pbllm_sweep(problem);
        ops.synchronize();
      });
  const PbSweepCheck check(p, high, w, moment);
  check.own(o.expected, "reference");
  check.own(o.actual, "backend");
  check.both(o);
  if (sides().same_backend) {
    for (const std::size_t i : {pb_w, pb_codes, pb_loss}) expect_exact(o, i);
  }
}

// ---- pbllm_split, pbllm_decode ----

struct CodesCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::int64_t group = 0;
  double salient = 0.1;
  int bits = 8;
  bool means = true;
  DType out = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_g" + std::to_string(group) + "_p" +
           share_name(salient) + "_b" + std::to_string(bits) + (means ? "" : "_centred") + "_" +
           dtype_name(out) + "_" + layout_name(layout);
  }
};

std::vector<CodesCase> codes_cases() {
  std::vector<CodesCase> cases;
  const double shares[] = {0.1, 0.0, 0.5, 1.0, 0.9};
  std::size_t turn = 0;
  const auto add = [&](std::int64_t rows, std::int64_t d, std::int64_t group) {
    cases.push_back({rows, d, group, shares[turn % 5], static_cast<int>(turn % 8) + 1,
                     turn % 3 != 1, small_floats[turn % 7 % 3], all_layouts[turn / 2 % 3]});
    ++turn;
  };
  for (const std::int64_t rows : {1, 3, 17, 129}) {
    for (const std::int64_t d : {2, 7, 8, 64, 131, 1027, 2048, 2304}) add(rows, d, 0);
    for (const std::int64_t group : {1, 3, 4, 32, 96, 128}) add(rows, 768, group);
  }
  // Many tiles and passes over a row.
  add(3, 14336, 128);
  add(700, 2304, 128);
  add(3000, 33, 11);
  return cases;
}

class PbllmCodes : public ::testing::TestWithParam<CodesCase> {};
INSTANTIATE_TEST_SUITE_P(Pbllm, PbllmCodes, ::testing::ValuesIn(codes_cases()),
                         case_name<CodesCase>);

// At least one weight is salient and one is not.
Operand mask_of(const CodesCase& p, std::uint64_t seed) {
  Operand mask(Role::input, DType::u8, p.rows, p.d, p.layout);
  mask.fill([&](std::int64_t r, std::int64_t j) {
    return uniform_value(seed, 1, at(r * p.d + j)) < p.salient ? 1.0 : 0.0;
  });
  mask.put(0, 0, 1.0);
  mask.put(p.rows - 1, p.d - 1, 0.0);
  return mask;
}

TEST_P(PbllmCodes, SplitInOrder) {
  const CodesCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand mask = mask_of(p, seed);
  Operand codes(Role::input, DType::u8, p.rows, p.d, p.layout);
  codes.uniform(seed + 1, 256);
  const Operand out(Role::output, DType::u8, 1, p.rows * p.d);
  const Operand ones(Role::output, DType::i32, 1, 1);
  const Outcome o =
      run_both({&mask, &codes, &out, &ones}, [&](Ops& ops, const std::vector<View>& v) {
        const Scratch workspace(ops, ops.pbllm_split_bytes(p.rows, p.d));
        ops.pbllm_split(v[0], v[1], v[2], v[3], workspace.view());
        ops.synchronize();
      });
  expect_exact(o, 2);
  expect_exact(o, 3);
  std::vector<std::int64_t> low, high;
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      (mask.get(r, j) != 0 ? high : low).push_back(static_cast<std::int64_t>(codes.get(r, j)));
    }
  }
  EXPECT_EQ(o.actual[3].integers()[0], static_cast<std::int64_t>(high.size()));
  low.insert(low.end(), high.begin(), high.end());
  EXPECT_TRUE(compare_integers(o.actual[2].integers(), low).ok);
}

// Packed codes of one row as an operand.
Operand packed_operand(const std::vector<std::uint8_t>& codes, int bits) {
  std::vector<std::byte> bytes(
      static_cast<std::size_t>(packed_row_bytes(codes.size(), static_cast<unsigned>(bits))));
  pack_row(codes, static_cast<unsigned>(bits), bytes);
  Operand out(Role::input, DType::u8, 1, static_cast<std::int64_t>(bytes.size()));
  return out.fill([&](std::int64_t, std::int64_t c) { return std::to_integer<int>(bytes[at(c)]); });
}

TEST_P(PbllmCodes, DecodeExactly) {
  const CodesCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t width = p.group == 0 ? p.d : p.group, groups = p.d / width;
  const Operand mask = mask_of(p, seed);
  std::vector<std::uint8_t> low, high, code_of(at(p.rows * p.d));
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      const double u = uniform_value(seed, 2, at(r * p.d + j));
      const bool salient = mask.get(r, j) != 0;
      const auto code = static_cast<std::uint8_t>(u * (salient ? 1 << p.bits : 2));
      (salient ? high : low).push_back(code);
      code_of[at(r * p.d + j)] = code;
    }
  }
  Operand bitmap(Role::input, DType::u8, p.rows, (p.d + 7) / 8, p.layout);
  bitmap.fill([&](std::int64_t r, std::int64_t c) {
    int byte = 0;
    for (std::int64_t j = 8 * c; j < std::min(8 * c + 8, p.d); ++j) {
      if (mask.get(r, j) != 0) byte |= 1 << (j % 8);
    }
    return byte;
  });
  const Operand signs = packed_operand(low, 1), codes = packed_operand(high, p.bits);
  const Operand means =
      Operand(Role::input, DType::f32, p.means ? p.rows : 0, groups, p.layout).bell(seed + 3, 0.01);
  const Operand scales =
      Operand(Role::input, DType::f32, p.rows, groups, p.layout).bell(seed + 4, 0.05);
  const Operand high_scales =
      Operand(Role::input, DType::f32, p.rows, 1, p.layout).bell(seed + 5, 0.01);
  const Operand high_zeros =
      Operand(Role::input, DType::i32, p.rows, 1, p.layout).uniform(seed + 6, 256);
  const Operand out(Role::output, p.out, p.rows, p.d, p.layout);
  const Outcome o =
      run_both({&bitmap, &signs, &codes, &means, &scales, &high_scales, &high_zeros, &out},
               [&](Ops& ops, const std::vector<View>& v) {
                 const Scratch workspace(ops, pbllm_decode_bytes(p.rows));
                 PbllmDecode d;
                 d.high_bits = p.bits;
                 d.bitmap = v[0];
                 d.signs = v[1];
                 d.high = v[2];
                 d.means = v[3];
                 d.scales = v[4];
                 d.high_scales = v[5];
                 d.high_zeros = v[6];
                 d.out = v[7];
                 d.workspace = workspace.view();
                 ops.pbllm_decode(d);
                 ops.synchronize();
               });
  expect_exact(o, 7);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const auto high_scale = static_cast<float>(high_scales.get(r, 0));
    for (std::int64_t j = 0; j < p.d; ++j) {
      const auto code = static_cast<float>(code_of[at(r * p.d + j)]);
      float value = high_scale * (code - static_cast<float>(high_zeros.get(r, 0)));
      if (mask.get(r, j) == 0) {
        const auto scale = static_cast<float>(scales.get(r, j / width));
        value = code != 0 ? scale : -scale;
        if (p.means) value = static_cast<float>(means.get(r, j / width)) + value;
      }
      ASSERT_EQ(o.actual[7].get(r, j), static_cast<double>(round_to(p.out, value)))
          << r << ", " << j;
    }
  }
}

}  // namespace
}  // namespace engine::test
