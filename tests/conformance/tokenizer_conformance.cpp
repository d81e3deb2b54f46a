// The tokenizers against llama.cpp's test vectors, against token streams made by Hugging Face's
// tokenizers, and against each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <sstream>
#include <unordered_map>

#include "formats/bytes.h"
#include "formats/tokenizer.h"
#include "formats/utf8.h"

extern std::filesystem::path conformance_dir;

namespace engine {
namespace {

using Ids = std::vector<std::int32_t>;

const std::array<const char*, 3> corpora = {"wikitext2.test.raw", "ptb.test.txt", "c4.sample.txt"};

std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw IoError(path.string(), "cannot open", 0);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

std::string corpus(const char* name) { return read_text(conformance_dir / "data/text" / name); }

// One of llama.cpp's pairs of .inp and .out files; returns the number of cases.
std::size_t check_vectors(const Tokenizer& tokenizer, const std::filesystem::path& base) {
  const std::string input = read_text(base.string() + ".inp");
  std::istringstream output(read_text(base.string() + ".out"));
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::size_t cases = 0;
  std::size_t at = 0;
  for (std::string line; std::getline(output, line); ++cases) {
    const std::size_t end = input.find(separator, at);
    if (end == std::string::npos) break;
    const std::string text = input.substr(at, end - at);
    at = end + separator.size();
    std::istringstream numbers(line);
    Ids expected;
    for (std::int32_t id = 0; numbers >> id;) expected.push_back(id);
    EXPECT_EQ(tokenizer.encode(text, SpecialText::plain), expected) << "case: " << text;
  }
  EXPECT_EQ(at, input.size());
  return cases;
}

void check_round_trips(const Tokenizer& tokenizer) {
  for (const char* name : corpora) {
    const std::string text = corpus(name);
    ASSERT_GT(text.size(), 100'000U) << name;
    const Ids ids = tokenizer.encode(text, SpecialText::plain);
    EXPECT_LT(ids.size(), text.size() / 2) << name;
    EXPECT_TRUE(tokenizer.decode(ids) == text) << name;
    StreamDecoder stream(tokenizer, false);
    std::string streamed;
    for (const std::int32_t id : ids) streamed += stream.push(id);
    streamed += stream.flush();
    EXPECT_TRUE(streamed == text) << name;
  }
}

// The vocabulary arrays of a GGUF file, enough of the format for llama.cpp's vocabulary files.
class GgufVocabulary {
 public:
  explicit GgufVocabulary(const std::filesystem::path& path)
      : bytes_(read_text(path)),
        reader_(std::as_bytes(std::span(std::as_const(bytes_))), path.string()) {
    if (reader_.take_text(4, "magic") != "GGUF") throw FormatError(path, "magic", "GGUF", "other");
    reader_.read<std::uint32_t>("version");
    reader_.read<std::uint64_t>("tensor count");
    const auto keys = reader_.read<std::uint64_t>("key count");
    for (std::uint64_t i = 0; i < keys; ++i) {
      const std::string key(text());
      read_value(key, reader_.read<std::uint32_t>("type"));
    }
  }
  [[nodiscard]] std::vector<SpmPiece> pieces() const {
    std::vector<SpmPiece> out;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      out.push_back({texts[i], scores.at(i), static_cast<SpmPiece::Type>(types.at(i))});
    }
    return out;
  }

  std::vector<std::string> texts;
  std::vector<float> scores;
  std::vector<std::int32_t> types;

 private:
  static constexpr std::uint32_t string_type = 8;
  static constexpr std::uint32_t array_type = 9;

  std::string_view text() { return reader_.take_text(reader_.read<std::uint64_t>("size"), "text"); }

  void read_value(const std::string& key, std::uint32_t type) {
    constexpr std::array<std::size_t, 13> sizes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == string_type) {
      const std::string_view value = text();
      if (key == "tokenizer.ggml.tokens") texts.emplace_back(value);
    } else if (type == array_type) {
      const auto item = reader_.read<std::uint32_t>("item type");
      const auto count = reader_.read<std::uint64_t>("count");
      if (item == array_type) throw FormatError(reader_.file(), key, "a flat array", "nested");
      for (std::uint64_t i = 0; i < count; ++i) read_value(key, item);
    } else if (key == "tokenizer.ggml.scores") {
      scores.push_back(reader_.read<float>("score"));
    } else if (key == "tokenizer.ggml.token_type") {
      types.push_back(reader_.read<std::int32_t>("piece type"));
    } else {
      reader_.take(sizes.at(type), "value");
    }
  }

  std::string bytes_;
  ByteReader reader_;
};

std::filesystem::path llama3_dir() { return conformance_dir / "tokenizers/llama3"; }
std::filesystem::path llama2_base() {
  return conformance_dir / "tokenizers/llama2/ggml-vocab-llama-spm.gguf";
}

TokenizerInfo llama2_info() {
  TokenizerInfo info;
  info.bos_id = 1;
  info.eos_ids = {2};
  return info;
}

// Bytes as GPT-2 prints them in tokenizer.json; written independently of the library's reader.
std::string printable(std::string_view bytes) {
  static const std::vector<std::uint32_t> map = [] {
    std::vector<std::uint32_t> out(256);
    std::uint32_t next = 256;
    for (std::uint32_t b = 0; b < 256; ++b) {
      const bool keeps = (b > 32 && b < 127) || (b > 160 && b != 173);
      out[b] = keeps ? b : next++;
    }
    return out;
  }();
  std::string out;
  for (const char c : bytes) append_utf8(out, map[static_cast<unsigned char>(c)]);
  return out;
}

// The merges list that Hugging Face's converter derives: all splits into two tokens, ordered by
// the rank of the result, then of the halves.
template <class CutsOf>
nlohmann::json derived_merges(const std::vector<std::string>& tokens, std::size_t first,
                              const std::vector<std::size_t>& order, CutsOf is_cut,
                              std::string (*spell)(std::string_view)) {
  std::unordered_map<std::string, std::size_t> ids;
  for (std::size_t id = first; id < tokens.size(); ++id) ids.emplace(tokens[id], id);
  nlohmann::json merges = nlohmann::json::array();
  for (const std::size_t id : order) {
    std::set<std::pair<std::size_t, std::size_t>> splits;
    for (std::size_t cut = 1; cut < tokens[id].size(); ++cut) {
      if (!is_cut(tokens[id], cut)) continue;
      const auto left = ids.find(tokens[id].substr(0, cut));
      const auto right = ids.find(tokens[id].substr(cut));
      if (left != ids.end() && right != ids.end()) splits.insert({left->second, right->second});
    }
    for (const auto& [left, right] : splits) {
      merges.push_back({spell(tokens[left]), spell(tokens[right])});
    }
  }
  return merges;
}

nlohmann::json added_json(const Tokenizer& tokenizer, std::int32_t first, std::int32_t end) {
  nlohmann::json out = nlohmann::json::array();
  for (std::int32_t id = first; id < end; ++id) {
    out.push_back({{"id", id},
                   {"content", tokenizer.token_bytes(id)},
                   {"special", true},
                   {"normalized", false}});
  }
  return out;
}

TEST(TokenizerConformance, Llama3Vectors) {
  const auto tokenizer = load_tokenizer(llama3_dir());
  EXPECT_EQ(tokenizer->kind(), "byte_bpe.ranks");
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  EXPECT_EQ(tokenizer->bos_id(), 128000);
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{128001, 128009}));
  EXPECT_EQ(tokenizer->added_id("<|start_header_id|>"), 128006);
  EXPECT_EQ(tokenizer->added_id("<|end_header_id|>"), 128007);
  EXPECT_EQ(tokenizer->added_id("<|reserved_special_token_250|>"), 128255);
  EXPECT_EQ(check_vectors(*tokenizer, llama3_dir() / "ggml-vocab-llama-bpe.gguf"), 46U);
  const std::vector<std::pair<std::string, Ids>> singles = {
      {"A", {32}},        {" A", {362}},        {"\n", {198}},        {"\n\n", {271}},
      {"\n\n\n", {1432}}, {".\n\n", {382}},     {" ", {220}},         {"  ", {256}},
      {"   ", {262}},     {"    ", {257}},      {"     ", {415}},     {"      ", {996}},
      {"       ", {286}}, {"        ", {260}},  {"   x", {256, 865}}, {" yes", {10035}},
      {" no", {912}},     {"\xC2\xBD", {27154}}};
  for (const auto& [text, ids] : singles) {
    EXPECT_EQ(tokenizer->encode(text, SpecialText::parse), ids) << text;
  }
}

TEST(TokenizerConformance, Llama3VocabularyEncodesToItself) {
  const auto tokenizer = load_tokenizer(llama3_dir());
  std::size_t valid = 0;
  std::size_t wrong = 0;
  for (std::int32_t id = 0; id < 128000; ++id) {
    const std::string& text = tokenizer->token_bytes(id);
    if (utf8_valid_prefix(text) != text.size()) continue;
    ++valid;
    if (tokenizer->encode(text, SpecialText::plain) != Ids{id}) ++wrong;
  }
  EXPECT_EQ(valid, 126648U);
  EXPECT_EQ(wrong, 0U);
}

TEST(TokenizerConformance, Llama2Vectors) {
  const GgufVocabulary gguf(llama2_base());
  ASSERT_EQ(gguf.texts.size(), 32000U);
  const auto tokenizer = make_spm(gguf.pieces(), true, llama2_info());
  EXPECT_EQ(check_vectors(*tokenizer, llama2_base()), 46U);
  EXPECT_EQ(tokenizer->encode("A", SpecialText::parse), (Ids{319}));
  EXPECT_EQ(tokenizer->encode("Answer:", SpecialText::parse), (Ids{673, 29901}));
}

TEST(TokenizerConformance, RoundTripsOfCorpora) {
  check_round_trips(*load_tokenizer(llama3_dir()));
  check_round_trips(*make_spm(GgufVocabulary(llama2_base()).pieces(), true, llama2_info()));
  check_round_trips(*load_tokenizer(conformance_dir / "models/tiny/tokenizer.json"));
}

// LLaMA3's vocabulary written as a tokenizer.json must give the same ids as the rank file.
TEST(TokenizerConformance, Llama3JsonEqualsRanks) {
  const auto ranks = load_tokenizer(llama3_dir());
  std::vector<std::string> tokens;
  std::vector<std::size_t> order;
  nlohmann::json vocab = nlohmann::json::object();
  for (std::int32_t id = 0; id < 128000; ++id) {
    order.push_back(tokens.size());
    tokens.push_back(ranks->token_bytes(id));
    vocab[printable(tokens.back())] = id;
  }
  const auto everywhere = [](const std::string&, std::size_t) { return true; };
  nlohmann::json merges = derived_merges(tokens, 0, order, everywhere, printable);
  EXPECT_EQ(merges.size(), 280147U);
  nlohmann::json json =
      nlohmann::json::parse(read_text(conformance_dir / "models/tiny/tokenizer.json"));
  json["added_tokens"] = added_json(*ranks, 128000, 128256);
  json["model"]["vocab"] = std::move(vocab);
  json["model"]["merges"] = std::move(merges);
  for (auto& step : json["post_processor"]["processors"]) {
    if (step["type"] == "TemplateProcessing") {
      step["special_tokens"]["<|begin_of_text|>"]["ids"] = {128000};
    }
  }
  const auto tokenizer = tokenizer_from_bytes(json.dump(), "derived tokenizer.json");
  EXPECT_EQ(tokenizer->kind(), "byte_bpe.json");
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  EXPECT_EQ(tokenizer->bos_id(), 128000);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(check_vectors(*tokenizer, llama3_dir() / "ggml-vocab-llama-bpe.gguf"), 46U);
  for (const char* name : corpora) {
    const std::string text = corpus(name);
    EXPECT_TRUE(tokenizer->encode(text, SpecialText::parse) ==
                ranks->encode(text, SpecialText::parse))
        << name;
  }
}

// LLaMA2's vocabulary written as a tokenizer.json must give the same ids as the pieces.
TEST(TokenizerConformance, Llama2JsonEqualsPieces) {
  const GgufVocabulary gguf(llama2_base());
  const auto pieces = make_spm(gguf.pieces(), true, llama2_info());
  std::vector<std::size_t> order;
  nlohmann::json vocab = nlohmann::json::object();
  for (std::size_t id = 0; id < gguf.texts.size(); ++id) {
    vocab[gguf.texts[id]] = id;
    if (id >= 259) order.push_back(id);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return gguf.scores[a] > gguf.scores[b]; });
  const auto at_character = [](const std::string& text, std::size_t cut) {
    return (static_cast<unsigned char>(text[cut]) & 0xC0) != 0x80;
  };
  const auto same = [](std::string_view text) { return std::string(text); };
  const nlohmann::json merges = derived_merges(gguf.texts, 259, order, at_character, +same);
  const nlohmann::json json = {
      {"added_tokens", added_json(*pieces, 0, 3)},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers",
         {{{"type", "Prepend"}, {"prepend", "\xE2\x96\x81"}},
          {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\xE2\x96\x81"}}}}}},
      {"model", {{"type", "BPE"}, {"byte_fallback", true}, {"vocab", vocab}, {"merges", merges}}}};
  const auto tokenizer = tokenizer_from_bytes(json.dump(), "derived tokenizer.json");
  EXPECT_EQ(tokenizer->kind(), "sentencepiece.json");
  EXPECT_EQ(check_vectors(*tokenizer, llama2_base()), 46U);
  for (const char* name : corpora) {
    const std::string text = corpus(name);
    EXPECT_TRUE(tokenizer->encode(text, SpecialText::parse) ==
                pieces->encode(text, SpecialText::parse))
        << name;
  }
}

// The int32 vector `name` of a safetensors file.
Ids safetensors_ids(const std::string& file, const char* name) {
  ByteReader reader(std::as_bytes(std::span(file)), "tiny_tokens.safetensors");
  const auto header =
      nlohmann::json::parse(reader.take_text(reader.read<std::uint64_t>("header size"), "header"));
  const auto& tensor = header.at(name);
  if (tensor.at("dtype") != "I32") throw FormatError(reader.file(), name, "I32", "another dtype");
  const auto begin = tensor.at("data_offsets").at(0).get<std::uint64_t>();
  const auto end = tensor.at("data_offsets").at(1).get<std::uint64_t>();
  reader.take(begin, "tensors before");
  const auto raw = reader.take(end - begin, name);
  Ids ids(raw.size() / sizeof(std::int32_t));
  std::memcpy(ids.data(), raw.data(), ids.size() * sizeof(std::int32_t));
  return ids;
}

// The reference streams were made from files read in text mode, where CR LF becomes LF.
std::string with_unix_lines(std::string text) {
  for (std::size_t at = 0; (at = text.find("\r\n", at)) != std::string::npos;) text.erase(at, 1);
  return text;
}

TEST(TokenizerConformance, TinyModelEqualsHuggingFace) {
  const auto tokenizer = load_tokenizer(conformance_dir / "models/tiny");
  EXPECT_EQ(tokenizer->kind(), "byte_bpe.json");
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->source_hash().size(), 64U);
  const std::string file = read_text(conformance_dir / "models/tiny/tiny_tokens.safetensors");
  const std::array<std::pair<const char*, std::size_t>, 3> streams = {
      {{"wikitext2", 473349}, {"ptb", 150031}, {"c4", 183072}}};
  for (std::size_t i = 0; i < streams.size(); ++i) {
    const auto& [name, count] = streams[i];
    const Ids expected = safetensors_ids(file, name);
    EXPECT_EQ(expected.size(), count) << name;
    Ids ids = {tokenizer->bos_id()};
    const Ids body = tokenizer->encode(with_unix_lines(corpus(corpora[i])), SpecialText::parse);
    ids.insert(ids.end(), body.begin(), body.end());
    EXPECT_TRUE(ids == expected) << name;
  }
}

TEST(TokenizerConformance, WikiTextIsTokenizedInTime) {
  const auto tokenizer = load_tokenizer(llama3_dir());
  const std::string text = corpus("wikitext2.test.raw");
  const auto start = std::chrono::steady_clock::now();
  const Ids ids = tokenizer->encode(text, SpecialText::parse);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_GT(ids.size(), 280'000U);
  EXPECT_LT(seconds.count(), 2.0);
  RecordProperty("milliseconds", static_cast<int>(1000 * seconds.count()));
}

}  // namespace
}  // namespace engine
