// Orthogonal transforms: their matrices, the butterfly's random numbers, and the CPU's ops against
// the plain loops of HostTransform.
#include "engine/weight/transform.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "engine/ops/transform_view.h"
#include "tests/support/compare.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

Transform butterfly(std::uint64_t seed, std::uint64_t stream, bool shared = false,
                    bool permuted = true) {
  Transform t;
  t.kind = TransformKind::butterfly;
  t.seed = seed;
  t.stream = stream;
  t.shared = shared;
  t.permuted = permuted;
  return t;
}

Transform hadamard() {
  Transform t;
  t.kind = TransformKind::hadamard;
  t.signs_plane = 0;
  return t;
}

std::vector<float> random_signs(std::int64_t d, std::uint64_t seed) {
  std::vector<float> signs(index(d));
  for (std::size_t i = 0; i < signs.size(); ++i) {
    signs[i] = uniform_value(seed, 9, i) < 0.5 ? -1.0F : 1.0F;
  }
  return signs;
}

// Q [d, d], column by column.
std::vector<double> matrix_of(const HostTransform& q, std::int64_t d, bool inverse) {
  std::vector<double> matrix(index(d * d)), column(index(d));
  for (std::int64_t j = 0; j < d; ++j) {
    std::fill(column.begin(), column.end(), 0.0);
    column[index(j)] = 1.0;
    q.apply(column, inverse);
    for (std::int64_t i = 0; i < d; ++i) matrix[index(i * d + j)] = column[index(i)];
  }
  return matrix;
}

// The largest |a b^T - I| of [p, p] matrices.
template <class T>
double distance_from_identity(const T* a, const T* b, std::int64_t p) {
  double worst = 0;
  for (std::int64_t i = 0; i < p; ++i) {
    for (std::int64_t j = 0; j < p; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < p; ++k) {
        sum += static_cast<double>(a[i * p + k]) * static_cast<double>(b[j * p + k]);
      }
      const double error = std::fabs(sum - (i == j ? 1.0 : 0.0));
      if (!(error <= worst)) worst = error;  // keeps NaN
    }
  }
  return worst;
}

// By elimination with pivots.
double determinant(const float* q, std::int64_t p) {
  std::vector<double> m(q, q + p * p);
  double det = 1;
  for (std::int64_t k = 0; k < p; ++k) {
    std::int64_t best = k;
    for (std::int64_t i = k + 1; i < p; ++i) {
      if (std::fabs(m[index(i * p + k)]) > std::fabs(m[index(best * p + k)])) best = i;
    }
    if (best != k) {
      det = -det;
      for (std::int64_t j = 0; j < p; ++j) std::swap(m[index(k * p + j)], m[index(best * p + j)]);
    }
    det *= m[index(k * p + k)];
    for (std::int64_t i = k + 1; i < p; ++i) {
      const double f = m[index(i * p + k)] / m[index(k * p + k)];
      for (std::int64_t j = k; j < p; ++j) m[index(i * p + j)] -= f * m[index(k * p + j)];
    }
  }
  return det;
}

TEST(Hadamard, OrdersOfSizes) {
  const std::vector<std::pair<std::int64_t, std::int64_t>> expected = {
      {1, 1},       {2, 1},      {1024, 1},    {4096, 1},    {12, 12},     {6144, 12}, {10240, 20},
      {14336, 28},  {28672, 28}, {57344, 28},  {36864, 36},  {13312, 52},  {60, 60},   {27648, 108},
      {29696, 116}, {124, 124},  {17920, 140}, {11008, 172}, {3, 0},       {6, 0},     {56, 28},
      {4095, 0},    {11264, 0},  {156, 0},     {9984, 0},    {36 * 3, 108}};
  for (const auto& [d, order] : expected) EXPECT_EQ(hadamard_order(d), order) << d;
  EXPECT_THROW(static_cast<void>(hadamard_order(0)), Error);
  EXPECT_THROW(static_cast<void>(hadamard_matrix(156)), Error);
  EXPECT_THROW(static_cast<void>(hadamard_matrix(16)), Error);
}

TEST(Hadamard, RowsOfSignsAreOrthogonal) {
  for (const std::int64_t k : {1, 12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 172}) {
    const std::vector<float> h = hadamard_matrix(k);
    ASSERT_EQ(h.size(), index(k * k));
    bool symmetric = true;
    for (std::int64_t i = 0; i < k; ++i) {
      for (std::int64_t j = 0; j < k; ++j) {
        ASSERT_EQ(std::fabs(h[index(i * k + j)]), 1.0F) << k;
        symmetric = symmetric && h[index(i * k + j)] == h[index(j * k + i)];
        float dot = 0;
        for (std::int64_t l = 0; l < k; ++l) dot += h[index(i * k + l)] * h[index(j * k + l)];
        ASSERT_EQ(dot, i == j ? static_cast<float>(k) : 0.0F) << k << ": " << i << ", " << j;
      }
    }
    EXPECT_EQ(symmetric, k == 1 || k == 28 || k == 36 || k == 124) << k;
  }
}

// Entries from the definitions: squares modulo 11 are 1, 3, 4, 5, 9; modulo 13 1, 3, 4, 9, 10, 12.
TEST(Hadamard, PaleyMatrices) {
  const std::vector<float> h = hadamard_matrix(12);
  EXPECT_EQ(h[0], 1.0F);
  EXPECT_EQ(h[5], -1.0F);           // first row
  EXPECT_EQ(h[5 * 12], 1.0F);       // first column
  EXPECT_EQ(h[3 * 12 + 3], 1.0F);   // diagonal
  EXPECT_EQ(h[4 * 12 + 1], 1.0F);   // chi(3)
  EXPECT_EQ(h[1 * 12 + 4], -1.0F);  // chi(-3) = chi(8)
  const std::vector<float> g = hadamard_matrix(28);
  EXPECT_EQ(g[0], 1.0F);    // C + I, where C_00 = 0
  EXPECT_EQ(g[14], -1.0F);  // C - I
  EXPECT_EQ(g[14 * 28], -1.0F);
  EXPECT_EQ(g[14 * 28 + 14], -1.0F);  // -C - I
  EXPECT_EQ(g[2 * 28 + 1], 1.0F);     // chi(1)
  EXPECT_EQ(g[3 * 28 + 1], -1.0F);    // chi(2)
  EXPECT_EQ(g[3 * 28 + 15], -1.0F);   // C - I, off the diagonal
  EXPECT_EQ(g[17 * 28 + 15], 1.0F);   // -chi(2)
}

// Q = H^T diag(sign) with H = (H_K kron Sylvester) / sqrt(d).
TEST(Hadamard, TransformIsTheMatrix) {
  for (const std::int64_t d : {8, 24, 56, 104}) {
    const std::vector<float> signs = random_signs(d, 3);
    const HostTransform q(hadamard(), signs, d, 1);
    const std::int64_t order = hadamard_order(d), power = d / order;
    const std::vector<float> small = hadamard_matrix(order);
    const std::vector<double> matrix = matrix_of(q, d, false), inverse = matrix_of(q, d, true);
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t j = 0; j < d; ++j) {
        // H_ji: Sylvester's entry is -1 to the number of common bits.
        const int bits =
            __builtin_popcountll(static_cast<unsigned long long>((i % power) & (j % power)));
        const double h = static_cast<double>(small[index(j / power * order + i / power)]) *
                         (bits % 2 == 0 ? 1 : -1) / std::sqrt(static_cast<double>(d));
        const double expected = h * static_cast<double>(signs[index(j)]);
        ASSERT_NEAR(matrix[index(i * d + j)], expected, 1e-14) << d << ": " << i << ", " << j;
        ASSERT_NEAR(inverse[index(j * d + i)], expected, 1e-14);
      }
    }
  }
}

TEST(ButterflyTransform, Sides) {
  const std::vector<std::array<std::int64_t, 3>> expected = {{1, 1, 1},
                                                             {7, 7, 1},
                                                             {6, 2, 3},
                                                             {1024, 32, 32},
                                                             {4096, 64, 64},
                                                             {8192, 128, 64},
                                                             {14336, 64, 224},
                                                             {28672, 448, 64},
                                                             {11008, 688, 16},
                                                             {5120, 32 * 5, 32},
                                                             {2147483647, 2147483647, 1}};
  for (const auto& [d, p1, p2] : expected) {
    EXPECT_EQ(butterfly_sides(d), std::make_pair(p1, p2)) << d;
  }
}

TEST(ButterflyTransform, RotationsAndPermutations) {
  for (const std::int64_t d : {6, 45, 256, 1024, 1344}) {
    for (const bool shared : {false, true}) {
      const Butterfly b = make_butterfly(butterfly(11, 4, shared), d, 2);
      const std::int64_t firsts = shared ? 1 : b.p2, seconds = shared ? 1 : b.p1;
      ASSERT_EQ(b.first.size(), index(firsts * b.p1 * b.p1));
      ASSERT_EQ(b.second.size(), index(seconds * b.p2 * b.p2));
      for (std::int64_t k = 0; k < firsts; ++k) {
        const float* a = b.first.data() + k * b.p1 * b.p1;
        ASSERT_LE(distance_from_identity(a, a, b.p1), 3e-7);
        ASSERT_NEAR(determinant(a, b.p1), 1.0, 1e-4);
      }
      for (std::int64_t k = 0; k < seconds; ++k) {
        const float* a = b.second.data() + k * b.p2 * b.p2;
        ASSERT_LE(distance_from_identity(a, a, b.p2), 3e-7);
        ASSERT_NEAR(determinant(a, b.p2), 1.0, 1e-4);
      }
      for (const auto* perm : {&b.perm_in, &b.perm_out}) {
        std::vector<std::int32_t> sorted = *perm;
        std::sort(sorted.begin(), sorted.end());
        std::vector<std::int32_t> expected(index(d));
        std::iota(expected.begin(), expected.end(), 0);
        EXPECT_EQ(sorted, expected);
        EXPECT_FALSE(std::is_sorted(perm->begin(), perm->end())) << d;
      }
      EXPECT_NE(b.perm_in, b.perm_out);
    }
  }
  const Butterfly plain = make_butterfly(butterfly(11, 4, false, false), 256, 1);
  EXPECT_TRUE(plain.perm_in.empty() && plain.perm_out.empty());
  EXPECT_THROW(static_cast<void>(make_butterfly(butterfly(1, 1), 1031, 1)), Error);
  EXPECT_TRUE(has_butterfly(28672) && has_butterfly(11008) && has_butterfly(65536));
  EXPECT_FALSE(has_butterfly(1031) || has_butterfly(131072));
}

// Files name a butterfly by its seed only, so these numbers may never change.
TEST(ButterflyTransform, TheSameNumbersForEver) {
  const Butterfly b = make_butterfly(butterfly(7, 3), 6, 1);
  const std::vector<float> first = {0x1.e96052p-3F, 0x1.f12afcp-1F, -0x1.f12afcp-1F,
                                    0x1.e96052p-3F};
  const std::vector<float> second = {0x1.f79664p-1F,  0x1.1256bcp-3F, 0x1.efbad6p-4F,
                                     0x1.721562p-5F,  0x1.dda292p-2F, -0x1.c44cc6p-1F,
                                     -0x1.65f6f2p-3F, 0x1.bfaaecp-1F, 0x1.cf9722p-2F};
  EXPECT_EQ(std::vector<float>(b.first.begin(), b.first.begin() + 4), first);
  EXPECT_EQ(std::vector<float>(b.second.begin(), b.second.begin() + 9), second);
  EXPECT_EQ(b.perm_in, (std::vector<std::int32_t>{2, 1, 4, 3, 5, 0}));
  EXPECT_EQ(b.perm_out, (std::vector<std::int32_t>{2, 0, 5, 4, 3, 1}));
  const Butterfly large = make_butterfly(butterfly(std::uint64_t{1} << 62U, 1), 1344, 1);
  double sum = 0;
  for (const float v : large.second) sum += static_cast<double>(v);
  EXPECT_EQ(sum, 0x1.23d710a91c4p+1);
}

TEST(ButterflyTransform, DependsOnSeedAndStreamButNotOnThreads) {
  const Butterfly one = make_butterfly(butterfly(5, 6), 1024, 1);
  const Butterfly three = make_butterfly(butterfly(5, 6), 1024, 3);
  EXPECT_EQ(one.first, three.first);
  EXPECT_EQ(one.second, three.second);
  EXPECT_EQ(one.perm_in, three.perm_in);
  EXPECT_EQ(one.perm_out, three.perm_out);
  for (const Transform& other : {butterfly(6, 6), butterfly(5, 7)}) {
    const Butterfly b = make_butterfly(other, 1024, 1);
    EXPECT_GT(differing(one.first, b.first), 0.99);
    EXPECT_GT(differing(one.second, b.second), 0.99);
    EXPECT_GT(differing(one.perm_in, b.perm_in), 0.9);
  }
}

// Uniform on SO(4): entries have mean 0 and mean square 1 / 4 everywhere. The mean of n independent
// values of variance v is off by less than 5 sqrt(v / n).
TEST(ButterflyTransform, RotationsAreUniform) {
  constexpr std::int64_t p = 4;
  std::array<double, 16> mean{}, square{};
  double n = 0;
  for (std::uint64_t stream = 0; stream < 256; ++stream) {
    const Butterfly b = make_butterfly(butterfly(1, stream), 16, 1);
    for (const auto* set : {&b.first, &b.second}) {
      for (std::size_t k = 0; k < 4; ++k, n += 1) {
        for (std::size_t i = 0; i < 16; ++i) {
          const auto v = static_cast<double>((*set)[k * 16 + i]);
          mean[i] += v;
          square[i] += v * v;
        }
      }
    }
  }
  ASSERT_EQ(n, 2048);
  // On the sphere of R^4 the variance of x^2 is 3 / (p (p + 2)) - 1 / p^2 = 1/16.
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_NEAR(mean[i] / n, 0.0, 5 * std::sqrt(1.0 / p / n)) << i;
    EXPECT_NEAR(square[i] / n, 1.0 / p, 5 * std::sqrt(1.0 / 16 / n)) << i;
  }
}

// The definition of transform.h, element by element.
TEST(ButterflyTransform, HostTransformFollowsTheDefinition) {
  for (const std::int64_t d : {6, 48, 45}) {
    for (const bool shared : {false, true}) {
      const Transform t = butterfly(2, 8, shared, d != 48);
      const HostTransform q(t, {}, d, 1);
      const Butterfly b = make_butterfly(t, d, 1);
      std::vector<double> x(index(d)), grid(index(d)), next(index(d)), expected(index(d));
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(bell_value(4, 4, i));
      const auto p1 = index(b.p1), p2 = index(b.p2);
      for (std::size_t k = 0; k < x.size(); ++k) {
        grid[k] = x[b.perm_in.empty() ? k : static_cast<std::size_t>(b.perm_in[k])];
      }
      for (std::size_t i = 0; i < p1; ++i) {
        for (std::size_t j = 0; j < p2; ++j) {
          double sum = 0;
          for (std::size_t k = 0; k < p1; ++k) {
            sum += static_cast<double>(b.first[(shared ? 0 : j * p1 * p1) + i * p1 + k]) *
                   grid[k * p2 + j];
          }
          next[i * p2 + j] = sum;
        }
      }
      for (std::size_t i = 0; i < p1; ++i) {
        for (std::size_t j = 0; j < p2; ++j) {
          double sum = 0;
          for (std::size_t k = 0; k < p2; ++k) {
            sum += static_cast<double>(b.second[(shared ? 0 : i * p2 * p2) + j * p2 + k]) *
                   next[i * p2 + k];
          }
          grid[i * p2 + j] = sum;
        }
      }
      for (std::size_t k = 0; k < x.size(); ++k) {
        expected[k] = grid[b.perm_out.empty() ? k : static_cast<std::size_t>(b.perm_out[k])];
      }
      std::vector<double> out = x;
      q.apply(out, false);
      EXPECT_TRUE(compare_close(out, expected, {.absolute = 1e-14})) << d;
      q.apply(out, true);  // the rotations are orthogonal to f32's rounding only
      EXPECT_TRUE(compare_close(out, x, {.absolute = 2e-6})) << d;
      const std::vector<double> forward = matrix_of(q, d, false), back = matrix_of(q, d, true);
      for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < d; ++j) {
          ASSERT_NEAR(forward[index(i * d + j)], back[index(j * d + i)], 1e-14);
        }
      }
    }
  }
}

struct Bench {
  Ledger ledger;
  std::unique_ptr<Ops> ops = make_cpu_ops(ledger, 3);
  TransformView make(Arena& arena, const Transform& t, const std::vector<float>& signs,
                     std::int64_t d) {
    return make_transform_view(*ops, arena, MemTag::solver, t, signs, d, 2);
  }
};

// An output is a sum of d terms of |q| at most 1 in stages; |q x| = |x|. Errors of f32 sums of n
// terms behave as sqrt(n) u |x|; four times that for all stages, and one rounding of the output.
TEST(TransformOps, RowsEqualTheReference) {
  Bench bench;
  std::vector<std::pair<Transform, std::int64_t>> cases;
  for (const std::int64_t d : {1, 8, 32, 96, 112, 172, 208, 512, 1024})
    cases.push_back({hadamard(), d});
  for (const std::int64_t d : {1, 6, 45, 96, 256, 1344}) {
    cases.push_back({butterfly(1, 2), d});
    cases.push_back({butterfly(1, 2, true, false), d});
  }
  cases.push_back({Transform{}, 9});
  for (const auto& [t, d] : cases) {
    const std::vector<float> signs =
        t.kind == TransformKind::hadamard ? random_signs(d, 5) : std::vector<float>{};
    const HostTransform reference(t, signs, d, 1);
    Arena arena(bench.ops->memory(), bench.ledger, std::int64_t{16} << 20U, true);
    const TransformView q = bench.make(arena, t, signs, d);
    for (const std::int64_t m : {1, 8, 11}) {
      for (const bool inverse : {false, true}) {
        const std::vector<float> x = bell_matrix(m, d, 7);
        for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
          const View in = arena.make(MemTag::solver, dtype, m, d);
          const View f32 = arena.make(MemTag::solver, DType::f32, m, d);
          bench.ops->convert(host_view(x.data(), m, d), in);
          bench.ops->convert(in, f32);
          const View out = arena.make(MemTag::solver, DType::f32, m, d);
          bench.ops->transform_rows(in, q, inverse, out);
          bench.ops->transform_rows(in, q, inverse, in);  // in place
          for (std::int64_t r = 0; r < m; ++r) {
            std::vector<double> row(f32.host<float>() + r * d, f32.host<float>() + (r + 1) * d);
            double norm = 0;
            for (const double v : row) norm += v * v;
            norm = std::sqrt(norm);
            reference.apply(row, inverse);
            const std::vector<double> found(out.host<float>() + r * d,
                                            out.host<float>() + (r + 1) * d);
            const double error =
                4 * std::sqrt(static_cast<double>(d)) * roundoff(DType::f32) * norm;
            EXPECT_TRUE(compare_close(found, row, {.absolute = error})) << d << " row " << r;
            std::vector<float> placed(index(d));
            bench.ops->convert(in.row_range(r, 1), host_view(placed.data(), 1, d));
            EXPECT_TRUE(compare_close(std::vector<double>(placed.begin(), placed.end()), row,
                                      {.absolute = error + store_tolerance(dtype, norm)}))
                << d << " in place, row " << r;
          }
        }
      }
    }
  }
}

TEST(TransformOps, ViewsTakeWhatPlansSay) {
  Bench bench;
  for (const auto& [t, d] : std::vector<std::pair<Transform, std::int64_t>>{
           {hadamard(), 256}, {hadamard(), 56}, {butterfly(1, 1), 96}, {Transform{}, 5}}) {
    Arena plan = Arena::measuring(DeviceKind::cpu);
    const TransformView described = take_transform_view(plan, MemTag::solver, t, d);
    Arena arena(bench.ops->memory(), bench.ledger, std::max<std::int64_t>(plan.peak(), 1));
    const TransformView q = bench.make(arena, t, random_signs(d, 1), d);
    EXPECT_EQ(arena.peak(), plan.peak());
    EXPECT_EQ(described.bytes(), q.bytes());
  }
}

TEST(TransformOps, RefusesTransformsOfAnotherSize) {
  Bench bench;
  Arena arena(bench.ops->memory(), bench.ledger, 1 << 20U);
  const TransformView q = bench.make(arena, butterfly(1, 1), {}, 12);
  const View x = arena.make(MemTag::solver, DType::f32, 2, 12);
  const View narrow = arena.make(MemTag::solver, DType::f32, 2, 6);
  EXPECT_THROW(bench.ops->transform_rows(narrow, q, false, narrow), Error);
  EXPECT_THROW(bench.ops->transform_rows(x, q, false, narrow), Error);
  TransformView broken = q;
  broken.p1 = 3;
  EXPECT_THROW(bench.ops->transform_rows(x, broken, false, x), Error);
}

TEST(TransformOps, TransposeAndPlaceColumns) {
  Bench bench;
  const std::int64_t rows = 37, cols = 70;
  const std::vector<float> x = bell_matrix(rows, cols, 3);
  std::vector<float> t(index(rows * cols));
  bench.ops->transpose(host_view(x.data(), rows, cols), host_view(t.data(), cols, rows));
  std::vector<std::int32_t> perm(index(cols));
  std::iota(perm.begin(), perm.end(), 0);
  std::rotate(perm.begin(), perm.begin() + 13, perm.end());
  const std::vector<float> diagonal = bell_matrix(1, cols, 4);
  std::vector<float> placed(x.size()), plain(x.size());
  const View in = host_view(x.data(), rows, cols);
  bench.ops->place_columns(in, host_view(perm.data(), 1, cols), host_view(diagonal.data(), 1, cols),
                           host_view(placed.data(), rows, cols));
  bench.ops->place_columns(in, {}, {}, host_view(plain.data(), rows, cols));
  EXPECT_EQ(plain, x);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      ASSERT_EQ(t[index(c * rows + r)], x[index(r * cols + c)]);
      const std::int64_t k = perm[index(c)];
      ASSERT_EQ(placed[index(r * cols + k)], x[index(r * cols + c)] * diagonal[index(k)]);
    }
  }
}

TEST(TransformOps, DecodesMidriseAndLattices) {
  Bench bench;
  const std::int64_t rows = 3, cols = 16;
  const std::vector<std::uint8_t> codes = {0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 1, 2, 2, 3, 3,
                                           3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
                                           0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3};
  const std::vector<float> scales = {0.5F, 2.0F, -1.0F};
  std::vector<float> out(index(rows * cols));
  const View view = host_view(out.data(), rows, cols);
  bench.ops->decode_midrise(host_view(codes.data(), rows, cols), 2, host_view(scales.data(), 3, 1),
                            view);
  for (std::size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(out[i], scales[i / 16] * (static_cast<float>(codes[i]) - 1.5F));
  }
  const std::vector<std::int16_t> words = {0, -1, 257, -256, 12345, -12345};
  const std::vector<std::uint8_t> bytes = {0, 255, 113, 7, 240, 128};
  const float one = 0.75F, half = 0.125F;
  bench.ops->decode_lattice(host_view(words.data(), rows, 2), LatticeBook::e8p,
                            host_view(&one, 1, 1), false, view);
  bench.ops->decode_lattice(host_view(bytes.data(), rows, 2), LatticeBook::e8_byte,
                            host_view(&half, 1, 1), true, view);
  for (std::size_t k = 0; k < words.size(); ++k) {
    std::array<float, 8> point{};
    e8p_point(static_cast<std::uint16_t>(words[k]), point);
    for (std::size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(out[8 * k + i], one * point[i] + half * e8_byte_points()[bytes[k]][i]);
    }
  }
  EXPECT_THROW(bench.ops->decode_lattice(host_view(bytes.data(), rows, 2), LatticeBook::e8p,
                                         host_view(&one, 1, 1), false, view),
               Error);
}

}  // namespace
}  // namespace engine::test
