// LinearWeight to JSON and back, and the JSON that must be refused.
#include <gtest/gtest.h>

#include "engine/weight/codec.h"
#include "engine/weight/serialize.h"

namespace engine {
namespace {

LinearWeight read(const std::string& text, std::vector<std::uint32_t>& ids) {
  return linear_from_json(parse_json(text, "a.qw"), "a.qw", "linears[3]", ids);
}

// One canonical text that uses every field; describe(read(text)) must give it back.
const std::string& every_field() {
  static const std::string text =
      R"({"rows":4,"cols":6,"terms":[)"
      R"({"kind":"affine","bits":3,"codes":0,"grid":{"kind":"group","group":2,"scales":1,)"
      R"("zeros":2,"column_groups":3,"product":"f16"},)"
      R"("support":{"columns":{"select":"not_in","plane":4},)"
      R"("bitmap":{"select":"in","plane":5},"compact":true}},)"
      R"({"kind":"sign","bits":1,"codes":5,"grid":{"kind":"row","scales":6,"product":"f32"},)"
      R"("mu":6,"support":{"bitmap":{"select":"not_in","plane":5}}},)"
      R"({"kind":"codebook","bits":4,"codes":7,"grid":{"kind":"tensor","scales":8,)"
      R"("product":"f32"},"codebook":9,"support":{"columns":{"select":"in","plane":4}}},)"
      R"({"kind":"dense","codes":10}],"permutation":3,"diagonal":11,"planes":[)"
      R"({"id":4294967295,"role":"codes","dtype":"u8","bits":3,"rows":1,"cols":5},)"
      R"({"id":1,"role":"scales","dtype":"f16","rows":4,"cols":3},)"
      R"({"id":2,"role":"zeros","dtype":"i16","rows":4,"cols":3},)"
      R"({"id":3,"role":"column_groups","dtype":"i32","rows":1,"cols":6},)"
      R"({"id":4,"role":"columns","dtype":"i32","rows":1,"cols":2},)"
      R"({"id":5,"role":"bitmap","dtype":"u8","bits":1,"rows":4,"cols":6},)"
      R"({"id":6,"role":"alpha","dtype":"bf16","rows":4,"cols":1},)"
      R"({"id":7,"role":"codes","dtype":"u8","bits":4,"rows":4,"cols":6},)"
      R"({"id":8,"role":"scales","dtype":"f32","rows":1,"cols":1},)"
      R"({"id":9,"role":"codebook","dtype":"f32","rows":1,"cols":16},)"
      R"({"id":10,"role":"dense","dtype":"bf16","rows":4,"cols":6},)"
      R"({"id":0,"role":"diagonal","dtype":"f32","rows":1,"cols":6}]})";
  return text;
}

TEST(WeightJson, EveryFieldSurvives) {
  std::vector<std::uint32_t> ids = {77};
  const LinearWeight w = read(every_field(), ids);
  EXPECT_EQ(describe(w, ids).dump(), every_field());
  EXPECT_EQ(ids, (std::vector<std::uint32_t>{4294967295U, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0}));
  ASSERT_EQ(w.terms.size(), 4U);
  EXPECT_EQ(w.rows, 4);
  EXPECT_EQ(w.cols, 6);
  EXPECT_EQ(w.terms[0].kind, TermKind::affine);
  EXPECT_EQ(w.terms[0].bits, 3);
  EXPECT_EQ(w.terms[0].grid.kind, GridKind::group);
  EXPECT_EQ(w.terms[0].grid.group, 2);
  EXPECT_EQ(w.terms[0].grid.zero_plane, 2);
  EXPECT_EQ(w.terms[0].grid.column_group_plane, 3);
  EXPECT_EQ(w.terms[0].grid.product, DType::f16);
  EXPECT_EQ(w.terms[0].support.columns, Select::not_in);
  EXPECT_EQ(w.terms[0].support.bitmap, Select::in);
  EXPECT_TRUE(w.terms[0].support.compact);
  EXPECT_EQ(w.terms[1].mu_plane, 6);
  EXPECT_EQ(w.terms[1].support.bitmap, Select::not_in);
  EXPECT_FALSE(w.terms[1].support.compact);
  EXPECT_EQ(w.terms[2].codebook_plane, 9);
  EXPECT_EQ(w.terms[3].bits, 0);
  EXPECT_EQ(w.terms[3].codes_plane, 10);
  EXPECT_EQ(w.permutation_plane, 3);
  EXPECT_EQ(w.diagonal_plane, 11);
  EXPECT_EQ(w.planes[0].raw_bytes(), 2);  // 5 codes of 3 bits
  EXPECT_EQ(w.planes[2].dtype, DType::i16);
  EXPECT_EQ(w.planes[2].raw_bytes(), 24);
  EXPECT_EQ(w.planes[2].data.data, nullptr);
  // Described only: decoding must refuse it, not read it.
  EXPECT_THROW(validate(w, "a.qw", "linears[3]"), FormatError);
}

struct Edit {
  const char* from;
  const char* to;
  const char* message;
};

TEST(WeightJson, RefusesMalformed) {
  const std::vector<Edit> edits = {
      {R"("rows":4,"cols":6,"terms")", R"("cols":6,"terms")", "linears[3].rows: expected"},
      {R"({"rows":4,)", R"({"rows":0,)", "linears[3].rows: expected"},
      {R"({"rows":4,)", R"({"rows":2147483648,)", "linears[3].rows: expected"},
      {R"({"rows":4,)", R"({"rows":18446744073709551615,)", "linears[3].rows: expected"},
      {R"({"rows":4,)", R"({"rows":4.0,)", "linears[3].rows: expected"},
      {R"({"rows":4,)", R"({"rows":5,)", "expected a plane of shape [5, "},
      {R"({"rows":4,)", R"({"hadamard":1,"rows":4,)", "hadamard\": expected no such key"},
      {R"({"kind":"dense",)", R"({"kind":"dense","adapter":1,)", "terms[3].\"adapter\""},
      {R"("product":"f16"})", R"("product":"f16","dyadic":2})", "terms[0].grid.\"dyadic\""},
      {R"("compact":true)", R"("compact":true,"rank":2)", "terms[0].support.\"rank\""},
      {R"({"id":1,)", R"({"id":1,"offset":0,)", "planes[1].\"offset\""},
      {R"({"kind":"dense",)", R"({"kind":"ternary",)",
       "terms[3].kind: expected one of dense, affine, codebook, sign, lattice, found \"ternary\""},
      {R"({"kind":"dense",)", R"({"kind":7,)", "terms[3].kind: expected a string"},
      {R"({"kind":"dense",)", R"({"kind":"dense","bits":4,)", "terms[3].bits"},
      {R"("bits":3,"codes":0)", R"("bits":9,"codes":0)", "terms[0].bits"},
      {R"("bits":3,"codes":0)", R"("bits":2,"codes":0)", "terms[0].codes: expected a plane of 2"},
      {R"("codes":0)", R"("codes":12)", "terms[0].codes: expected an integer from 0 to 11"},
      {R"("codes":0)", R"("codes":-1)", "terms[0].codes: expected an integer from 0 to 11"},
      {R"("codes":0)", R"("codes":"0")", "terms[0].codes: expected an integer"},
      {R"("codes":0,)", "", "terms[0].codes: expected an integer"},
      {R"("kind":"group")", R"("kind":"block")", "grid.kind: expected one of tensor, row, group"},
      {R"("kind":"group","group":2)", R"("kind":"group")", "grid.group"},
      {R"("kind":"row",)", R"("kind":"row","group":2,)", "terms[1].grid.group: expected nothing"},
      {R"("scales":6,"product":"f32"},"mu")", R"("product":"f32"},"mu")", "terms[1].grid.scales"},
      {R"("product":"f16")", R"("product":"bf16")", "grid.product: expected one of f32, f16"},
      {R"("select":"not_in","plane":4)", R"("select":"all","plane":4)",
       "support.columns.select: expected one of in, not_in"},
      {R"("select":"not_in","plane":4)", R"("select":"not_in")", "support.columns.plane"},
      {R"("compact":true)", R"("compact":1)", "support.compact: expected true or false"},
      {R"("codebook":9,)", "", "terms[2].codebook: expected a plane index"},
      {R"("mu":6,)", R"("mu":1,)", "terms[1].mu: expected a plane of shape [4, 1]"},
      {R"("permutation":3)", R"("permutation":4)", "permutation: expected a plane of shape [1, 6]"},
      {R"("permutation":3)", R"("permutation":[3])", "permutation: expected an integer"},
      {R"("diagonal":11)", R"("diagonal":3)", "diagonal: expected a plane of f32"},
      {R"(,"diagonal":11)", "", "planes[11]: expected a plane that something refers to"},
      {R"({"id":1,)", R"({"id":2,)", "planes[2].id: expected each plane once"},
      {R"({"id":4294967295,)", R"({"id":4294967296,)", "planes[0].id"},
      {R"("dtype":"i16")", R"("dtype":"f64")", "planes[2].dtype: expected one of f32"},
      {R"("dtype":"i16")", R"("dtype":"i16","bits":4)", "planes[2].dtype: expected u8"},
      {R"("bits":3,"rows":1)", R"("bits":0,"rows":1)", "planes[0].bits"},
      {R"("role":"alpha")", R"("role":"")", "planes[6].role"},
      {R"("role":"alpha")", R"("role":"an alpha of far too many characters")", "planes[6].role"},
      {R"("rows":1,"cols":5})", R"("rows":1,"cols":0})", "planes[0].cols"},
  };
  for (const Edit& edit : edits) {
    std::string text = every_field();
    const std::size_t at = text.find(edit.from);
    ASSERT_NE(at, std::string::npos) << edit.from;
    text.replace(at, std::string(edit.from).size(), edit.to);
    std::vector<std::uint32_t> ids;
    try {
      (void)read(text, ids);
      ADD_FAILURE() << "accepted " << edit.from << " -> " << edit.to;
    } catch (const FormatError& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.rfind("a.qw: linears[3].", 0), 0U) << what;
      EXPECT_NE(what.find(edit.message), std::string::npos) << edit.to << ": " << what;
    }
  }
}

TEST(WeightJson, CapsTermsAndPlanes) {
  const auto replaced = [](const char* key, Json value) {
    Json json = parse_json(every_field(), "a.qw");
    json[key] = std::move(value);
    std::vector<std::uint32_t> ids;
    try {
      (void)linear_from_json(json, "a.qw", "w", ids);
    } catch (const FormatError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  Json terms = Json::array();
  for (int i = 0; i < 9; ++i) terms.push_back({{"kind", "dense"}, {"codes", 10}});
  EXPECT_NE(replaced("terms", terms).find("w.terms: expected an array of 1 to 8 elements"),
            std::string::npos);
  Json planes = Json::array();
  for (int i = 0; i < 65; ++i) planes.push_back(i);
  EXPECT_NE(replaced("planes", planes).find("w.planes: expected an array of 1 to 64 elements"),
            std::string::npos);
  EXPECT_NE(replaced("terms", Json::array()).find("w.terms: expected an array"), std::string::npos);
  EXPECT_NE(replaced("planes", 3).find("w.planes: expected an array"), std::string::npos);
  EXPECT_NE(replaced("terms", Json::array({1})).find("w.terms[0]: expected an object"),
            std::string::npos);
  std::vector<std::uint32_t> ids;
  EXPECT_THROW((void)linear_from_json(Json(3), "a.qw", "w", ids), FormatError);
}

}  // namespace
}  // namespace engine
