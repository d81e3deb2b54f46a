// The three file formats of tokenizers: what is read from them, and what is refused.
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/pretokenizer.h"
#include "formats/tokenizer.h"
#include "formats/utf8.h"
#include "tests/formats/temp_dir.h"
#include "tests/formats/tokenizer_fixtures.h"

namespace engine::testing {
namespace {

using Json = nlohmann::json;

const std::string emoji = "\xF0\x9F\x98\x80";

// GPT-2's printable form of the ASCII and Latin-1 characters that these tests use.
std::string printable(int byte) {
  const bool keeps = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
  int code = byte;
  if (!keeps) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += (b > 32 && b < 127) || (b > 160 && b != 173) ? 0 : 1;
  }
  std::string out;
  append_utf8(out, static_cast<std::uint32_t>(code));
  return out;
}

// Merges in the newer spelling, as arrays of two strings.
Json merge_pairs(const std::vector<std::pair<std::string, std::string>>& pairs) {
  Json out = Json::array();
  for (const auto& [left, right] : pairs) out.push_back(Json::array({left, right}));
  return out;
}

Json byte_json() {
  Json vocab = Json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[printable(byte)] = byte;
  vocab["ab"] = 256;
  vocab["bc"] = 257;
  vocab["abc"] = 258;
  vocab
      ["\xC4\xA0"
       "ab"] = 259;  // U+0120 stands for the space
  vocab["xyz"] = 260;
  const std::string space_mark = "\xC4\xA0";
  return {{"added_tokens",
           {{{"id", 300}, {"content", "<|begin_of_text|>"}, {"special", true}},
            {{"id", 301}, {"content", "<|end_of_text|>"}, {"special", true}},
            {{"id", 302}, {"content", "<|eot_id|>"}, {"special", true}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Split"},
               {"pattern", {{"Regex", llama3_split_regex}}},
               {"behavior", "Isolated"},
               {"invert", false}},
              {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}}},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single",
             {{{"SpecialToken", {{"id", "<|begin_of_text|>"}, {"type_id", 0}}}},
              {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
            {"special_tokens",
             {{"<|begin_of_text|>", {{"id", "<|begin_of_text|>"}, {"ids", {300}}}}}}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"ignore_merges", true},
            {"vocab", vocab},
            {"merges", Json::array({"b c", "a b", "ab c", space_mark + " ab"})}}}};
}

Json spm_json() {
  Json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int byte = 0; byte < 256; ++byte) vocab[byte_name(byte)] = 3 + byte;
  std::int32_t id = first_piece;
  for (const std::string& text :
       {space, std::string("a"), std::string("b"), space + "a", std::string("ab"), space + space}) {
    vocab[text] = id++;  // 259..264
  }
  return {{"added_tokens",
           {{{"id", 0}, {"content", "<unk>"}, {"special", true}, {"normalized", true}},
            {{"id", 1}, {"content", "<s>"}, {"special", true}, {"normalized", false}},
            {{"id", 2}, {"content", "</s>"}, {"special", true}, {"normalized", false}}}},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", space}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", space}}}}}},
          {"pre_tokenizer", nullptr},
          {"model",
           {{"type", "BPE"},
            {"byte_fallback", true},
            {"vocab", vocab},
            {"merges", merge_pairs({{space, "a"}, {"a", "b"}, {space, space}})}}}};
}

TEST(TokenizerJson, ByteLevel) {
  Json json = byte_json();
  auto tokenizer = tokenizer_from_bytes(json.dump(), "tokenizer.json");
  EXPECT_EQ(tokenizer->kind(), "byte_bpe.json");
  EXPECT_EQ(tokenizer->bos_id(), 300);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{301, 302}));
  EXPECT_EQ(tokenizer->vocab_size(), 303);
  EXPECT_EQ(tokenizer->source_hash().size(), 64U);
  // The list's order decides, not the ids: bc comes before ab.
  EXPECT_EQ(tokenizer->encode("abcd", SpecialText::parse), (Ids{'a', 257, 'd'}));
  EXPECT_EQ(tokenizer->encode("abc ab xyz", SpecialText::parse),
            (Ids{258, 259, ' ', 'x', 'y', 'z'}));
  EXPECT_EQ(tokenizer->encode("xyz", SpecialText::parse), (Ids{260}));
  EXPECT_EQ(tokenizer->encode("<|eot_id|>\n", SpecialText::parse), (Ids{302, '\n'}));
  EXPECT_EQ(tokenizer->token_bytes(259), " ab");

  json["model"]["merges"] = merge_pairs({{"b", "c"}, {"a", "b"}, {"ab", "c"}, {"\xC4\xA0", "ab"}});
  json["model"]["ignore_merges"] = false;
  json["post_processor"] = {{"type", "ByteLevel"}};
  tokenizer = tokenizer_from_bytes(json.dump(), "tokenizer.json");
  EXPECT_EQ(tokenizer->encode("xyz", SpecialText::parse), (Ids{'x', 'y', 'z'}));
  EXPECT_EQ(tokenizer->encode("abc", SpecialText::parse), (Ids{'a', 257}));
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->bos_id(), 300);

  json["model"].erase("ignore_merges");
  tokenizer = tokenizer_from_bytes(json.dump(), "tokenizer.json");
  EXPECT_EQ(tokenizer->encode("xyz", SpecialText::parse), (Ids{260}));
}

TEST(TokenizerJson, ByteFallback) {
  const auto tokenizer = tokenizer_from_bytes(spm_json().dump(), "tokenizer.json");
  EXPECT_EQ(tokenizer->kind(), "sentencepiece.json");
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{2}));
  EXPECT_EQ(tokenizer->encode("ab  b\n", SpecialText::plain), (Ids{262, 261, 264, 261, 13}));
  // Every text between raw special tokens gets its own prefix; a normalized one is looked for after
  // normalization and therefore takes the space before it along.
  EXPECT_EQ(tokenizer->encode("a<s>a", SpecialText::parse), (Ids{262, 1, 262}));
  EXPECT_EQ(tokenizer->encode("a <unk> a", SpecialText::parse), (Ids{262, 0, 262}));
  EXPECT_EQ(tokenizer->decode(Ids{1, 262, 262}), "a a");
}

TEST(TokenizerJson, RefusesWhatItDoesNotUnderstand) {
  struct Case {
    const char* pointer;
    Json value;
    const char* message;
  };
  const std::vector<Case> cases = {
      {"/model/type", "Unigram", "$.model.type: expected \"BPE\""},
      {"/model/type", nullptr, "$.model.type"},
      {"/model", 7, "$.model: expected an object"},
      {"/model/dropout", 0.1, "$.model.dropout"},
      {"/model/end_of_word_suffix", "</w>", "end_of_word_suffix"},
      {"/model/byte_fallback", "yes", "byte_fallback: expected true or false"},
      {"/model/ignore_merges", 1, "ignore_merges"},
      {"/model/vocab", Json::array(), "$.model.vocab: expected an object"},
      {"/model/vocab/ab", "x", "$.model.vocab.ab"},
      {"/model/vocab/ab", -1, "$.model.vocab.ab"},
      {"/model/vocab/ab", 97, "an id of its own"},
      {"/model/vocab/ab", 2'000'000'000, "an id of its own"},
      {"/model/vocab/ab", 1e300, "a token id"},
      {"/model/vocab/\xE4\xB8\xAD", 270, "characters that stand for bytes"},
      {"/model/merges", nullptr, "$.model.merges: expected an array"},
      {"/model/merges/0", "bc", "$.model.merges[0]"},
      {"/model/merges/0", Json::array({"b", 1}), "$.model.merges[0]"},
      {"/model/merges/0", Json::array({"b", "x"}), "$.model.merges[0]"},
      {"/model/merges/1", "b c", "$.model.merges[1]"},
      {"/normalizer", {{"type", "NFC"}}, "$.normalizer: expected null"},
      {"/pre_tokenizer", nullptr, "$.pre_tokenizer"},
      {"/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\s", "pre_tokenizer: expected the LLaMA3"},
      {"/pre_tokenizer/pretokenizers/0/behavior", "Removed", "behavior"},
      {"/pre_tokenizer/pretokenizers/1/use_regex", true, "use_regex: expected false"},
      {"/decoder", {{"type", "WordPiece"}}, "$.decoder.type"},
      {"/post_processor/type", "BertProcessing", "TemplateProcessing"},
      {"/post_processor/single/1", {{"SpecialToken", 1}}, "an optional BOS and the text"},
      {"/post_processor/special_tokens", Json::object(), "<|begin_of_text|>: expected an object"},
      {"/post_processor/special_tokens/<|begin_of_text|>/ids/0", 305, "BOS"},
      {"/added_tokens", 5, "$.added_tokens: expected an array"},
      {"/added_tokens/0/id", 2'000'000'000, "added token \"<|begin_of_text|>\""},
      {"/added_tokens/0/id", 301, "distinct"},
      {"/added_tokens/0/content", "", "non-empty"},
      {"/added_tokens/0/lstrip", true, "lstrip: expected false"},
  };
  for (const Case& item : cases) {
    Json json = byte_json();
    json[Json::json_pointer(item.pointer)] = item.value;
    expect_error([&] { tokenizer_from_bytes(json.dump(), "bad.json"); }, item.message);
  }
  Json missing = byte_json();
  missing["model"]["vocab"].erase("!");
  expect_error([&] { tokenizer_from_bytes(missing.dump(), "bad.json"); }, "none for byte 33");
  missing = spm_json();
  missing["model"]["vocab"].erase("<0x0A>");
  expect_error([&] { tokenizer_from_bytes(missing.dump(), "bad.json"); }, "none for byte 10");
  missing = spm_json();
  missing["pre_tokenizer"] = {{"type", "Metaspace"}};
  expect_error([&] { tokenizer_from_bytes(missing.dump(), "bad.json"); }, "$.pre_tokenizer");
  std::string deep = "{\"model\":";
  deep += std::string(200'000, '[') + std::string(200'000, ']') + "}";
  expect_error([&] { tokenizer_from_bytes(deep, "bad.json"); }, "$.model: expected an object");
}

std::string base64(std::string_view bytes) {
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      bits = bits << 8 | (at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0U);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      out += at + i > bytes.size() ? '=' : digits[(bits >> (18 - 6 * i)) & 63];
    }
  }
  return out;
}

std::string rank_file(const std::vector<std::string>& tokens) {
  std::string out;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    out += base64(tokens[i]) + " " + std::to_string(i) + "\n";
  }
  return out;
}

TEST(RankFile, LoadsWithTheSpecialTokensOfLlama3) {
  const auto tokenizer = tokenizer_from_bytes(rank_file(byte_tokens({"ab", "abc"})), "ranks");
  EXPECT_EQ(tokenizer->kind(), "byte_bpe.ranks");
  EXPECT_EQ(tokenizer->vocab_size(), 258 + 256);
  EXPECT_EQ(tokenizer->bos_id(), 258);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{259, 267}));
  EXPECT_EQ(tokenizer->added_id("<|reserved_special_token_3|>"), 258 + 5);
  EXPECT_EQ(tokenizer->added_id("<|reserved_special_token_4|>"), 258 + 8);
  EXPECT_EQ(tokenizer->encode("abcd<|eot_id|>", SpecialText::parse), (Ids{257, 'd', 267}));
}

TEST(RankFile, RefusesMalformedFiles) {
  const std::string good = rank_file(byte_tokens());
  const auto refused = [&](const std::string& file, const std::string& message) {
    expect_error([&] { tokenizer_from_bytes(file, "ranks"); }, message);
  };
  refused("", "nothing");
  refused("\n\n", "nothing");
  refused("?", "offset 0");
  refused("IQ== 0\n", "none for byte 0");
  refused("IQ= 0\n", "line 1");
  refused("I!== 0\n", "line 1");
  refused("IR== 0\n", "line 1");  // bits after the last byte
  refused("IQ==\n", "a rank");
  refused("IQ== x\n", "a rank");
  refused("IQ== -1\n", "a rank");
  refused("IQ== 0 0\n", "a rank");
  refused("IQ== 99999999999999\n", "a rank");
  refused("IQ== 5\n", "every rank in 0..0 once");
  refused(good + "YWI= 255\n", "line 257");
  refused(good + "\n", "line 257");
  refused(good + base64("a") + " 256\n", "token 256: expected distinct tokens");
  refused(good + base64(std::string(300, 'a')) + " 256\n", "token 256");
}

std::string varint(std::uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7F) | 0x80);
  return out += static_cast<char>(value);
}
std::string number_field(unsigned number, std::uint64_t value) {
  return varint(number << 3) + varint(value);
}
std::string bytes_field(unsigned number, const std::string& body) {
  return varint(number << 3 | 2) + varint(body.size()) + body;
}

std::string spm_piece(const SpmPiece& piece) {
  std::string body = bytes_field(1, piece.text) + varint(2 << 3 | 5);
  body.append(reinterpret_cast<const char*>(&piece.score), sizeof(piece.score));
  // The default type is left out, as writers do.
  if (piece.type != SpmPiece::Type::normal) {
    body += number_field(3, static_cast<std::uint64_t>(piece.type));
  }
  return bytes_field(1, body);
}

struct SpmSpecs {
  std::string trainer = number_field(3, 2) + number_field(35, 1) + number_field(41, 1) +
                        number_field(42, 2) + number_field(43, ~std::uint64_t{0});
  std::string normalizer = bytes_field(1, "identity") + number_field(3, 1) + number_field(4, 0);
};

std::string spm_file(const std::vector<SpmPiece>& pieces, const SpmSpecs& specs = {}) {
  std::string out;
  for (const SpmPiece& piece : pieces) out += spm_piece(piece);
  return out + bytes_field(2, specs.trainer) + bytes_field(3, specs.normalizer);
}

TEST(SpmFile, LoadsPiecesAndSpecs) {
  const auto tokenizer = tokenizer_from_bytes(spm_file(tiny_pieces()), "tokenizer.model");
  EXPECT_EQ(tokenizer->kind(), "sentencepiece.model");
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{2}));
  const std::string text = "abc  bab \n" + emoji;
  EXPECT_EQ(tokenizer->encode(text, SpecialText::plain),
            tiny_spm()->encode(text, SpecialText::plain));
  SpmSpecs bare;
  bare.normalizer = number_field(3, 0) + number_field(4, 0);
  const auto without = tokenizer_from_bytes(spm_file(tiny_pieces(), bare), "tokenizer.model");
  EXPECT_EQ(without->encode("a", SpecialText::plain), (Ids{265}));
  EXPECT_EQ(without->decode(Ids{260}), " a");
}

TEST(SpmFile, RefusesMalformedFiles) {
  const std::string good = spm_file(tiny_pieces());
  const auto refused = [&](const std::string& file, const std::string& message) {
    expect_error([&] { tokenizer_from_bytes(file, "spm"); }, message);
  };
  for (std::size_t size = 3; size < good.size(); size += 41) {
    EXPECT_THROW(tokenizer_from_bytes(good.substr(0, size), "spm"), FormatError) << size;
  }
  const std::string start = spm_piece({"<unk>", 0, SpmPiece::Type::unknown});
  refused(start + std::string(12, '\xFF'), "a varint of at most 10 bytes");
  refused(start + "\x0A\xFF\xFF\xFF\xFF\x7F", "bytes of length-delimited field");
  refused(start + varint(9 << 3 | 3), "a protobuf field");
  refused(start + varint(2), "a protobuf field");
  refused(start + number_field(1, 1), "message of wire type 2");
  refused(start + bytes_field(1, number_field(1, 1)), "piece text of wire type 2");
  refused(start + bytes_field(1, bytes_field(1, "x") + number_field(3, 9)), "a piece type 1..6");

  const auto with_piece = [](const SpmPiece& piece) {
    auto pieces = tiny_pieces();
    pieces.push_back(piece);
    return spm_file(pieces);
  };
  using Type = SpmPiece::Type;
  refused(with_piece({"x", std::numeric_limits<float>::quiet_NaN(), Type::normal}), "NaN");
  refused(with_piece({"ab", 0, Type::normal}), "distinct pieces");
  refused(with_piece({"\xFF", 0, Type::normal}), "valid UTF-8");
  refused(with_piece({"", 0, Type::normal}), "bytes of text");
  refused(with_piece({std::string(300, 'x'), 0, Type::normal}), "bytes of text");
  refused(with_piece({"<0x0A>", 0, Type::byte}), "distinct byte pieces");
  refused(with_piece({"<0xZZ>", 0, Type::byte}), "a byte piece spelled");
  refused(with_piece({"x", 0, Type::user_defined}), "a normal, unknown, control or byte piece");
  refused(with_piece({"<s>", 0, Type::control}), "added tokens");

  const auto with_specs = [](const std::string& trainer, const std::string& normalizer) {
    SpmSpecs specs;
    specs.trainer += trainer;
    specs.normalizer += normalizer;
    return spm_file(tiny_pieces(), specs);
  };
  refused(with_specs(number_field(3, 1), ""), "trainer_spec.model_type");
  refused(with_specs(number_field(35, 0), ""), "byte_fallback");
  refused(with_specs(number_field(41, 5000), ""), "BOS");
  refused(with_specs("", bytes_field(2, "map")), "precompiled_charsmap");
  refused(with_specs("", number_field(4, 1)), "remove_extra_whitespaces");
  refused(with_specs("", number_field(5, 0)), "escape_whitespaces");
  auto pieces = tiny_pieces();
  pieces.erase(pieces.begin() + 3 + 10);
  refused(spm_file(pieces), "none for byte 10");
}

TEST(LoadTokenizer, PrefersJsonAndNamesWhatItLookedFor) {
  const TempDir directory;
  try {
    load_tokenizer(directory.path());
    ADD_FAILURE() << "an empty directory has no tokenizer";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.code(), ErrorCode::io);
    EXPECT_NE(message.find("tokenizer.json"), std::string::npos) << message;
    EXPECT_NE(message.find("tokenizer.model"), std::string::npos) << message;
  }
  EXPECT_THROW(load_tokenizer(directory.path() / "none"), IoError);
  directory.file("tokenizer.model", spm_file(tiny_pieces()));
  EXPECT_EQ(load_tokenizer(directory.path())->kind(), "sentencepiece.model");
  directory.file("tokenizer.model", rank_file(byte_tokens()));
  EXPECT_EQ(load_tokenizer(directory.path())->kind(), "byte_bpe.ranks");
  directory.file("tokenizer.json", byte_json().dump(1));
  EXPECT_EQ(load_tokenizer(directory.path())->kind(), "byte_bpe.json");
  EXPECT_EQ(load_tokenizer(directory.path() / "tokenizer.model")->kind(), "byte_bpe.ranks");
  directory.file("tokenizer.json", "{\"model\": ");
  EXPECT_THROW(load_tokenizer(directory.path()), FormatError);
}

}  // namespace
}  // namespace engine::testing
