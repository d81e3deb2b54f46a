#include "formats/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "formats/pretokenizer.h"
#include "formats/utf8.h"
#include "tests/formats/tokenizer_fixtures.h"

namespace engine::testing {
namespace {

const std::string emoji = "\xF0\x9F\x98\x80";

// Ids 0..255 are the bytes, then `more`, then the special tokens.
std::unique_ptr<Tokenizer> tiny_bpe(const std::vector<std::string>& more) {
  TokenizerInfo info;
  info.added = {{1000, "<|s|>", true, false},
                {1001, "<|s|>more", true, false},
                {1002, "<tool>", false, false}};
  info.bos_id = 1000;
  return make_bpe_from_ranks(byte_tokens(more), info);
}

std::vector<std::string> split(std::string_view text) {
  const PreTokenizer splitter(llama3_split_regex, "test");
  PreTokenizer::Scanner scanner(splitter);
  scanner.start(text);
  std::vector<std::string> out;
  for (std::string_view piece; scanner.next(piece);) out.emplace_back(piece);
  return out;
}

std::string random_text(std::mt19937& random, std::size_t characters) {
  const std::vector<std::string> common = {" ",  "  ", "\n", "a",   "b",
                                           "ab", "1",  "'s", space, emoji};
  std::string out;
  for (std::size_t i = 0; i < characters; ++i) {
    if (random() % 2 == 0) {
      out += common[random() % common.size()];
      continue;
    }
    auto codepoint = static_cast<std::uint32_t>(random() % 0x110000);
    if (random() % 2 == 0) codepoint %= 0x800;
    if (codepoint >= 0xD800 && codepoint < 0xE000) codepoint = 0x20AC;
    append_utf8(out, codepoint);
  }
  return out;
}

// The definition of byte-pair encoding, without any data structure.
Ids naive_bpe(std::string_view piece, const std::vector<std::string>& tokens) {
  std::map<std::string, std::int32_t> ranks;
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    ranks[tokens[id]] = static_cast<std::int32_t>(id);
  }
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  for (;;) {
    std::size_t best = parts.size();
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto here = ranks.find(parts[i] + parts[i + 1]);
      if (here == ranks.end()) continue;
      if (best == parts.size() || here->second < ranks.at(parts[best] + parts[best + 1])) best = i;
    }
    if (best == parts.size()) break;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  Ids out;
  for (const auto& part : parts) out.push_back(ranks.at(part));
  return out;
}

TEST(PreTokenizer, FollowsTheRulesOfLlama3) {
  using Pieces = std::vector<std::string>;
  const std::vector<std::pair<std::string, Pieces>> cases = {
      {"", {}},
      {"Hello world", {"Hello", " world"}},
      {"it's WE'LL 'sound", {"it", "'s", " WE", "'LL", " '", "sound"}},
      {"'sound", {"'s", "ound"}},
      {"x'\xC5\xBFy", {"x", "'\xC5\xBF", "y"}},  // U+017F folds to s
      {"1314151", {"131", "415", "1"}},
      {" 12", {" ", "12"}},
      {"a\xC2\xBD\xD9\xA3", {"a", "\xC2\xBD\xD9\xA3"}},  // one half, Arabic-Indic three
      {"(a\ta", {"(a", "\ta"}},
      {" !?\n\nx", {" !?\n\n", "x"}},
      {"\t!", {"\t", "!"}},
      {"a  \n \n  b", {"a", "  \n \n", " ", " b"}},
      {"a   b", {"a", "  ", " b"}},
      {"a   ", {"a", "   "}},
      {"a\r\n", {"a", "\r\n"}},
      {"  1", {" ", " ", "1"}},
      {"\xC2\xA0\xC2\xA0x", {"\xC2\xA0", "\xC2\xA0x"}},  // NBSP is white space
      {"\xE1\xA0\x8E!", {"\xE1\xA0\x8E!"}},              // U+180E is not
      {" \xE1\xA0\x8E", {" \xE1\xA0\x8E"}},
      {"\xE3\x80\x80"
       "1",
       {"\xE3\x80\x80", "1"}},             // U+3000
      {"e\xCC\x81!", {"e", "\xCC\x81!"}},  // a mark is no letter
      {"\xE6\x88\x91\xE6\x83\xB3"
       "apple",
       {"\xE6\x88\x91\xE6\x83\xB3"
        "apple"}},
  };
  for (const auto& [text, pieces] : cases) EXPECT_EQ(split(text), pieces) << text;
}

TEST(PreTokenizer, CoversLongRuns) {
  for (const std::string unit : {"a", " ", "\n", "1", "!", "\xCC\x81"}) {
    std::string text;
    for (int i = 0; i < 300'000; ++i) text += unit;
    std::string joined;
    for (const std::string& piece : split(text + "z")) joined += piece;
    EXPECT_TRUE(joined == text + "z") << unit;
  }
}

TEST(PreTokenizer, RefusesOtherExpressions) {
  expect_error([] { PreTokenizer(R"(\p{L}+|.)", "some.json"); }, "some.json: pre_tokenizer");
}

TEST(BpeTokenizer, MergesLowestRankFirstAndLeftmostOnTies) {
  const auto tokenizer = tiny_bpe({"bc", "ab", "aa", "abcab"});
  EXPECT_EQ(tokenizer->encode("abc", SpecialText::plain), (Ids{'a', 256}));
  EXPECT_EQ(tokenizer->encode("aaa", SpecialText::plain), (Ids{258, 'a'}));
  EXPECT_EQ(tokenizer->encode("abab", SpecialText::plain), (Ids{257, 257}));
  // A whole piece that is a token is taken even if merges cannot reach it.
  EXPECT_EQ(tokenizer->encode("abcab", SpecialText::plain), (Ids{259}));
  EXPECT_EQ(tokenizer->encode("abcabc", SpecialText::plain), (Ids{'a', 256, 'a', 256}));
  EXPECT_EQ(tokenizer->encode("", SpecialText::plain), Ids{});
  EXPECT_EQ(tokenizer->vocab_size(), 1003);
}

TEST(BpeTokenizer, EqualsTheDefinitionForShortAndLongPieces) {
  std::mt19937 random(7);
  std::vector<std::string> more;
  std::vector<std::string> tokens = byte_tokens();
  for (int i = 0; i < 40; ++i) {
    const std::vector<std::string> parts = {"a", "b", "c", "d"};
    const auto pick = [&] {
      const std::size_t n = more.size();
      return n > 0 && random() % 2 == 0 ? more[random() % n] : parts[random() % 4];
    };
    const std::string next = pick() + pick();
    if (next.size() > 8 || std::find(more.begin(), more.end(), next) != more.end()) continue;
    more.push_back(next);
    tokens.push_back(next);
  }
  const auto tokenizer = tiny_bpe(more);
  for (const std::size_t length : {10U, 60U, 64U, 65U, 66U, 130U, 300U}) {
    for (int repeat = 0; repeat < 10; ++repeat) {
      std::string piece;
      for (std::size_t i = 0; i < length; ++i) piece += static_cast<char>('a' + random() % 4);
      EXPECT_EQ(tokenizer->encode(piece, SpecialText::plain), naive_bpe(piece, tokens)) << piece;
    }
  }
}

TEST(BpeTokenizer, LongRunOfOneSymbolIsNotQuadratic) {
  const auto tokenizer = tiny_bpe({"aa", "aaaa", "aaaaaaaa"});
  const std::string text(400'003, 'a');
  const Ids ids = tokenizer->encode(text, SpecialText::plain);
  ASSERT_EQ(ids.size(), 50'002U);
  EXPECT_EQ(ids.front(), 258);
  EXPECT_EQ(ids[50'000], 256);
  EXPECT_EQ(ids[50'001], 'a');
}

TEST(Tokenizer, SpecialTextIsParsedOrPlain) {
  const auto tokenizer = tiny_bpe({});
  EXPECT_EQ(tokenizer->encode("a<|s|>b", SpecialText::parse), (Ids{'a', 1000, 'b'}));
  EXPECT_EQ(tokenizer->encode("<|s|>more<|s|>mor", SpecialText::parse),
            (Ids{1001, 1000, 'm', 'o', 'r'}));
  EXPECT_EQ(tokenizer->encode("<|s|", SpecialText::parse), (Ids{'<', '|', 's', '|'}));
  EXPECT_EQ(tokenizer->encode("<|s|>", SpecialText::plain), (Ids{'<', '|', 's', '|', '>'}));
  EXPECT_EQ(tokenizer->added_id("<tool>"), 1002);
  EXPECT_EQ(tokenizer->added_id("a"), std::nullopt);
  EXPECT_TRUE(tokenizer->is_special(1000));
  EXPECT_FALSE(tokenizer->is_special(1002));
  EXPECT_FALSE(tokenizer->is_special('a'));
  const Ids ids = {'a', 1000, 1002, 'b'};
  EXPECT_EQ(tokenizer->decode(ids), "a<tool>b");
  EXPECT_EQ(tokenizer->decode(ids, true), "a<|s|><tool>b");
  EXPECT_EQ(tokenizer->token_bytes(1000), "<|s|>");
  for (const std::int32_t id : {-1, 256, 999, 1003}) {
    EXPECT_FALSE(tokenizer->contains(id));
    EXPECT_THROW(static_cast<void>(tokenizer->decode(Ids{id})), Error) << id;
  }
}

TEST(Tokenizer, NamesTheOffsetOfInvalidUtf8) {
  const auto tokenizer = tiny_bpe({});
  const std::vector<std::pair<std::string, int>> cases = {
      {"\xFF", 0},         {"0123456789\x80", 10},     {"abc\xC0\xAF", 3},
      {"\xED\xA0\x80", 0}, {"a\xF4\x90\x80\x80", 1},   {"a\xE2\x82", 1},
      {"\xE0\x9F\xBF", 0}, {emoji + "\xF0\x9F\x98", 4}};
  for (const auto& [text, offset] : cases) {
    expect_error([&, t = text] { static_cast<void>(tokenizer->encode(t, SpecialText::parse)); },
                 "byte offset " + std::to_string(offset) + ": expected valid UTF-8");
  }
}

TEST(StreamDecoder, HoldsBackUnfinishedCharacters) {
  const auto tokenizer = tiny_bpe({});
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.push('x'), "x");
  EXPECT_EQ(stream.push(0xF0), "");
  EXPECT_EQ(stream.push(0x9F), "");
  EXPECT_EQ(stream.push(1000), "");  // special
  EXPECT_EQ(stream.push(0x98), "");
  EXPECT_EQ(stream.push(0x80), emoji);
  EXPECT_EQ(stream.push(0xFF), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.push('y'), "\xEF\xBF\xBDy");
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.flush(), "");
}

TEST(StreamDecoder, TreatsTheLeadingSpaceAsAsked) {
  const auto tokenizer = tiny_spm();
  const Ids ids = tokenizer->encode("a b", SpecialText::plain);
  StreamDecoder continuation(*tokenizer);
  StreamDecoder whole(*tokenizer, false);
  std::string continued;
  std::string complete;
  for (const std::int32_t id : ids) {
    continued += continuation.push(id);
    complete += whole.push(id);
  }
  EXPECT_EQ(continued, " a b");
  EXPECT_EQ(complete, "a b");
}

TEST(SpmTokenizer, MergesByScoreAndFallsBackToBytes) {
  const auto tokenizer = tiny_spm();
  const auto ids = [&](const std::string& text) {
    return tokenizer->encode(text, SpecialText::plain);
  };
  EXPECT_EQ(ids(""), Ids{});
  EXPECT_EQ(ids("a"), (Ids{260}));
  EXPECT_EQ(ids("ab"), (Ids{263}));
  EXPECT_EQ(ids("abc"), (Ids{260, 261}));  // bc merges before U+2581 ab
  EXPECT_EQ(ids("bab"), (Ids{264, 266, 262}));
  EXPECT_EQ(ids("babc"), (Ids{264, 266, 265, 261}));
  EXPECT_EQ(ids(" a"), (Ids{264, 260}));  // the last space goes with the word
  EXPECT_EQ(ids("  "), (Ids{259, 264}));  // three spaces: leftmost pair
  EXPECT_EQ(ids("\n"), (Ids{264, 13}));
  EXPECT_EQ(ids("\xC3\xA9"), (Ids{264, 3 + 0xC3, 3 + 0xA9}));
  EXPECT_EQ(tokenizer->decode(ids("  a \n\xC3\xA9 ")), "  a \n\xC3\xA9 ");
  EXPECT_EQ(tokenizer->token_bytes(260), " a");
  EXPECT_EQ(tokenizer->token_bytes(13), "\n");
  EXPECT_EQ(tokenizer->encode("a<s>a", SpecialText::parse), (Ids{260, 1, 260}));
  EXPECT_TRUE(tokenizer->is_special(0));
  EXPECT_EQ(tokenizer->vocab_size(), 268);
}

TEST(SpmTokenizer, WordsThatDependOnEachOtherAreNotCut) {
  auto pieces = tiny_pieces();
  const auto id = static_cast<std::int32_t>(pieces.size());
  pieces.push_back({"a" + space, 1, SpmPiece::Type::normal});  // better than all others
  const auto tokenizer = make_spm(pieces, true, {});
  EXPECT_EQ(tokenizer->encode("a a", SpecialText::plain), (Ids{264, id, 265}));
}

TEST(SpmTokenizer, LongRunsAreNotQuadratic) {
  const auto tokenizer = tiny_spm();
  EXPECT_EQ(tokenizer->encode(std::string(300'000, ' '), SpecialText::plain).size(), 150'001U);
  EXPECT_EQ(tokenizer->encode(std::string(300'000, 'b'), SpecialText::plain).size(), 300'001U);
}

TEST(Tokenizer, RoundTripsRandomText) {
  std::mt19937 random(11);
  const auto bpe = tiny_bpe({"ab", " a", "\xF0\x9F", "  ", "\n\n"});
  const auto spm = tiny_spm();
  for (int i = 0; i < 300; ++i) {
    std::string text = random_text(random, random() % 200);
    EXPECT_EQ(bpe->decode(bpe->encode(text, SpecialText::plain)), text);
    // Sentencepiece cannot tell U+2581 from a space.
    for (std::size_t at = 0; (at = text.find(space)) != std::string::npos;)
      text.replace(at, 3, " ");
    EXPECT_EQ(spm->decode(spm->encode(text, SpecialText::plain)), text);
  }
}

}  // namespace
}  // namespace engine::testing
