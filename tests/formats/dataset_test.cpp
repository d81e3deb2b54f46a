#include "formats/dataset.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "formats/dataset_wikitext.h"
#include "formats/error.h"
#include "formats/mt19937.h"
#include "formats/sha256.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;

TextCorpus load(std::string_view content, Dataset dataset) {
  const testing::TempDir dir;
  return load_corpus(dir.file("corpus", content), dataset);
}

TEST(Dataset, NamesRoundTrip) {
  for (const Dataset d : {Dataset::plain, Dataset::wikitext2, Dataset::ptb_old, Dataset::ptb_new,
                          Dataset::c4_old, Dataset::c4_new}) {
    EXPECT_EQ(dataset_from_name(dataset_name(d)), d);
  }
  expect_contains(error_of([] { (void)dataset_from_name("ptb"); }),
                  "expected one of plain, wikitext2, ptb-old, ptb-new, c4-old, c4-new, found "
                  "\"ptb\"");
}

TEST(Dataset, PlainTextIsTheFile) {
  const TextCorpus corpus = load("one\n \n\xc3\xa9 two", Dataset::plain);
  EXPECT_EQ(corpus.text, "one\n \n\xc3\xa9 two");
  EXPECT_EQ(corpus.protocol, "plain");
  EXPECT_EQ(corpus.file_sha256, sha256_hex("one\n \n\xc3\xa9 two"));
  EXPECT_EQ(corpus.joined_sha256, corpus.file_sha256);
  EXPECT_TRUE(corpus.note.empty());
  const TextCorpus dos = load("a\r\nb\rc\r\n\r", Dataset::plain);
  EXPECT_EQ(dos.text, "a\nb\nc\n\n");
  EXPECT_FALSE(dos.note.empty());
}

TEST(Dataset, Wikitext2KeepsLinesAndEmptiesBlankOnes) {
  const TextCorpus corpus =
      load(" \n = Title = \n \n Text with  spaces . \n Next . \n", Dataset::wikitext2);
  EXPECT_EQ(corpus.text, "\n\n = Title = \n\n\n\n\n Text with  spaces . \n\n\n Next . \n");
  EXPECT_EQ(corpus.joined_sha256, sha256_hex(corpus.text));
  EXPECT_EQ(load(" \nlast", Dataset::wikitext2).text, "\n\nlast");
  EXPECT_EQ(load("first\n \n", Dataset::wikitext2).text, "first\n\n\n");
}

TEST(Dataset, PtbStripsAndJoins) {
  constexpr std::string_view kText = " no it was n't \n <unk> N\tyears \n last one";
  EXPECT_EQ(load(kText, Dataset::ptb_old).text, "no it was n't\n\n<unk> N\tyears\n\nlast one");
  EXPECT_EQ(load(kText, Dataset::ptb_new).text, "no it was n't <unk> N\tyears last one");
}

TEST(Dataset, C4ReadsJsonLines) {
  constexpr std::string_view kText =
      "{\"text\": \" a\\nb \", \"url\": \"u\"}\n{\"timestamp\": 1, \"text\": \"c\\u00e9\"}";
  const TextCorpus old = load(kText, Dataset::c4_old);
  EXPECT_EQ(old.documents, (std::vector<std::string>{" a\nb ", "c\xc3\xa9"}));
  EXPECT_TRUE(old.text.empty());
  EXPECT_EQ(old.joined_sha256, sha256_hex(std::string_view(" a\nb \0c\xc3\xa9\0", 10)));
  EXPECT_EQ(load(kText, Dataset::c4_new).text, " a\nb  c\xc3\xa9");

  std::string many;
  for (int i = 0; i < 1200; ++i) many += "{\"text\": \"" + std::string(i == 0 ? "" : "x") + "\"}\n";
  EXPECT_EQ(load(many, Dataset::c4_new).text.size(), 1099U + 1099U);  // texts and spaces
  EXPECT_EQ(load(many, Dataset::c4_old).documents.size(), 1200U);
}

TEST(Dataset, RejectsWhatTheProtocolDoesNotAllow) {
  struct Case {
    std::string content;
    Dataset dataset;
    std::string message;
  };
  const std::vector<Case> cases = {
      {"", Dataset::plain, "corpus: text: expected at least one line, found an empty file"},
      {"", Dataset::c4_old, "found an empty file"},
      {"abc\xff", Dataset::plain, "3"},
      {" \n\xc0\xaf\n", Dataset::wikitext2, "2"},
      {" \n a \r\n", Dataset::wikitext2, "offset 5: expected lines that end in \\n only"},
      {"a\r\n", Dataset::ptb_old, "offset 1: expected lines that end in \\n only"},
      {"a\r\n", Dataset::ptb_new, "offset 1"},
      {"{\"text\": \"a\"}\r\n", Dataset::c4_old, "offset 13"},
      {" = A = \n text \n", Dataset::wikitext2, "expected blank lines around headings"},
      {"a\n\nb\n", Dataset::ptb_old, "line 2: expected a sentence, found a blank line"},
      {"a\n \n", Dataset::ptb_new, "line 2: expected a sentence"},
      {"{\"text\": \"a\"}\nplain\n", Dataset::c4_old, "line 2: byte 1: expected valid JSON"},
      {"{\"text\": \"a\"}\n\n", Dataset::c4_old, "line 2: byte 1: expected valid JSON"},
      {"{\"url\": \"a\"}\n", Dataset::c4_new, "line 1: text: expected a string, found nothing"},
      {"{\"text\": 5}\n", Dataset::c4_new, "line 1: text: expected a string, found 5"},
      {"[]\n", Dataset::c4_new, "line 1: JSON: expected an object, found []"},
      {"\x1f\x8b\x08 rest", Dataset::c4_old, "found a gzip file; decompress it first (gunzip"},
      {"\x28\xb5\x2f\xfd rest", Dataset::plain, "found a zstd file"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.message);
    expect_contains(error_of([&] { (void)load(c.content, c.dataset); }), c.message);
  }
  EXPECT_THROW((void)load_corpus("/nonexistent/corpus", Dataset::plain), IoError);
}

TEST(Dataset, OnlyTheKnownFileIsRepairedAndTheResultIsChecked) {
  EXPECT_FALSE(is_stripped_wikitext_test(sha256_hex("anything")));
  // The rule: blank lines around headings, one more where an article ends.
  const std::string repaired = repair_wikitext_test(
      " = A = \n x \n = = S = = \n y \n = B = \n = 1 henry and capacitance C = \n", "f");
  EXPECT_EQ(repaired,
            " \n = A = \n \n x \n \n = = S = = \n \n y \n \n \n = B = \n \n"
            " = 1 henry and capacitance C = \n \n");
  expect_contains(error_of([] { check_repaired_wikitext_test("other text", "f"); }),
                  "f: repaired text: expected SHA-256 696cca6b");
}

TEST(Sampling, WindowsStartWhereCPythonDraws) {
  std::vector<std::int32_t> stream(45'576 + 8);
  std::iota(stream.begin(), stream.end(), 0);
  // randint(0, size - seq - 1) = randint(0, 45575) with seed 0.
  const SampledWindows sampled = sample_windows(stream, 4, 8, 0);
  EXPECT_EQ(sampled.offsets, (std::vector<std::int64_t>{25'247, 27'562, 2'653, 16'968}));
  ASSERT_EQ(sampled.windows.size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    ASSERT_EQ(sampled.windows[i].size(), 8U);
    EXPECT_EQ(sampled.windows[i].front(), sampled.offsets[i]);
    EXPECT_EQ(sampled.windows[i].back(), sampled.offsets[i] + 7);
  }
  EXPECT_EQ(sample_windows(std::span(stream).first(9), 3, 8, 5).offsets,
            (std::vector<std::int64_t>{0, 0, 0}));
  expect_contains(error_of([&] { (void)sample_windows(std::span(stream).first(8), 1, 8, 0); }),
                  "expected a text of more than 8 tokens, found 8");
  EXPECT_THROW((void)sample_windows(stream, 0, 8, 0), Error);
  EXPECT_THROW((void)sample_windows(stream, 1, 0, 0), Error);
}

// A token per byte.
std::vector<std::int32_t> bytes_as_ids(std::string_view text) { return {text.begin(), text.end()}; }

TEST(Sampling, DocumentsAreDrawnWithRejection) {
  const std::vector<std::string> documents = {"abc", "abcdefghij", "x", "ABCDEFGHIJKLMNO", ""};
  const SampledWindows sampled = sample_document_windows(documents, bytes_as_ids, 20, 5, 0);
  // The protocol, written out once more.
  PythonRandom random(0);
  ASSERT_EQ(sampled.windows.size(), 20U);
  for (std::size_t i = 0; i < 20; ++i) {
    std::int64_t drawn = 0;
    do {
      drawn = random.randint(0, 4);
    } while (documents[static_cast<std::size_t>(drawn)].size() < 5);
    const std::string& text = documents[static_cast<std::size_t>(drawn)];
    const std::int64_t offset = random.randint(0, static_cast<std::int64_t>(text.size()) - 6);
    EXPECT_EQ(sampled.documents[i], drawn);
    EXPECT_EQ(sampled.offsets[i], offset);
    EXPECT_EQ(sampled.windows[i], bytes_as_ids(text.substr(static_cast<std::size_t>(offset), 5)));
  }
}

TEST(Sampling, DocumentsThatCannotBeCutAreErrors) {
  const auto message = [](std::vector<std::string> documents) {
    return error_of([&] { (void)sample_document_windows(documents, bytes_as_ids, 2, 5, 0); });
  };
  expect_contains(message({}), "expected documents, found none");
  expect_contains(message({"a", "bc", ""}),
                  "expected a document of more than 5 tokens, found none");
  expect_contains(message({"12345"}), "document 0: expected more than 5 tokens, found exactly");
}

}  // namespace
}  // namespace engine
