#include "formats/tokenizer.h"

#include <algorithm>
#include <functional>

#include "formats/error.h"
#include "formats/json.h"
#include "formats/tokenizer_parts.h"
#include "formats/utf8.h"

namespace engine {

Tokenizer::~Tokenizer() = default;

Tokenizer::Tokenizer(TokenizerInfo info, std::vector<std::string> bytes)
    : info_(std::move(info)), bytes_(std::move(bytes)) {
  const std::size_t limit = bytes_.size() + info_.added.size() + widest_id_gap;
  std::size_t size = bytes_.size();
  for (const AddedToken& token : info_.added) {
    if (token.id < 0 || static_cast<std::size_t>(token.id) >= limit) {
      throw FormatError(info_.file, "added token " + quote_text(token.text),
                        "an id in 0.." + std::to_string(limit - 1), std::to_string(token.id));
    }
    size = std::max(size, static_cast<std::size_t>(token.id) + 1);
  }
  bytes_.resize(size);
  kinds_.resize(size, Kind::absent);
  for (std::size_t id = 0; id < size; ++id) {
    if (!bytes_[id].empty()) kinds_[id] = Kind::ordinary;
  }
  for (const AddedToken& token : info_.added) {
    const auto at = static_cast<std::size_t>(token.id);
    if (token.text.empty() || kinds_[at] == Kind::added || kinds_[at] == Kind::special ||
        !added_ids_.emplace(token.text, token.id).second) {
      throw FormatError(info_.file, "added tokens", "distinct, non-empty names and distinct ids",
                        quote_text(token.text) + " with id " + std::to_string(token.id) + " again");
    }
    kinds_[at] = token.special ? Kind::special : Kind::added;
    bytes_[at] = token.text;
  }
  const auto check_id = [&](std::int32_t id, const char* what) {
    if (!contains(id)) {
      throw FormatError(info_.file, what, "the id of a token", std::to_string(id));
    }
  };
  if (info_.bos_id != -1 || info_.adds_bos) check_id(info_.bos_id, "BOS");
  for (const std::int32_t id : info_.eos_ids) check_id(id, "EOS");
}

void Tokenizer::index_added_tokens() {
  for (const AddedToken& token : info_.added) {
    if (matches_raw_text(token)) raw_added_.add(token.text, token.id);
  }
}

void Tokenizer::Matcher::add(std::string text, std::int32_t id) {
  texts_.push_back(std::make_unique<const std::string>(std::move(text)));
  const std::string& kept = *texts_.back();
  ids_.emplace(kept, id);
  auto& lengths = lengths_[static_cast<unsigned char>(kept[0])];
  const auto at = std::lower_bound(lengths.begin(), lengths.end(), kept.size(), std::greater<>());
  if (at == lengths.end() || *at != kept.size()) lengths.insert(at, kept.size());
}

std::vector<Tokenizer::Segment> Tokenizer::Matcher::split(std::string_view text) const {
  std::vector<Segment> out;
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t matched = 0;
    for (const std::size_t length : lengths_[static_cast<unsigned char>(text[at])]) {
      if (length > text.size() - at) continue;
      const auto found = ids_.find(text.substr(at, length));
      if (found == ids_.end()) continue;
      if (at > begin) out.push_back({text.substr(begin, at - begin), -1});
      out.push_back({text.substr(at, length), found->second});
      matched = length;
      break;
    }
    at += std::max<std::size_t>(matched, 1);
    if (matched > 0) begin = at;
  }
  if (begin < text.size()) out.push_back({text.substr(begin), -1});
  return out;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, SpecialText special) const {
  check_utf8(text, "text");
  std::vector<std::int32_t> out;
  if (text.empty()) return out;
  out.reserve(text.size() / 4 + 8);
  if (special == SpecialText::parse) {
    encode_segments(raw_added_.split(text), special, out);
  } else {
    const Segment whole{text, -1};
    encode_segments({&whole, 1}, special, out);
  }
  return out;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool keep_special) const {
  std::string out;
  for (const std::int32_t id : ids) {
    const std::string& bytes = token_bytes(id);
    if (keep_special || !is_special(id)) out += bytes;
  }
  if (has_leading_space() && !out.empty() && out[0] == ' ') out.erase(0, 1);
  return out;
}

bool Tokenizer::contains(std::int32_t id) const {
  return id >= 0 && static_cast<std::size_t>(id) < kinds_.size() &&
         kinds_[static_cast<std::size_t>(id)] != Kind::absent;
}

const std::string& Tokenizer::token_bytes(std::int32_t id) const {
  if (!contains(id)) {
    throw Error(ErrorCode::usage, info_.file + ": no token has the id " + std::to_string(id) +
                                      "; the vocabulary has " + std::to_string(vocab_size()));
  }
  return bytes_[static_cast<std::size_t>(id)];
}

bool Tokenizer::is_special(std::int32_t id) const {
  return contains(id) && kinds_[static_cast<std::size_t>(id)] == Kind::special;
}

std::optional<std::int32_t> Tokenizer::added_id(std::string_view text) const {
  const auto found = added_ids_.find(std::string(text));
  if (found == added_ids_.end()) return std::nullopt;
  return found->second;
}

std::string StreamDecoder::push(std::int32_t id) {
  const std::string& bytes = tokenizer_->token_bytes(id);
  if (tokenizer_->is_special(id)) return {};
  held_ += bytes;
  std::string out;
  std::size_t at = 0;
  while (at < held_.size()) {
    const std::string_view rest = std::string_view(held_).substr(at);
    const Utf8Step step = utf8_step(rest);
    if (step.state == Utf8Step::State::incomplete) break;
    if (step.state == Utf8Step::State::complete) {
      out += rest.substr(0, step.length);
    } else {
      append_utf8(out, 0xFFFD);
    }
    at += step.length;
  }
  held_.erase(0, at);
  if (drop_space_ && !out.empty()) {
    if (out[0] == ' ') out.erase(0, 1);
    drop_space_ = false;
  }
  return out;
}

std::string StreamDecoder::flush() {
  std::string out;
  if (!held_.empty()) append_utf8(out, 0xFFFD);
  held_.clear();
  drop_space_ = false;
  return out;
}

}  // namespace engine
