// The measuring program on the CPU: what it reports is complete, finite and consistent, wrong usage
// ends in one line, and an interrupted run leaves nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <set>

#include "bench/paper_table6.h"
#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/program.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

RunLimits bench_limits() {
  RunLimits limits;
  limits.program = LOWBIT_BENCH;
  limits.timeout = std::chrono::seconds(120);
  return limits;
}

// Runs `bench ARGUMENTS --device cpu --report FILE` and returns the report.
Json report_of(const Arguments& arguments) {
  const TemporaryDirectory d;
  const fs::path report = d.path() / "report.json";
  const Outcome outcome =
      run_program(arguments + Arguments{"--device", "cpu", "--report", report}, bench_limits());
  EXPECT_EQ(outcome.exit_code, 0) << command_text(arguments) << "\n" << outcome.err;
  EXPECT_EQ(outcome.err, "") << command_text(arguments);
  if (outcome.exit_code != 0) return {};
  const Json json = Json::parse(read_bytes(report));
  EXPECT_EQ(json.at("command"), "bench " + arguments.front());
  EXPECT_EQ(json.at("device").at("name"), "cpu");
  return json;
}

double number(const Json& row, const char* key) { return row.at(key).get<double>(); }

void expect_positive(const Json& row, const std::vector<const char*>& keys) {
  for (const char* key : keys) {
    ASSERT_TRUE(row.contains(key)) << key << " in " << row.dump();
    EXPECT_TRUE(std::isfinite(number(row, key)) && number(row, key) > 0)
        << key << " in " << row.dump();
  }
}

void expect_spread(const Json& row, const std::string& name) {
  const double low = number(row, ("low_" + name).c_str());
  const double median = number(row, ("median_" + name).c_str());
  const double high = number(row, ("high_" + name).c_str());
  EXPECT_GT(low, 0) << row.dump();
  EXPECT_LE(low, median) << row.dump();
  EXPECT_LE(median, high) << row.dump();
}

void expect_near(double actual, double expected) {
  EXPECT_LE(std::fabs(actual - expected), 1e-9 * std::fabs(expected)) << actual << " " << expected;
}

// Figures that follow from others do.
void expect_decoding_row(const Json& row, const Json& ceilings, double prompt) {
  expect_positive(row, {"batch", "prefill_token_per_s", "token_per_s", "weight_bytes", "kv_bytes",
                        "gb_per_s", "read_share", "copy_share", "floor_ms", "floor_token_per_s",
                        "floor_share", "p50_token_ms"});
  expect_spread(row, "prefill_ms");
  expect_spread(row, "step_ms");
  EXPECT_LE(number(row, "p50_token_ms"), number(row, "p90_token_ms"));
  EXPECT_LE(number(row, "p90_token_ms"), number(row, "p99_token_ms"));
  const double batch = number(row, "batch"), step_s = number(row, "median_step_ms") * 1e-3;
  const double gigabytes = (number(row, "weight_bytes") + number(row, "kv_bytes")) * 1e-9;
  const double read = number(ceilings, "read_gb_per_s"), copy = number(ceilings, "copy_gb_per_s");
  expect_near(number(row, "prefill_token_per_s"),
              batch * prompt / (number(row, "median_prefill_ms") * 1e-3));
  expect_near(number(row, "token_per_s"), batch / step_s);
  expect_near(number(row, "gb_per_s"), gigabytes / step_s);
  expect_near(number(row, "read_share"), gigabytes / step_s / read);
  expect_near(number(row, "copy_share"), gigabytes / step_s / copy);
  expect_near(number(row, "floor_ms"), gigabytes / read * 1e3);
  expect_near(number(row, "floor_token_per_s"), batch / (gigabytes / read));
  expect_near(number(row, "floor_share"), number(row, "read_share"));
}

TEST(BenchLatency, FiguresAreCompleteAndConsistent) {
  const Json json =
      report_of({"latency", "--model", tiny_llama3(), "--bits", "4", "--group", "64", "--prompt",
                 "16", "--steps", "12", "--batch", "1,3", "--repeat", "2"});
  ASSERT_TRUE(json.contains("latency"));
  EXPECT_EQ(json.at("exec"), "packed");
  EXPECT_EQ(json.at("compute_dtype"), "f32");
  EXPECT_EQ(json.at("steps_replayed"), false);
  EXPECT_EQ(json.at("clocks").at("before"), "not available");
  const Json& ceilings = json.at("ceilings");
  expect_positive(ceilings, {"read_gb_per_s", "copy_gb_per_s"});
  const Json& rows = json.at("latency");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].at("batch"), 1);
  EXPECT_EQ(rows[1].at("batch"), 3);
  for (const Json& row : rows) expect_decoding_row(row, ceilings, 16);
  // Four layers of f32 keys and values, 2 heads of 32 channels: tokens 0 to 21 at the mean position
  // 16 + 11 / 2 = 21.
  EXPECT_EQ(rows[0].at("kv_bytes"), 4 * 2 * 2 * 32 * 4 * 22);
  EXPECT_EQ(rows[1].at("kv_bytes"), 3 * rows[0].at("kv_bytes").get<std::int64_t>());
}

TEST(BenchLatency, OneStepIsEnough) {
  const Json json = report_of({"latency", "--model", tiny_llama3(), "--prompt", "4", "--steps", "1",
                               "--batch", "1", "--repeat", "1"});
  ASSERT_TRUE(json.contains("latency"));
  EXPECT_FALSE(json.contains("incomplete"));
  expect_decoding_row(json.at("latency").at(0), json.at("ceilings"), 4);
}

TEST(BenchLatency, FewerBitsAreFewerBytes) {
  const Arguments common = {"latency", "--model", tiny_llama3(), "--prompt", "8", "--steps",
                            "4",       "--batch", "1",           "--repeat", "1"};
  const Json dense = report_of(common);
  ASSERT_TRUE(dense.contains("latency"));
  EXPECT_EQ(dense.at("exec"), "decoded");
  const Json two = report_of(common + Arguments{"--bits", "2", "--sym", "--kv", "8"});
  const Json eight = report_of(common + Arguments{"--bits", "8"});
  ASSERT_TRUE(two.contains("latency") && eight.contains("latency"));
  const auto bytes = [](const Json& json, const char* key) {
    return json.at("latency").at(0).at(key).get<std::int64_t>();
  };
  EXPECT_LT(bytes(two, "weight_bytes"), bytes(eight, "weight_bytes"));
  EXPECT_LT(bytes(eight, "weight_bytes"), bytes(dense, "weight_bytes"));
  EXPECT_LT(bytes(two, "kv_bytes"), bytes(eight, "kv_bytes"));
  EXPECT_EQ(bytes(dense, "kv_bytes"), bytes(eight, "kv_bytes"));
}

TEST(BenchKernels, EveryKindOfKernelIsMeasured) {
  const TemporaryDirectory d;
  const fs::path google = d.path() / "google.json";
  const Json json =
      report_of({"kernels", "--shapes", "tiny-test", "--repeat", "3", "--json", google, "--filter",
                 "(gate/(b4g128|b3g128|codebook4g128|binary2g128|dense)/f32/m1$|expand/.*gate/b2|"
                 "matrix/.*gate/b5g128/f32/m32|format/.*b6g0s/f32/"
                 "m16|(qkv_step|gate_up|block_tail|norm_linear|"
                 "norm_head)/.*m2$|attention_step/.*/len256/m4)"});
  ASSERT_TRUE(json.contains("kernels"));
  expect_positive(json.at("ceilings"), {"read_gb_per_s", "copy_gb_per_s", "matmul_tflop_per_s"});
  std::set<std::string> kinds;
  const double read = number(json.at("ceilings"), "read_gb_per_s");
  for (const Json& row : json.at("kernels")) {
    const auto name = row.at("name").get<std::string>();
    kinds.insert(name.substr(0, name.find('/')));
    expect_positive(row, {"us", "bytes", "flops", "gb_per_s", "read_share", "tflop_per_s",
                          "matmul_share", "copies"});
    EXPECT_LE(number(row, "low_us"), number(row, "us")) << name;
    EXPECT_LE(number(row, "us"), number(row, "high_us")) << name;
    expect_near(number(row, "gb_per_s"), number(row, "bytes") * 1e-3 / number(row, "us"));
    expect_near(number(row, "read_share"), number(row, "gb_per_s") / read);
  }
  const std::set<std::string> expected = {"vector",    "matrix",   "expand",        "dense",
                                          "format",    "gate_up",  "block_tail",    "norm_linear",
                                          "norm_head", "qkv_step", "attention_step"};
  EXPECT_EQ(kinds, expected);
  const Json written = Json::parse(read_bytes(google));
  EXPECT_EQ(written.at("benchmarks").size(), json.at("kernels").size());
}

TEST(BenchKernels, CrossoverNamesTheFastestKernel) {
  const Json json = report_of({"kernels", "--crossover", "--shapes", "tiny-test", "--filter",
                               "kv/b4g128", "--max-rows", "4", "--repeat", "3"});
  ASSERT_TRUE(json.contains("crossover"));
  const Json& rows = json.at("crossover");
  ASSERT_EQ(rows.size(), 3U);  // 1, 2 and 4 rows
  for (const Json& row : rows) {
    expect_positive(row, {"rows", "vector_us", "matrix_us", "expand_us", "automatic_us"});
    const double best =
        std::min({number(row, "vector_us"), number(row, "matrix_us"), number(row, "expand_us")});
    EXPECT_EQ(number(row, (row.at("winner").get<std::string>() + "_us").c_str()), best);
  }
}

TEST(BenchKernels, ListsItsCases) {
  const Arguments arguments = {"kernels", "--list",   "--device",
                               "cpu",     "--shapes", "llama3-8b,llama3-70b"};
  const Outcome outcome = run_program(arguments, bench_limits());
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* name :
       {"vector/llama3-8b/gate/b3g128/f32/m1\n", "matrix/llama3-70b/down/b8g128/f32/m512\n",
        "attention_step/llama3-70b/kv8/f32/len8192/m16\n", "dense/llama3-8b/head/dense/f32/m4\n"}) {
    EXPECT_NE(outcome.out.find(name), std::string::npos) << name;
  }
}

TEST(BenchMemory, ThePlanIsWhatTheLedgerCounts) {
  const Json json = report_of({"memory", "--model", tiny_llama3(), "--bits", "3", "--prompt", "16",
                               "--steps", "4", "--batch", "2", "--kv", "8"});
  ASSERT_TRUE(json.contains("tags"));
  std::set<std::string> tags;
  for (const Json& row : json.at("tags")) {
    const auto tag = row.at("tag").get<std::string>();
    tags.insert(tag);
    if (tag == "staging") continue;  // of the host, which on the CPU is the same memory
    EXPECT_GT(row.at("planned_bytes").get<std::int64_t>(), 0) << row.dump();
    EXPECT_EQ(row.at("planned_bytes"), row.at("ledger_bytes")) << row.dump();
  }
  for (const char* tag : {"weights", "kv", "activations"}) EXPECT_TRUE(tags.contains(tag)) << tag;
  ASSERT_EQ(json.at("stages").size(), 4U);
  EXPECT_EQ(json.at("stages").at(2).at("ledger_live_bytes"),
            json.at("stages").at(3).at("ledger_live_bytes"));
  // 8-bit keys and values of 2 sequences of 20 tokens in 4 layers: 64 codes and 2 f32 scales each.
  EXPECT_GE(json.at("kv_bytes").get<std::int64_t>(), 4 * 2 * (2 * 20) * (64 + 2 * 4));
  expect_positive(json, {"planned_bytes", "weight_bytes"});
}

TEST(BenchLoad, PackedAndDecoded) {
  const TemporaryDirectory d;
  const fs::path file = d.path() / "m.qw";
  const Arguments quantize = {"quantize", "--model", tiny_llama3(), "--method", "rtn",
                              "--out",    file,      "--device",    "cpu"};
  ASSERT_EQ(run_program(quantize).exit_code, 0);
  const Json json = report_of({"load", "--model", file, "--repeat", "2"});
  ASSERT_TRUE(json.contains("load"));
  EXPECT_EQ(json.at("file_bytes"), static_cast<std::int64_t>(fs::file_size(file)));
  EXPECT_GT(json.at("plane_bytes").get<std::int64_t>(), 0);
  EXPECT_NE(json.at("page_cache").get<std::string>().find("read once before"), std::string::npos);
  const Json& rows = json.at("load");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].at("exec"), "packed");
  EXPECT_EQ(rows[1].at("exec"), "decoded");
  for (const Json& row : rows) {
    expect_spread(row, "s");
    expect_positive(row, {"weight_bytes", "weight_gb_per_s", "file_gb_per_s"});
    expect_near(number(row, "file_gb_per_s"),
                number(json, "file_bytes") * 1e-9 / number(row, "median_s"));
  }
  EXPECT_LT(rows[0].at("weight_bytes").get<std::int64_t>(),
            rows[1].at("weight_bytes").get<std::int64_t>());
  const Json synthetic = report_of({"load", "--model", "synthetic:tiny-test", "--repeat", "1"});
  ASSERT_TRUE(synthetic.contains("load"));
  EXPECT_EQ(synthetic.at("file_bytes"), 0);
  EXPECT_EQ(synthetic.at("load").size(), 1U);
}

Arguments table6(const fs::path& workdir, const Arguments& more = {}) {
  return Arguments{"table6",    "--model", tiny_llama3(), "--calib",  tiny_llama3() / "calib.txt",
                   "--samples", "4",       "--seq",       "64",       "--prompt",
                   "8",         "--steps", "6",           "--repeat", "1",
                   "--group",   "64",      "--methods",   "rtn,gptq", "--workdir",
                   workdir} +
         more;
}

TEST(BenchTable6, EveryMethodHasItsRow) {
  const TemporaryDirectory d;
  const Json json = report_of(table6(d.path()));
  ASSERT_TRUE(json.contains("table6"));
  EXPECT_TRUE(contents(d.path()).empty());
  const Json& rows = json.at("table6");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].at("method"), "rtn");
  EXPECT_EQ(rows[1].at("method"), "gptq");
  for (const Json& row : rows) {
    expect_positive(row, {"quantize_peak_bytes", "quantize_s", "file_bytes"});
    expect_positive(row.at("decode"), {"memory_bytes"});
    expect_decoding_row(row.at("decode"), json.at("ceilings"), 8);
    EXPECT_EQ(row.at("published"), "not available");  // nobody published this model
  }
}

TEST(BenchTable6, PublishedRowsBelongToTheirMethodAndShape) {
  const PaperRow* row = find_paper_row("gptq", synthetic_config("llama3-8b"), 4);
  ASSERT_NE(row, nullptr);
  EXPECT_EQ(row->model, "llama3-8b");
  EXPECT_EQ(row->minutes, 19);
  EXPECT_EQ(published_speed(*row, 128), 61.2);
  EXPECT_EQ(published_speed(*row, 64), std::nullopt);
  // Other widths were not published.
  EXPECT_EQ(find_paper_row("gptq", synthetic_config("llama3-8b"), 2), nullptr);
  EXPECT_EQ(find_paper_row("gptq", synthetic_config("llama3-8b"), 8), nullptr);
  row = find_paper_row("smoothquant", synthetic_config("llama2-7b"), 4);
  ASSERT_NE(row, nullptr);
  EXPECT_EQ(row->memory_gb, 13.5);
  EXPECT_FALSE(row->token_per_s.has_value());
  EXPECT_EQ(find_paper_row("rtn", synthetic_config("llama3-8b"), 4), nullptr);
  EXPECT_EQ(find_paper_row("gptq", synthetic_config("llama3-70b"), 4), nullptr);
  EXPECT_EQ(find_paper_row("gptq", synthetic_config("llama-7b"), 4), nullptr);
  for (const PaperRow& known : paper_table6) {
    EXPECT_EQ(find_paper_row(known.method, synthetic_config(known.model), 4), &known);
  }
}

TEST(BenchTable6, KeepsItsFilesOnlyIfAsked) {
  const TemporaryDirectory d;
  const Json json = report_of(table6(d.path(), {"--keep"}));
  ASSERT_TRUE(json.contains("table6"));
  const auto kept = contents(d.path());
  EXPECT_EQ(kept.size(), 2U);
  EXPECT_TRUE(kept.contains("table6.rtn.b4g64.qw"));
  EXPECT_TRUE(kept.contains("table6.gptq.b4g64.qw"));
  // They are not overwritten either.
  const Outcome again = run_program(table6(d.path(), {"--device", "cpu"}), bench_limits());
  EXPECT_EQ(again.exit_code, 2);
  EXPECT_NE(again.err.find("already there"), std::string::npos) << again.err;
  EXPECT_EQ(contents(d.path()), kept);
  // The second file is enough to refuse, before the first method runs.
  fs::remove(d.path() / "table6.rtn.b4g64.qw");
  const Outcome second = run_program(table6(d.path(), {"--device", "cpu"}), bench_limits());
  EXPECT_EQ(second.exit_code, 2);
  EXPECT_EQ(second.out, "");
  EXPECT_NE(second.err.find("table6.gptq.b4g64.qw: already there"), std::string::npos)
      << second.err;
  EXPECT_EQ(contents(d.path()).size(), 1U);
}

TEST(BenchTable6, AnInterruptedRunLeavesNothing) {
  // A run that was over before the signal is repeated with more to do.
  for (int samples = 64; samples <= 1024; samples *= 4) {
    const TemporaryDirectory d;
    Arguments arguments = table6(d.path(), {"--device", "cpu"});
    *(std::find(arguments.begin(), arguments.end(), "--samples") + 1) = std::to_string(samples);
    *(std::find(arguments.begin(), arguments.end(), "--methods") + 1) = "gptq";
    Program program(arguments, bench_limits());
    if (!program.runs_until_exists(d.path() / "table6.gptq.b4g64.qw.partial")) continue;
    program.send(SIGINT);
    const Outcome outcome = program.wait();
    ASSERT_FALSE(outcome.timed_out);
    EXPECT_TRUE(contents(d.path()).empty());
    if (outcome.exit_code == 0) continue;
    EXPECT_EQ(outcome.exit_code, 130) << outcome.err;
    EXPECT_EQ(outcome.err.rfind("bench: error: ", 0), 0U) << outcome.err;
    return;
  }
  FAIL() << "every run was over before it could be interrupted";
}

TEST(BenchTable6, AnInterruptedRunReportsTheRowsItHas) {
  for (int samples = 64; samples <= 1024; samples *= 4) {
    const TemporaryDirectory d, reports;
    const fs::path file = reports.path() / "report.json";
    Arguments arguments = table6(d.path(), {"--device", "cpu", "--report", file});
    *(std::find(arguments.begin(), arguments.end(), "--samples") + 1) = std::to_string(samples);
    Program program(arguments, bench_limits());
    if (!program.runs_until_exists(d.path() / "table6.gptq.b4g64.qw.partial")) continue;
    program.send(SIGINT);
    const Outcome outcome = program.wait();
    ASSERT_FALSE(outcome.timed_out);
    EXPECT_TRUE(contents(d.path()).empty());
    if (outcome.exit_code == 0) continue;
    EXPECT_EQ(outcome.exit_code, 130) << outcome.err;
    EXPECT_NE(outcome.out.find("| rtn"), std::string::npos) << outcome.out;
    EXPECT_EQ(outcome.out.find("| gptq"), std::string::npos) << outcome.out;
    const Json json = Json::parse(read_bytes(file));
    ASSERT_EQ(json.at("table6").size(), 1U);
    EXPECT_EQ(json.at("table6").at(0).at("method"), "rtn");
    EXPECT_EQ(json.at("incomplete").at("missing"), Json::array({"gptq"}));
    EXPECT_NE(json.at("incomplete").at("error").get<std::string>().find("interrupted"),
              std::string::npos);
    return;
  }
  FAIL() << "every run was over before it could be interrupted";
}

struct WrongUsage {
  Arguments arguments;
  std::string fragment;
};

TEST(BenchUsage, EndsInOneLine) {
  const std::string tiny = tiny_llama3();
  const WrongUsage rows[] = {
      {{}, "subcommand"},
      {{"latenzy"}, "table6"},
      {{"latency"}, "--model"},
      {{"latency", "--model", tiny, "--no-such-option"}, "--no-such-option"},
      {{"latency", "--model", tiny, "--trace"}, "--trace"},
      {{"latency", "--model", tiny, "--batch", "1,,4"}, "--batch"},
      {{"latency", "--model", tiny, "--batch", "0"}, "--batch"},
      {{"latency", "--model", tiny, "--batch", "two"}, "--batch"},
      {{"latency", "--model", tiny, "--batch", "99999999999999999999"}, "--batch"},
      {{"latency", "--model", tiny, "--prompt", "0"}, "--prompt"},
      {{"latency", "--model", tiny, "--steps", "8193"}, "--steps"},
      {{"latency", "--model", tiny, "--repeat", "0"}, "--repeat"},
      {{"latency", "--model", tiny, "--kv", "4"}, "--kv"},
      {{"latency", "--model", tiny, "--bits", "9"}, "--bits"},
      {{"latency", "--model", tiny, "--group", "64"}, "--bits"},
      {{"latency", "--model", tiny, "--bits", "4", "--group", "-1"}, "--group"},
      {{"latency", "--model", tiny, "--bits", "4", "--group", "100", "--device", "cpu"}, "100"},
      {{"latency", "--model", tiny, "--exec", "pact"}, "packed"},
      {{"latency", "--model", tiny, "--exec", "packed", "--device", "cpu"}, "decoded"},
      {{"latency", "--model", tiny, "--prompt", "8192", "--device", "cpu"}, "8192"},
      {{"latency", "--model", tiny, "--threads", "-1"}, "--threads"},
      {{"latency", "--model", tiny, "--device", "tpu"}, "tpu"},
      {{"latency", "--model", tiny, "--report", "."}, "--report"},
      {{"kernels", "--filter", "("}, "--filter"},
      {{"kernels", "--filter", "no such case", "--device", "cpu"}, "--filter"},
      {{"kernels", "--shapes", "gpt-2"}, "gpt-2"},
      {{"kernels", "--shapes", "", "--device", "cpu"}, "--shapes"},
      {{"kernels", "--json", "."}, "--json"},
      {{"kernels", "--max-rows", "8"}, "--crossover"},
      {{"kernels", "--crossover", "--json", "x"}, "--json"},
      {{"kernels", "--crossover", "--list"}, "--list"},
      {{"memory", "--model", tiny, "--batch", "1,2"}, "--batch"},
      {{"memory", "--model", "synthetic:none"}, "tiny-test"},
      {{"load", "--model", tiny, "--repeat", "-3"}, "--repeat"},
      {{"table6", "--model", tiny, "--methods", "rtm", "--device", "cpu"}, "rtn, gptq"},
      {{"table6", "--model", tiny, "--methods", "rtn,", "--device", "cpu"}, "--methods"},
      {{"table6", "--model", tiny, "--methods", "rtn,gptq,rtn", "--device", "cpu"}, "rtn twice"},
      {{"table6", "--model", tiny, "--methods", "rtn", "--group", "16", "--device", "cpu"}, "16"},
      {{"table6", "--model", tiny, "--methods", "gptq", "--device", "cpu"}, "--calib"},
      {{"table6", "--model", tiny, "--methods", "rtn", "--workdir", "no/such"}, "--workdir"},
      {{"table6", "--model", tiny, "--methods", "rtn", "--group", "96", "--device", "cpu"}, "96"},
  };
  for (const WrongUsage& row : rows) {
    const Outcome outcome = run_program(row.arguments, bench_limits());
    const std::string what = command_text(row.arguments) + "\nsaid: " + outcome.err;
    EXPECT_EQ(outcome.exit_code, 2) << what;
    EXPECT_EQ(outcome.err.rfind("bench: error: ", 0), 0U) << what;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << what;
    EXPECT_NE(outcome.err.find(row.fragment), std::string::npos) << row.fragment << " in " << what;
  }
}

}  // namespace
}  // namespace engine::test
