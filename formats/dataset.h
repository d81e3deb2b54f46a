// Text corpora of the perplexity protocols: from a file to strings, and cuts of token streams.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace engine {

// The protocols turn the same files into different text; figures compare only within one of them.
enum class Dataset : std::uint8_t {
  plain,      // the whole file; line ends \r\n and \r become \n, as in text mode
  wikitext2,  // raw WikiText2 (test or train): blank lines become "", rows joined by "\n\n"
  ptb_old,    // PTB validation: lines stripped, joined by "\n\n" (GPTQ default)
  ptb_new,    // PTB test: lines stripped, joined by one space (GPTQ --new-eval)
  c4_old,     // C4 JSON lines: separate documents, for sample_document_windows()
  c4_new,     // C4 JSON lines: the first 1100 documents joined by one space
};

// "plain", "wikitext2", "ptb-old", "ptb-new", "c4-old", "c4-new".
[[nodiscard]] std::string_view dataset_name(Dataset dataset);
// Throws Error(usage) listing the names.
[[nodiscard]] Dataset dataset_from_name(std::string_view name);

struct TextCorpus {
  std::string protocol;     // dataset_name()
  std::string file_sha256;  // of the bytes of the file
  // Of `text`; for c4-old, of all documents with one zero byte after each.
  std::string joined_sha256;
  std::string text;                    // empty for c4-old
  std::vector<std::string> documents;  // c4-old only
  std::string note;                    // what had to be repaired, for the report; usually empty
};

// Throws IoError, or FormatError naming the offset or line for an empty file, invalid UTF-8,
// \r line ends (except `plain`), blank lines where the protocol has none or none where it has
// some, compressed files and malformed JSON lines.
//
// One widespread WikiText2 test file has \r\n line ends and no blank lines. It is recognised by
// its SHA-256, repaired, and the result checked against the hash of the official text.
[[nodiscard]] TextCorpus load_corpus(const std::filesystem::path& path, Dataset dataset);

// Cuts of a token stream or of documents, with where they came from.
struct SampledWindows {
  std::vector<std::vector<std::int32_t>> windows;  // `samples` of `seq` tokens
  std::vector<std::int64_t> offsets;               // first token of each in its stream
  std::vector<std::int64_t> documents;             // sample_document_windows() only
};

// `samples` windows that start at randint(0, size - seq - 1), with replacement (GPTQ's loader).
// Throws Error(usage) unless samples and seq are positive and the stream is longer than seq.
[[nodiscard]] SampledWindows sample_windows(std::span<const std::int32_t> stream,
                                            std::int64_t samples, std::int64_t seq,
                                            std::int64_t seed);

// GPTQ's C4 sampler: draw documents until one has at least `seq` tokens, then cut it at
// randint(0, size - seq - 1). `tokenize` turns a document into ids, BOS included. As in the
// original, a drawn document of exactly `seq` tokens has no valid cut: Error(mismatch). So is a
// corpus in which no document is long enough.
[[nodiscard]] SampledWindows sample_document_windows(
    std::span<const std::string> documents,
    const std::function<std::vector<std::int32_t>(std::string_view)>& tokenize,
    std::int64_t samples, std::int64_t seq, std::int64_t seed);

}  // namespace engine
