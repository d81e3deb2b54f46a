#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "formats/json.h"
#include "formats/safetensors.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::expect_contains;

constexpr const char* kIndex = "model.safetensors.index.json";

// A shard with one-byte tensors of these names.
void write_shard(const fs::path& path, const std::vector<std::string>& names) {
  std::vector<TensorDecl> decls;
  for (const std::string& name : names) decls.push_back({name, TensorDType::u8, {1}});
  SafetensorsWriter writer(path, decls);
  for (const std::string& name : names) {
    writer.append(name, std::as_bytes(std::span(name)).first(1));
  }
  writer.commit();
}

TEST(Checkpoint, ShardsRoundTrip) {
  const testing::TempDir dir;
  const fs::path out = dir.path() / "sub" / "out";
  std::vector<TensorDecl> decls;
  for (int i = 0; i < 7; ++i) {
    decls.push_back({"t" + std::to_string(i), TensorDType::i16, {5 + i}});
  }
  decls.push_back({"empty", TensorDType::f32, {0}});
  {
    ShardedCheckpointWriter writer(out, decls, 40);  // two or three tensors per shard
    for (std::size_t i = 0; i < decls.size(); ++i) {
      const std::string bytes(declared_bytes(decls[i]), static_cast<char>('a' + i));
      writer.append(decls[i].name, std::as_bytes(std::span(bytes)));
    }
    EXPECT_FALSE(fs::exists(out / kIndex));
    writer.commit();
  }
  const Checkpoint checkpoint(out);
  EXPECT_GT(checkpoint.files().size(), 2U);
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < decls.size(); ++i) {
    const TensorInfo& info = checkpoint.require(decls[i].name, decls[i].shape, {decls[i].dtype});
    total += declared_bytes(decls[i]);
    ASSERT_EQ(checkpoint.bytes(info).size(), declared_bytes(decls[i]));
    for (const std::byte byte : checkpoint.bytes(info)) {
      ASSERT_EQ(static_cast<char>(byte), static_cast<char>('a' + i));
    }
  }
  EXPECT_EQ(checkpoint.total_bytes(), total);
  const Json index = read_json_file(out / kIndex);
  EXPECT_EQ(index["metadata"]["total_size"].get<std::uint64_t>(), total);
  const std::string shard = index["weight_map"]["t0"].get<std::string>();
  EXPECT_EQ(shard,
            "model-00001-of-0000" + std::to_string(checkpoint.files().size()) + ".safetensors");
  EXPECT_EQ(checkpoint.file_of(*checkpoint.find("t0")), out / shard);
  for (const auto& entry : fs::directory_iterator(out)) {
    EXPECT_EQ(entry.path().string().find("partial"), std::string::npos) << entry.path();
  }
}

TEST(Checkpoint, OneShardNeedsNoIndex) {
  const testing::TempDir dir;
  ShardedCheckpointWriter writer(dir.path(), {{"a", TensorDType::u8, {2}}});
  writer.append("a", std::as_bytes(std::span("xy", 2)));
  writer.commit();
  EXPECT_TRUE(fs::exists(dir.path() / "model.safetensors"));
  EXPECT_FALSE(fs::exists(dir.path() / kIndex));
  EXPECT_EQ(Checkpoint(dir.path() / "model.safetensors").names(), std::vector<std::string>{"a"});
  expect_contains(error_of([&] {
                    ShardedCheckpointWriter again(dir.path(), {{"a", TensorDType::u8, {2}}});
                  }),
                  "already holds a checkpoint (model.safetensors)");
}

TEST(Checkpoint, AnIncompleteWriterLeavesNothing) {
  const testing::TempDir dir;
  {
    ShardedCheckpointWriter writer(dir.path(),
                                   {{"a", TensorDType::u8, {2}}, {"b", TensorDType::u8, {2}}}, 2);
    writer.append("a", std::as_bytes(std::span("xy", 2)));
    expect_contains(error_of([&] { writer.commit(); }), "tensor \"b\" is incomplete");
  }
  EXPECT_TRUE(fs::is_empty(dir.path()));
  expect_contains(error_of([&] {
                    ShardedCheckpointWriter writer(
                        dir.path(), {{"a", TensorDType::u8, {2}}, {"a", TensorDType::u8, {2}}}, 2);
                  }),
                  "tensor \"a\" twice");
}

TEST(Checkpoint, TheIndexRules) {
  const testing::TempDir dir;
  write_shard(dir.path() / "model.safetensors", {"stray"});
  write_shard(dir.path() / "one.safetensors", {"a", "unlisted"});
  write_shard(dir.path() / "two.safetensors", {"b", "a"});
  dir.file(kIndex, R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(checkpoint.file_of(*checkpoint.find("a")).filename(), "one.safetensors");
  EXPECT_EQ(checkpoint.find("stray"), nullptr);
  EXPECT_EQ(checkpoint.find("unlisted"), nullptr);
}

TEST(Checkpoint, RejectsEveryMalformedIndex) {
  struct Case {
    std::string index;
    std::string message;
  };
  const std::vector<Case> cases = {
      {"{", "valid JSON"},
      {"[]", "expected an object, found []"},
      {"{}", "weight_map: expected an object, found nothing"},
      {R"({"weight_map": []})", "weight_map: expected an object, found []"},
      {R"({"weight_map": {}})", "weight_map: expected at least one tensor, found none"},
      {R"({"weight_map": {"a": 1}})",
       "weight_map.\"a\": expected the name of a file in the same directory, found 1"},
      {R"({"weight_map": {"a": ""}})", "the name of a file in the same directory"},
      {R"({"weight_map": {"a": "../one.safetensors"}})", "found \"../one.safetensors\""},
      {R"({"weight_map": {"a": ".."}})", "the name of a file in the same directory"},
      {R"({"weight_map": {"a": "one.safetensors\u0000"}})", "file in the same directory"},
      {R"({"weight_map": {"a": "gone.safetensors"}})",
       "weight_map.\"a\": expected the shard \"gone.safetensors\" beside it, found no such file"},
      {R"({"weight_map": {"c": "one.safetensors"}})", "one.safetensors, found no such tensor"},
      {R"({"weight_map": {"a": "broken.safetensors"}})", "broken.safetensors: header length"},
      {R"({"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}})", "key \"a\""},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.index);
    const testing::TempDir dir;
    write_shard(dir.path() / "one.safetensors", {"a"});
    dir.file("broken.safetensors", "xyz");
    dir.file(kIndex, c.index);
    expect_contains(error_of([&] { Checkpoint checkpoint(dir.path()); }), c.message);
  }
}

TEST(Checkpoint, SaysWhatElseItFound) {
  const auto message = [](const std::string& file) {
    const testing::TempDir dir;
    if (!file.empty()) dir.file(file, "x");
    return error_of([&] { Checkpoint checkpoint(dir.path()); });
  };
  expect_contains(message(""),
                  "expected model.safetensors or model.safetensors.index.json, found neither");
  expect_contains(message("pytorch_model.bin"), "pytorch_model.bin, a PyTorch pickle");
  expect_contains(message("original/consolidated.00.pth"), "consolidated.00.pth, a PyTorch pickle");
  expect_contains(message("m.gguf"), "a GGUF file");
  expect_contains(error_of([] { Checkpoint checkpoint("/nonexistent/model"); }),
                  "/nonexistent/model: not found");
}

TEST(Checkpoint, RequireNamesTensorExpectedAndFound) {
  const testing::TempDir dir;
  write_shard(dir.path() / "model.safetensors", {"a"});
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.require("a", {1}, {TensorDType::u8, TensorDType::f16}).name, "a");
  const auto message = [&](std::string_view name, std::initializer_list<std::int64_t> shape,
                           TensorDType dtype) {
    return error_of([&] { checkpoint.require(name, shape, {dtype, TensorDType::bf16}); });
  };
  expect_contains(message("a", {1}, TensorDType::f16),
                  "model.safetensors: tensor \"a\": expected [1] of F16 or BF16, found [1] of U8");
  expect_contains(message("a", {2, 1}, TensorDType::u8),
                  "expected [2, 1] of U8 or BF16, found [1] of U8");
  expect_contains(message("a", {}, TensorDType::u8), "expected [] of U8 or BF16");
  expect_contains(message("b", {1}, TensorDType::u8),
                  "tensor \"b\": expected [1] of U8 or BF16, found no such tensor");
}

}  // namespace
}  // namespace engine
