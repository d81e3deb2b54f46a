// Ops::block_tail against the fused ops it is defined by, one after another on the same device.
// Kernels that put several products into one launch do the same arithmetic, so the results are the
// same to the bit.
#include <cmath>

#include "tests/parity/packed_operands.h"

namespace engine::test {
namespace {

struct TailCase {
  int bits = 4;
  std::int64_t group = 128;
  std::int64_t batch = 1;
  DType dtype = DType::bf16;
  bool dense = false, quantized_cache = false, last = false, permuted = false;
  // 4096 and more: several units for each block of threads, and some for only a part of them.
  std::int64_t hidden = 512, intermediate = 1280;
  [[nodiscard]] std::string name() const {
    return (dense ? std::string("dense")
                  : "b" + std::to_string(bits) + "g" + std::to_string(group)) +
           "_batch" + std::to_string(batch) + "_" + dtype_name(dtype) +
           (quantized_cache ? "_8bit" : "_plain") + (last ? "_last" : "") +
           (permuted ? "_permuted" : "") + "_" + std::to_string(hidden) + "x" +
           std::to_string(intermediate);
  }
};

std::vector<TailCase> tail_cases() {
  std::vector<TailCase> cases;
  for (const int bits : {2, 3, 4, 5, 8}) {
    for (const std::int64_t batch : {1, 4, 7, 12}) {
      cases.push_back({.bits = bits,
                       .group = bits % 2 == 0 ? 128 : 32,
                       .batch = batch,
                       .dtype = batch == 4 ? DType::f16 : DType::bf16,
                       .quantized_cache = bits == 3,
                       .last = bits == 8 && batch == 1});
    }
  }
  cases.push_back({.bits = 4, .group = 0, .batch = 2});
  cases.push_back({.bits = 4, .batch = 1, .hidden = 4096, .intermediate = 14336});
  cases.push_back({.bits = 2, .batch = 3, .hidden = 4096, .intermediate = 11008});
  cases.push_back({.batch = 1, .dense = true});
  // Columns that end within a record, row tiles that pair with nothing; permutations of their own.
  for (const int bits : {2, 4, 8}) {
    cases.push_back({.bits = bits, .batch = 2, .hidden = 320, .intermediate = 720});
    cases.push_back({.bits = bits, .batch = 1, .permuted = true});
  }
  return cases;
}

class Tail : public ::testing::TestWithParam<TailCase> {};
INSTANTIATE_TEST_SUITE_P(Products, Tail, ::testing::ValuesIn(tail_cases()),
                         [](const auto& info) { return info.param.name(); });

constexpr std::int64_t capacity = 4;
constexpr std::int64_t head_dim = 64;

TEST_P(Tail, EqualsItsParts) {
  const TailCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t kv_dim = p.hidden / 256 * head_dim;
  // o, gate, up, down, q, k, v.
  struct Size {
    std::int64_t rows, cols;
  };
  const Size sizes[] = {{p.hidden, p.hidden},       {p.intermediate, p.hidden},
                        {p.intermediate, p.hidden}, {p.hidden, p.intermediate},
                        {p.hidden, p.hidden},       {kv_dim, p.hidden},
                        {kv_dim, p.hidden}};
  // Linears of one input share its permutation.
  const std::uint64_t inputs[] = {1, 2, 2, 3, 4, 4, 4};
  std::vector<PackedOperands> packed;
  std::vector<Operand> dense;
  for (const Size& size : sizes) {
    const std::size_t index = packed.size() + dense.size();
    const std::uint64_t own = seed + 17 * index;
    const std::uint64_t order = inputs[index];
    if (p.dense) {
      dense.push_back(Operand(Role::input, p.dtype, size.rows, size.cols).bell(own, 0.05));
    } else {
      packed.emplace_back(packed_shape(size.rows, size.cols, PackedKind::affine, p.bits, p.group,
                                       p.bits == 3 ? DType::f32 : DType::f16, p.bits != 8),
                          p.permuted, own, Layout::tight, order);
    }
  }
  const Operand a = Operand(Role::input, p.dtype, p.batch, p.hidden).bell(seed, 1.0);
  Operand norm(Role::input, p.dtype, 1, p.hidden);
  norm.fill([&](std::int64_t, std::int64_t c) {
    return 0.5 + uniform_value(seed, 3, static_cast<std::uint64_t>(c));
  });
  Operand cos(Role::input, DType::f32, capacity, head_dim / 2);
  Operand sin(Role::input, DType::f32, capacity, head_dim / 2);
  cos.fill([](std::int64_t at, std::int64_t j) { return std::cos(0.1 * double(at * (j + 1))); });
  sin.fill([](std::int64_t at, std::int64_t j) { return std::sin(0.1 * double(at * (j + 1))); });
  Operand position(Role::input, DType::i32, 1, 1);
  position.put(0, 0, 2);
  const Operand x = Operand(Role::inout, p.dtype, p.batch, p.hidden).bell(seed + 1, 1.0);
  const Operand g(Role::output, p.dtype, p.batch, p.intermediate);
  const Operand q(Role::output, p.dtype, p.batch, p.hidden);
  Operand cache(Role::inout, p.quantized_cache ? DType::u8 : p.dtype, p.batch * capacity, kv_dim);
  Operand scales(Role::inout, DType::f32, p.quantized_cache ? p.batch * capacity : 0,
                 kv_dim / head_dim);
  cache.fill([](std::int64_t, std::int64_t) { return 1.0; });
  scales.fill([](std::int64_t, std::int64_t) { return 1.0; });

  std::vector<const Operand*> operands = {&a, &norm, &cos, &sin, &position};
  constexpr std::size_t sides = 2, results = 7, first_result = 5;
  for (std::size_t i = 0; i < sides; ++i) {
    operands.insert(operands.end(), {&x, &g, &q, &cache, &cache, &scales, &scales});
  }
  const std::size_t first_weight = operands.size();
  for (const Operand& w : dense) operands.push_back(&w);
  for (const PackedOperands& w : packed) w.append_to(operands);

  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    Linear w[7];
    std::int64_t bytes = 0;
    for (std::size_t i = 0; i < 7; ++i) {
      if (p.dense) {
        w[i].dense = v[first_weight + i];
        continue;
      }
      w[i].packed = packed[i].weight(v, first_weight + 4 * i);
      // The same permutation is the same memory, as in a model.
      for (std::size_t j = 0; j < i; ++j) {
        if (inputs[j] == inputs[i]) w[i].packed.permutation = w[j].packed.permutation;
      }
      bytes = std::max(bytes, ops.packed_workspace_bytes(packed[i].shape, p.batch, p.dtype,
                                                         PackedKernel::automatic));
    }
    const auto element = static_cast<std::int64_t>(dtype_bytes(p.dtype));
    const Scratch h(ops, p.batch * p.hidden * element), k(ops, p.batch * kv_dim * element),
        values(ops, p.batch * kv_dim * element), u(ops, p.batch * p.intermediate * element),
        workspace(ops, bytes);
    const auto view = [&](const Scratch& s, std::int64_t cols) {
      return make_view(s.view().data, p.dtype, ops.kind(), p.batch, cols);
    };
    const FusedScratch scratch{view(h, p.hidden), view(k, kv_dim), view(values, kv_dim),
                               view(u, p.intermediate), workspace.view()};
    const auto tail = [&](std::size_t at) {
      BlockTail t;
      t.a = v[0];
      t.o = &w[0];
      t.mlp = {v[at], v[1], 1e-5F, &w[1], &w[2], v[at + 1], scratch};
      t.down = &w[3];
      if (p.last) return t;
      t.next.x = v[at];
      t.next.norm = v[1];
      t.next.eps = 1e-5F;
      t.next.q = &w[4];
      t.next.k = &w[5];
      t.next.v = &w[6];
      t.next.head_dim = head_dim;
      t.next.cos = v[2];
      t.next.sin = v[3];
      t.next.position = v[4];
      t.next.cache = {v[at + 3], v[at + 4], v[at + 5], v[at + 6], p.batch, capacity};
      t.next.q_out = v[at + 2];
      t.next.scratch = scratch;
      return t;
    };
    ops.block_tail(tail(first_result));
    ops.Ops::block_tail(tail(first_result + results));
    ops.synchronize();
  });
  for (std::size_t i = 0; i < results; ++i) {
    if (p.last && i == 2) continue;  // no queries
    EXPECT_EQ(o.actual[first_result + i].element_bytes(),
              o.actual[first_result + results + i].element_bytes())
        << "result " << i;
  }
  // And it did something.
  const std::vector<double> before = x.values(), after = o.actual[first_result].values();
  std::size_t changed = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(std::isfinite(after[i]));
    changed += before[i] != after[i] ? 1 : 0;
  }
  EXPECT_GT(changed, before.size() / 2);
}

}  // namespace
}  // namespace engine::test
