// Checkpoints that are broken, contradict themselves or do not fit their texts.
#include <cmath>
#include <limits>

#include "tests/cli/bad_inputs.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

const Arguments quantize = {"quantize", "--model", "{d}/m",    "--method", "rtn", "--group",
                            "32",       "--out",   "{d}/o.qw", "--device", "cpu"};
const Arguments quantize_gptq = {"quantize", "--model", "{d}/m",   "--method",      "gptq",
                                 "--group",  "32",      "--calib", "{t}/calib.txt", "--samples",
                                 "2",        "--seq",   "64",      "--out",         "{d}/o.qw",
                                 "--device", "cpu"};
const Arguments ppl = {"ppl",     "--model", "{d}/m",    "--text", "{t}/heldout.txt", "--seq", "64",
                       "--limit", "2",       "--device", "cpu"};
const Arguments generate = {"generate",     "--model", "{d}/m",    "--prompt", "The king",
                            "--max-tokens", "3",       "--device", "cpu"};
const Arguments decode = {"decode", "--model", "{d}/m", "--out", "{d}/decoded", "--device", "cpu"};

const char* const q1 = "model.layers.1.self_attn.q_proj.weight";
constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

// Preparations: the small model in {d}/m, and one thing wrong with it.
using Prepare = std::function<void(const fs::path&)>;

void small(const fs::path& d) { write_small_model(d / "m"); }

Prepare config(std::function<void(Json&)> change) {
  return [change](const fs::path& d) {
    small(d);
    edit_json(d / "m/config.json", change);
  };
}
Prepare header(std::function<void(Json&)> change) {
  return [change](const fs::path& d) {
    small(d);
    edit_header(d / "m/model.safetensors", change);
  };
}
Prepare index(std::function<void(Json&)> change) {
  return [change](const fs::path& d) {
    write_small_model_in_shards(d / "m");
    edit_json(d / "m/model.safetensors.index.json", change);
  };
}
Prepare element(const std::string& tensor, float value) {
  return [tensor, value](const fs::path& d) {
    small(d);
    set_element(d / "m/model.safetensors", tensor, 37, value);
  };
}
Prepare file(const std::string& name, const std::string& bytes) {
  return [name, bytes](const fs::path& d) {
    small(d);
    write_bytes(d / name, bytes);
  };
}
Prepare without(const std::string& name) {
  return [name](const fs::path& d) {
    small(d);
    fs::remove(d / name);
  };
}
Prepare cut(const std::string& name, std::int64_t bytes) {
  return [name, bytes](const fs::path& d) {
    small(d);
    const auto size = static_cast<std::int64_t>(fs::file_size(d / name));
    fs::resize_file(d / name, static_cast<std::uintmax_t>(bytes < 0 ? size + bytes : bytes));
  };
}

std::vector<BadInput> files() {
  const std::string weights = "{d}/m/model.safetensors";
  const std::string index_file = "{d}/m/model.safetensors.index.json";
  const auto offsets = [](const char* key, std::int64_t by_begin, std::int64_t by_end) {
    return header([key, by_begin, by_end](Json& h) {
      Json& o = h.at(key).at("data_offsets");
      o[0] = o[0].get<std::int64_t>() + by_begin;
      o[1] = o[1].get<std::int64_t>() + by_end;
    });
  };
  return {
      {"MissingShard",
       [](const fs::path& d) {
         write_small_model_in_shards(d / "m");
         fs::remove(d / "m" / second_shard);
       },
       quantize,
       3,
       {index_file, "weight_map", second_shard, "no such file"}},
      {"ShardNamedNowhere",
       index([](Json& j) { j["weight_map"]["model.norm.weight"] = "x.safetensors"; }),
       ppl,
       3,
       {index_file, "model.norm.weight", "x.safetensors", "no such file"}},
      {"TensorInAnotherShard",
       index([](Json& j) { j["weight_map"]["model.norm.weight"] = second_shard; }),
       quantize,
       3,
       {index_file, "model.norm.weight", second_shard, "no such tensor"}},
      {"TensorAbsentFromIndex",
       index([](Json& j) { j["weight_map"].erase("model.norm.weight"); }),
       quantize,
       5,
       {"{d}/m", "model.norm.weight", "expected [64]", "no such tensor"}},
      {"ShardOutsideTheDirectory",
       index([](Json& j) { j["weight_map"]["model.norm.weight"] = "../m.safetensors"; }),
       quantize,
       3,
       {index_file, "model.norm.weight", "same directory"}},
      {"IndexWithoutMap",
       index([](Json& j) { j.erase("weight_map"); }),
       quantize,
       3,
       {index_file, "weight_map"}},
      {"NoWeights", without("m/model.safetensors"), quantize, 3, {"{d}/m", "model.safetensors"}},
      {"PickleOnly",
       [](const fs::path& d) {
         small(d);
         fs::rename(d / "m/model.safetensors", d / "m/pytorch_model.bin");
       },
       quantize,
       3,
       {"pytorch_model.bin", "safetensors"}},
      {"TruncatedData",
       cut("m/model.safetensors", -100),
       quantize,
       3,
       {weights, "expected", "found"}},
      {"TruncatedHeader", cut("m/model.safetensors", 40), ppl, 3, {weights, "header length"}},
      {"TruncatedLength",
       cut("m/model.safetensors", 4),
       ppl,
       3,
       {weights, "header length", "8 bytes"}},
      {"EmptyWeights", cut("m/model.safetensors", 0), generate, 3, {weights, "header length"}},
      {"BytesBehindTheEnd",
       [](const fs::path& d) {
         small(d);
         write_bytes(d / "m/model.safetensors", read_bytes(d / "m/model.safetensors") + "more");
       },
       quantize,
       3,
       {weights, "data"}},
      {"HugeHeaderLength",
       file("m/model.safetensors", std::string(8, '\x7f') + "{}"),
       quantize,
       3,
       {weights, "header length", "at most 100000000"}},
      {"HeaderNotJson",
       file("m/model.safetensors", std::string("\x02\0\0\0\0\0\0\0{]", 10)),
       quantize,
       3,
       {weights, "valid JSON"}},
      {"OverlappingOffsets", offsets(q1, -64, -64), quantize, 3, {weights, q1, "overlap"}},
      {"GapBetweenTensors",
       header([](Json& h) { h.erase("model.layers.0.self_attn.q_proj.weight"); }),
       quantize,
       3,
       {weights, "data_offsets", "gap"}},
      {"OffsetsOutOfRange",
       offsets("lm_head.weight", 0, 1 << 30),
       quantize,
       3,
       {weights, "lm_head.weight", "data_offsets"}},
      {"NegativeOffset",
       header([](Json& h) { h["lm_head.weight"]["data_offsets"][0] = -8; }),
       ppl,
       3,
       {weights, "lm_head.weight", "-8"}},
      {"BeginBehindEnd",
       header([](Json& h) {
         Json& o = h["model.norm.weight"]["data_offsets"];
         std::swap(o[0], o[1]);
       }),
       ppl,
       3,
       {weights, "model.norm.weight", "begin"}},
      {"OverflowingShape",
       header([](Json& h) {
         h[q1]["shape"] = {std::int64_t{1} << 62, std::int64_t{1} << 62};
       }),
       ppl,
       3,
       {weights, q1, "shape"}},
      {"UnknownDtype",
       header([](Json& h) { h[q1]["dtype"] = "F3"; }),
       ppl,
       3,
       {weights, q1, "dtype", "F3"}},
      {"IntegerWeights",
       header([](Json& h) { h[q1]["dtype"] = "I32"; }),
       quantize,
       5,
       {weights, q1, "BF16 or F16 or F32", "I32"}},
      {"WrongShape",
       header([](Json& h) {
         h[q1]["shape"] = {32, 128};
       }),
       quantize,
       5,
       {weights, q1, "[64, 64]", "[32, 128]"}},
      {"TransposedShape",
       header([](Json& h) {
         h["model.layers.0.mlp.down_proj.weight"]["shape"] = {128, 64};
       }),
       generate,
       5,
       {weights, "mlp.down_proj", "[64, 128]", "[128, 64]"}},
      {"NoSuchModel", nullptr, ppl, 4, {"{d}/m", "no such file or directory"}},
      {"ModelIsAWeightsFile",
       small,
       {"ppl", "--model", "{d}/m/model.safetensors", "--text", "{t}/heldout.txt"},
       2,
       {weights, "expected a model directory"}},
      {"UnknownSyntheticModel",
       nullptr,
       {"generate", "--model", "synthetic:gpt5"},
       2,
       {"llama3-8b", "gpt5"}},
  };
}

std::vector<BadInput> configs() {
  const std::string name = "{d}/m/config.json";
  return {
      {"UnknownArchitecture",
       config([](Json& c) { c["architectures"] = Json::array({"MistralForCausalLM"}); }),
       quantize,
       3,
       {name, "architectures", "LlamaForCausalLM", "MistralForCausalLM"}},
      {"UnknownModelType",
       config([](Json& c) { c["model_type"] = "qwen2"; }),
       ppl,
       3,
       {name, "model_type", "llama", "qwen2"}},
      {"UnknownRopeType",
       config([](Json& c) {
         c["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
       }),
       ppl,
       3,
       {name, "rope_scaling.rope_type", "llama3", "yarn"}},
      {"RopeWithoutFactor",
       config([](Json& c) {
         c["rope_scaling"] = {{"rope_type", "linear"}};
       }),
       ppl,
       3,
       {name, "rope_scaling.factor"}},
      {"AttentionBias",
       config([](Json& c) { c["attention_bias"] = true; }),
       ppl,
       3,
       {name, "attention_bias"}},
      {"OtherActivation",
       config([](Json& c) { c["hidden_act"] = "gelu"; }),
       ppl,
       3,
       {name, "hidden_act", "silu", "gelu"}},
      {"TooManyLayers",
       config([](Json& c) { c["num_hidden_layers"] = 3; }),
       quantize,
       5,
       {"{d}/m", "model.layers.2.", "no such tensor"}},
      {"TooFewLayers",
       config([](Json& c) { c["num_hidden_layers"] = 1; }),
       quantize,
       5,
       {"{d}/m", "config.json", "num_hidden_layers", "expected at least 2", "found 1"}},
      {"NoLayers",
       config([](Json& c) { c["num_hidden_layers"] = 0; }),
       quantize,
       3,
       {name, "num_hidden_layers", "0"}},
      {"OtherVocabulary",
       config([](Json& c) { c["vocab_size"] = 2000; }),
       quantize,
       5,
       {"embed_tokens", "[2000, 64]", "[2048, 64]"}},
      {"OtherHiddenSize",
       config([](Json& c) { c["hidden_size"] = 128; }),
       ppl,
       5,
       {"embed_tokens", "[2048, 128]", "[2048, 64]"}},
      {"HeadsThatDoNotDivide",
       config([](Json& c) { c["num_attention_heads"] = 5; }),
       ppl,
       3,
       {name, "hidden_size"}},
      {"MoreKeyHeadsThanHeads",
       config([](Json& c) { c["num_key_value_heads"] = 3; }),
       ppl,
       3,
       {name, "num_key_value_heads"}},
      {"HugeSize",
       config([](Json& c) { c["intermediate_size"] = std::int64_t{1} << 50; }),
       ppl,
       3,
       {name, "intermediate_size"}},
      {"SizeIsText",
       config([](Json& c) { c["hidden_size"] = "64"; }),
       ppl,
       3,
       {name, "hidden_size", "64"}},
      {"NoHiddenSize",
       config([](Json& c) { c.erase("hidden_size"); }),
       ppl,
       3,
       {name, "hidden_size"}},
      {"BosBeyondVocabulary",
       config([](Json& c) { c["bos_token_id"] = 2048; }),
       ppl,
       3,
       {name, "bos_token_id", "2048"}},
      {"NotJson",
       file("m/config.json", "{\n\"hidden_size\": 64,\n oops"),
       quantize,
       3,
       {name, "valid JSON"}},
      {"NotAnObject", file("m/config.json", "[1, 2]"), quantize, 3, {name, "object"}},
      {"Empty", file("m/config.json", ""), ppl, 3, {name}},
      {"DeeplyNested", file("m/config.json", std::string(100000, '[')), ppl, 3, {name}},
      {"Absent", without("m/config.json"), quantize, 4, {name, "cannot open"}},
      {"BadGenerationConfig",
       file("m/generation_config.json", "{\"eos_token_id\": 5000}"),
       ppl,
       3,
       {"generation_config.json", "eos_token_id", "5000"}},
  };
}

std::vector<BadInput> weights() {
  const std::string tensor = "layers.1.self_attn.q_proj";
  const std::string norm = "model.layers.0.post_attention_layernorm.weight";
  return {
      {"NanQuantizeRtn", element(q1, nan), quantize, 6, {tensor, "finite", "NaN"}},
      {"NanQuantizeGptq", element(q1, nan), quantize_gptq, 6, {tensor, "finite", "NaN"}},
      {"NanPpl", element(q1, nan), ppl, 6, {tensor, "finite", "NaN"}},
      {"NanGenerate", element(q1, nan), generate, 6, {tensor, "finite", "NaN"}},
      {"InfinityQuantizeRtn", element(q1, infinity), quantize, 6, {tensor, "finite"}},
      {"NanNormQuantizeRtn",
       element(norm, nan),
       quantize,
       6,
       {"layers.0.post_attention_layernorm", "finite"}},
      {"NanNormPpl", element(norm, nan), ppl, 6, {"layers.0.post_attention_layernorm", "finite"}},
      {"NanEmbeddingQuantizeRtn",
       element("model.embed_tokens.weight", nan),
       quantize,
       6,
       {"embed_tokens", "finite"}},
      {"InfiniteHeadQuantizeGptq",
       element("lm_head.weight", infinity),
       quantize_gptq,
       6,
       {"lm_head", "finite"}},
      {"NanHeadPpl", element("lm_head.weight", nan), ppl, 6, {"finite", "NaN"}},
      {"NanHeadGenerate", element("lm_head.weight", nan), generate, 6, {"finite", "NaN"}},
      {"NanFinalNormPpl", element("model.norm.weight", nan), ppl, 6, {"finite", "NaN"}},
      {"ShapeDecode",
       header([](Json& h) {
         h[q1]["shape"] = {32, 128};
       }),
       decode,
       5,
       {q1, "[64, 64]"}},
  };
}

std::vector<BadInput> texts() {
  const Prepare other = [](const fs::path& d) { write_small_model(d / "m", 1024); };
  const auto with_text = [](Arguments a) {
    for (std::string& s : a) {
      if (s == "{t}/heldout.txt" || s == "{t}/calib.txt") s = "{d}/text";
    }
    return a;
  };
  const auto text = [](const std::string& bytes) { return file("text", bytes); };
  std::string broken(1000, 'a');
  broken[777] = '\xC3';
  const std::string tokenizer = "{d}/m/tokenizer.json";
  return {
      {"NoTokenizerPpl", without("m/tokenizer.json"), ppl, 4, {"{d}/m", "tokenizer.json"}},
      {"NoTokenizerGenerate",
       without("m/tokenizer.json"),
       generate,
       4,
       {"{d}/m", "tokenizer.json"}},
      {"NoTokenizerQuantize",
       without("m/tokenizer.json"),
       quantize,
       4,
       {"{d}/m", "tokenizer.json"}},
      {"TokenizerNotJson", file("m/tokenizer.json", "{]"), ppl, 3, {"tokenizer.json", "JSON"}},
      {"TokenizerNotJsonQuantize",
       file("m/tokenizer.json", "{"),
       quantize,
       3,
       {"tokenizer.json", "JSON"}},
      {"TokenizerWithoutModel",
       file("m/tokenizer.json", "{}"),
       generate,
       3,
       {"tokenizer.json", "model"}},
      {"TokenizerOfAnotherModelPpl", other, ppl, 5, {"heldout.txt", "vocabulary of 1024"}},
      {"TokenizerOfAnotherModelQuantize",
       other,
       quantize_gptq,
       5,
       {"calibration", "vocabulary of 1024"}},
      {"TokenizerOfAnotherModelGenerate", other, generate, 5, {"prompt", "vocabulary of 1024"}},
      {"NoSuchText", small, with_text(ppl), 4, {"{d}/text", "cannot open"}},
      {"TextIsADirectory",
       small,
       {"ppl", "--model", "{d}/m", "--text", "{d}", "--device", "cpu"},
       4,
       {"{d}", "regular file"}},
      {"EmptyTextPpl", text(""), with_text(ppl), 3, {"{d}/text", "empty"}},
      {"EmptyTextQuantize", text(""), with_text(quantize_gptq), 3, {"{d}/text", "empty"}},
      {"InvalidUtf8Ppl", text(broken), with_text(ppl), 3, {"{d}/text", "777", "UTF-8"}},
      {"InvalidUtf8Quantize",
       text(broken),
       with_text(quantize_gptq),
       3,
       {"{d}/text", "777", "UTF-8"}},
      {"InvalidUtf8Prompt",
       small,
       {"generate", "--model", "{d}/m", "--prompt", "ab\xFF", "--device", "cpu"},
       3,
       {"offset 2", "UTF-8"}},
      {"ShortTextPpl",
       text("A few words."),
       with_text(ppl),
       2,
       {"{d}/text", "one window of 64 tokens", "found"}},
      {"ShortTextQuantize",
       text("A few words."),
       with_text(quantize_gptq),
       2,
       {"{d}/text", "--seq 64", "found"}},
      {"UnknownDataset",
       small,
       ppl + Arguments{"--dataset", "wikitext3"},
       2,
       {"wikitext2", "wikitext3"}},
      {"TwoDatasetsForOneText",
       small,
       ppl + Arguments{"--dataset", "plain", "ptb"},
       2,
       {"--dataset", "found 2"}},
      {"C4NotJsonLines",
       text("not json\n"),
       with_text(ppl) + Arguments{"--dataset", "c4-new"},
       3,
       {"{d}/text", "line 1"}},
      {"CalibrationMissing",
       small,
       {"quantize", "--model", "{d}/m", "--method", "gptq", "--group", "32", "--out", "{d}/o.qw",
        "--device", "cpu"},
       2,
       {"--calib", "gptq"}},
      {"CalibrationWrongShape",
       small,
       {"quantize", "--model", "{d}/m", "--method", "gptq", "--group", "32", "--calib",
        "{t}/heldout.safetensors:tokens", "--samples", "8", "--seq", "256", "--out", "{d}/o.qw",
        "--device", "cpu"},
       5,
       {"heldout.safetensors", "256", "[64, 512]"}},
      {"CalibrationTooFewRows",
       small,
       {"quantize", "--model", "{d}/m", "--method", "gptq", "--group", "32", "--calib",
        "{t}/heldout.safetensors:tokens", "--samples", "65", "--seq", "512", "--out", "{d}/o.qw",
        "--device", "cpu"},
       5,
       {"heldout.safetensors", "65", "[64, 512]"}},
      {"CalibrationNoSuchTensor",
       small,
       {"quantize", "--model", "{d}/m", "--method", "gptq", "--group", "32", "--calib",
        "{t}/heldout.safetensors:nothing", "--out", "{d}/o.qw", "--device", "cpu"},
       3,
       {"heldout.safetensors", "nothing", "no such tensor"}},
      {"TokensOfFloats",
       small,
       {"ppl", "--model", "{d}/m", "--text", "{d}/m/model.safetensors:lm_head.weight", "--device",
        "cpu"},
       3,
       {"model.safetensors", "lm_head.weight", "I32", "F32"}},
      {"TokensBeyondVocabulary",
       other,
       {"ppl", "--model", "{d}/m", "--text", "{t}/heldout.safetensors:tokens", "--seq", "512",
        "--device", "cpu"},
       5,
       {"heldout.safetensors", "vocabulary of 1024"}},
  };
}

class BadCheckpoint : public testing::TestWithParam<BadInput> {};
TEST_P(BadCheckpoint, IsRefusedInOneLine) { expect_refused(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Files, BadCheckpoint, testing::ValuesIn(files()), row_name);
INSTANTIATE_TEST_SUITE_P(Configs, BadCheckpoint, testing::ValuesIn(configs()), row_name);
INSTANTIATE_TEST_SUITE_P(Weights, BadCheckpoint, testing::ValuesIn(weights()), row_name);
INSTANTIATE_TEST_SUITE_P(Texts, BadCheckpoint, testing::ValuesIn(texts()), row_name);

// The rows above break a model that works.
TEST(BadCheckpoint, TheUnbrokenModelIsAccepted) {
  const TemporaryDirectory directory;
  write_small_model(directory.path() / "m");
  write_small_model_in_shards(directory.path() / "shards");
  for (const char* model : {"m", "shards"}) {
    for (Arguments arguments : {quantize, quantize_gptq, ppl, generate, decode}) {
      for (std::string& a : arguments) {
        if (a == "{d}/m") a = directory.path() / model;
        if (a.starts_with("{d}")) a = (directory.path() / model).string() + "-" + a.substr(4);
        if (a.starts_with("{t}")) a = tiny_llama3().string() + a.substr(3);
      }
      const Outcome outcome = run_program(arguments);
      EXPECT_EQ(outcome.exit_code, 0) << command_text(arguments) << "\n" << outcome.err;
    }
  }
}

}  // namespace
}  // namespace engine::test
