#include "formats/dataset.h"

#include <algorithm>
#include <array>
#include <optional>

#include "formats/dataset_wikitext.h"
#include "formats/json.h"
#include "formats/mapped_file.h"
#include "formats/sha256.h"
#include "formats/utf8.h"

namespace engine {
namespace {

constexpr std::array<std::string_view, 6> kNames = {"plain",   "wikitext2", "ptb-old",
                                                    "ptb-new", "c4-old",    "c4-new"};
constexpr std::size_t kNewC4Documents = 1100;
constexpr std::string_view kSpace = " \t\n\v\f\r";

std::string_view stripped(std::string_view line) {
  const std::size_t first = line.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return line.substr(first, line.find_last_not_of(kSpace) - first + 1);
}

// Calls take(line, number) for each line without its \n; numbers count from 1. The end of the
// file ends the last line if nothing else does.
template <class Take>
void each_line(std::string_view text, Take take) {
  std::size_t number = 0;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    take(text.substr(0, end), ++number);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  }
}

std::string line_name(std::size_t number) { return "line " + std::to_string(number); }

// Python's text mode: \r\n and \r alone end lines as \n does.
std::string with_plain_newlines(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\r') {
      out += text[i];
    } else if (i + 1 == text.size() || text[i + 1] != '\n') {
      out += '\n';
    }
  }
  return out;
}

void refuse_carriage_returns(std::string_view text, const std::string& file) {
  const std::size_t at = text.find('\r');
  if (at != std::string_view::npos) {
    throw FormatError(file, "offset " + std::to_string(at), "lines that end in \\n only",
                      "\\r; this is not the original file of the data set");
  }
}

// A row per line: a blank line is an empty row, any other keeps its \n and its spaces.
std::string join_wikitext(std::string_view text, const std::string& file) {
  std::string joined;
  bool blank_seen = false;
  each_line(text, [&](std::string_view line, std::size_t number) {
    if (number > 1) joined += "\n\n";
    if (stripped(line).empty()) {
      blank_seen = true;
      return;
    }
    joined += line;
    // data() + size() is still inside `text` unless the file ends without a newline.
    if (line.data() + line.size() != text.data() + text.size()) joined += '\n';
  });
  if (!blank_seen) {
    throw FormatError(file, "text", "blank lines around headings, as in raw WikiText2",
                      "none; this is not the original file of the data set");
  }
  return joined;
}

std::string join_ptb(std::string_view text, std::string_view separator, const std::string& file) {
  std::string joined;
  each_line(text, [&](std::string_view line, std::size_t number) {
    const std::string_view sentence = stripped(line);
    if (sentence.empty()) throw FormatError(file, line_name(number), "a sentence", "a blank line");
    if (number > 1) joined += separator;
    joined += sentence;
  });
  return joined;
}

std::vector<std::string> read_documents(std::string_view text, std::size_t most,
                                        const std::string& file) {
  std::vector<std::string> documents;
  each_line(text, [&](std::string_view line, std::size_t number) {
    if (documents.size() == most) return;
    const std::string where = file + ": " + line_name(number);
    const Json json = parse_json(line, where);
    documents.push_back(JsonObject(json, where).text("text"));
  });
  return documents;
}

void refuse_compressed(std::string_view text, const std::string& file) {
  if (text.starts_with("\x1f\x8b")) {
    throw FormatError(file, "text", "uncompressed JSON lines",
                      "a gzip file; decompress it first (gunzip --keep)");
  }
  if (text.starts_with("\x28\xb5\x2f\xfd")) {
    throw FormatError(file, "text", "uncompressed text",
                      "a zstd file; decompress it first (unzstd)");
  }
}

std::string documents_sha256(std::span<const std::string> documents) {
  Sha256 hash;
  for (const std::string& document : documents) {
    hash.update(document);
    hash.update(std::string_view("\0", 1));
  }
  return hash.hex();
}

}  // namespace

std::string_view dataset_name(Dataset dataset) {
  return kNames.at(static_cast<std::size_t>(dataset));
}

Dataset dataset_from_name(std::string_view name) {
  std::string known;
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Dataset>(i);
    known += (known.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw Error(ErrorCode::usage,
              "data set: expected one of " + known + ", found " + quote_text(name));
}

TextCorpus load_corpus(const std::filesystem::path& path, Dataset dataset) {
  const MappedFile map(path);
  const std::string file = path.string();
  const std::string_view text(reinterpret_cast<const char*>(map.bytes().data()), map.size());
  if (text.empty()) throw FormatError(file, "text", "at least one line", "an empty file");
  refuse_compressed(text, file);
  check_utf8(text, file);

  TextCorpus corpus;
  corpus.protocol = dataset_name(dataset);
  corpus.file_sha256 = sha256_hex(map.bytes());
  const bool repairable =
      dataset == Dataset::wikitext2 && is_stripped_wikitext_test(corpus.file_sha256);
  if (dataset != Dataset::plain && !repairable) refuse_carriage_returns(text, file);

  switch (dataset) {
    case Dataset::plain:
      corpus.text = with_plain_newlines(text);
      if (corpus.text != text) corpus.note = "line ends \\r\\n or \\r became \\n";
      break;
    case Dataset::wikitext2:
      if (repairable) {
        corpus.text = join_wikitext(repair_wikitext_test(with_plain_newlines(text), file), file);
        check_repaired_wikitext_test(corpus.text, file);
        corpus.note = "line ends and the 1467 blank lines of the official file restored";
      } else {
        corpus.text = join_wikitext(text, file);
      }
      break;
    case Dataset::ptb_old:
      corpus.text = join_ptb(text, "\n\n", file);
      break;
    case Dataset::ptb_new:
      corpus.text = join_ptb(text, " ", file);
      break;
    case Dataset::c4_old:
      corpus.documents = read_documents(text, SIZE_MAX, file);
      break;
    case Dataset::c4_new: {
      const std::vector<std::string> documents = read_documents(text, kNewC4Documents, file);
      for (std::size_t i = 0; i < documents.size(); ++i) {
        if (i > 0) corpus.text += ' ';
        corpus.text += documents[i];
      }
      break;
    }
  }
  corpus.joined_sha256 = dataset == Dataset::c4_old ? documents_sha256(corpus.documents)
                                                    : sha256_hex(std::string_view(corpus.text));
  return corpus;
}

}  // namespace engine
