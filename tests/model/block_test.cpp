// The forward pass against the logits and the greedy text of Hugging Face transformers, and
// against itself: however tokens are fed, the result is the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "engine/model/decoder.h"
#include "engine/quant/calibration.h"
#include "formats/json.h"
#include "formats/safetensors.h"
#include "tests/support/compare.h"
#include "tests/support/model_runs.h"

namespace engine::test {
namespace {

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

template <class T>
std::vector<T> tensor(const SafetensorsFile& file, const char* name) {
  const TensorInfo* info = file.find(name);
  REQUIRE(info != nullptr, name);
  const auto bytes = file.bytes(*info);
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), bytes.size());
  return out;
}

// The embedded model with a decoder on two threads.
struct Rig {
  explicit Rig(std::int64_t capacity, DType dtype = DType::f32, std::int64_t prompt_rows = 2048)
      : source(open_checkpoint(data)),
        ops(make_cpu_ops(ledger, 2)),
        decoder(*source, *ops, ledger,
                {.dtype = dtype, .capacity = capacity, .prompt_rows = prompt_rows}) {}
  Ledger ledger;
  std::unique_ptr<WeightSource> source;
  std::unique_ptr<Ops> ops;
  Decoder decoder;
};

std::vector<std::int32_t> some_tokens(std::int64_t count) {
  std::vector<std::int32_t> ids = token_rows(data / "heldout.safetensors", 0, 4, 512).ids;
  ids.resize(static_cast<std::size_t>(count));
  return ids;
}

std::vector<float> fed(Decoder& decoder, std::span<const std::int32_t> ids) {
  const auto logits = decoder.feed(ids);
  return {logits.begin(), logits.end()};
}

double log_sum_exp(std::span<const float> row) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float v : row) sum += std::exp(static_cast<double>(v) - top);
  return top + std::log(sum);
}

// Two f32 evaluations of four blocks. Each of the eight residual additions carries the rounding of
// sums of at most 768 products, sqrt(768) * 2^-24 = 1.7e-6 of their size; the largest logits are
// near 20, and the head sums 256 products more: some 1e-5 in all, and ten times that is allowed.
constexpr double logit_tolerance = 1e-4;

TEST(Block, LogitsEqualThoseOfTransformers) {
  const SafetensorsFile golden(data / "golden_logits.safetensors");
  const auto ids = tensor<std::int32_t>(golden, "input_ids");
  ASSERT_EQ(ids.size(), 256U);
  Rig rig(256);
  const std::vector<float> logits = rig.decoder.feed_all_logits(ids);
  const std::size_t vocab = logits.size() / ids.size();
  ASSERT_EQ(vocab, 2048U);

  const auto last = tensor<float>(golden, "logits_last8");
  const std::span<const float> found(logits);
  const Comparison same =
      compare_close(found.last(last.size()), last, {.absolute = logit_tolerance});
  EXPECT_TRUE(same) << same.message;

  std::vector<float> sums;
  std::vector<std::int64_t> best;
  for (std::size_t t = 0; t < ids.size(); ++t) {
    const auto row = found.subspan(t * vocab, vocab);
    sums.push_back(static_cast<float>(log_sum_exp(row)));
    best.push_back(std::max_element(row.begin(), row.end()) - row.begin());
  }
  const Comparison same_sums =
      compare_close(sums, tensor<float>(golden, "logsumexp"), {.absolute = logit_tolerance});
  EXPECT_TRUE(same_sums) << same_sums.message;
  const auto argmax = tensor<std::int32_t>(golden, "logits_argmax");
  const Comparison same_best =
      compare_integers(best, std::vector<std::int64_t>(argmax.begin(), argmax.end()));
  EXPECT_TRUE(same_best) << same_best.message;
}

TEST(Block, GreedyTextEqualsThatOfTransformers) {
  const Json reference = read_json_file(data / "reference_hf.json");
  const auto expected = reference["greedy"].get<std::vector<std::int32_t>>();
  Rig rig(static_cast<std::int64_t>(expected.size()));
  const auto tokenizer = model_tokenizer(*rig.source);
  std::vector<std::int32_t> ids = tokenizer->encode(
      " = Robert Boulter = \n Robert Boulter is an English film , television", SpecialText::plain);
  ids.insert(ids.begin(), tokenizer->bos_id());
  ASSERT_LT(ids.size(), expected.size());
  const auto count = static_cast<std::int64_t>(expected.size() - ids.size());
  rig.decoder.prefill(ids);
  rig.decoder.sample();
  rig.decoder.run_steps(count - 1);
  const std::vector<std::int32_t> sampled = rig.decoder.tokens(0, count);
  ids.insert(ids.end(), sampled.begin(), sampled.end());
  EXPECT_EQ(ids, expected);
  EXPECT_EQ(tokenizer->decode(ids), reference["greedy_text"].get<std::string>());
}

TEST(Block, TokenByTokenEqualsWholePrompt) {
  const std::vector<std::int32_t> ids = some_tokens(96);
  Rig rig(96);
  const std::vector<float> whole = rig.decoder.feed_all_logits(ids);
  rig.decoder.reset();
  EXPECT_EQ(rig.decoder.position(), 0);
  std::vector<float> single;
  for (const std::int32_t id : ids) {
    const auto row = rig.decoder.feed({&id, 1});
    single.insert(single.end(), row.begin(), row.end());
  }
  EXPECT_EQ(rig.decoder.position(), 96);
  const Comparison same = compare_close(single, whole, {.absolute = logit_tolerance});
  EXPECT_TRUE(same) << same.message;
}

TEST(Block, PromptMayComeInPieces) {
  const std::vector<std::int32_t> ids = some_tokens(700);
  const std::span<const std::int32_t> all(ids);
  Rig rig(700, DType::f32, 512);
  const std::vector<float> whole = fed(rig.decoder, all);  // 512 and 188 tokens inside

  rig.decoder.reset();
  rig.decoder.feed(all.first(512));
  EXPECT_EQ(fed(rig.decoder, all.subspan(512)), whole);

  for (const std::size_t piece : {350U, 256U, 37U}) {
    rig.decoder.reset();
    std::vector<float> last;
    for (std::size_t at = 0; at < ids.size(); at += piece) {
      last = fed(rig.decoder, all.subspan(at, std::min<std::size_t>(piece, ids.size() - at)));
    }
    const Comparison same = compare_close(last, whole, {.absolute = logit_tolerance});
    EXPECT_TRUE(same) << piece << ": " << same.message;
  }
}

TEST(Block, FullContextIsRefused) {
  Rig rig(8);
  const std::vector<std::int32_t> ids = some_tokens(8);
  rig.decoder.feed(ids);
  EXPECT_THROW(rig.decoder.feed({ids.data(), 1}), Error);
  rig.decoder.reset();
  const std::int32_t outside[] = {2048};
  EXPECT_THROW(rig.decoder.feed(outside), Error);
  EXPECT_NO_THROW(rig.decoder.feed(ids));
}

// A sequence's values do not depend on which others are stacked with it.
TEST(Block, BatchedSequencesEqualSingleOnesBitForBit) {
  const auto source = open_checkpoint(data);
  const ModelConfig& config = source->config();
  constexpr std::int64_t seq = 40, windows = 5;
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 3, windows, seq);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    std::vector<std::vector<std::uint8_t>> results;
    for (const std::int64_t batch : {1, 3, 5}) {
      Ledger ledger;
      const auto ops = make_cpu_ops(ledger, 2);
      Arena arena(ops->memory(), ledger, 256 << 20, true);
      Loader loader(*ops, ledger, arena, config);
      const View hidden = arena.make(MemTag::hidden_stream, dtype, windows * seq, config.hidden);
      embed_stream(*source, loader, tokens, hidden);
      const StreamPass pass{
          .run = {.ops = *ops, .config = config, .rope = make_rope_table(arena, *ops, config, seq)},
          .weights = make_block_weights(arena, config, dtype),
          .scratch = make_block_scratch(arena, *ops, config, dtype, batch, seq, seq),
          .seq = seq,
          .batch = batch};
      for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        load_block(*source, layer, loader, pass.weights);
        propagate(pass, hidden);
      }
      check_stream(*ops, hidden, "the end");
      const auto* bytes = static_cast<const std::uint8_t*>(hidden.data);
      results.emplace_back(bytes, bytes + hidden.bytes());
    }
    EXPECT_TRUE(results[0] == results[1]) << dtype_name(dtype) << ", 3 at a time";
    EXPECT_TRUE(results[0] == results[2]) << dtype_name(dtype) << ", 5 at a time";
  }
}

// 16-bit activations are coarser, not wrong: transformers in bf16 is off as much (its perplexity
// moves by 3e-4), and the most likely token is nearly always the same.
TEST(Block, HalfPrecisionStaysNear) {
  const std::vector<std::int32_t> ids = some_tokens(128);
  Rig exact(128);
  const std::vector<float> reference = exact.decoder.feed_all_logits(ids);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    Rig rig(128, dtype);
    const std::vector<float> logits = rig.decoder.feed_all_logits(ids);
    // 17 roundings of the residual stream, each of relative size u, as independent errors.
    EXPECT_LE(std::sqrt(relative_square_error(logits, reference)), 8.0 * roundoff(dtype));
    EXPECT_GT(relative_square_error(logits, reference), 0.0);
  }
}

}  // namespace
}  // namespace engine::test
