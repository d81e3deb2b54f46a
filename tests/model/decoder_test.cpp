// Step decoding against whole-sequence passes of the same weights: packed or dense, plain or 8-bit
// cache, one sequence or several, in one piece or in many.
#include "engine/model/decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "tests/support/compare.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

// Two f32 evaluations of four blocks (see block_test.cpp).
constexpr double logit_tolerance = 1e-4;
// With an 8-bit cache a difference in the last bits of a key or value can move its code by one.
// That is as large as the error that quantizing makes to each element: k moved codes of N elements
// make an error of about sqrt(k / N) of what the 8-bit cache changes in all. Here N is 4 blocks *
// 256 * some 45 tokens = 46000, and differences of a relative 1e-6 against steps of 1/127 move at
// most about 7: 0.012 of the change, more where a key counts much (0.09 was seen; 5e-5 where none
// moves). A cache read without being quantized, or at other places, is off by 1 or more.
constexpr double moved_codes_share = 0.25;

// `plain`: the same logits with a plain cache; used if kv8.
void expect_same_logits(std::span<const float> found, std::span<const float> expected, bool kv8,
                        std::span<const float> plain) {
  if (!kv8) {
    const Comparison same = compare_close(found, expected, {.absolute = logit_tolerance});
    EXPECT_TRUE(same) << same.message;
    return;
  }
  const double change = std::sqrt(relative_square_error(plain, expected));
  EXPECT_GT(change, 0.0);
  EXPECT_LE(std::sqrt(relative_square_error(found, expected)), moved_codes_share * change);
}

struct Rig {
  explicit Rig(const DecoderOptions& options)
      : source(open_checkpoint(data)),
        ops(make_cpu_ops(ledger, 2)),
        decoder(*source, *ops, ledger, options) {}
  Ledger ledger;
  std::unique_ptr<WeightSource> source;
  std::unique_ptr<Ops> ops;
  Decoder decoder;
};

// [count, len] ids of the held-out text.
std::vector<std::int32_t> some_tokens(std::int64_t count, std::int64_t len) {
  return token_rows(data / "heldout.safetensors", 0, count, len).ids;
}

std::vector<float> copied(std::span<const float> v) { return {v.begin(), v.end()}; }

std::int32_t best(std::span<const float> row) {
  return static_cast<std::int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

struct Case {
  std::optional<SchemeOptions> scheme;
  Exec exec;
  bool kv8;
  std::int64_t batch;
  std::string name;
};

std::vector<Case> cases() {
  const std::pair<const char*, std::optional<SchemeOptions>> schemes[] = {
      {"dense", std::nullopt},
      {"rtn4", SchemeOptions{4, 128, false, DType::f16}},
      {"rtn3", SchemeOptions{3, 64, false, DType::f32}},
      {"rtn8", SchemeOptions{8, 0, true, DType::bf16}},
  };
  std::vector<Case> all;
  for (const auto& [name, scheme] : schemes) {
    for (const bool kv8 : {false, true}) {
      for (const std::int64_t batch : {1, 3}) {
        all.push_back(
            {scheme, scheme ? Exec::packed : Exec::decoded, kv8, batch,
             std::string(name) + (kv8 ? "_kv8" : "_plain") + "_batch" + std::to_string(batch)});
      }
    }
  }
  return all;
}

class Steps : public ::testing::TestWithParam<Case> {};

TEST_P(Steps, GiveTheTokensAndLogitsOfWholeSequences) {
  const Case& c = GetParam();
  constexpr std::int64_t prompt = 21, steps = 24;
  const std::vector<std::int32_t> ids = some_tokens(c.batch, prompt);
  Rig rig({.dtype = DType::f32,
           .capacity = prompt + steps,
           .batch = c.batch,
           .exec = c.exec,
           .scheme = c.scheme,
           .kv8 = c.kv8,
           .poison = true});
  Decoder& d = rig.decoder;
  const auto vocab = static_cast<std::size_t>(d.config().vocab);

  // logits[b] follow one another: after the prompt, after each step.
  std::vector<std::vector<float>> logits(index(c.batch));
  const auto note = [&] {
    const std::span<const float> all = d.logits();
    for (std::size_t b = 0; b < logits.size(); ++b) {
      const auto row = all.subspan(b * vocab, vocab);
      logits[b].insert(logits[b].end(), row.begin(), row.end());
    }
  };
  d.prefill(ids);
  note();
  d.sample();
  for (std::int64_t i = 0; i < steps; ++i) {
    d.run_steps(1);
    note();
  }
  EXPECT_EQ(d.position(), prompt + steps);
  EXPECT_EQ(d.sampled(), steps + 1);
  const std::vector<std::int32_t> sampled = d.tokens(0, steps + 1);

  // The same weights, decoded, over the whole sequence at once.
  Rig whole({.dtype = DType::f32,
             .capacity = prompt + steps,
             .exec = Exec::decoded,
             .scheme = c.scheme,
             .kv8 = c.kv8});
  Rig plain(
      {.dtype = DType::f32, .capacity = prompt + steps, .exec = Exec::decoded, .scheme = c.scheme});
  for (std::int64_t b = 0; b < c.batch; ++b) {
    SCOPED_TRACE("sequence " + std::to_string(b));
    const auto own = std::span(sampled).subspan(index(b * (steps + 1)), index(steps + 1));
    std::vector<std::int32_t> all(ids.begin() + b * prompt, ids.begin() + (b + 1) * prompt);
    all.insert(all.end(), own.begin(), own.end() - 1);
    whole.decoder.reset();
    plain.decoder.reset();
    const auto rows = index(steps + 1) * vocab;
    const std::vector<float> expected = whole.decoder.feed_all_logits(all);
    const std::vector<float> unquantized =
        c.kv8 ? plain.decoder.feed_all_logits(all) : std::vector<float>();
    const auto tail = std::span(expected).last(rows);
    expect_same_logits(logits[index(b)], tail, c.kv8,
                       c.kv8 ? std::span(unquantized).last(rows) : std::span<const float>());
    std::vector<std::int64_t> greedy;
    for (std::size_t i = 0; i < own.size(); ++i)
      greedy.push_back(best(tail.subspan(i * vocab, vocab)));
    // A moved code may decide between two tokens of nearly the same likelihood.
    const Comparison same_tokens =
        compare_mostly(std::vector<std::int64_t>(own.begin(), own.end()), greedy, c.kv8 ? 1 : 0);
    EXPECT_TRUE(same_tokens) << same_tokens.message;
  }
}

INSTANTIATE_TEST_SUITE_P(Decoder, Steps, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// The cache in 8 bits is another model, but a near one.
TEST(Decoder, AnEightBitCacheStaysNear) {
  const std::vector<std::int32_t> ids = some_tokens(1, 200);
  Rig plain({.dtype = DType::f32, .capacity = 200});
  Rig packed({.dtype = DType::f32, .capacity = 200, .kv8 = true});
  const std::vector<float> exact = plain.decoder.feed_all_logits(ids);
  const std::vector<float> coarse = packed.decoder.feed_all_logits(ids);
  // Keys and values are off by up to half of 1/127 of the head's largest element: errors of about
  // 1e-3 of their size, averaged by attention and added up over four blocks.
  const double error = relative_square_error(coarse, exact);
  EXPECT_GT(error, 0.0);
  EXPECT_LT(error, 1e-3);
  EXPECT_LT(4 * packed.decoder.kv_bytes(), 2 * plain.decoder.kv_bytes());
}

TEST(Decoder, PromptsMayComeInAnyPieces) {
  constexpr std::int64_t len = 50;
  for (const bool kv8 : {false, true}) {
    for (const std::int64_t batch : {1, 3}) {
      const std::vector<std::int32_t> ids = some_tokens(batch, len);
      std::vector<float> whole;
      Rig exact({.dtype = DType::f32, .capacity = len, .batch = batch});
      const std::vector<float> plain = copied(exact.decoder.feed(ids));
      // All at once, two sequences at a time, one at a time, and in pieces of 16 tokens.
      for (const std::int64_t rows : {2048, 110, 50, 16}) {
        SCOPED_TRACE(std::to_string(batch) + " sequences, " + std::to_string(rows) + " rows" +
                     (kv8 ? ", 8-bit cache" : ""));
        Rig rig({.dtype = DType::f32,
                 .capacity = len + 8,
                 .batch = batch,
                 .kv8 = kv8,
                 .prompt_rows = rows,
                 .poison = true});
        rig.decoder.prefill(ids);
        const std::vector<float> found = copied(rig.decoder.logits());
        if (whole.empty()) whole = found;
        expect_same_logits(found, whole, kv8, plain);
      }
    }
  }
}

TEST(Decoder, ASharedPromptIsOneForEach) {
  const std::vector<std::int32_t> one = some_tokens(1, 30);
  std::vector<std::int32_t> three;
  for (int b = 0; b < 3; ++b) three.insert(three.end(), one.begin(), one.end());
  for (const bool kv8 : {false, true}) {
    const DecoderOptions options{.dtype = DType::f32, .capacity = 40, .batch = 3, .kv8 = kv8};
    Rig rig(options);
    rig.decoder.prefill(three);
    rig.decoder.sample();
    rig.decoder.run_steps(8);
    const std::vector<std::int32_t> expected = rig.decoder.tokens(0, 9);
    const std::vector<float> logits = copied(rig.decoder.logits());
    rig.decoder.reset();
    rig.decoder.prefill_shared(one);
    rig.decoder.sample();
    rig.decoder.run_steps(8);
    EXPECT_EQ(rig.decoder.tokens(0, 9), expected);
    EXPECT_EQ(copied(rig.decoder.logits()), logits);
  }
}

// A conversation: more prompt after some steps.
TEST(Decoder, FeedingGoesOnAfterSteps) {
  const std::vector<std::int32_t> ids = some_tokens(1, 40);
  const std::span<const std::int32_t> all(ids);
  Rig rig({.dtype = DType::f32, .capacity = 64});
  rig.decoder.prefill(all.first(20));
  rig.decoder.sample();
  rig.decoder.run_steps(5);
  std::vector<std::int32_t> said = rig.decoder.tokens(0, 6);
  // The last token was sampled and not fed yet.
  std::vector<std::int32_t> more{said.back()};
  more.insert(more.end(), ids.begin() + 20, ids.end());
  const std::vector<float> found = copied(rig.decoder.feed(more));
  rig.decoder.sample();
  rig.decoder.run_steps(3);
  const std::vector<std::int32_t> later = rig.decoder.tokens(6, 4);

  std::vector<std::int32_t> line(ids.begin(), ids.begin() + 20);
  line.insert(line.end(), said.begin(), said.end());
  line.insert(line.end(), ids.begin() + 20, ids.end());
  rig.decoder.reset();
  const Comparison same =
      compare_close(found, rig.decoder.feed(line), {.absolute = logit_tolerance});
  EXPECT_TRUE(same) << same.message;
  rig.decoder.sample();
  rig.decoder.run_steps(3);
  EXPECT_EQ(rig.decoder.tokens(0, 4), later);
}

TEST(Decoder, SequencesOfABatchDrawAsAlone) {
  const std::vector<std::int32_t> prompt = some_tokens(1, 12);
  constexpr std::int64_t count = 20;
  const auto sampled = [&](std::int64_t batch, std::uint64_t seed) {
    Rig rig({.dtype = DType::f32, .capacity = 12 + count, .batch = batch});
    rig.decoder.reset({.temperature = 1.0F, .top_p = 0.95F, .seed = seed});
    rig.decoder.prefill_shared(prompt);
    rig.decoder.sample();
    rig.decoder.run_steps(count - 1);
    return rig.decoder.tokens(0, count);
  };
  const std::vector<std::int32_t> together = sampled(3, 7);
  for (std::uint64_t b = 0; b < 3; ++b) {
    const auto first = together.begin() + static_cast<std::ptrdiff_t>(b) * count;
    EXPECT_EQ(std::vector<std::int32_t>(first, first + count), sampled(1, 7 + b)) << b;
  }
  EXPECT_NE(sampled(1, 7), sampled(1, 8));
}

// The plan is what the ledger sees at its worst, tag by tag; only staging has host buffers, too.
TEST(Decoder, KeepsItsPlan) {
  const auto checkpoint = open_checkpoint(data);
  const auto synthetic = open_synthetic("tiny-test");
  const SchemeOptions scheme{4, 64, false, DType::f16};
  for (WeightSource* source : {checkpoint.get(), synthetic.get()}) {
    for (const bool packed : {false, true}) {
      for (const bool kv8 : {false, true}) {
        std::vector<std::int32_t> tokens[2];
        for (const bool poison : {false, true}) {
          SCOPED_TRACE(std::string(packed ? "packed" : "dense") + (kv8 ? " kv8" : "") +
                       (source == synthetic.get() ? " synthetic" : ""));
          Ledger ledger;
          const auto ops = make_cpu_ops(ledger, 2);
          {
            Decoder d(*source, *ops, ledger,
                      {.dtype = DType::bf16,
                       .capacity = 48,
                       .batch = 2,
                       .exec = packed ? Exec::packed : Exec::decoded,
                       .scheme = packed ? std::optional(scheme) : std::nullopt,
                       .kv8 = kv8,
                       .poison = poison,
                       .verify = poison});
            d.prefill(synthetic_tokens(2 * 16, d.config().vocab, 1));
            d.sample();
            d.run_steps(10);
            tokens[poison ? 1 : 0] = d.tokens(0, 11);
            const Ledger::Entry entry = ledger.entry(ops->memory().name());
            for (std::size_t t = 0; t < mem_tag_count; ++t) {
              if (static_cast<MemTag>(t) == MemTag::staging) continue;
              EXPECT_EQ(entry.peak[t], d.planned_tags()[t]) << mem_tag_name(static_cast<MemTag>(t));
            }
            EXPECT_GE(entry.peak_reserved, d.planned_bytes());
            EXPECT_EQ(entry.live[static_cast<std::size_t>(MemTag::weights)], d.weight_bytes());
            EXPECT_EQ(entry.live[static_cast<std::size_t>(MemTag::kv)], d.kv_bytes());
            EXPECT_EQ(entry.live[static_cast<std::size_t>(MemTag::staging)], 0);
          }
          EXPECT_EQ(ledger.entry(ops->memory().name()).reserved, 0);
        }
        EXPECT_EQ(tokens[0], tokens[1]);
      }
    }
  }
}

TEST(Decoder, StepBytesAreThoseOfTheParts) {
  const auto source = open_synthetic("tiny-test");
  const ModelConfig& c = source->config();
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 1);
  const Decoder d(*source, *ops, ledger,
                  {.dtype = DType::bf16,
                   .capacity = 32,
                   .batch = 2,
                   .exec = Exec::packed,
                   .scheme = SchemeOptions{4, 128, false, DType::f16},
                   .kv8 = true});
  std::int64_t linears = 0;
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(c, s);
    // 4 bits per code, and 3 bytes per group of 128: exact when both sides are whole tiles.
    ASSERT_EQ(shape.rows % record_rows + shape.cols % record_cols, 0);
    linears += shape.rows * shape.cols / 2 + shape.rows * shape.cols / 128 * 3;
  }
  const std::int64_t norms = (2 * c.layers + 1) * c.hidden * 2;
  const std::int64_t head = c.vocab * c.hidden * 2, embedded = 2 * c.hidden * 2;
  const StepBytes bytes = d.step_bytes(9);
  EXPECT_EQ(bytes.weights, c.layers * linears + norms + head + embedded);
  EXPECT_EQ(bytes.kv, c.layers * 2 * 10 * 2 * c.kv_heads * (c.head_dim + 4));
  EXPECT_EQ(bytes.total(), bytes.weights + bytes.kv);
}

TEST(Decoder, RefusesWhatDoesNotFit) {
  Rig rig({.dtype = DType::f32, .capacity = 10, .max_steps = 4});
  Decoder& d = rig.decoder;
  const std::vector<std::int32_t> ids = some_tokens(1, 11);
  const auto usage = [](const auto& action) {
    try {
      action();
    } catch (const Error& e) {
      return e.code() == ErrorCode::usage;
    }
    return false;
  };
  EXPECT_TRUE(usage([&] { d.prefill(ids); }));
  EXPECT_EQ(d.position(), 0);
  EXPECT_THROW(d.sample(), Error);
  EXPECT_THROW(d.run_steps(1), Error);
  d.prefill({ids.data(), 4});
  EXPECT_THROW(d.run_steps(1), Error);  // nothing was sampled
  d.sample();
  EXPECT_THROW(d.sample(), Error);
  EXPECT_TRUE(usage([&] { d.run_steps(4); }));  // of 4 steps one is done
  EXPECT_EQ(d.position(), 4);
  d.run_steps(3);
  EXPECT_THROW(static_cast<void>(d.tokens(0, 5)), Error);
  EXPECT_EQ(d.tokens(0, 4).size(), 4U);
  d.reset();
  d.prefill({ids.data(), 9});
  d.sample();
  d.run_steps(1);
  EXPECT_TRUE(usage([&] { d.run_steps(1); }));  // the cache is full
  // A checkpoint has nothing to pack, and a scheme must fit the model.
  Ledger ledger;
  EXPECT_TRUE(usage([&] {
    const Decoder packed(*rig.source, *rig.ops, ledger, {.capacity = 4, .exec = Exec::packed});
  }));
  EXPECT_TRUE(usage([&] {
    const Decoder packed(*rig.source, *rig.ops, ledger,
                         {.capacity = 4, .exec = Exec::packed, .scheme = SchemeOptions{4, 96}});
  }));
}

// Every weight that was packed for the steps is read back once if asked, and never otherwise.
TEST(Decoder, VerifiesOnRequest) {
  const auto source = open_checkpoint(data);
  for (const bool verify : {false, true}) {
    Ledger ledger;
    const auto cpu = make_cpu_ops(ledger, 2);
    TraceOps ops(*cpu);
    const Decoder d(*source, ops, ledger,
                    {.dtype = DType::f32,
                     .capacity = 8,
                     .exec = Exec::packed,
                     .scheme = SchemeOptions{3, 64},
                     .verify = verify});
    EXPECT_EQ(ops.stats().at("unpack").calls, verify ? 7 * d.config().layers : 0);
    EXPECT_EQ(ops.stats().at("repack").calls, 7 * d.config().layers);
  }
}

}  // namespace
}  // namespace engine::test
