// Parity of the fused ops: against the CPU, and on the same device against the composition of plain
// ops that defines them.
#include <optional>

#include "tests/parity/packed_operands.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// ---- linears of several kinds ----

enum class Mix { dense, four, three, eight, codebook, binary2, permuted, different };
const Mix all_mixes[] = {Mix::dense,    Mix::four,    Mix::three,    Mix::eight,
                         Mix::codebook, Mix::binary2, Mix::permuted, Mix::different};
const char* mix_name(Mix mix) {
  const char* names[] = {"dense",    "affine4", "affine3",  "affine8",
                         "codebook", "binary2", "permuted", "different"};
  return names[static_cast<int>(mix)];
}

// One linear of a case: always five operands, of which some are absent.
class LinearOperands {
 public:
  // `index` counts the linears of a fused op.
  LinearOperands(Mix mix, int index, std::int64_t rows, std::int64_t cols, DType dtype,
                 std::uint64_t seed)
      : rows_(rows) {
    const auto affine = [&](int bits, std::int64_t group, DType scales, bool zeros) {
      return packed_shape(rows, cols, PackedKind::affine, bits, group, scales, zeros);
    };
    switch (mix) {
      case Mix::dense:
        break;
      case Mix::four:
        packed_.emplace(affine(4, 128, DType::f16, true), false, seed);
        break;
      case Mix::three:
        packed_.emplace(affine(3, 64, DType::bf16, true), false, seed);
        break;
      case Mix::eight:
        packed_.emplace(affine(8, 0, DType::f32, false), false, seed);
        break;
      case Mix::codebook:
        packed_.emplace(packed_shape(rows, cols, PackedKind::codebook, 4, 64, DType::f16, false),
                        false, seed);
        break;
      case Mix::binary2:
        packed_.emplace(packed_shape(rows, cols, PackedKind::binary2, 2, 128, DType::f16, true),
                        false, seed);
        break;
      case Mix::permuted:
        packed_.emplace(affine(4, 128, DType::f16, true), true, seed);
        break;
      case Mix::different:  // one of each: nothing to share
        if (index == 0) packed_.emplace(affine(4, 32, DType::f16, true), false, seed);
        if (index == 1) packed_.emplace(affine(6, 256, DType::f32, true), true, seed);
        break;
    }
    if (!packed_) dense_ = Operand(Role::input, dtype, rows, cols).bell(seed, 0.05);
  }

  static constexpr std::size_t operands = 5;
  void append_to(std::vector<const Operand*>& list) const {
    list.push_back(&dense_);
    if (packed_) return packed_->append_to(list);
    list.insert(list.end(), 4, &absent_);
  }
  [[nodiscard]] Linear linear(const std::vector<View>& views, std::size_t first) const {
    Linear out;
    out.dense = views.at(first);
    if (packed_) out.packed = packed_->weight(views, first + 1);
    return out;
  }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] bool is_packed() const { return packed_.has_value(); }
  [[nodiscard]] DecodedWeight decoded() const {
    return packed_ ? packed_->decoded() : DecodedWeight(dense_);
  }
  [[nodiscard]] std::int64_t workspace_bytes(const Ops& ops, std::int64_t rows, DType dtype) const {
    if (!packed_) return 0;
    return ops.packed_workspace_bytes(packed_->shape, rows, dtype, PackedKernel::automatic);
  }

 private:
  std::int64_t rows_;
  Operand dense_;
  Operand absent_;
  std::optional<PackedOperands> packed_;
};

// The linears of views from `first` on; those with a permutation share the first one's, as those of
// a model that read the same input do.
std::vector<Linear> linears_of(const std::vector<LinearOperands>& all, const std::vector<View>& v,
                               std::size_t first, Mix mix) {
  std::vector<Linear> out;
  for (const LinearOperands& w : all) {
    out.push_back(w.linear(v, first + out.size() * LinearOperands::operands));
    if (mix == Mix::permuted) out.back().packed.permutation = out[0].packed.permutation;
  }
  return out;
}

// Memory for the intermediate results of a composition; poisoned.
class Memory {
 public:
  Memory(Ops& ops, DType dtype, std::int64_t rows, std::int64_t cols)
      : scratch_(ops, rows * cols * static_cast<std::int64_t>(dtype_bytes(dtype))),
        view_(make_view(scratch_.view().data, dtype, ops.kind(), rows, cols)) {}
  [[nodiscard]] const View& view() const { return view_; }

 private:
  Scratch scratch_;
  View view_;
};

Scratch workspace_for(Ops& ops, const std::vector<LinearOperands>& linears, std::int64_t rows,
                      DType dtype) {
  std::int64_t bytes = 0;
  for (const LinearOperands& w : linears) {
    bytes = std::max(bytes, w.workspace_bytes(ops, rows, dtype));
  }
  return {ops, bytes};
}

// ---- the products by the definition ----

constexpr float eps = 1e-5F;

// x normalized: the two roundings of rmsnorm.
std::vector<double> normalized(const Operand& x, const Operand& norm) {
  std::vector<double> out;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    double sum = 0.0;
    for (std::int64_t c = 0; c < x.cols(); ++c) sum += x.get(r, c) * x.get(r, c);
    const double scale =
        1.0 / std::sqrt(sum / static_cast<double>(x.cols()) + static_cast<double>(eps));
    for (std::int64_t c = 0; c < x.cols(); ++c) {
      const float inner = round_to(x.dtype(), static_cast<float>(x.get(r, c) * scale));
      const float weighed = inner * static_cast<float>(norm.get(0, c));
      out.push_back(static_cast<double>(round_to(x.dtype(), weighed)));
    }
  }
  return out;
}

// w(h) of each element, and by how much two evaluations may differ before they are stored.
struct Products {
  std::int64_t cols = 0;
  std::vector<double> value, error;
  [[nodiscard]] std::size_t at(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(r * cols + c);
  }
};

// A normalized value comes from sums in different orders, so a few of a row's may end up one step
// apart in either rounding; four are allowed for, the largest by the largest weight.
Products products(const std::vector<double>& h, std::int64_t rows, const LinearOperands& w,
                  DType dtype) {
  const std::int64_t k = static_cast<std::int64_t>(h.size()) / rows;
  const DecodedWeight weights = w.decoded();
  const std::vector<WeightRow> ws = weight_rows(weights);
  Products out;
  out.cols = w.rows();
  for (std::int64_t r = 0; r < rows; ++r) {
    const double* row = h.data() + r * k;
    double squares = 0.0, largest = 0.0;
    for (std::int64_t i = 0; i < k; ++i) {
      squares += row[i] * row[i];
      largest = std::max(largest, std::abs(row[i]));
    }
    for (std::int64_t c = 0; c < w.rows(); ++c) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < k; ++i) {
        sum += row[i] * static_cast<double>(weights.value[static_cast<std::size_t>(c * k + i)]);
      }
      const WeightRow& weight = ws[static_cast<std::size_t>(c)];
      out.value.push_back(sum);
      out.error.push_back(product_tolerance(k, std::sqrt(squares), weight, w.is_packed(), dtype) +
                          4.0 * 4.5 * roundoff(dtype) * largest * weight.largest);
    }
  }
  return out;
}

// Fused against the CPU, and against its composition on the same device, which on the CPU is the
// same.
void expect_fused(const Outcome& o, std::size_t fused, std::size_t composed,
                  const std::vector<double>& each) {
  expect_close(o, fused, {0.0, 0.0, each});
  const Comparison c =
      compare_close(o.actual.at(fused).values(), o.actual.at(composed).values(), {0.0, 0.0, each});
  EXPECT_TRUE(c.ok) << "operand " << fused << " against the composition: " << c.message;
  EXPECT_EQ(o.expected.at(fused).element_bytes(), o.expected.at(composed).element_bytes());
}

// ---- the cases ----

struct FusedCase {
  Mix mix = Mix::dense;
  bool large = false;  // head_dim 128
  std::int64_t batch = 1;
  DType dtype = DType::bf16;
  bool quantized = false;  // the cache; norm_linear: f32 output
  std::int64_t position = 0;
  [[nodiscard]] std::int64_t hidden() const { return large ? 512 : 256; }
  [[nodiscard]] AttnShape heads() const {
    return large ? AttnShape{4, 2, 128} : AttnShape{8, 2, 32};
  }
  [[nodiscard]] std::int64_t intermediate() const { return large ? 640 : 400; }
  [[nodiscard]] std::string name() const {
    return std::string(mix_name(mix)) + (large ? "_dim128" : "_dim32") + "_batch" +
           std::to_string(batch) + "_" + dtype_name(dtype) + (quantized ? "_8bit" : "_plain") +
           "_at" + std::to_string(position);
  }
};

constexpr std::int64_t capacity = 12;

std::vector<FusedCase> fused_cases() {
  std::vector<FusedCase> cases;
  const std::int64_t positions[] = {0, 5, capacity - 1};
  std::size_t turn = 0;
  for (const Mix mix : all_mixes) {
    for (const bool large : {false, true}) {
      turn += 1;
      for (const std::int64_t batch : {1, 3, 8, 16, 20}) {
        if (large && (batch == 3 || batch == 20)) continue;
        // Five batches, two kinds of cache, two dtypes, three positions: over the mixes each meets
        // each.
        cases.push_back({mix, large, batch, turn / 2 % 2 == 0 ? DType::bf16 : DType::f16,
                         turn % 2 == 1, positions[turn % 3]});
        turn += 1;
      }
    }
  }
  return cases;
}

class Fused : public ::testing::TestWithParam<FusedCase> {
 protected:
  void SetUp() override {
    const FusedCase& p = GetParam();
    seed_ = seed_of(p.name());
    x_ = Operand(Role::input, p.dtype, p.batch, p.hidden(), Layout::wide).bell(seed_, 2.0);
    norm_ = Operand(Role::input, p.dtype, 1, p.hidden());
    norm_.fill([&](std::int64_t, std::int64_t c) {
      return 0.5 + uniform_value(seed_, 3, static_cast<std::uint64_t>(c));
    });
  }
  [[nodiscard]] LinearOperands linear(int index, std::int64_t rows) const {
    return {GetParam().mix,
            index,
            rows,
            GetParam().hidden(),
            GetParam().dtype,
            seed_ / 3 + static_cast<std::uint64_t>(index)};
  }

  std::uint64_t seed_ = 0;
  Operand x_, norm_;
};
INSTANTIATE_TEST_SUITE_P(Packed, Fused, ::testing::ValuesIn(fused_cases()), case_name<FusedCase>);

// The rows of a cache as they are read, and what their tolerance gains from being codes.
struct CacheRows {
  std::vector<double> value, step;
};

CacheRows cache_rows(const Operand& cache, const Operand& scales, std::int64_t head_dim) {
  CacheRows out;
  for (std::int64_t r = 0; r < cache.rows(); ++r) {
    for (std::int64_t c = 0; c < cache.cols(); ++c) {
      const double scale = scales.rows() == 0 ? 0.0 : scales.get(r, c / head_dim);
      const double v = cache.get(r, c);
      out.value.push_back(scales.rows() == 0 ? v : scale * (v - 128.0));
      out.step.push_back(scale);
    }
  }
  return out;
}

// `errors`: of the rows that were appended, [batch, kv_dim]. Every other row is as it was. A code
// is within half a step of what it stands for on each side.
void check_cache(const Outcome& o, std::size_t fused, std::size_t composed, std::size_t scales,
                 std::size_t composed_scales, const Operand& before, const Operand& scales_before,
                 const FusedCase& p, const std::vector<double>& errors) {
  const std::int64_t head_dim = p.heads().head_dim;
  const CacheRows old = cache_rows(before, scales_before, head_dim);
  const CacheRows reference = cache_rows(o.expected[fused], o.expected[scales], head_dim);
  std::vector<double> each(old.value.size(), 0.0);
  const std::int64_t cols = before.cols();
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t c = 0; c < cols; ++c) {
      const auto at = static_cast<std::size_t>((b * capacity + p.position) * cols + c);
      const double error = errors[static_cast<std::size_t>(b * cols + c)];
      each[at] = p.quantized ? 1.5 * error + 1.01 * reference.step[at] : error;
    }
  }
  const auto expect_rows = [&](const Operand& cache, const Operand& scale, const char* what) {
    const CacheRows found = cache_rows(cache, scale, head_dim);
    const Comparison c = compare_close(found.value, reference.value, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << what << ": operand " << fused << ": " << c.message;
    for (std::size_t i = 0; i < each.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i) / cols;
      if (row % capacity != p.position) {
        ASSERT_EQ(found.value[i], old.value[i]) << what << ": another token changed: row " << row;
      }
    }
  };
  expect_rows(o.actual[fused], o.actual[scales], "fused");
  expect_rows(o.actual[composed], o.actual[composed_scales], "composed");
  if (sides().same_backend) {
    expect_exact(o, fused);
    EXPECT_EQ(o.actual[fused].element_bytes(), o.actual[composed].element_bytes());
  }
}

TEST_P(Fused, QkvStep) {
  const FusedCase& p = GetParam();
  const AttnShape heads = p.heads();
  const std::int64_t hd = heads.head_dim;
  const std::int64_t q_dim = heads.heads * hd, kv_dim = heads.kv_heads * hd;
  const std::vector<LinearOperands> linears = {linear(0, q_dim), linear(1, kv_dim),
                                               linear(2, kv_dim)};
  const auto angle = [&](std::int64_t at, std::int64_t j) {
    return static_cast<double>(at) *
           std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(hd));
  };
  Operand cos(Role::input, DType::f32, capacity, hd / 2);
  Operand sin(Role::input, DType::f32, capacity, hd / 2);
  cos.fill([&](std::int64_t at, std::int64_t j) { return std::cos(angle(at, j)); });
  sin.fill([&](std::int64_t at, std::int64_t j) { return std::sin(angle(at, j)); });
  Operand position(Role::input, DType::i32, 1, 1);
  position.put(0, 0, static_cast<double>(p.position));
  // Caches full of earlier tokens, one for the fused op and one for the composition.
  const DType stored = p.quantized ? DType::u8 : p.dtype;
  Operand cache(Role::inout, stored, p.batch * capacity, kv_dim);
  if (p.quantized) {
    cache.uniform(seed_ / 5, 256);
  } else {
    cache.bell(seed_ / 5);
  }
  Operand scales(Role::inout, DType::f32, p.quantized ? p.batch * capacity : 0, heads.kv_heads);
  scales.fill([](std::int64_t r, std::int64_t c) {
    return 0.01 * static_cast<double>(1 + (r + 3 * c) % 7);
  });
  const Operand q_out(Role::output, p.dtype, p.batch, q_dim, Layout::wide);

  // 5..9 and 10..14: q_out, k, v, scales of k and of v.
  std::vector<const Operand*> operands = {&x_, &norm_, &cos, &sin, &position};
  for (int i = 0; i < 2; ++i) {
    operands.insert(operands.end(), {&q_out, &cache, &cache, &scales, &scales});
  }
  for (const LinearOperands& w : linears) w.append_to(operands);
  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    const std::vector<Linear> w = linears_of(linears, v, 15, p.mix);
    const Memory h(ops, p.dtype, p.batch, p.hidden()), k(ops, p.dtype, p.batch, kv_dim),
        values(ops, p.dtype, p.batch, kv_dim);
    const Scratch workspace = workspace_for(ops, linears, p.batch, p.dtype);
    QkvStep s;
    s.x = v[0];
    s.norm = v[1];
    s.eps = eps;
    s.q = &w[0];
    s.k = &w[1];
    s.v = &w[2];
    s.head_dim = hd;
    s.cos = v[2];
    s.sin = v[3];
    s.position = v[4];
    s.scratch = {h.view(), k.view(), values.view(), {}, workspace.view()};
    const auto use = [&](std::size_t first) {
      s.q_out = v[first];
      s.cache = {v[first + 1], v[first + 2], v[first + 3], v[first + 4], p.batch, capacity};
    };
    use(5);
    ops.qkv_step(s);
    use(10);
    ops.Ops::qkv_step(s);
    ops.synchronize();
  });

  const std::vector<double> hs = normalized(x_, norm_);
  // Stored once before the rotation. Two products of a pair are rounded, then their sum.
  const auto rotated = [&](const LinearOperands& w) {
    const Products product = products(hs, p.batch, w, p.dtype);
    std::vector<double> each;
    for (std::int64_t r = 0; r < p.batch; ++r) {
      for (std::int64_t c = 0; c < w.rows(); ++c) {
        const std::int64_t other = c % hd < hd / 2 ? c + hd / 2 : c - hd / 2;
        const std::size_t a = product.at(r, c), b = product.at(r, other);
        const double length = std::hypot(product.value[a], product.value[b]);
        each.push_back(product.error[a] + product.error[b] +
                       6.0 * store_tolerance(p.dtype, length));
      }
    }
    return each;
  };
  expect_fused(o, 5, 10, rotated(linears[0]));
  check_cache(o, 6, 11, 8, 13, cache, scales, p, rotated(linears[1]));
  const Products v = products(hs, p.batch, linears[2], p.dtype);
  std::vector<double> each;
  for (std::size_t i = 0; i < v.value.size(); ++i) {
    each.push_back(v.error[i] + store_tolerance(p.dtype, std::abs(v.value[i])));
  }
  check_cache(o, 7, 12, 9, 14, cache, scales, p, each);
}

TEST_P(Fused, GateUp) {
  const FusedCase& p = GetParam();
  const std::vector<LinearOperands> linears = {linear(0, p.intermediate()),
                                               linear(1, p.intermediate())};
  const Operand out(Role::output, p.dtype, p.batch, p.intermediate(), Layout::wide);
  std::vector<const Operand*> operands = {&x_, &norm_, &out, &out};
  for (const LinearOperands& w : linears) w.append_to(operands);
  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    const std::vector<Linear> w = linears_of(linears, v, 4, p.mix);
    const Memory h(ops, p.dtype, p.batch, p.hidden()), u(ops, p.dtype, p.batch, p.intermediate());
    const Scratch workspace = workspace_for(ops, linears, p.batch, p.dtype);
    GateUp s;
    s.x = v[0];
    s.norm = v[1];
    s.eps = eps;
    s.gate = &w[0];
    s.up = &w[1];
    s.scratch = {h.view(), {}, {}, u.view(), workspace.view()};
    s.out = v[2];
    ops.gate_up(s);
    s.out = v[3];
    ops.Ops::gate_up(s);
    ops.synchronize();
  });
  const std::vector<double> hs = normalized(x_, norm_);
  const Products gate = products(hs, p.batch, linears[0], p.dtype);
  const Products up = products(hs, p.batch, linears[1], p.dtype);
  std::vector<double> exact, each;
  for (std::size_t i = 0; i < gate.value.size(); ++i) {
    const double g = gate.value[i], u = up.value[i];
    const double silu = g / (1.0 + std::exp(-g));
    // |silu'| is below 1.1. g, u and silu(g) are stored, then the product.
    const double g_error = 1.1 * (gate.error[i] + store_tolerance(p.dtype, std::abs(g))) +
                           store_tolerance(p.dtype, std::abs(silu)) +
                           16.0 * roundoff(DType::f32) * std::abs(silu);
    const double u_error = up.error[i] + store_tolerance(p.dtype, std::abs(u));
    exact.push_back(silu * u);
    each.push_back(g_error * (std::abs(u) + u_error) + std::abs(silu) * u_error +
                   store_tolerance(p.dtype, std::abs(silu * u)));
  }
  expect_fused(o, 2, 3, each);
  const Comparison c = compare_close(o.actual[2].values(), exact, {0.0, 0.0, each});
  EXPECT_TRUE(c.ok) << "against the definition: " << c.message;
}

TEST_P(Fused, NormLinear) {
  const FusedCase& p = GetParam();
  const std::vector<LinearOperands> linears = {linear(0, p.intermediate() + 1)};
  const DType to = p.quantized ? DType::f32 : p.dtype;
  const Operand out(Role::output, to, p.batch, p.intermediate() + 1, Layout::wide);
  std::vector<const Operand*> operands = {&x_, &norm_, &out, &out};
  linears[0].append_to(operands);
  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    const std::vector<Linear> w = linears_of(linears, v, 4, p.mix);
    const Memory h(ops, p.dtype, p.batch, p.hidden());
    const Scratch workspace = workspace_for(ops, linears, p.batch, p.dtype);
    NormLinear s;
    s.x = v[0];
    s.norm = v[1];
    s.eps = eps;
    s.w = w.data();
    s.scratch = {h.view(), {}, {}, {}, workspace.view()};
    s.out = v[2];
    ops.norm_linear(s);
    s.out = v[3];
    ops.Ops::norm_linear(s);
    ops.synchronize();
  });
  const Products product = products(normalized(x_, norm_), p.batch, linears[0], p.dtype);
  std::vector<double> each;
  for (std::size_t i = 0; i < product.value.size(); ++i) {
    each.push_back(product.error[i] + store_tolerance(to, std::abs(product.value[i])));
  }
  expect_fused(o, 2, 3, each);
  const Comparison c = compare_close(o.actual[2].values(), product.value, {0.0, 0.0, each});
  EXPECT_TRUE(c.ok) << "against the definition: " << c.message;
}

// ---- recordings ----

// Through a trace that times its ops: no mark may end up inside the recording.
TEST(Recordings, ReplayRunsWhatWasRecorded) {
  const Operand x = Operand(Role::input, DType::f32, 5, 96).bell(1);
  const Operand out(Role::output, DType::bf16, 5, 96);
  run_both({&x, &out}, [](Ops& ops, const std::vector<View>& v) {
    TraceOps trace(ops, true);
    const auto body = [&] { trace.convert(v[0], v[1]); };
    body();
    if (!trace.can_record()) {
      try {
        (void)trace.record(body);
        ADD_FAILURE() << "a backend that cannot record did";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::device);
      }
      EXPECT_EQ(trace.stats().at("record").calls, 0);
      return;
    }
    trace.synchronize();
    const auto bits = [&] {
      std::vector<bf16> host(5 * 96);
      trace.download(v[1], host_view(host.data(), 5, 96));
      std::vector<std::uint16_t> out;
      for (const bf16 h : host) out.push_back(h.bits);
      return out;
    };
    const auto converted = bits();
    trace.reset();
    const std::unique_ptr<Recording> recording = trace.record(body);
    EXPECT_EQ(trace.stats().at("record").calls, 1);
    EXPECT_EQ(trace.stats().at("convert").calls, 1);
    EXPECT_EQ(trace.stats().at("convert").ms, 0.0);
    trace.zero(v[1]);
    EXPECT_NE(bits(), converted) << "recording must not run";
    for (int i = 0; i < 2; ++i) {
      trace.replay(*recording);
      EXPECT_EQ(bits(), converted);
      trace.zero(v[1]);
    }
    EXPECT_EQ(trace.stats().at("replay").calls, 2);
    EXPECT_GT(trace.stats().at("replay").ms, 0.0);
    EXPECT_EQ(trace.stats().at("convert").calls, 1);
  });
}

}  // namespace
}  // namespace engine::test
