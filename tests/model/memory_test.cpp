// The plan of a run is what the run takes, to the byte, and nothing reads memory that was never
// written.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";
constexpr auto staging = static_cast<std::size_t>(MemTag::staging);

const QuantRun quant_runs[] = {
    {"rtn", "--bits 4 --group 128"},
    {"rtn", "--bits 3 --group 0 --rule paper", DType::bf16},
    {"gptq", "--bits 4 --group 128"},
    {"gptq", "--bits 3 --group 0", DType::bf16},
    {"gptq", "--bits 3 --group 64 --factor f32", DType::f16},
    {"gptq", "--bits 4 --group 64 --true-sequential"},
    {"gptq", "--bits 4 --group 128 --act-order"},
    {"gptq", "--bits 4 --group 64 --act-order --static-groups --true-sequential", DType::bf16},
};

// Every tag's peak in the ledger is the plan's. Only staging also has buffers outside the arena:
// the loader's host half and the planes on their way to the file.
void expect_plan_kept(const TagBytes& plan, std::int64_t planned_total, const Json& report,
                      const Ledger::Entry& memory) {
  EXPECT_GT(planned_total, 0);
  EXPECT_EQ(report["plan"]["device_bytes"].get<std::int64_t>(), planned_total);
  EXPECT_EQ(report["plan"]["arena_peak_bytes"].get<std::int64_t>(), planned_total);
  for (std::size_t t = 0; t < mem_tag_count; ++t) {
    const char* name = mem_tag_name(static_cast<MemTag>(t));
    if (t == staging) {
      EXPECT_GT(memory.peak[t], plan[t]);
    } else {
      EXPECT_EQ(memory.peak[t], plan[t]) << name;
    }
    EXPECT_EQ(report["plan"].value(name, std::int64_t{0}), plan[t]) << name;
    EXPECT_EQ(memory.live[t], 0) << name;
  }
  EXPECT_EQ(memory.reserved, 0);
  EXPECT_GE(memory.peak_reserved, planned_total);
}

TEST(Memory, QuantizationKeepsItsPlan) {
  const TempDir dir;
  TinyCheckpoint options;
  options.tokenizer = data / "tokenizer.json";
  write_tiny_checkpoint(dir.path() / "m", options);
  const auto checkpoint = open_checkpoint(dir.path() / "m");
  const auto synthetic = open_synthetic("tiny-test");
  for (WeightSource* source : {checkpoint.get(), synthetic.get()}) {
    for (QuantRun run : quant_runs) {
      for (const std::int64_t batch : {1, 4}) {
        SCOPED_TRACE(run.method + " " + run.options + ", batch " + std::to_string(batch) +
                     (source == synthetic.get() ? ", synthetic" : ""));
        run.calibration = {synthetic_tokens(6 * 32, source->config().vocab, 1), 6, 32};
        run.batch = batch;
        const QuantOutcome o = run_quantize(*source, run, dir.path() / "a.qw");
        expect_plan_kept(o.plan.by_tag, o.plan.device_bytes, o.report, o.memory);
        const std::string plain = read_text_file(dir.path() / "a.qw", 1 << 28);
        run.poison = true;
        run_quantize(*source, run, dir.path() / "a.qw");
        EXPECT_TRUE(read_text_file(dir.path() / "a.qw", 1 << 28) == plain);
      }
    }
  }
}

TEST(Memory, PerplexityKeepsItsPlan) {
  const TempDir dir;
  TinyCheckpoint options;
  options.tokenizer = data / "tokenizer.json";
  const std::filesystem::path packed = dir.path() / "a.qw";
  write_tiny_checkpoint(dir.path() / "m", options);
  {
    const auto source = open_checkpoint(dir.path() / "m");
    const TokenWindows tokens{synthetic_tokens(6 * 32, options.config.vocab, 1), 6, 32};
    run_quantize(*source,
                 {.method = "gptq", .options = "--bits 3 --act-order", .calibration = tokens},
                 packed);
  }
  for (const std::string& model :
       {(dir.path() / "m").string(), packed.string(), std::string("synthetic:tiny-test")}) {
    const auto source = open_model(model);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const std::int64_t batch : {1, 3}) {
        SCOPED_TRACE(model + " " + dtype_name(dtype) + ", batch " + std::to_string(batch));
        std::vector<double> losses[2];
        for (const bool poison : {false, true}) {
          Ledger ledger;
          const auto ops = make_cpu_ops(ledger, 2);
          PplJob job;
          job.source = source.get();
          job.ops = ops.get();
          job.ledger = &ledger;
          job.dtype = dtype;
          job.batch = batch;
          job.poison = poison;
          job.texts = {{synthetic_tokens(4 * 32, source->config().vocab, 2), 4, 32}};
          Report report("test");
          losses[poison ? 1 : 0] = perplexity(job, report).front().window_nll;
          TagBytes plan{};
          for (std::size_t t = 0; t < mem_tag_count; ++t) {
            plan[t] = report.document()["plan"].value(mem_tag_name(static_cast<MemTag>(t)),
                                                      std::int64_t{0});
          }
          expect_plan_kept(plan, report.document()["plan"]["device_bytes"].get<std::int64_t>(),
                           report.document(), ledger.entry(ops->memory().name()));
        }
        EXPECT_EQ(losses[0].size(), 4U);
        EXPECT_EQ(losses[0], losses[1]);
      }
    }
  }
}

// Streaming: more blocks take more time, not more memory.
TEST(Memory, PlanDoesNotGrowWithTheBlocks) {
  const TempDir dir;
  std::vector<std::int64_t> bytes;
  for (const std::int64_t layers : {1, 5}) {
    TinyCheckpoint options;
    options.config.layers = layers;
    const auto path = dir.path() / std::to_string(layers);
    write_tiny_checkpoint(path, options);
    const auto source = open_checkpoint(path);
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 1);
    const auto method = method_with("gptq", "--bits 4", source->config());
    QuantizeJob job;
    job.source = source.get();
    job.method = method.get();
    job.ops = ops.get();
    job.ledger = &ledger;
    job.calibration = {synthetic_tokens(6 * 32, options.config.vocab, 1), 6, 32};
    bytes.push_back(plan_quantize(job).device_bytes);
    EXPECT_EQ(ledger.entry(ops->memory().name()).peak_total, 0);  // planning takes nothing
  }
  EXPECT_EQ(bytes[0], bytes[1]);
}

}  // namespace
}  // namespace engine::test
