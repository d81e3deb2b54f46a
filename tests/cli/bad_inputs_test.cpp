// Impossible options, packed files that are damaged, and outputs that cannot be written.
#include "tests/cli/bad_inputs.h"

#include <unistd.h>

#include "formats/packed.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

const Arguments base = {"quantize", "--model", "{d}/m", "--out", "{d}/o.qw", "--device", "cpu"};
const Arguments rtn = base + Arguments{"--method", "rtn"};
const Arguments gptq = base + Arguments{"--method", "gptq", "--calib", "{t}/calib.txt"};
const Arguments few = {"--samples", "2", "--seq", "64", "--group", "32"};
const Arguments ppl = {"ppl",      "--model", "{d}/m",   "--text", "{t}/heldout.txt",
                       "--device", "cpu",     "--limit", "2"};
const Arguments generate = {"generate", "--model", "{d}/m", "--prompt", "The king"};
const Arguments decode = {"decode", "--model", "{d}/m"};

void small(const fs::path& d) { write_small_model(d / "m"); }

Arguments quantize_small(const fs::path& d, const std::string& out) {
  return {"quantize", "--model", d / "m", "--method", "rtn", "--group",
          "32",       "--out",   d / out, "--device", "cpu"};
}
// The small model and the same packed, {d}/m and {d}/m.qw.
void small_packed(const fs::path& d) {
  small(d);
  const Outcome outcome = run_program(quantize_small(d, "m.qw"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
}

// Groups of 16 columns have no packed kernel.
void small_unpackable(const fs::path& d) {
  small(d);
  const Outcome outcome = run_program({"quantize", "--model", d / "m", "--method", "rtn", "--group",
                                       "16", "--out", d / "m.qw", "--device", "cpu"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
}

std::vector<BadInput> options() {
  const auto with = [](const Arguments& a, const Arguments& more) { return a + more; };
  return {
      {"GroupThatDoesNotDivide", small, with(rtn, {"--group", "48"}), 2, {"--group", "64", "48"}},
      {"NegativeGroup", small, with(rtn, {"--group", "-1"}), 2, {"--group", "-1"}},
      {"BitsZero", small, with(rtn, {"--bits", "0"}), 2, {"--bits", "1 to 8", "found 0"}},
      {"BitsNine", small, with(rtn, {"--bits", "9"}), 2, {"--bits", "1 to 8", "found 9"}},
      {"BitsNotANumber", small, with(rtn, {"--bits", "abc"}), 2, {"--bits", "abc"}},
      {"BitsFraction", small, with(rtn, {"--bits", "3.5"}), 2, {"--bits", "3.5"}},
      {"SymmetricByAnotherRule", small, with(rtn, {"--sym", "--rule", "awq"}), 2, {"--sym", "awq"}},
      {"BlockNotDividingGroup",
       small,
       with(gptq, {"--group", "32", "--block", "24"}),
       2,
       {"--block", "32", "24"}},
      {"BlockTooLarge",
       small,
       with(gptq, {"--group", "0", "--block", "256"}),
       2,
       {"--block", "1 to 128", "256"}},
      {"DampingNotPositive",
       small,
       with(gptq, {"--group", "32", "--damp", "0"}),
       2,
       {"--damp", "positive"}},
      {"DampingNan", small, with(gptq, {"--group", "32", "--damp", "nan"}), 2, {"--damp", "nan"}},
      {"StaticGroupsWithoutGroups",
       small,
       with(gptq, {"--static-groups", "--group", "0"}),
       2,
       {"--static-groups", "--group"}},
      {"UnknownMethod", small, with(base, {"--method", "magic"}), 2, {"magic", "rtn", "gptq"}},
      {"UnknownOption", small, with(rtn, {"--magic", "1"}), 2, {"--magic"}},
      {"OptionOfAnotherMethod", small, with(rtn, {"--act-order"}), 2, {"--act-order"}},
      {"OptionTwice", small, with(rtn, {"--out", "{d}/p.qw"}), 2, {"--out"}},
      {"OptionWithoutValue", small, with(rtn, {"--bits"}), 2, {"--bits"}},
      {"UnknownCommand", nullptr, {"quantify"}, 2, {"quantify"}},
      {"NewlineInAnArgument", nullptr, {"inspect", "no\nsuch\r\nmodel"}, 4, {"no such"}},
      {"BlocksBeyondTheModel",
       small,
       with(rtn, {"--group", "32", "--blocks", "0:3"}),
       2,
       {"--blocks", "1 to 2", "0:3"}},
      {"BlocksFromTheMiddle",
       small,
       with(rtn, {"--group", "32", "--blocks", "1:2"}),
       2,
       {"--blocks", "1:2"}},
      {"ZstdLevel",
       small,
       with(rtn, {"--group", "32", "--zstd-level", "20"}),
       2,
       {"--zstd-level", "1 to 19", "20"}},
      {"NegativeBatchQuantize",
       small,
       with(rtn, {"--group", "32", "--batch", "-1"}),
       2,
       {"--batch", "-1"}},
      {"NegativeBatchPpl", small, with(ppl, {"--batch", "-1"}), 2, {"--batch", "-1"}},
      {"SamplesZero",
       small,
       with(gptq, {"--group", "32", "--samples", "0"}),
       2,
       {"--samples", "found 0"}},
      {"SeqOne", small, with(gptq, {"--group", "32", "--seq", "1"}), 2, {"--seq", "found 1"}},
      {"SeqOnePpl", small, with(ppl, {"--seq", "1"}), 2, {"--seq", "found 1"}},
      {"SeqBeyondInt64", small, with(ppl, {"--seq", "99999999999999999999"}), 2, {"--seq"}},
      {"NegativeLimit",
       small,
       {"ppl", "--model", "{d}/m", "--text", "x", "--limit", "-1"},
       2,
       {"--limit", "-1"}},
      {"UnknownBos", small, with(ppl, {"--bos", "always"}), 2, {"--bos", "per-window", "always"}},
      {"UnknownDevice",
       small,
       {"ppl", "--model", "{d}/m", "--text", "{t}/heldout.txt", "--seq", "64", "--device", "tpu"},
       2,
       {"cpu or cuda:N", "tpu"}},
      {"NoSuchGpu",
       small,
       {"ppl", "--model", "{d}/m", "--text", "{t}/heldout.txt", "--seq", "64", "--device",
        "cuda:99"},
       8,
       {"cuda:99"}},
      {"GpuThatIsNoNumber",
       small,
       {"generate", "--model", "{d}/m", "--device", "cuda:one"},
       2,
       {"cuda:one"}},
      {"UnknownDtype", small, with(ppl, {"--seq", "64", "--dtype", "f64"}), 2, {"--dtype", "f64"}},
      {"NegativeThreads",
       small,
       with(ppl, {"--seq", "64", "--threads", "-2"}),
       2,
       {"--threads", "-2"}},
      {"NegativeTemperature",
       small,
       with(generate, {"--temperature", "-0.5"}),
       2,
       {"--temperature", "0 to 100", "-0.5"}},
      {"TemperatureNan",
       small,
       with(generate, {"--temperature", "nan"}),
       2,
       {"--temperature", "nan"}},
      {"ExecUnknown", small, with(generate, {"--exec", "fast"}), 2, {"--exec", "packed", "fast"}},
      {"ExecPackedOfACheckpoint",
       small,
       with(generate, {"--exec", "packed"}),
       2,
       {"m: ", "packed linears", "--exec decoded"}},
      {"NoPackedKernel",
       small_unpackable,
       {"generate", "--model", "{d}/m.qw", "--prompt", "The king", "--exec", "packed"},
       2,
       {"layers.0.self_attn.q_proj", "affine4 g16", "--exec decoded"}},
      {"PplExecPackedOfACheckpoint",
       small,
       with(ppl, {"--exec", "packed"}),
       2,
       {"m: ", "packed linears", "--exec decoded"}},
      {"PplNoPackedKernel",
       small_unpackable,
       {"ppl", "--model", "{d}/m.qw", "--text", "{t}/heldout.txt", "--exec", "packed"},
       2,
       {"layers.0.self_attn.q_proj", "affine4 g16", "--exec decoded"}},
      {"PackedKernelWithoutExec",
       small,
       with(ppl, {"--packed-kernel", "vector"}),
       2,
       {"--packed-kernel", "--exec packed", "--exec decoded"}},
      {"CacheOfFourBits", small, with(generate, {"--kv", "4"}), 2, {"--kv", "16|8", "4"}},
      {"TopPZero", small, with(generate, {"--top-p", "0"}), 2, {"--top-p", "0.0"}},
      {"TopPAboveOne", small, with(generate, {"--top-p", "1.5"}), 2, {"--top-p", "1.5"}},
      {"NoTokensToGenerate",
       small,
       with(generate, {"--max-tokens", "0"}),
       2,
       {"--max-tokens", "found 0"}},
      {"PromptBeyondTheContext",
       small,
       {"generate", "--model", "{d}/m", "--prompt", std::string(3000, 'x'), "--max-tokens", "4"},
       2,
       {"positions", "512"}},
      {"OutputBeyondTheContext",
       small,
       with(generate, {"--max-tokens", "600"}),
       2,
       {"--max-tokens", "positions", "512"}},
      {"QuantizePacked",
       small_packed,
       {"quantize", "--model", "{d}/m.qw", "--method", "rtn", "--group", "32", "--out", "{d}/o.qw"},
       2,
       {"m.qw", "dense checkpoint", "packed"}},
      {"NothingToResume",
       small,
       with(rtn, {"--group", "32", "--resume"}),
       2,
       {"nothing to resume", "o.qw.journal"}},
      {"TableOfNothing",
       [](const fs::path& d) { fs::create_directory(d / "f"); },
       {"table", "{d}/f"},
       2,
       {"{d}/f", "ppl.json"}},
      {"TableWithoutFolder", nullptr, {"table", "{d}/f"}, 4, {"{d}/f"}},
      {"TableOfOtherJson",
       [](const fs::path& d) { write_bytes(d / "a.ppl.json", "{}"); },
       {"table", "{d}"},
       3,
       {"a.ppl.json", "engine ppl", "results"}},
      {"TableOfBrokenJson",
       [](const fs::path& d) { write_bytes(d / "a.ppl.json", "{\"a\": "); },
       {"table", "{d}"},
       3,
       {"a.ppl.json", "valid JSON"}},
  };
}

// The weights of 70 billion parameters exceed the memory of most machines; of the others, this
// limit.
std::uint64_t seventy_billion_limit() {
  const auto physical = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                        static_cast<std::uint64_t>(::sysconf(_SC_PAGE_SIZE));
  return physical > (std::uint64_t{256} << 30U) ? std::uint64_t{16} << 30U : 0;
}

std::vector<BadInput> outputs() {
  const auto with = [](const Arguments& a, const Arguments& more) { return a + more; };
  const Arguments to = {"quantize", "--model", "{d}/m",    "--method", "rtn",
                        "--group",  "32",      "--device", "cpu",      "--out"};
  const Arguments seq = {"--seq", "64"};
  const RunLimits full_disk{.file_bytes = 100'000};
  return {
      {"MissingDirectory", small, with(to, {"{d}/no/o.qw"}), 4, {"{d}/no/o.qw", "cannot create"}},
      {"IsADirectory", small, with(to, {"{d}/m"}), 2, {"{d}/m", "--out", "directory"}},
      {"NoName", small, with(to, {""}), 2, {"--out", "nothing"}},
      {"BelowAFile",
       small,
       with(to, {"{d}/m/config.json/o.qw"}),
       4,
       {"config.json/o.qw", "cannot create"}},
      {"ReadOnly", small, with(to, {"/proc/o.qw"}), 4, {"/proc/o.qw", "cannot create"}},
      {"FullDiskRtn", small, with(to, {"{d}/o.qw"}), 4, {"{d}/o.qw", "cannot write"}, full_disk},
      {"FullDiskGptq", small, with(gptq, few), 4, {"{d}/o.qw", "cannot write"}, full_disk},
      {"FullDiskDecode",
       small,
       with(decode, {"--out", "{d}/n"}),
       4,
       {"{d}/n/model.safetensors", "cannot write"},
       full_disk},
      {"FullDiskReport",
       small,
       with(ppl, {"--seq", "64", "--report", "{d}/r.json"}),
       4,
       {"{d}/r.json", "cannot write"},
       {.file_bytes = 1500}},
      {"ReportInMissingDirectory",
       small,
       with(ppl, {"--seq", "64", "--report", "{d}/no/r.json"}),
       4,
       {"{d}/no/r.json", "cannot create"}},
      {"ReportIsADirectory",
       small,
       with(with(to, {"{d}/o.qw"}), {"--report", "{d}/m"}),
       2,
       {"--report", "{d}/m", "directory"}},
      {"TokensOutUnwritable",
       small,
       with(generate, {"--tokens-out", "{d}/no/t.safetensors"}),
       4,
       {"{d}/no/t.safetensors", "cannot create"}},
      {"TextOutUnwritable",
       small,
       with(generate, {"--text-out", "/proc/t.txt"}),
       4,
       {"/proc/t.txt", "cannot create"}},
      {"TokenizeOutUnwritable",
       small,
       {"tokenize", "--model", "{d}/m", "--prompt", "x", "--tokens-out", "{d}/no/t.safetensors"},
       4,
       {"{d}/no/t.safetensors", "cannot create"}},
      {"DecodeOntoACheckpoint",
       small_packed,
       {"decode", "--model", "{d}/m.qw", "--out", "{d}/m", "--device", "cpu"},
       2,
       {"{d}/m", "already holds a checkpoint", "model.safetensors"}},
      {"DecodeOntoAConfig",
       [](const fs::path& d) {
         small(d);
         fs::create_directory(d / "n");
         write_bytes(d / "n/config.json", "{}");
       },
       with(decode, {"--out", "{d}/n"}),
       2,
       {"{d}/n", "config.json"}},
      {"DecodeOntoAFile",
       small,
       with(decode, {"--out", "{d}/m/config.json"}),
       4,
       {"config.json", "cannot create"}},
      {"DecodeInMissingDirectory",
       small,
       with(decode, {"--out", "{d}/no/n"}),
       4,
       {"{d}/no/n", "cannot create"}},
      {"MemoryCalibration",
       small,
       with(base, {"--method", "gptq", "--group", "32", "--calib", "synthetic", "--samples",
                   "1048576", "--seq", "1048576"}),
       7,
       {"cpu", "out of memory", "GB"},
       {.timeout = std::chrono::seconds(10)}},
      {"MemoryCalibrationText",
       small,
       with(gptq, {"--group", "32", "--samples", "1048576", "--seq", "1048576"}),
       7,
       {"cpu", "out of memory", "GB"},
       {.timeout = std::chrono::seconds(10)}},
      {"MemoryTokens",
       small,
       {"ppl", "--model", "{d}/m", "--text", "synthetic:999999999999", "--device", "cpu"},
       7,
       {"cpu", "out of memory", "GB"},
       {.timeout = std::chrono::seconds(10)}},
      {"MemoryWeights",
       nullptr,
       {"generate", "--model", "synthetic:llama3-70b", "--device", "cpu", "--threads", "2",
        "--max-tokens", "2"},
       7,
       {"cpu", "out of memory", "GB"},
       {.timeout = std::chrono::seconds(10), .memory_bytes = seventy_billion_limit()}},
  };
}

class BadRequest : public testing::TestWithParam<BadInput> {};
TEST_P(BadRequest, IsRefusedInOneLine) { expect_refused(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Options, BadRequest, testing::ValuesIn(options()), row_name);
INSTANTIATE_TEST_SUITE_P(Outputs, BadRequest, testing::ValuesIn(outputs()), row_name);

// A packed model, made once for all tests below.
class BadPacked : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TemporaryDirectory;
    small_packed(directory_->path());
  }
  static void TearDownTestSuite() { delete directory_; }

  static fs::path good() { return directory_->path() / "m.qw"; }
  static fs::path bad() { return directory_->path() / "bad.qw"; }
  static Arguments inspect_arguments(const fs::path& file) { return {"inspect", file}; }
  static Arguments ppl_arguments(const fs::path& file) {
    return {"ppl",   "--model", file,      "--text", tiny_llama3() / "heldout.txt",
            "--seq", "32",      "--limit", "1",      "--device",
            "cpu"};
  }
  // Both commands must refuse these bytes, naming the file.
  static void expect_both_refuse(const std::string& bytes, const std::string& what) {
    write_bytes(bad(), bytes);
    for (const Arguments& arguments : {inspect_arguments(bad()), ppl_arguments(bad())}) {
      const testing::Message trace = testing::Message() << what;
      SCOPED_TRACE(trace);
      expect_one_error(run_program(arguments), arguments, 3, {bad().string(), "expected", "found"});
    }
  }

 private:
  static inline TemporaryDirectory* directory_ = nullptr;
};

TEST_F(BadPacked, TheUndamagedFileIsAccepted) {
  for (const Arguments& arguments : {inspect_arguments(good()), ppl_arguments(good())}) {
    const Outcome outcome = run_program(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  }
}

// One changed byte in every part of the file. Padding carries nothing, so only inspect reads it.
TEST_F(BadPacked, EveryFlippedByteIsFound) {
  const std::string bytes = read_bytes(good());
  const PackedReader reader(good());
  struct Flip {
    std::uint64_t at;
    bool used;  // by ppl
    std::string part;
  };
  std::vector<Flip> flips;
  for (const std::uint64_t at : {0, 7, 8, 12, 16, 20, 24, 40, 56, 63}) {
    flips.push_back({at, true, "header"});
  }
  std::uint64_t end = 64;
  std::size_t paddings = 0;
  for (std::size_t i = 0; i < reader.planes().size(); ++i) {
    const PlaneInfo& plane = reader.planes()[i];
    const std::uint64_t stored = plane.stored_bytes();
    if (plane.offset > end && paddings < 5) {
      flips.push_back({end, false, "padding"});
      ++paddings;
    }
    const bool whole_model =
        plane.name == "tokenizer" || plane.name.find("layers.") == std::string::npos;
    if (i % 5 == 0 || whole_model) {
      const std::uint64_t places[] = {0, stored / 2, stored - 1};
      flips.push_back({plane.offset + places[i % 3], true, "plane " + plane.name});
    }
    end = plane.offset + stored;
  }
  EXPECT_EQ(paddings, 5U);
  std::uint64_t directory = (end + 63) / 64 * 64;
  const std::uint64_t trailer = bytes.size() - 40;
  for (std::uint64_t k = 0; k < 8; ++k) {
    flips.push_back({directory + k * (trailer - 1 - directory) / 7, true, "directory"});
  }
  for (std::uint64_t k = 0; k < 40; k += 5) flips.push_back({trailer + k, true, "trailer"});
  flips.push_back({bytes.size() - 1, true, "trailer"});
  EXPECT_GE(flips.size(), 40U);

  for (const Flip& flip : flips) {
    std::string changed = bytes;
    changed[flip.at] = static_cast<char>(changed[flip.at] ^ 0x10);
    const std::string what = flip.part + ", byte " + std::to_string(flip.at);
    if (flip.used) {
      expect_both_refuse(changed, what);
      continue;
    }
    write_bytes(bad(), changed);
    SCOPED_TRACE(testing::Message() << what);
    const Arguments arguments = inspect_arguments(bad());
    expect_one_error(run_program(arguments), arguments, 3,
                     {bad().string(), "offset " + std::to_string(flip.at), "zero padding"});
  }
}

TEST_F(BadPacked, TruncatedFilesAreRefused) {
  const std::string bytes = read_bytes(good());
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{127}, std::size_t{128},
        bytes.size() / 2, bytes.size() - 40, bytes.size() - 1}) {
    expect_both_refuse(bytes.substr(0, size), std::to_string(size) + " bytes left");
  }
  expect_both_refuse(bytes + '\0', "one byte more");
  expect_both_refuse("This is a text file.\n" + std::string(300, '.'), "text");
  expect_both_refuse(std::string(100'000, '\0'), "zeros");
}

TEST_F(BadPacked, DecodeOfADamagedFileLeavesNoDirectory) {
  std::string bytes = read_bytes(good());
  const PackedReader reader(good());
  const PlaneInfo& plane = reader.planes()[reader.planes().size() / 2];
  bytes[plane.offset] = static_cast<char>(bytes[plane.offset] ^ 1);
  write_bytes(bad(), bytes);
  const auto before = contents(good().parent_path());
  const Arguments arguments = {
      "decode", "--model", bad(), "--out", good().parent_path() / "dense", "--device", "cpu"};
  expect_one_error(run_program(arguments), arguments, 3, {bad().string(), plane.name});
  EXPECT_EQ(contents(good().parent_path()), before);
}

}  // namespace
}  // namespace engine::test
