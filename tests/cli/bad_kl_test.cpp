// engine kl: a run from end to end, and inputs that are not fit to be compared.
#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

const Arguments text = {"--text", "{t}/heldout.txt", "--seq", "64", "--limit",
                        "2",      "--device",        "cpu"};
const Arguments of_model = Arguments{"kl", "--reference", "{d}/m"} + text;
const Arguments of_stored =
    Arguments{"kl", "--reference", "{d}/r.safetensors", "--model", "{d}/m"} + text;

void small(const fs::path& d) { write_small_model(d / "m"); }
void small_and_narrow(const fs::path& d) {
  small(d);
  write_small_model(d / "n", 1024);
}
void small_and_stranger(const fs::path& d) {
  small(d);
  write_small_model(d / "n");
  write_bytes(d / "n/tokenizer.json", read_bytes(d / "n/tokenizer.json") + "\n");
}
// {d}/m and what --save-reference makes of it.
void stored(const fs::path& d) {
  small(d);
  const Outcome outcome = run_program({"kl", "--reference", d / "m", "--text",
                                       tiny_llama3() / "heldout.txt", "--seq", "64", "--limit", "2",
                                       "--device", "cpu", "--save-reference", d / "r.safetensors"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
}
// As stored(), with a changed header.
std::function<void(const fs::path&)> stored_with(const std::function<void(Json&)>& change) {
  return [change](const fs::path& d) {
    stored(d);
    edit_header(d / "r.safetensors", change);
  };
}
std::function<void(const fs::path&)> stored_without(const std::string& key) {
  return stored_with([key](Json& header) { header["__metadata__"].erase(key); });
}
std::function<void(const fs::path&)> truncated(std::size_t kept, bool from_end) {
  return [kept, from_end](const fs::path& d) {
    stored(d);
    const std::string bytes = read_bytes(d / "r.safetensors");
    write_bytes(d / "r.safetensors", bytes.substr(0, from_end ? bytes.size() - kept : kept));
  };
}

std::vector<BadInput> rows() {
  const auto with = [](const Arguments& a, const Arguments& more) { return a + more; };
  return {
      {"NothingToCompare", small, of_model, 2, {"--model", "--save-reference"}},
      {"NoReference", small, with({"kl", "--model", "{d}/m"}, text), 2, {"--reference"}},
      {"MissingReference",
       nullptr,
       with({"kl", "--reference", "{d}/m", "--model", "{d}/n"}, text),
       4,
       {"{d}/m", "no such file"}},
      {"MissingModel", small, with(of_model, {"--model", "{d}/n"}), 4, {"{d}/n", "no such file"}},
      {"MissingStoredReference", small, of_stored, 4, {"{d}/r.safetensors", "cannot open"}},
      {"MissingText",
       small,
       {"kl", "--reference", "{d}/m", "--model", "{d}/m", "--text", "{d}/t.txt", "--device", "cpu"},
       4,
       {"{d}/t.txt"}},
      {"NegativeBatch",
       small,
       with(of_model, {"--model", "{d}/m", "--batch", "-1"}),
       2,
       {"--batch"}},
      {"OtherVocabulary",
       small_and_narrow,
       with(of_model, {"--model", "{d}/n"}),
       5,
       {"n: vocabulary", "expected 2048", "found 1024"}},
      {"OtherTokenizer",
       small_and_stranger,
       with(of_model, {"--model", "{d}/n"}),
       5,
       {"n: tokenizer SHA-256", "expected", "found"}},
      {"ExecPackedWithoutModel",
       small,
       with(of_model, {"--exec", "packed", "--save-reference", "{d}/r.safetensors"}),
       2,
       {"--exec packed", "--model"}},
      {"ExecPackedOfACheckpoint",
       small,
       with(of_model, {"--model", "{d}/m", "--exec", "packed"}),
       2,
       {"m: ", "packed linears", "--exec decoded"}},
      {"SaveUnderAnotherName",
       small,
       with(of_model, {"--save-reference", "{d}/r.bin"}),
       2,
       {"--save-reference", "FILE.safetensors", "r.bin"}},
      {"SaveInMissingDirectory",
       small,
       with(of_model, {"--save-reference", "{d}/no/r.safetensors"}),
       4,
       {"{d}/no/r.safetensors", "cannot create"}},
      {"SaveOnAFullDisk",
       small,
       with(of_model, {"--save-reference", "{d}/r.safetensors"}),
       4,
       {"{d}/r.safetensors", "cannot write"},
       {.file_bytes = 20'000}},
      {"SaveOfAStoredReference",
       stored,
       with(of_stored, {"--save-reference", "{d}/s.safetensors"}),
       2,
       {"--save-reference", "r.safetensors"}},
      {"NoiseFloorOfAStoredReference",
       stored,
       with(of_stored, {"--noise-floor"}),
       2,
       {"--noise-floor", "r.safetensors"}},
      {"StoredOfFewerWindows",
       stored,
       {"kl", "--reference", "{d}/r.safetensors", "--model", "{d}/m", "--text", "{t}/heldout.txt",
        "--seq", "64", "--limit", "3", "--device", "cpu"},
       5,
       {"r.safetensors", "tokens", "expected [3, 64]", "found [2, 64]"}},
      {"StoredOfAnotherText",
       stored,
       {"kl", "--reference", "{d}/r.safetensors", "--model", "{d}/m", "--text", "{t}/calib.txt",
        "--seq", "64", "--limit", "2", "--device", "cpu"},
       5,
       {"r.safetensors", "SHA-256 of the tokens", "expected", "found"}},
      {"StoredInAnotherDtype",
       stored,
       with(of_stored, {"--dtype", "bf16"}),
       5,
       {"r.safetensors", "dtype", "expected bf16", "found f32"}},
      {"StoredOfAnotherVocabulary",
       [](const fs::path& d) {
         stored(d);
         write_small_model(d / "n", 1024);
       },
       {"kl", "--reference", "{d}/r.safetensors", "--model", "{d}/n", "--text", "synthetic:128",
        "--seq", "64", "--device", "cpu"},
       5,
       {"r.safetensors", "vocabulary", "expected 1024", "found 2048"}},
      {"StoredOfAnotherTokenizer",
       [](const fs::path& d) {
         stored(d);
         write_bytes(d / "m/tokenizer.json", read_bytes(d / "m/tokenizer.json") + "\n");
       },
       of_stored,
       5,
       {"r.safetensors", "tokenizer SHA-256", "expected", "found"}},
      {"StoredWithoutDataAtTheEnd", truncated(1, true), of_stored, 3, {"r.safetensors"}},
      {"StoredWithoutHead", truncated(2048 * 64 * 4, true), of_stored, 3, {"r.safetensors"}},
      {"StoredCutInTheHeader", truncated(100, false), of_stored, 3, {"r.safetensors"}},
      {"StoredEmpty", truncated(0, false), of_stored, 3, {"r.safetensors"}},
      {"StoredIsACheckpoint",
       [](const fs::path& d) {
         small(d);
         fs::copy_file(d / "m/model.safetensors", d / "r.safetensors");
       },
       of_stored,
       3,
       {"r.safetensors", "__metadata__.format", "lowbit-kl-reference"}},
      {"StoredWithoutDtype", stored_without("dtype"), of_stored, 3, {"__metadata__.dtype"}},
      {"StoredWithoutModel", stored_without("model"), of_stored, 3, {"__metadata__.model"}},
      {"StoredOfUnknownDtype",
       stored_with([](Json& header) { header["__metadata__"]["dtype"] = "f64"; }),
       of_stored,
       3,
       {"__metadata__.dtype", "f32, bf16 or f16", "f64"}},
      {"StoredOfContradictingDtype",
       stored_with([](Json& header) { header["__metadata__"]["dtype"] = "bf16"; }),
       of_stored,
       3,
       {"hidden", "BF16", "F32"}},
      {"StoredWithBrokenModel",
       stored_with([](Json& header) { header["__metadata__"]["model"] = "{\"a\": "; }),
       of_stored,
       3,
       {"r.safetensors", "model", "JSON"}},
      {"StoredWithBrokenTokenizerHash",
       stored_with(
           [](Json& header) { header["__metadata__"]["tokenizer_sha256"] = std::string(64, 'x'); }),
       of_stored,
       3,
       {"tokenizer_sha256", "64 hexadecimal digits"}},
      {"StoredWithOtherTokens",
       stored_with(
           [](Json& header) { header["__metadata__"]["tokens_sha256"] = std::string(64, '0'); }),
       of_stored,
       3,
       {"tokens", "SHA-256"}},
      {"StoredWithoutTokens",
       stored_with([](Json& header) {
         header["other"] = header["tokens"];
         header.erase("tokens");
       }),
       of_stored,
       3,
       {"tokens", "no such tensor"}},
      {"StoredWithRowsMissing",
       stored_with([](Json& header) {
         header["hidden"]["shape"] = {64, 128};
       }),
       of_stored,
       3,
       {"hidden", "128 rows", "found 64"}},
      {"StoredWithAnotherHead",
       stored_with([](Json& header) {
         header["head"]["shape"] = {4096, 32};
       }),
       of_stored,
       3,
       {"head", "64 columns", "found 32"}},
      {"StoredWithAFlatHead",
       stored_with([](Json& header) { header["head"]["shape"] = {2048 * 64}; }),
       of_stored,
       3,
       {"head", "[131072]"}},
      {"StoredWithNan",
       [](const fs::path& d) {
         stored(d);
         set_element(d / "r.safetensors", "hidden", 70 * 64, std::stof("nan"));
       },
       of_stored,
       6,
       {"window 1, position 6", "finite"}},
      {"MemoryOfBothModels",
       nullptr,
       {"kl", "--reference", "synthetic:llama3-70b", "--model", "synthetic:llama3-70b", "--text",
        "synthetic:30000000", "--device", "cpu", "--threads", "2"},
       7,
       {"cpu", "out of memory", "hidden_stream", "GB", "--limit"}},
  };
}

class BadKl : public testing::TestWithParam<BadInput> {};
TEST_P(BadKl, IsRefusedInOneLine) { expect_refused(GetParam()); }
INSTANTIATE_TEST_SUITE_P(Kl, BadKl, testing::ValuesIn(rows()), row_name);

TEST(KlCommand, ComparesWithAModelAndWithWhatItStored) {
  const TemporaryDirectory directory;
  const fs::path& d = directory.path();
  small(d);
  const auto run = [](const Arguments& arguments) {
    const Outcome outcome = run_program(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.out;
  };
  run({"quantize", "--model", d / "m", "--method", "rtn", "--group", "32", "--out", d / "q.qw",
       "--device", "cpu"});
  const Arguments common = {"--model",  d / "q.qw",
                            "--text",   tiny_llama3() / "heldout.txt",
                            "--text",   "synthetic:500",
                            "--seq",    "64",
                            "--limit",  "3",
                            "--device", "cpu"};
  const std::string said =
      run(Arguments{"kl", "--reference", d / "m", "--noise-floor", "--save-reference",
                    d / "r.safetensors", "--report", d / "a.json"} +
          common);
  EXPECT_NE(said.find("same_top"), std::string::npos);
  run(Arguments{"kl", "--reference", d / "r.safetensors", "--report", d / "b.json"} + common);
  run(Arguments{"kl", "--reference", d / "r.safetensors", "--report", d / "c.json", "--exec",
                "packed"} +
      common);
  run({"ppl", "--model", d / "q.qw", "--text", tiny_llama3() / "heldout.txt", "--seq", "64",
       "--limit", "3", "--device", "cpu", "--report", d / "p.json"});

  const Json a = Json::parse(read_bytes(d / "a.json")), b = Json::parse(read_bytes(d / "b.json"));
  const Json c = Json::parse(read_bytes(d / "c.json")), p = Json::parse(read_bytes(d / "p.json"));
  ASSERT_EQ(a["results"].size(), 2U);
  EXPECT_EQ(a["results"], b["results"]);
  EXPECT_EQ(a["all_texts"], b["all_texts"]);
  EXPECT_EQ(a["results"][0]["text"], "heldout.txt");
  EXPECT_EQ(a["results"][0]["protocol"], "plain-64");
  EXPECT_EQ(a["results"][0]["positions"], 3 * 63);
  EXPECT_EQ(a["all_texts"]["windows"], 6);
  EXPECT_GT(a["results"][0]["kl"]["mean"].get<double>(), 0.0);
  EXPECT_EQ(a["results"][0]["perplexity"], p["results"][0]["perplexity"]);
  EXPECT_NEAR(c["all_texts"]["kl"]["mean"].get<double>(),
              a["all_texts"]["kl"]["mean"].get<double>(),
              1e-3 * a["all_texts"]["kl"]["mean"].get<double>());
  EXPECT_EQ(c["numerics"]["exec"], "packed");
  EXPECT_EQ(a["noise_floor"]["max"], 0.0);
  EXPECT_EQ(a["noise_floor"]["same_top"], 1.0);
  EXPECT_EQ(a["saved_reference"]["file_bytes"], fs::file_size(d / "r.safetensors"));
  EXPECT_EQ(a["reference"]["kind"], "checkpoint");
  EXPECT_EQ(b["reference"]["kind"], "stored reference");
  EXPECT_EQ(b["reference"]["model"], a["reference"]);
  EXPECT_TRUE(a.contains("plan") && a.contains("memory") && a.contains("time_s"));

  // Storing alone compares nothing.
  run(Arguments{"kl", "--reference", d / "m", "--save-reference", d / "s.safetensors", "--report",
                d / "s.json", "--text", tiny_llama3() / "heldout.txt", "--seq", "64", "--limit",
                "3", "--device", "cpu"});
  EXPECT_FALSE(Json::parse(read_bytes(d / "s.json")).contains("results"));
}

}  // namespace
}  // namespace engine::test
