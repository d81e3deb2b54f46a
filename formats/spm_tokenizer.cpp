// LLaMA1/2's sentencepiece BPE: the engine behind tokenizer.model and behind the tokenizer.json
// exported from it.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "formats/error.h"
#include "formats/json.h"
#include "formats/tokenizer_parts.h"
#include "formats/utf8.h"

namespace engine {
namespace {

constexpr std::int32_t absent = -1;

// Symbols of characters that are no pieces. Never equal to a piece id.
std::int32_t character_symbol(std::uint32_t codepoint) {
  return -1 - static_cast<std::int32_t>(codepoint);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size() + text.size() / 4);
  for (std::size_t at = 0;;) {
    const std::size_t found = text.find(from, at);
    out += text.substr(at, found - at);
    if (found == std::string_view::npos) return out;
    out += to;
    at = found + from.size();
  }
}

// The bytes that each piece decodes to.
std::vector<std::string> piece_bytes(const std::vector<SpmPiece>& pieces) {
  std::vector<std::string> out;
  out.reserve(pieces.size());
  for (const SpmPiece& piece : pieces) {
    if (piece.type == SpmPiece::Type::byte) {
      out.emplace_back(1, static_cast<char>(byte_piece_value(piece.text)));
    } else if (piece.type == SpmPiece::Type::normal) {
      out.push_back(replace_all(piece.text, spm_space, " "));
    } else {
      out.push_back(piece.text);
    }
  }
  return out;
}

class SpmTokenizer final : public Tokenizer {
 public:
  SpmTokenizer(SpmModel model, TokenizerInfo info)
      : Tokenizer(std::move(info), piece_bytes(model.pieces)),
        merges_(std::move(model.merges)),
        add_dummy_prefix_(model.add_dummy_prefix) {
    byte_ids_.fill(absent);
    for (std::size_t id = 0; id < model.pieces.size(); ++id) {
      add_piece(model.pieces[id], static_cast<std::int32_t>(id));
    }
    for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
      if (byte_ids_[byte] == absent) {
        throw FormatError(this->info().file, "vocabulary", "a piece for every single byte",
                          "none for byte " + std::to_string(byte));
      }
    }
    for (const AddedToken& token : this->info().added) {
      if (token.normalized) normalized_added_.add(normalize(token.text), token.id);
    }
    index_added_tokens();
  }

  [[nodiscard]] bool has_leading_space() const override { return add_dummy_prefix_; }

 private:
  void add_piece(const SpmPiece& piece, std::int32_t id) {
    const std::string_view text = piece.text;
    if (piece.type == SpmPiece::Type::byte) {
      auto& slot = byte_ids_[static_cast<std::size_t>(byte_piece_value(text))];
      if (slot != absent) {
        throw FormatError(info().file, "piece " + std::to_string(id), "distinct byte pieces",
                          quote_text(piece.text) + " again");
      }
      slot = id;
    } else if (piece.type == SpmPiece::Type::normal && !text.empty()) {
      const Utf8Step first = utf8_step(text);
      if (first.length == text.size()) character_ids_.emplace(first.codepoint, id);
      // A space inside or after a word would make words depend on each other.
      const std::size_t word = text.find_first_not_of(spm_space);
      const std::size_t leading = word == std::string_view::npos ? text.size() : word;
      const std::size_t aligned = leading - leading % spm_space.size();
      if (text.find(spm_space, aligned) != std::string_view::npos) words_are_independent_ = false;
    }
  }

  [[nodiscard]] bool matches_raw_text(const AddedToken& token) const override {
    return !token.normalized;
  }

  [[nodiscard]] std::string normalize(std::string_view text) const {
    std::string out(add_dummy_prefix_ ? spm_space : std::string_view());
    return out += replace_all(text, " ", spm_space);
  }

  void encode_segments(std::span<const Segment> segments, SpecialText special,
                       std::vector<std::int32_t>& out) const override {
    PieceCache cache;
    std::vector<std::int32_t> symbols;
    for (const Segment& segment : segments) {
      if (segment.id >= 0) {
        out.push_back(segment.id);
        continue;
      }
      const std::string text = normalize(segment.text);
      if (special == SpecialText::plain) {
        encode_normalized(text, cache, symbols, out);
        continue;
      }
      for (const Segment& part : normalized_added_.split(text)) {
        if (part.id >= 0) {
          out.push_back(part.id);
        } else {
          encode_normalized(part.text, cache, symbols, out);
        }
      }
    }
  }

  // Cuts before every run of spaces where the vocabulary allows it: merges never cross such a cut.
  void encode_normalized(std::string_view text, PieceCache& cache,
                         std::vector<std::int32_t>& symbols, std::vector<std::int32_t>& out) const {
    if (!words_are_independent_) return encode_word(text, cache, symbols, out);
    while (!text.empty()) {
      std::size_t spaces = 0;
      while (text.substr(spaces).starts_with(spm_space)) spaces += spm_space.size();
      const std::size_t end = std::min(text.find(spm_space, spaces), text.size());
      encode_word(text.substr(0, end), cache, symbols, out);
      text.remove_prefix(end);
    }
  }

  void encode_word(std::string_view word, PieceCache& cache, std::vector<std::int32_t>& symbols,
                   std::vector<std::int32_t>& out) const {
    if (cache.append(word, out)) return;
    symbols.clear();
    for (std::string_view rest = word; !rest.empty();) {
      const Utf8Step step = utf8_step(rest);
      const auto found = character_ids_.find(step.codepoint);
      symbols.push_back(found != character_ids_.end() ? found->second
                                                      : character_symbol(step.codepoint));
      rest.remove_prefix(step.length);
    }
    merge_symbols(merges_, symbols);
    const std::size_t before = out.size();
    std::string bytes;
    for (const std::int32_t symbol : symbols) {
      if (symbol >= 0) {
        out.push_back(symbol);
        continue;
      }
      bytes.clear();
      append_utf8(bytes, static_cast<std::uint32_t>(-1 - symbol));
      for (const char byte : bytes) out.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }
    cache.remember(word, std::span(out).subspan(before));
  }

  MergeTable merges_;
  bool add_dummy_prefix_;
  bool words_are_independent_ = true;
  std::unordered_map<std::uint32_t, std::int32_t> character_ids_;
  std::array<std::int32_t, 256> byte_ids_;
  Matcher normalized_added_;
};

// Throws FormatError unless the piece is one that make_spm() understands.
void check_piece(const SpmPiece& piece, const std::string& file, const std::string& place) {
  if (piece.text.empty() || piece.text.size() > longest_token) {
    throw FormatError(file, place, "1 to " + std::to_string(longest_token) + " bytes of text",
                      std::to_string(piece.text.size()));
  }
  check_utf8(piece.text, file + ": " + place);
  using Type = SpmPiece::Type;
  if (piece.type != Type::normal && piece.type != Type::unknown && piece.type != Type::control &&
      piece.type != Type::byte) {
    throw FormatError(file, place, "a normal, unknown, control or byte piece",
                      "type " + std::to_string(static_cast<int>(piece.type)));
  }
  if (piece.type == Type::byte && byte_piece_value(piece.text) < 0) {
    throw FormatError(file, place, "a byte piece spelled <0xHH>", quote_text(piece.text));
  }
  if (std::isnan(piece.score)) throw FormatError(file, place, "a score", "NaN");
}

}  // namespace

int byte_piece_value(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  int value = 0;
  for (const char c : text.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9';
    if (!digit && !(c >= 'A' && c <= 'F')) return -1;
    value = value * 16 + (digit ? c - '0' : c - 'A' + 10);
  }
  return value;
}

std::unique_ptr<Tokenizer> make_spm_from_merges(SpmModel model, TokenizerInfo info) {
  return std::make_unique<SpmTokenizer>(std::move(model), std::move(info));
}

std::unique_ptr<Tokenizer> make_spm(std::vector<SpmPiece> pieces, bool add_dummy_prefix,
                                    TokenizerInfo info) {
  if (info.kind.empty()) info.kind = "sentencepiece.model";
  std::unordered_map<std::string_view, std::int32_t> ids;
  std::vector<float> scores;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const SpmPiece& piece = pieces[id];
    const std::string place = "piece " + std::to_string(id);
    check_piece(piece, info.file, place);
    if (piece.type == SpmPiece::Type::normal) {
      if (!ids.emplace(piece.text, static_cast<std::int32_t>(id)).second) {
        throw FormatError(info.file, place, "distinct pieces", piece.text + " again");
      }
      scores.push_back(piece.score);
    } else if (piece.type != SpmPiece::Type::byte) {
      info.added.push_back({static_cast<std::int32_t>(id), piece.text, true, false});
    }
  }
  // Pieces of equal score share a priority: then the leftmost pair merges first.
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  const auto symbol_of = [&](std::string_view text) -> std::optional<std::int32_t> {
    const auto found = ids.find(text);
    if (found != ids.end()) return found->second;
    const Utf8Step step = utf8_step(text);
    if (step.length == text.size()) return character_symbol(step.codepoint);
    return std::nullopt;
  };
  SpmModel model;
  model.add_dummy_prefix = add_dummy_prefix;
  for (const auto& [text, id] : ids) {
    const float score = pieces[static_cast<std::size_t>(id)].score;
    const auto rank = std::lower_bound(scores.begin(), scores.end(), score, std::greater<>());
    const auto priority = static_cast<std::uint32_t>(rank - scores.begin());
    for (std::size_t cut = utf8_step(text).length; cut < text.size();
         cut += utf8_step(text.substr(cut)).length) {
      const auto left = symbol_of(text.substr(0, cut));
      if (!left) continue;
      const auto right = symbol_of(text.substr(cut));
      if (right) model.merges.insert(*left, *right, {priority, id});
    }
  }
  model.pieces = std::move(pieces);
  return make_spm_from_merges(std::move(model), std::move(info));
}

}  // namespace engine
