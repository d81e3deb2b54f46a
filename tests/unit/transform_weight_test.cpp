// Weights with transforms, lattice terms and midrise grids: decoding, checks, JSON, names, bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <string>

#include "engine/weight/bits.h"
#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"
#include "engine/weight/plane_read.h"
#include "engine/weight/row_decoder.h"
#include "engine/weight/serialize.h"
#include "tests/support/compare.h"
#include "tests/support/transform_weights.h"

namespace engine::test {
namespace {

// W = L^T T R P D with dense matrices in f64; T from the row decoder.
std::vector<double> dense_product(const LinearWeight& w) {
  const std::int64_t m = w.rows, n = w.cols;
  std::vector<float> t(index(m * n));
  RowDecoder(w).decode_terms(0, host_view(t.data(), m, n));
  // Column j of a transform's matrix is what it makes of e_j.
  const auto matrix = [&](const Transform& q, std::int64_t d) {
    const HostTransform transform(q, read_signs(w, q), d, 1);
    std::vector<double> out(index(d * d)), column(index(d));
    for (std::int64_t j = 0; j < d; ++j) {
      std::fill(column.begin(), column.end(), 0.0);
      column[index(j)] = 1.0;
      transform.apply(column, false);
      for (std::int64_t i = 0; i < d; ++i) out[index(i * d + j)] = column[index(i)];
    }
    return out;
  };
  const std::vector<double> l = matrix(w.left, m), r = matrix(w.right, n);
  std::vector<double> tr(index(m * n), 0.0), ltr(index(m * n), 0.0), out(index(m * n));
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t k = 0; k < n; ++k) {
      for (std::int64_t j = 0; j < n; ++j) {
        tr[index(i * n + j)] += static_cast<double>(t[index(i * n + k)]) * r[index(k * n + j)];
      }
    }
  }
  for (std::int64_t k = 0; k < m; ++k) {
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        ltr[index(i * n + j)] += l[index(k * m + i)] * tr[index(k * n + j)];
      }
    }
  }
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t to = w.permutation_plane < 0
                                  ? j
                                  : read_element<std::int32_t>(w.plane(w.permutation_plane), 0, j);
      const double factor = w.diagonal_plane < 0
                                ? 1.0
                                : static_cast<double>(read_float(w.plane(w.diagonal_plane), 0, to));
      out[index(i * n + to)] = ltr[index(i * n + j)] * factor;
    }
  }
  return out;
}

TEST(TransformWeight, DecodesAsDefined) {
  for (const auto& [name, w] : transformed_weights(24, 48)) {
    SCOPED_TRACE(name);
    std::vector<float> found(24 * 48);
    decode_linear(w.weight, host_view(found.data(), 24, 48));
    const std::vector<double> expected = dense_product(w.weight);
    // Two roundings to f32 of values of at most the matrix's norm, then the diagonal and one more.
    double norm = 0;
    for (const double v : expected) norm += v * v;
    ASSERT_GT(norm, 0);
    EXPECT_TRUE(compare_close(std::vector<double>(found.begin(), found.end()), expected,
                              {.absolute = 8 * roundoff(DType::f32) * std::sqrt(norm)}));
  }
}

TEST(TransformWeight, TermsFollowTheirDefinitions) {
  const std::vector<NamedWeight> all = transformed_weights(24, 48);
  for (const auto& [name, owned] : all) {
    SCOPED_TRACE(name);
    const LinearWeight& w = owned.weight;
    std::vector<float> t(24 * 48);
    RowDecoder(w).decode_terms(0, host_view(t.data(), 24, 48));
    for (std::int64_t r = 0; r < 24; ++r) {
      for (std::int64_t c = 0; c < 48; ++c) {
        float sum = 0;
        for (const Term& term : w.terms) {
          const Plane& scales = w.plane(term.grid.scale_plane);
          const float scale = read_float(scales, scales.rows == 1 ? 0 : r, 0);
          if (term.kind == TermKind::affine) {
            const unsigned code = read_code(w.plane(term.codes_plane), r, c);
            const float zero =
                term.grid.midrise
                    ? static_cast<float>((1 << term.bits) - 1) / 2
                    : static_cast<float>(read_integer(w.plane(term.grid.zero_plane), r, 0));
            sum += scale * (static_cast<float>(code) - zero);
            continue;
          }
          std::array<float, 8> point{};
          const Plane& codes = w.plane(term.codes_plane);
          if (term.lattice == LatticeBook::e8p) {
            e8p_point(static_cast<std::uint16_t>(read_element<std::int16_t>(codes, r, c / 8)),
                      point);
          } else {
            point = e8_byte_points()[read_code(codes, r, c / 8)];
          }
          sum += scale * point[index(c % 8)];
        }
        ASSERT_EQ(t[index(r * 48 + c)], sum) << r << ", " << c;
      }
    }
  }
}

TEST(TransformWeight, RowsOfATransformedWeightAreRefused) {
  const OwnedLinear w = quip_weight(24, 48, 2);
  std::vector<float> out(24 * 48);
  EXPECT_THROW(RowDecoder(w.weight).decode(0, host_view(out.data(), 24, 48)), Error);
}

TEST(TransformWeight, SurvivesJson) {
  for (const auto& [name, w] : transformed_weights(24, 48)) {
    SCOPED_TRACE(name);
    std::vector<std::uint32_t> ids(w.weight.planes.size()), found_ids;
    std::iota(ids.begin(), ids.end(), 5U);
    const Json json = describe(w.weight, ids);
    const LinearWeight found = linear_from_json(parse_json(json.dump(), "a"), "a", "l", found_ids);
    EXPECT_EQ(describe(found, found_ids).dump(), json.dump());
    EXPECT_EQ(scheme_name(found), scheme_name(w.weight));
    for (const auto& [a, b] :
         {std::pair(found.left, w.weight.left), {found.right, w.weight.right}}) {
      EXPECT_EQ(a.kind, b.kind);
      EXPECT_EQ(a.signs_plane, b.signs_plane);
      EXPECT_EQ(a.seed, b.seed);
      EXPECT_EQ(a.stream, b.stream);
      EXPECT_EQ(a.shared, b.shared);
      EXPECT_EQ(a.permuted, b.permuted);
    }
    for (std::size_t i = 0; i < found.terms.size(); ++i) {
      EXPECT_EQ(found.terms[i].grid.midrise, w.weight.terms[i].grid.midrise);
      EXPECT_EQ(found.terms[i].lattice, w.weight.terms[i].lattice);
    }
  }
}

TEST(TransformWeight, NamesBitsAndPatterns) {
  const OwnedLinear quip = quip_weight(24, 48, 2);
  EXPECT_EQ(scheme_name(quip.weight),
            "affine2 tensor midrise f32-scale permuted diagonal kronecker-plain-in butterfly-out");
  EXPECT_EQ(weight_bits(quip.weight).nominal, 2.0);
  const OwnedLinear sharp = quipsharp_weight(24, 48, true);
  EXPECT_EQ(scheme_name(sharp.weight),
            "lattice e8p tensor f32-scale + lattice e8-byte row f16-scale hadamard12-in "
            "hadamard12-out");
  EXPECT_EQ(weight_bits(sharp.weight).nominal, 3.0);
  EXPECT_EQ(weight_bits(quipsharp_weight(24, 48, false).weight).nominal, 2.0);
  for (const auto& [name, w] : transformed_weights(24, 48)) {
    EXPECT_FALSE(match_affine(w.weight) || match_dense(w.weight) || match_packable(w.weight))
        << name;
  }
  const std::vector<float> values = bell_matrix(16, 16, 1);
  OwnedLinear dense = dense_linear(host_view(values.data(), 16, 16));
  EXPECT_TRUE(match_dense(dense.weight));
  dense.weight.right.kind = TransformKind::butterfly;
  EXPECT_FALSE(match_dense(dense.weight));
}

// Expects the message of the error that the changed weight gives.
void expect_refused(OwnedLinear w, const std::function<void(LinearWeight&)>& change,
                    const std::string& message) {
  change(w.weight);
  try {
    validate(w.weight, "file", "linear");
    ADD_FAILURE() << "accepted: " << message;
  } catch (const FormatError& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
  }
}

TEST(TransformWeight, RefusesWhatIsNotDefined) {
  const auto quip = [] { return quip_weight(24, 48, 2); };
  const auto sharp = [] { return quipsharp_weight(24, 48, true); };
  expect_refused(
      quip(), [](auto& w) { w.left.kind = TransformKind::hadamard; },
      "linear.left.signs: expected a plane index");
  expect_refused(
      quip(), [](auto& w) { w.left.signs_plane = 0; },
      "linear.left.signs: expected no plane unless the transform is hadamard");
  expect_refused(
      quip(), [](auto& w) { w.right.seed = std::uint64_t{1} << 63U; },
      "linear.right: expected seed and stream below 2^63");
  expect_refused(
      quip(), [](auto& w) { w.left.kind = static_cast<TransformKind>(7); },
      "linear.left.kind: expected none, hadamard or butterfly");
  expect_refused(
      quip(), [](auto& w) { w.terms[0].grid.zero_plane = w.terms[0].codes_plane; },
      "linear.terms[0].grid.midrise: expected false");
  expect_refused(
      sharp(), [](auto& w) { w.terms[0].grid.midrise = true; },
      "linear.terms[0].grid.midrise: expected false");
  expect_refused(
      sharp(), [](auto& w) { std::swap(w.left.signs_plane, w.right.signs_plane); },
      "linear.left.signs: expected a plane of shape [1, 24]");
  expect_refused(
      sharp(), [](auto& w) { w.terms[0].bits = 1; }, "linear.terms[0].bits: expected 2 to 2");
  expect_refused(
      sharp(), [](auto& w) { w.terms[1].bits = 2; }, "linear.terms[1].bits: expected 1 to 1");
  expect_refused(
      sharp(), [](auto& w) { w.terms[0].lattice = static_cast<LatticeBook>(9); },
      "linear.terms[0].book: expected e8p or e8_byte");
  expect_refused(
      sharp(), [](auto& w) { std::swap(w.terms[0].codes_plane, w.terms[1].codes_plane); },
      "linear.terms[0].codes: expected a plane of i16");
  expect_refused(
      sharp(),
      [](auto& w) {
        w.terms[1].lattice = LatticeBook::e8p;
        w.terms[1].bits = 2;
      },
      "linear.terms[1].codes: expected a plane of i16");
  expect_refused(
      sharp(),
      [](auto& w) {
        w.terms[1].grid.kind = GridKind::group;
        w.terms[1].grid.group = 48;
      },
      "linear.terms[1].grid.kind: expected tensor or row");
  expect_refused(
      sharp(), [](auto& w) { w.cols = 44; }, "linear.cols: expected a multiple of 8");
  expect_refused(
      sharp(), [](auto& w) { w.terms[0].mu_plane = 0; }, "linear.terms[0].mu");
  expect_refused(
      sharp(), [](auto& w) { w.terms[0].grid.zero_plane = 0; },
      "linear.terms[0].grid.zeros: expected no plane unless the term is affine");
  expect_refused(
      sharp(), [](auto& w) { w.rows = 25; }, "");
}

// Sizes without a transform, from the structure alone.
TEST(TransformWeight, RefusesSizesWithoutATransform) {
  const auto structure = [](std::int64_t rows, std::int64_t cols, TransformKind kind) {
    LinearWeight w;
    w.rows = rows;
    w.cols = cols;
    Term t;
    t.kind = TermKind::dense;
    w.planes.push_back({"dense", DType::bf16, 0, rows, cols, {}});
    w.planes.push_back({"signs", DType::u8, 1, 1, cols, {}});
    t.codes_plane = 0;
    w.terms.push_back(t);
    w.right.kind = kind;
    if (kind == TransformKind::hadamard) w.right.signs_plane = 1;
    if (kind == TransformKind::butterfly) w.planes.pop_back();
    return w;
  };
  const auto message = [](const LinearWeight& w) -> std::string {
    try {
      validate_structure(w, "file", "linear");
    } catch (const FormatError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message(structure(1, 11008, TransformKind::hadamard)), "");
  EXPECT_EQ(message(structure(1, 11264, TransformKind::butterfly)), "");
  EXPECT_NE(message(structure(1, 11264, TransformKind::hadamard))
                .find("linear.right: expected a size with a Hadamard matrix, found 11264"),
            std::string::npos);
  EXPECT_NE(message(structure(1, 2062, TransformKind::butterfly))
                .find("linear.right: expected a size up to 65536 with two sides up to 1024, found "
                      "2062 = 2 * 1031"),
            std::string::npos);
  EXPECT_NE(
      message(structure(1, 131072, TransformKind::butterfly)).find("found 131072 = 512 * 256"),
      std::string::npos);
  // 2^31 - 1 is prime: refused before anything of that size is made.
  EXPECT_NE(message(structure(1, max_dimension, TransformKind::butterfly)).find("linear.right"),
            std::string::npos);
}

TEST(TransformWeight, RefusesMalformedJson) {
  const OwnedLinear quip = quip_weight(24, 48, 2), sharp = quipsharp_weight(24, 48, true);
  const auto text = [](const OwnedLinear& w) {
    std::vector<std::uint32_t> ids(w.weight.planes.size());
    std::iota(ids.begin(), ids.end(), 0U);
    return describe(w.weight, ids).dump();
  };
  struct Edit {
    const OwnedLinear* w;
    const char* from;
    const char* to;
    const char* message;
  };
  const std::vector<Edit> edits = {
      {&quip, R"("left":{"kind":"butterfly",)", R"("left":{"kind":"givens",)",
       "left.kind: expected one of hadamard, butterfly"},
      {&quip, R"("left":{"kind":"butterfly",)", R"("left":{"kind":"none",)", "left.kind"},
      {&quip, R"("left":{"kind":"butterfly",)", R"("left":{"kind":"butterfly","rank":1,)",
       "left.\"rank\""},
      {&quip, R"("left":{"kind":"butterfly",)", R"("left":{"kind":"hadamard",)", "left.\"seed\""},
      {&quip, R"("seed":9,"stream":4})", R"("seed":9})", "left.stream: expected an integer"},
      {&quip, R"("seed":9,"stream":4})", R"("seed":-9,"stream":4})", "left.seed"},
      {&quip, R"("seed":9,"stream":4})", R"("seed":9223372036854775808,"stream":4})", "left.seed"},
      {&quip, R"("shared":true)", R"("shared":1)", "right.shared: expected true or false"},
      {&quip, R"("midrise":true)", R"("midrise":1)", "grid.midrise: expected true or false"},
      {&sharp, R"("book":"e8p",)", "", "terms[0].book: expected"},
      {&sharp, R"("book":"e8p",)", R"("book":"d4",)",
       "terms[0].book: expected one of e8p, e8_byte"},
      {&quip, R"("kind":"affine",)", R"("kind":"affine","book":"e8p",)",
       "terms[0].book: expected nothing unless the term is a lattice"},
      {&sharp, R"("left":{"kind":"hadamard","signs")", R"("left":{"kind":"hadamard","seed")",
       "left.\"seed\""},
  };
  for (const Edit& edit : edits) {
    std::string json = text(*edit.w);
    const std::size_t at = json.find(edit.from);
    ASSERT_NE(at, std::string::npos) << edit.from << " in " << json;
    json.replace(at, std::string(edit.from).size(), edit.to);
    std::vector<std::uint32_t> ids;
    try {
      static_cast<void>(linear_from_json(parse_json(json, "a"), "a", "l", ids));
      ADD_FAILURE() << "accepted: " << edit.to;
    } catch (const FormatError& e) {
      EXPECT_NE(std::string(e.what()).find(edit.message), std::string::npos)
          << edit.to << ": " << e.what();
    }
  }
}

TEST(TransformWeight, EncodersRefuse) {
  const std::vector<float> signs = {1.0F, -1.0F, 0.5F};
  EXPECT_THROW(static_cast<void>(signs_plane(signs)), Error);
  OwnedLinear w;
  w.weight.right.kind = TransformKind::hadamard;
  w.weight.right.signs_plane = w.add(signs_plane(std::span(signs).first(2)));
  EXPECT_EQ(read_signs(w.weight, w.weight.right), (std::vector<float>{1.0F, -1.0F}));
}

}  // namespace
}  // namespace engine::test
