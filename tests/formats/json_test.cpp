#include "formats/json.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;

TEST(Json, ParsesEveryKindOfValueInOrder) {
  const Json json = parse_json(
      R"({"z": 1, "a": [true, false, null, -2, 1.5, "t\u00e9"], "m": {"n": {}}, "e": []})", "f");
  EXPECT_EQ(json.dump(), R"({"z":1,"a":[true,false,null,-2,1.5,"té"],"m":{"n":{}},"e":[]})");
  EXPECT_EQ(parse_json(" 7 ", "f").get<int>(), 7);
}

TEST(Json, RejectsMalformedTextWithPosition) {
  struct Case {
    std::string text;
    std::string message;
  };
  const std::vector<Case> cases = {
      {"", "f.json: byte 1: expected valid JSON"},
      {"{", "f.json: byte 2: expected valid JSON"},
      {R"({"a": 1,})", "f.json: byte 9: expected valid JSON"},
      {"[1] x", "f.json: byte 5: expected valid JSON"},
      {"[NaN]", "f.json: byte 2: expected valid JSON"},
      {"[1e999]", "f.json: byte 6: expected valid JSON"},
      {"\"a\nb\"", "expected valid JSON"},
      {"\"\xff\"", "expected valid JSON"},
      {R"(["\ud800"])", "expected valid JSON"},
      {R"({"a": 1, "b": {"a": 1}, "a": 2})", R"(f.json: key "a": expected unique keys)"},
      {R"([{"k": {"x": 1, "x": 1}}])", R"(f.json: key "x": expected unique keys)"},
  };
  for (const Case& c : cases) {
    expect_contains(error_of([&] { (void)parse_json(c.text, "f.json"); }), c.message);
  }
}

TEST(Json, LimitsBytesAndDepth) {
  expect_contains(error_of([] { (void)parse_json("[1, 2]", "f", {.max_bytes = 5}); }),
                  "f: JSON: expected at most 5 bytes, found 6");
  const std::string deep = std::string(64, '[') + std::string(64, ']');
  EXPECT_EQ(parse_json(deep, "f").size(), 1U);
  expect_contains(error_of([&] { (void)parse_json("[" + deep + "]", "f"); }),
                  "at most 64 nested levels");
  // Never closed: must fail by depth long before memory or stack run out.
  expect_contains(error_of([] { (void)parse_json(std::string(1'000'000, '['), "f"); }),
                  "at most 64 nested levels");
}

TEST(Json, LargeObjectsParseInLinearTime) {
  std::string text = "{";
  constexpr int kKeys = 200'000;
  for (int i = 0; i < kKeys; ++i) {
    text += (i > 0 ? ",\"k" : "\"k") + std::to_string(i) + "\":" + std::to_string(i);
  }
  text += "}";
  // Quadratic insertion would take minutes here.
  EXPECT_EQ(parse_json(text, "f").size(), static_cast<std::size_t>(kKeys));
}

TEST(Json, GettersNameTheKeyPath) {
  const Json json = parse_json(R"({"s": "abc", "i": 5, "big": 18446744073709551615, "neg": -3,
      "f": 2.5, "b": true, "n": null, "o": {"p": {"q": "x\ny"}}})",
                               "config.json");
  const JsonObject root(json, "config.json");
  EXPECT_EQ(root.integer("i", 1, 10), 5);
  EXPECT_EQ(root.integer("absent", 1, 10, 7), 7);
  EXPECT_EQ(root.integer("n", 1, 10, 7), 7) << "null counts as absent";
  EXPECT_EQ(root.number("f"), 2.5);
  EXPECT_EQ(root.number("i"), 5.0);
  EXPECT_EQ(root.number("absent", 1.25), 1.25);
  EXPECT_TRUE(root.boolean("b"));
  EXPECT_FALSE(root.boolean("absent", false));
  EXPECT_EQ(root.text("s"), "abc");
  EXPECT_EQ(root.text("absent", "d"), "d");
  EXPECT_TRUE(root.has("s"));
  EXPECT_FALSE(root.has("n"));

  const auto message = [&](auto get) { return error_of([&] { (void)get(); }); };
  EXPECT_EQ(message([&] { return root.integer("s", 1, INT64_MAX); }),
            "config.json: s: expected a positive integer, found \"abc\"");
  EXPECT_EQ(message([&] { return root.integer("i", 6, 9); }),
            "config.json: i: expected an integer from 6 to 9, found 5");
  EXPECT_EQ(message([&] { return root.integer("f", 0, 9); }),
            "config.json: f: expected an integer from 0 to 9, found 2.5");
  EXPECT_EQ(message([&] { return root.integer("neg", 0, 9); }),
            "config.json: neg: expected an integer from 0 to 9, found -3");
  expect_contains(message([&] { return root.integer("big", 1, INT64_MAX); }),
                  "expected a positive integer, found 18446744073709551615");
  EXPECT_EQ(message([&] { return root.integer("absent", 0, 9); }),
            "config.json: absent: expected an integer from 0 to 9, found nothing");
  EXPECT_EQ(message([&] { return root.number("s"); }),
            "config.json: s: expected a number, found \"abc\"");
  EXPECT_EQ(message([&] { return root.boolean("i"); }),
            "config.json: i: expected true or false, found 5");
  EXPECT_EQ(message([&] { return root.text("i"); }), "config.json: i: expected a string, found 5");
  EXPECT_EQ(message([&] { return root.object("i").has("x"); }),
            "config.json: i: expected an object, found 5");
  EXPECT_EQ(message([&] { return root.object("o").object("p").integer("q", 0, 1); }),
            "config.json: o.p.q: expected an integer from 0 to 1, found \"x\\ny\"");
  const Json array = Json::array();
  EXPECT_EQ(message([&] { return JsonObject(array, "a.json").has("x"); }),
            "a.json: JSON: expected an object, found []");
}

TEST(Json, DescriptionsAreShort) {
  EXPECT_LT(quote_text(std::string(100'000, 'x')).size(), 100U);
  EXPECT_EQ(quote_text("a\n\x01"), "\"a\\n\\u0001\"");
  EXPECT_EQ(quote_text("\xff"), "\"\xef\xbf\xbd\"");
  EXPECT_EQ(describe(Json::array({1, 2})), "[1,2]");
  Json large = Json::array();
  for (int i = 0; i < 1000; ++i) large.push_back(i);
  EXPECT_EQ(describe(large), "an array of 1000 elements");
}

TEST(Json, ReadsFiles) {
  const testing::TempDir dir;
  EXPECT_EQ(read_text_file(dir.file("t", "text\n"), 5), "text\n");
  expect_contains(error_of([&] { (void)read_text_file(dir.path() / "t", 4); }),
                  "file size: expected at most 4 bytes, found 5");
  expect_contains(error_of([&] { (void)read_text_file(dir.path() / "absent", 4); }),
                  "absent: cannot open: No such file or directory");
  expect_contains(error_of([&] { (void)read_text_file(dir.path(), 4); }), "not a regular file");
  EXPECT_EQ(read_json_file(dir.file("j", "[3]"))[0], 3);
}

}  // namespace
}  // namespace engine
