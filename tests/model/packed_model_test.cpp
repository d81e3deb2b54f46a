// From quantization through the .qw file and back: what the engine loads is what the reference
// codec reads from the same bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

struct Scheme {
  const char* method;
  const char* options;
  int bits;
  std::int64_t group;
  std::int64_t scale_bytes;
  bool zeros;       // stored
  bool wide_zeros;  // as i32, not in `bits` bits
  bool permutation;
};

const Scheme schemes[] = {
    {"rtn", "--bits 4 --group 128", 4, 128, 4, true, false, false},
    {"rtn", "--bits 3 --group 64 --sym", 3, 64, 4, false, false, false},
    {"rtn", "--bits 2 --group 0 --scale-dtype f16", 2, 0, 2, true, false, false},
    {"rtn", "--bits 8 --group 0 --scale-dtype bf16", 8, 0, 2, true, false, false},
    {"rtn", "--bits 1 --group 32", 1, 32, 4, true, false, false},
    {"rtn", "--bits 5 --group 64 --mse", 5, 64, 4, true, false, false},
    {"rtn", "--bits 3 --group 128 --rule awq --arithmetic f16 --scale-dtype f16", 3, 128, 2, true,
     false, false},
    {"rtn", "--bits 4 --group 64 --rule omniquant --arithmetic f16 --scale-dtype f16", 4, 64, 2,
     true, true, false},
    {"rtn", "--bits 4 --group 0 --rule omniquant", 4, 0, 4, true, true, false},
    {"rtn", "--bits 4 --group 128 --rule awq", 4, 128, 4, true, false, false},
    {"rtn", "--bits 2 --group 128 --rule paper --scale-dtype bf16", 2, 128, 2, true, true, false},
    {"gptq", "--bits 3 --group 128", 3, 128, 4, true, false, false},
    {"gptq", "--bits 4 --group 0 --sym --scale-dtype f16", 4, 0, 2, false, false, false},
    {"gptq", "--bits 3 --group 64 --act-order", 3, 64, 4, true, false, true},
    {"gptq", "--bits 2 --group 0 --act-order --scale-dtype bf16", 2, 0, 2, true, false, true},
    {"gptq", "--bits 4 --group 64 --static-groups", 4, 64, 4, true, false, false},
    {"gptq", "--bits 8 --group 128 --act-order --static-groups", 8, 128, 4, true, false, false},
    {"gptq", "--bits 4 --group 32 --true-sequential --factor f32", 4, 32, 4, true, false, false},
};

std::int64_t stored_by_hand(const Scheme& s, std::int64_t rows, std::int64_t cols) {
  const std::int64_t groups = s.group == 0 ? 1 : cols / s.group;
  const std::int64_t code_row = (cols * s.bits + 7) / 8;
  const std::int64_t zero_row = !s.zeros       ? 0
                                : s.wide_zeros ? 4 * groups
                                               : (groups * s.bits + 7) / 8;
  return rows * (code_row + groups * s.scale_bytes + zero_row) + (s.permutation ? 4 * cols : 0);
}

class PackedModelTest : public ::testing::Test {
 protected:
  PackedModelTest() {
    TinyCheckpoint options;
    options.tokenizer = data / "tokenizer.json";
    tensors_ = write_tiny_checkpoint(dir_.path() / "model", options);
    source_ = open_checkpoint(dir_.path() / "model");
    tokens_ = {synthetic_tokens(8 * 64, options.config.vocab, 3), 8, 64};
  }
  [[nodiscard]] QuantRun run_of(const Scheme& s) const {
    return {.method = s.method, .options = s.options, .calibration = tokens_};
  }

  TempDir dir_;
  NamedTensors tensors_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

TEST_F(PackedModelTest, DevicePathEqualsReferenceCodecBitForBit) {
  const std::filesystem::path file = dir_.path() / "a.qw";
  for (const Scheme& s : schemes) {
    SCOPED_TRACE(std::string(s.method) + " " + s.options);
    run_quantize(*source_, run_of(s), file);
    const PackedFileView view(file);
    const auto packed = open_packed(file);
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      for (const Site site : all_sites) {
        const std::string name = linear_name(layer, site);
        const std::vector<float> expected = view.decode(name);
        const std::vector<float> found = load_weight(*packed, layer, site);
        const Comparison same = compare_bytes(std::as_bytes(std::span(found)),
                                              std::as_bytes(std::span(expected)), sizeof(float));
        EXPECT_TRUE(same) << name << ": " << same.message;
        // Near the original, too: both could read the same nonsense (unrelated weights are off by
        // 2; GPTQ gives up weight error for output error).
        const double error = relative_square_error(found, tensors_.at("model." + name + ".weight"));
        EXPECT_GT(error, 0.0) << name;
        EXPECT_LT(error, s.bits <= 2 ? 1.0 : 10.0 / double(1 << (2 * s.bits))) << name;
        EXPECT_TRUE(test::close(error, view.entry(name)["relative_error"].get<double>(), 1e-5))
            << name;
      }
    }
  }
}

TEST_F(PackedModelTest, FileTakesTheBitsItSays) {
  const std::filesystem::path file = dir_.path() / "a.qw";
  for (const Scheme& s : schemes) {
    SCOPED_TRACE(std::string(s.method) + " " + s.options);
    const QuantOutcome outcome = run_quantize(*source_, run_of(s), file);
    const PackedFileView view(file);
    std::int64_t bytes = 0, weights = 0;
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      for (const Site site : all_sites) {
        const std::string name = linear_name(layer, site);
        const SiteShape shape = site_shape(source_->config(), site);
        const std::int64_t expected = stored_by_hand(s, shape.rows, shape.cols);
        EXPECT_EQ(static_cast<std::int64_t>(view.bytes(name).size()), expected) << name;
        EXPECT_EQ(view.entry(name)["bytes_stored"].get<std::int64_t>(), expected);
        EXPECT_EQ(view.entry(name)["bits_nominal"].get<double>(), s.bits);
        EXPECT_DOUBLE_EQ(
            view.entry(name)["bits_stored"].get<double>(),
            8.0 * static_cast<double>(expected) / static_cast<double>(shape.rows * shape.cols));
        EXPECT_EQ(view.model().linears.at(name).weight.permutation_plane >= 0, s.permutation);
        bytes += expected;
        weights += shape.rows * shape.cols;
      }
    }
    const Json& bits = view.model().directory["bits"];
    EXPECT_EQ(bits[0]["weights"].get<std::int64_t>(), weights);
    EXPECT_DOUBLE_EQ(bits[0]["bits_stored"].get<double>(),
                     8.0 * static_cast<double>(bytes) / static_cast<double>(weights));
    EXPECT_EQ(outcome.report["bits"], bits);
  }
}

TEST_F(PackedModelTest, EverythingElseTravelsUnchanged) {
  const std::filesystem::path file = dir_.path() / "a.qw";
  run_quantize(*source_, {.method = "gptq", .options = "--bits 4", .calibration = tokens_}, file);
  const PackedFileView view(file);
  const auto packed = open_packed(file);
  EXPECT_EQ(packed->config(), source_->config());
  for (const std::string& name : dense_names(source_->config())) {
    const PackedDense& d = view.model().dense.at(name);
    EXPECT_EQ(d.info.dtype, DType::bf16);
    const std::string full = name == "lm_head.weight" ? name : "model." + name;
    std::vector<float> found;
    const std::vector<std::byte> bytes = view.plane(d.plane);
    for (std::size_t i = 0; i < bytes.size(); i += 2) {
      found.push_back(to_float(bf16{static_cast<std::uint16_t>(
          std::to_integer<unsigned>(bytes[i]) | std::to_integer<unsigned>(bytes[i + 1]) << 8)}));
    }
    EXPECT_TRUE(found == tensors_.at(full)) << name;
  }
  EXPECT_EQ(packed->tokenizer_name(), "tokenizer.json");
  EXPECT_EQ(packed->tokenizer_bytes(), source_->tokenizer_bytes());
  const auto before = model_tokenizer(*source_), after = model_tokenizer(*packed);
  const std::string text = "One text, 12 words & <unk> signs.\n";
  EXPECT_EQ(before->encode(text, SpecialText::parse), after->encode(text, SpecialText::parse));
  EXPECT_EQ(before->source_hash(), after->source_hash());
}

TEST_F(PackedModelTest, DirectoryTellsHowTheFileWasMade) {
  const std::filesystem::path file = dir_.path() / "a.qw";
  run_quantize(*source_,
               {.method = "gptq", .options = "--bits 3 --damp 0.02", .calibration = tokens_}, file);
  const PackedFileView view(file);
  const Json& d = view.model().directory;
  EXPECT_EQ(d["kind"], "lowbit-model");
  EXPECT_EQ(d["schema"], 1);
  EXPECT_EQ(d["engine"], engine_version);
  EXPECT_EQ(d["method"], "gptq");
  EXPECT_EQ(d["options"]["bits"], 3);
  EXPECT_EQ(d["options"]["group"], 128);
  EXPECT_EQ(d["options"]["damp"], 0.02);
  EXPECT_EQ(d["compute_dtype"], "f32");
  EXPECT_EQ(d["device"], "cpu");
  EXPECT_EQ(d["calibration"]["source"], "test");
  EXPECT_EQ(d["source"], source_->describe());
  ASSERT_EQ(d["blocks"].size(), 2U);
  for (const Json& block : d["blocks"]) {
    const double error = block["output_relative_error"].get<double>();
    EXPECT_GT(error, 0.0);
    EXPECT_LT(error, 0.5);
  }
  EXPECT_EQ(d["linears"].size(), 14U);
  for (const auto& [name, entry] : d["linears"].items()) {
    EXPECT_EQ(entry["outcome"], "ok") << name;
    EXPECT_GT(entry["loss"].get<double>(), 0.0) << name;
    EXPECT_GT(entry["damping"].get<double>(), 0.0) << name;
  }
  const Json said = open_packed(file)->describe();
  EXPECT_EQ(said["method"], "gptq");
  EXPECT_EQ(said["options"], d["options"]);
  EXPECT_EQ(said["file_bytes"].get<std::uint64_t>(), std::filesystem::file_size(file));
}

TEST_F(PackedModelTest, SameRunGivesSameBytes) {
  const QuantRun run{.method = "gptq", .options = "--bits 3 --act-order", .calibration = tokens_};
  run_quantize(*source_, run, dir_.path() / "a.qw");
  run_quantize(*source_, run, dir_.path() / "b.qw");
  EXPECT_EQ(read_text_file(dir_.path() / "a.qw", 1 << 26),
            read_text_file(dir_.path() / "b.qw", 1 << 26));
}

TEST_F(PackedModelTest, TiedModelStoresOneEmbedding) {
  TinyCheckpoint options;
  options.config.tie_embeddings = true;
  options.tokenizer = data / "tokenizer.json";
  write_tiny_checkpoint(dir_.path() / "tied", options);
  const auto source = open_checkpoint(dir_.path() / "tied");
  const std::filesystem::path file = dir_.path() / "a.qw";
  run_quantize(*source, {.method = "rtn", .options = "--bits 8 --group 64"}, file);
  const PackedFileView view(file);
  EXPECT_EQ(view.model().dense.count("lm_head.weight"), 0U);
  const auto packed = open_packed(file);
  const double before = perplexity_of(*source, tokens_), after = perplexity_of(*packed, tokens_);
  EXPECT_TRUE(test::close(after, before, 0.02)) << before << " " << after;
  EXPECT_NE(after, before);
}

}  // namespace
}  // namespace engine::test
