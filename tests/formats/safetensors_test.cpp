#include "formats/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "formats/json.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::expect_contains;

std::string with_length(std::uint64_t length, const std::string& rest) {
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + rest;
}

// A file of this header and so many bytes of data.
std::string file_bytes(const std::string& header, std::size_t data) {
  return with_length(header.size(), header + std::string(data, '\1'));
}

SafetensorsHeader parse(const std::string& bytes) {
  return parse_safetensors(std::as_bytes(std::span(bytes)), "f");
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

TEST(Safetensors, ReadsTensorsInTheOrderOfTheData) {
  const std::string bytes = file_bytes(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[1],"data_offsets":[6,10]},)"
      R"("a":{"dtype":"BF16","shape":[3,1],"data_offsets":[0,6]},)"
      R"("none":{"dtype":"F32","shape":[4,0],"data_offsets":[6,6]},)"
      R"("s":{"dtype":"U8","shape":[],"data_offsets":[10,11]}}   )",
      11);
  const SafetensorsHeader header = parse(bytes);
  ASSERT_EQ(header.tensors.size(), 4U);
  const std::vector<std::string> names = {"a", "none", "b", "s"};
  for (std::size_t i = 0; i < names.size(); ++i) EXPECT_EQ(header.tensors[i].name, names[i]);
  EXPECT_EQ(header.tensors[0].dtype, TensorDType::bf16);
  EXPECT_EQ(header.tensors[0].shape, (std::vector<std::int64_t>{3, 1}));
  EXPECT_EQ(header.tensors[0].begin, bytes.size() - 11);
  EXPECT_EQ(header.tensors[3].end, bytes.size());
  ASSERT_EQ(header.metadata.size(), 1U);
  EXPECT_EQ(header.metadata[0].second, "pt");
  EXPECT_TRUE(parse(file_bytes("{}", 0)).tensors.empty());
}

TEST(Safetensors, RejectsEveryMalformedHeader) {
  struct Case {
    const char* what;
    std::string bytes;
    std::string message;
  };
  const auto one = [](const std::string& entry, std::size_t data) {
    return file_bytes("{\"t\":" + entry + "}", data);
  };
  const auto tensor = [](const std::string& shape, const std::string& range) {
    return R"({"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + range + "}";
  };
  const auto two = [&](const std::string& first, const std::string& second, std::size_t data) {
    return file_bytes("{\"t\":" + tensor("[1]", first) + ",\"u\":" + tensor("[1]", second) + "}",
                      data);
  };
  const std::string good = tensor("[1]", "[0,4]");
  const std::vector<Case> cases = {
      {"no bytes", "", "f: header length: expected 8 bytes, found 0"},
      {"truncated length", std::string(7, '\0'), "header length: expected 8 bytes, found 7"},
      {"header beyond the file", with_length(3, "{}"), "at most the 2 bytes that follow, found 3"},
      {"header over 100 MB", with_length(100'000'001, "{}"), "expected at most 100000000"},
      {"huge header", with_length(UINT64_MAX, "{}"), "expected at most 100000000"},
      {"empty header", with_length(0, ""), "expected valid JSON"},
      {"not JSON", file_bytes("hello", 0), "expected valid JSON"},
      {"cut JSON", file_bytes("{\"t\":", 0), "expected valid JSON"},
      {"text after JSON", file_bytes("{}x", 0), "expected valid JSON"},
      {"invalid UTF-8", file_bytes("{\"\xff\":1}", 0), "expected valid JSON"},
      {"not an object", file_bytes("[]", 0), "header: expected a JSON object, found []"},
      {"deep nesting", file_bytes(std::string(5000, '['), 0), "at most 8 nested levels"},
      {"duplicate name", file_bytes("{\"t\":" + good + ",\"t\":" + good + "}", 4), "key \"t\""},
      {"duplicate field",
       one(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})", 4),
       "key \"dtype\""},
      {"entry not an object", one("5", 0), "tensor \"t\": expected an object, found 5"},
      {"null entry", one("null", 0), "tensor \"t\": expected an object, found null"},
      {"unknown dtype", one(R"({"dtype":"F17","shape":[1],"data_offsets":[0,4]})", 4),
       "tensor \"t\".dtype: expected a known dtype such as F16, BF16 or I32, found \"F17\""},
      {"dtype missing", one(R"({"shape":[1],"data_offsets":[0,4]})", 4),
       ".dtype: expected a string, found nothing"},
      {"shape missing", one(R"({"dtype":"F32","data_offsets":[0,4]})", 4),
       ".shape: expected an array, found nothing"},
      {"shape not an array", one(tensor("1", "[0,4]"), 4), ".shape: expected an array, found 1"},
      {"negative dim", one(tensor("[-1]", "[0,4]"), 4), ".shape: expected an integer from 0"},
      {"fractional dim", one(tensor("[1.0]", "[0,4]"), 4), ".shape: expected an integer from 0"},
      {"dim over 63 bits", one(tensor("[9223372036854775808]", "[0,4]"), 4),
       ".shape: expected an integer from 0"},
      {"overflowing dims", one(tensor("[4294967296,4294967296]", "[0,4]"), 4),
       ".shape: expected a size in bytes below 2^64"},
      {"overflowing bytes", one(tensor("[4611686018427387904]", "[0,0]"), 0),
       ".shape: expected a size in bytes below 2^64"},
      {"offsets missing", one(R"({"dtype":"F32","shape":[1]})", 4), "[begin, end], found nothing"},
      {"one offset", one(tensor("[1]", "[0]"), 4), "expected [begin, end], found [0]"},
      {"three offsets", one(tensor("[1]", "[0,4,4]"), 4), "expected [begin, end]"},
      {"negative offset", one(tensor("[1]", "[-4,0]"), 4), "expected an integer from 0 to 4"},
      {"text offset", one(tensor("[1]", "[\"0\",4]"), 4), "found \"0\""},
      {"end out of range", one(tensor("[1]", "[0,5]"), 4),
       "tensor \"t\".data_offsets: expected an integer from 0 to 4, found 5"},
      {"huge end", one(tensor("[1]", "[0,18446744073709551615]"), 4), "an integer from 0 to 4"},
      {"begin > end", one(tensor("[1]", "[4,0]"), 4), "expected begin <= end"},
      {"too few bytes", one(tensor("[1]", "[0,3]"), 3), "4 bytes for F32 [1], found 3"},
      {"too many bytes", one(tensor("[1]", "[0,8]"), 8), "4 bytes for F32 [1], found 8"},
      {"empty with bytes", one(tensor("[0]", "[0,4]"), 4), "0 bytes for F32 [0], found 4"},
      {"overlap", two("[0,4]", "[2,6]", 6),
       "tensor \"u\".data_offsets: expected to begin at 4 where the tensor before it ends, found "
       "an overlap from 2"},
      {"same range", two("[0,4]", "[0,4]", 4), "an overlap from 0"},
      {"gap", two("[0,4]", "[6,10]", 10), "found a gap up to 6"},
      {"gap in front", one(tensor("[1]", "[4,8]"), 8), "found a gap up to 4"},
      {"trailing bytes", one(good, 5), "data: expected 4 bytes of tensors, found 5 bytes"},
      {"data without tensors", file_bytes("{}", 1), "expected 0 bytes of tensors"},
      {"metadata not an object", file_bytes(R"({"__metadata__":1})", 0), "expected an object"},
      {"metadata not text", file_bytes(R"({"__metadata__":{"a":1}})", 0),
       "__metadata__.\"a\": expected a string, found 1"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    const std::string message = error_of([&] { (void)parse(c.bytes); });
    expect_contains(message, c.message);
    EXPECT_EQ(message.substr(0, 1), "f");
  }
  EXPECT_EQ(parse(one(good, 4)).tensors.size(), 1U) << "the template of the cases is valid";
}

TEST(Safetensors, DTypesHaveNamesAndSizes) {
  const std::vector<std::size_t> sizes = {8, 4, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1};
  const std::vector<std::string> names = {"F64",     "F32", "F16", "BF16", "F8_E4M3",
                                          "F8_E5M2", "I64", "I32", "I16",  "I8",
                                          "U64",     "U32", "U16", "U8",   "BOOL"};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_EQ(dtype_size(static_cast<TensorDType>(i)), sizes[i]);
    EXPECT_EQ(dtype_name(static_cast<TensorDType>(i)), names[i]);
  }
}

TEST(SafetensorsWriter, RoundTripsAllDTypes) {
  const testing::TempDir dir;
  const fs::path path = dir.path() / "model.safetensors";
  std::vector<TensorDecl> decls;
  std::string data;
  for (int i = 0; i < 15; ++i) {
    const auto dtype = static_cast<TensorDType>(i);
    decls.push_back({"t" + std::to_string(i), dtype, {i % 4, 3}});
  }
  decls.push_back({"scalar", TensorDType::f32, {}});
  SafetensorsWriter writer(path, decls);
  for (const TensorDecl& decl : decls) {
    std::string bytes(declared_bytes(decl), '\0');
    std::iota(bytes.begin(), bytes.end(), static_cast<char>(data.size()));
    data += bytes;
    const std::size_t half = bytes.size() / 2;  // any pieces
    writer.append(decl.name, bytes_of(bytes).first(half));
    writer.append(decl.name, bytes_of(bytes).subspan(half));
  }
  EXPECT_FALSE(fs::exists(path));
  writer.commit();

  const std::string raw = read_text_file(path, 1 << 20);
  std::uint64_t header = 0;
  std::memcpy(&header, raw.data(), sizeof(header));
  EXPECT_EQ(header % 8, 0U);
  EXPECT_EQ(raw.substr(8 + header), data);
  expect_contains(raw, R"({"__metadata__":{"format":"pt"},"t0":{"dtype":"F64","shape":[0,3],)");

  const Checkpoint checkpoint(dir.path());
  std::size_t at = 0;
  for (const TensorDecl& decl : decls) {
    const TensorInfo& info = checkpoint.require(decl.name, decl.shape, {decl.dtype});
    const auto bytes = checkpoint.bytes(info);
    ASSERT_EQ(bytes.size(), declared_bytes(decl));
    if (!bytes.empty()) {  // memcmp takes no null
      EXPECT_EQ(std::memcmp(bytes.data(), data.data() + at, bytes.size()), 0);
    }
    at += bytes.size();
  }
  EXPECT_EQ(checkpoint.total_bytes(), data.size());
  EXPECT_EQ(checkpoint.names().size(), decls.size());
  EXPECT_EQ(checkpoint.names().front(), "scalar");
}

TEST(SafetensorsWriter, RefusesMisuse) {
  const testing::TempDir dir;
  const fs::path path = dir.path() / "w";
  const TensorDecl a{"a", TensorDType::f32, {1}};
  const TensorDecl b{"b", TensorDType::u8, {2}};
  const auto declare = [&](std::vector<TensorDecl> decls) {
    return error_of([&] { SafetensorsWriter writer(path, std::move(decls)); });
  };
  expect_contains(declare({a, a}), "tensor name \"a\" is empty, reserved or used twice");
  expect_contains(declare({{"", TensorDType::f32, {1}}}), "empty, reserved");
  expect_contains(declare({{"__metadata__", TensorDType::f32, {1}}}), "reserved");
  expect_contains(declare({{"n", TensorDType::f32, {-1}}}), "impossible shape [-1]");
  expect_contains(declare({{"n", TensorDType::f32, {INT64_MAX, 2}}}), "impossible shape");
  {
    SafetensorsWriter writer(path, {a, b});
    expect_contains(error_of([&] { writer.append("b", bytes_of("xy")); }),
                    "tensors out of order: expected \"a\", found \"b\"");
    expect_contains(error_of([&] { writer.append("a", bytes_of("12345")); }),
                    "expected at most 4 more bytes, found 5");
    writer.append("a", bytes_of("1234"));
    writer.append("b", bytes_of("x"));
    expect_contains(error_of([&] { writer.commit(); }), "tensor \"b\" is incomplete");
    writer.append("b", bytes_of("y"));
    expect_contains(error_of([&] { writer.append("b", bytes_of("z")); }), "expected no more data");
  }
  EXPECT_TRUE(fs::is_empty(dir.path())) << "nothing may remain without a commit";
}

}  // namespace
}  // namespace engine
