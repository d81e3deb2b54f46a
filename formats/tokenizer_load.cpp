// Finds the tokenizer file of a checkpoint and tells its format from its content.

#include "formats/error.h"
#include "formats/json.h"
#include "formats/sha256.h"
#include "formats/tokenizer_parts.h"

namespace engine {
namespace {

// Far above any real file (LLaMA3's tokenizer.json has 9 MB).
constexpr std::size_t largest_file = 256U << 20;

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_from_bytes(std::string_view bytes, std::string_view name) {
  TokenizerInfo info;
  info.file = std::string(name);
  info.source_hash = sha256_hex(std::as_bytes(std::span(bytes)));
  const std::size_t first = bytes.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) {
    throw FormatError(info.file, "offset 0", "a tokenizer", "nothing");
  }
  // A sentencepiece model opens with the tag of its first piece, which is also a line feed, and
  // goes on with that piece's own tag two bytes later.
  constexpr char piece_tag = 0x0A;
  if (bytes.size() > 2 && bytes[0] == piece_tag && bytes[2] == piece_tag) {
    return tokenizer_from_spm(bytes, std::move(info));
  }
  if (bytes[first] == '{') return tokenizer_from_json(bytes, std::move(info));
  const char c = bytes[0];
  const bool base64 = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
                      c == '+' || c == '/';
  if (base64) return tokenizer_from_ranks(bytes, std::move(info));
  throw FormatError(info.file, "offset 0", "tokenizer.json, a rank file or a sentencepiece model",
                    "byte " + std::to_string(static_cast<unsigned char>(c)));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& directory_or_file) {
  std::error_code ignored;
  std::filesystem::path path = directory_or_file;
  if (std::filesystem::is_directory(path, ignored)) {
    path = directory_or_file / "tokenizer.json";
    if (!std::filesystem::exists(path, ignored)) path = directory_or_file / "tokenizer.model";
    if (!std::filesystem::exists(path, ignored)) {
      throw IoError(directory_or_file.string(),
                    "no tokenizer found: neither tokenizer.json nor tokenizer.model is there", 0);
    }
  }
  return tokenizer_from_bytes(read_text_file(path, largest_file), path.string());
}

}  // namespace engine
