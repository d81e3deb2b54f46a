// Byte-level BPE: LLaMA3's rank file, and the engine behind its tokenizer.json.
#include <algorithm>
#include <array>
#include <charconv>

#include "formats/error.h"
#include "formats/pretokenizer.h"
#include "formats/tokenizer_parts.h"

namespace engine {
namespace {

constexpr std::int32_t absent = -1;

class ByteBpeTokenizer final : public Tokenizer {
 public:
  ByteBpeTokenizer(ByteBpeModel model, TokenizerInfo info)
      : Tokenizer(std::move(info), model.tokens),
        model_(std::move(model)),
        splitter_(model_.split_regex, this->info().file) {
    byte_ids_.fill(absent);
    ids_.reserve(model_.tokens.size());
    for (std::size_t id = 0; id < model_.tokens.size(); ++id) {
      const std::string& token = model_.tokens[id];
      if (token.empty()) continue;
      if (!ids_.emplace(token, static_cast<std::int32_t>(id)).second) {
        throw FormatError(this->info().file, "token " + std::to_string(id), "distinct tokens",
                          "the bytes of token " + std::to_string(ids_.at(token)));
      }
      if (token.size() == 1) {
        byte_ids_[static_cast<unsigned char>(token[0])] = static_cast<std::int32_t>(id);
      }
    }
    for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
      if (byte_ids_[byte] == absent) {
        throw FormatError(this->info().file, "vocabulary", "a token for every single byte",
                          "none for byte " + std::to_string(byte));
      }
    }
    index_added_tokens();
  }

 private:
  void encode_segments(std::span<const Segment> segments, SpecialText,
                       std::vector<std::int32_t>& out) const override {
    PreTokenizer::Scanner scanner(splitter_);
    PieceCache cache;
    std::vector<std::int32_t> symbols;
    for (const Segment& segment : segments) {
      if (segment.id >= 0) {
        out.push_back(segment.id);
        continue;
      }
      scanner.start(segment.text);
      for (std::string_view piece; scanner.next(piece);) encode_piece(piece, cache, symbols, out);
    }
  }

  void encode_piece(std::string_view piece, PieceCache& cache, std::vector<std::int32_t>& symbols,
                    std::vector<std::int32_t>& out) const {
    if (model_.whole_piece_first) {
      const auto whole = ids_.find(piece);
      if (whole != ids_.end()) {
        out.push_back(whole->second);
        return;
      }
    }
    if (cache.append(piece, out)) return;
    symbols.clear();
    for (const char byte : piece) symbols.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    merge_symbols(model_.merges, symbols);
    cache.remember(piece, symbols);
    out.insert(out.end(), symbols.begin(), symbols.end());
  }

  ByteBpeModel model_;  // never changed: ids_ looks into its strings
  PreTokenizer splitter_;
  std::unordered_map<std::string_view, std::int32_t> ids_;
  std::array<std::int32_t, 256> byte_ids_;
};

// One value per base64 digit, -1 otherwise.
int base64_value(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  if (c == '+') return 62;
  if (c == '/') return 63;
  return -1;
}

// RFC 4648 with padding; false if malformed.
bool decode_base64(std::string_view text, std::string& out) {
  out.clear();
  if (text.empty() || text.size() % 4 != 0) return false;
  const std::size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  std::uint32_t bits = 0;
  int held = 0;
  for (const char c : text.substr(0, text.size() - padding)) {
    const int value = base64_value(c);
    if (value < 0) return false;
    bits = (bits << 6) | static_cast<std::uint32_t>(value);
    held += 6;
    if (held >= 8) {
      held -= 8;
      out.push_back(static_cast<char>(static_cast<unsigned char>((bits >> held) & 0xFF)));
    }
  }
  return (bits & ((1U << held) - 1)) == 0;  // the unused bits of the last digit
}

}  // namespace

std::unique_ptr<Tokenizer> make_byte_bpe(ByteBpeModel model, TokenizerInfo info) {
  return std::make_unique<ByteBpeTokenizer>(std::move(model), std::move(info));
}

std::unique_ptr<Tokenizer> make_bpe_from_ranks(std::vector<std::string> tokens,
                                               TokenizerInfo info) {
  if (info.kind.empty()) info.kind = "byte_bpe.ranks";
  ByteBpeModel model;
  model.split_regex = llama3_split_regex;
  std::unordered_map<std::string_view, std::int32_t> ids;
  ids.reserve(tokens.size());
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    const std::size_t size = tokens[id].size();
    if (size == 0 || size > longest_token) {
      throw FormatError(info.file, "token " + std::to_string(id),
                        "1 to " + std::to_string(longest_token) + " bytes", std::to_string(size));
    }
    ids.emplace(tokens[id], static_cast<std::int32_t>(id));
  }
  // Joining a pair is allowed whenever the result is a token, and the result's rank is the
  // priority; so every split of a token into two tokens is a merge.
  model.merges.reserve(3 * tokens.size());
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    const std::string_view token = tokens[id];
    for (std::size_t cut = 1; cut < token.size(); ++cut) {
      const auto left = ids.find(token.substr(0, cut));
      if (left == ids.end()) continue;
      const auto right = ids.find(token.substr(cut));
      if (right == ids.end()) continue;
      model.merges.insert(left->second, right->second,
                          {static_cast<std::uint32_t>(id), static_cast<std::int32_t>(id)});
    }
  }
  model.tokens = std::move(tokens);
  return make_byte_bpe(std::move(model), std::move(info));
}

std::vector<AddedToken> llama3_added_tokens(std::int32_t first) {
  std::vector<AddedToken> out;
  int reserved = 0;
  for (std::int32_t i = 0; i < 256; ++i) {
    std::string name;
    switch (i) {
      case 0:
        name = "<|begin_of_text|>";
        break;
      case 1:
        name = "<|end_of_text|>";
        break;
      case 6:
        name = "<|start_header_id|>";
        break;
      case 7:
        name = "<|end_header_id|>";
        break;
      case 9:
        name = "<|eot_id|>";
        break;
      default:
        name = "<|reserved_special_token_" + std::to_string(reserved++) + "|>";
    }
    out.push_back({first + i, std::move(name), true, false});
  }
  return out;
}

std::unique_ptr<Tokenizer> tokenizer_from_ranks(std::string_view bytes, TokenizerInfo info) {
  std::vector<std::pair<std::int32_t, std::string>> lines;
  std::string token;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t end = std::min(bytes.find('\n', at), bytes.size());
    std::string_view line = bytes.substr(at, end - at);
    const std::string place = "line " + std::to_string(lines.size() + 1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    const std::size_t space = std::min(line.find(' '), line.size());
    if (!decode_base64(line.substr(0, space), token)) {
      throw FormatError(info.file, place, "base64 bytes, a space and a rank",
                        "'" + std::string(line.substr(0, 40)) + "'");
    }
    const std::string_view digits = line.substr(std::min(space + 1, line.size()));
    std::int32_t rank = 0;
    const auto [last, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (error != std::errc() || last != digits.data() + digits.size() || rank < 0) {
      throw FormatError(info.file, place, "a rank", "'" + std::string(digits.substr(0, 40)) + "'");
    }
    lines.emplace_back(rank, token);
    at = end + 1;
  }
  std::vector<std::string> tokens(lines.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const auto rank = static_cast<std::size_t>(lines[i].first);
    if (rank >= tokens.size() || !tokens[rank].empty()) {
      throw FormatError(info.file, "line " + std::to_string(i + 1),
                        "every rank in 0.." + std::to_string(tokens.size() - 1) + " once",
                        std::to_string(rank));
    }
    tokens[rank] = std::move(lines[i].second);
  }
  const auto first = static_cast<std::int32_t>(tokens.size());
  info.added = llama3_added_tokens(first);
  info.bos_id = first;
  info.eos_ids = {first + 1, first + 9};
  info.adds_bos = true;
  return make_bpe_from_ranks(std::move(tokens), std::move(info));
}

}  // namespace engine
