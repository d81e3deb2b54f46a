// The corpora of the perplexity protocols against published sizes, hashes and token counts.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "formats/dataset.h"
#include "formats/tokenizer.h"

extern std::filesystem::path conformance_dir;

namespace engine {
namespace {

TextCorpus corpus(const char* name, Dataset dataset) {
  return load_corpus(conformance_dir / "data" / "text" / name, dataset);
}

// LLaMA3 ids of the text, BOS first, as the protocols count them.
std::vector<std::int32_t> llama3_ids(const std::string& text) {
  const std::unique_ptr<Tokenizer> tokenizer =
      load_tokenizer(conformance_dir / "tokenizers" / "llama3" / "tokenizer.model");
  std::vector<std::int32_t> ids = {tokenizer->bos_id()};
  const std::vector<std::int32_t> rest = tokenizer->encode(text, SpecialText::parse);
  ids.insert(ids.end(), rest.begin(), rest.end());
  return ids;
}

TEST(DatasetConformance, Wikitext2JoinsToTheOfficialString) {
  const TextCorpus text = corpus("wikitext2.test.raw", Dataset::wikitext2);
  EXPECT_EQ(text.text.size(), 1'296'370U);
  EXPECT_EQ(std::count_if(text.text.begin(), text.text.end(),
                          [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }),
            1'294'336)
      << "characters";
  EXPECT_EQ(text.joined_sha256, "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
}

TEST(DatasetConformance, Wikitext2TokensOfLlama3) {
  const auto ids = llama3_ids(corpus("wikitext2.test.raw", Dataset::wikitext2).text);
  EXPECT_EQ(ids.size(), 289'077U);
  EXPECT_EQ(ids.size() / 2048, 141U);
  ASSERT_GE(ids.size(), 8U);
  EXPECT_EQ(std::vector<std::int32_t>(ids.begin(), ids.begin() + 8),
            (std::vector<std::int32_t>{128000, 271, 284, 8563, 426, 11206, 466, 284}));
}

TEST(DatasetConformance, PtbTokensOfLlama3) {
  EXPECT_EQ(llama3_ids(corpus("ptb.valid.txt", Dataset::ptb_old).text).size(), 87'293U);
  EXPECT_EQ(llama3_ids(corpus("ptb.test.txt", Dataset::ptb_new).text).size(), 95'069U);
}

}  // namespace
}  // namespace engine
