// Hugging Face's tokenizer.json, as exported for LLaMA1/2 and LLaMA3.
#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/error.h"
#include "formats/tokenizer_parts.h"
#include "formats/utf8.h"

namespace engine {
namespace {

using Json = nlohmann::json;
using Ids = std::unordered_map<std::string, std::int32_t>;

// A value with the file and the key path that lead to it, for errors. A missing key reads as null,
// which is how the format itself writes an absent option.
class Node {
 public:
  Node(const Json& value, const std::string& file, std::string place)
      : value_(&value), file_(&file), place_(std::move(place)) {}

  [[nodiscard]] Node at(const std::string& key) const {
    static const Json null;
    if (!value_->is_object()) fail("an object");
    const auto found = value_->find(key);
    return child(key, found == value_->end() ? null : *found);
  }
  [[nodiscard]] Node child(const std::string& key, const Json& value) const {
    return {value, *file_, place_ + "." + key};
  }
  [[nodiscard]] std::vector<Node> items() const {
    if (!value_->is_array()) fail("an array");
    std::vector<Node> out;
    for (const Json& item : *value_) {
      out.emplace_back(item, *file_, place_ + "[" + std::to_string(out.size()) + "]");
    }
    return out;
  }
  [[nodiscard]] bool is_null() const { return value_->is_null(); }
  [[nodiscard]] const Json& raw() const { return *value_; }
  [[nodiscard]] const std::string& text() const {
    if (!value_->is_string()) fail("a string");
    return value_->get_ref<const std::string&>();
  }
  [[nodiscard]] std::int32_t id() const {
    if (value_->is_number_integer()) {
      const auto wide = value_->get<std::int64_t>();
      if (wide >= 0 && wide < std::numeric_limits<std::int32_t>::max()) {
        return static_cast<std::int32_t>(wide);
      }
    }
    fail("a token id");
  }
  [[nodiscard]] bool flag(bool if_null) const {
    if (is_null()) return if_null;
    if (!value_->is_boolean()) fail("true or false");
    return value_->get<bool>();
  }
  void expect_text(std::string_view want) const {
    if (text() != want) fail("\"" + std::string(want) + "\"");
  }
  void expect_flag(bool want, bool if_null) const {
    if (flag(if_null) != want) fail(want ? "true" : "false");
  }
  [[noreturn]] void fail(const std::string& expected) const {
    // Arrays and objects are only named: printing them would recurse over foreign nesting.
    std::string found = value_->is_structured()
                            ? std::string("another ") + value_->type_name()
                            : value_->dump(-1, ' ', true, Json::error_handler_t::replace);
    if (found.size() > 100) found = found.substr(0, 100) + "...";
    throw FormatError(*file_, place_, expected, found);
  }

 private:
  const Json* value_;
  const std::string* file_;
  std::string place_;
};

// GPT-2's printable stand-ins for bytes: code point -> byte for U+0000..U+0143, -1 if unused.
std::array<int, 324> byte_stand_ins() {
  std::array<int, 324> out;
  out.fill(-1);
  std::size_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                           (byte >= 0xAE && byte <= 0xFF);
    out[printable ? static_cast<std::size_t>(byte) : next++] = byte;
  }
  return out;
}

// False if the text holds a character that stands for no byte.
bool map_to_bytes(std::string_view text, std::string& out) {
  static const std::array<int, 324> stand_ins = byte_stand_ins();
  out.clear();
  while (!text.empty()) {
    const Utf8Step step = utf8_step(text);
    if (step.state != Utf8Step::State::complete || step.codepoint >= stand_ins.size()) return false;
    const int byte = stand_ins[step.codepoint];
    if (byte < 0) return false;
    out.push_back(static_cast<char>(byte));
    text.remove_prefix(step.length);
  }
  return true;
}

void read_added_tokens(const Node& root, TokenizerInfo& info) {
  const Node list = root.at("added_tokens");
  if (list.is_null()) return;
  for (const Node& item : list.items()) {
    for (const char* option : {"single_word", "lstrip", "rstrip"}) {
      item.at(option).expect_flag(false, false);
    }
    info.added.push_back({item.at("id").id(), item.at("content").text(),
                          item.at("special").flag(false), item.at("normalized").flag(false)});
  }
}

std::optional<std::int32_t> find_added(const TokenizerInfo& info, std::string_view name) {
  for (const AddedToken& token : info.added) {
    if (token.text == name) return token.id;
  }
  return std::nullopt;
}

// BOS from the post-processor's template: [BOS, A] or [A].
void read_post_processor(const Node& node, TokenizerInfo& info) {
  if (node.is_null()) return;
  const std::string& type = node.at("type").text();
  if (type == "ByteLevel") return;  // changes offsets only
  if (type == "Sequence") {
    // One level: a Sequence in a Sequence is not worth a recursion over foreign input.
    for (const Node& item : node.at("processors").items()) {
      if (item.at("type").text() == "Sequence") item.at("type").fail("no nested Sequence");
      read_post_processor(item, info);
    }
    return;
  }
  if (type != "TemplateProcessing") node.at("type").fail("TemplateProcessing");
  const Node single = node.at("single");
  const std::vector<Node> parts = single.items();
  if (parts.empty() || parts.size() > 2 || parts.back().at("Sequence").is_null()) {
    single.fail("an optional BOS and the text");
  }
  if (parts.size() == 1) return;
  const std::string& name = parts[0].at("SpecialToken").at("id").text();
  const std::vector<Node> ids = node.at("special_tokens").at(name).at("ids").items();
  if (ids.size() != 1) single.fail("one id for " + name);
  info.bos_id = ids[0].id();
  info.adds_bos = true;
}

void read_roles(const Node& root, TokenizerInfo& info) {
  read_added_tokens(root, info);
  for (const char* name : {"<|begin_of_text|>", "<s>"}) {
    const auto id = find_added(info, name);
    if (id && info.bos_id < 0) info.bos_id = *id;
  }
  for (const char* name : {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>"}) {
    if (const auto id = find_added(info, name)) info.eos_ids.push_back(*id);
  }
  read_post_processor(root.at("post_processor"), info);
}

// token -> id, with every id once.
Ids read_vocabulary(const Node& node) {
  if (!node.raw().is_object()) node.fail("an object");
  Ids ids;
  ids.reserve(node.raw().size());
  std::vector<bool> used(node.raw().size() + widest_id_gap);
  for (const auto& [text, value] : node.raw().items()) {
    if (text.empty()) node.fail("no empty token");
    const Node entry = node.child(text, value);
    const auto id = static_cast<std::size_t>(entry.id());
    if (id >= used.size() || used[id]) entry.fail("an id of its own within the vocabulary");
    used[id] = true;
    ids.emplace(text, static_cast<std::int32_t>(id));
  }
  return ids;
}

std::size_t table_size(const Ids& ids) {
  std::int32_t most = -1;
  for (const auto& [text, id] : ids) most = std::max(most, id);
  return static_cast<std::size_t>(most + 1);
}

// The merges in order of priority; each side and the result must be tokens.
MergeTable read_merges(const Node& node, const Ids& ids) {
  MergeTable table;
  if (!node.raw().is_array()) node.fail("an array");
  table.reserve(node.raw().size());
  std::uint32_t priority = 0;
  for (const Json& item : node.raw()) {
    std::string left;
    std::string right;
    if (item.is_string()) {
      const auto& text = item.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      left = text.substr(0, space);
      if (space != std::string::npos) right = text.substr(space + 1);
    } else if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      left = item[0].get_ref<const std::string&>();
      right = item[1].get_ref<const std::string&>();
    }
    const auto l = ids.find(left);
    const auto r = ids.find(right);
    const auto both = ids.find(left + right);
    if (left.empty() || right.empty() || l == ids.end() || r == ids.end() || both == ids.end() ||
        !table.insert(l->second, r->second, {priority, both->second})) {
      node.items()[priority].fail("a new pair of tokens whose concatenation is a token");
    }
    ++priority;
  }
  return table;
}

std::unique_ptr<Tokenizer> byte_bpe_from_json(const Node& root, TokenizerInfo info) {
  info.kind = "byte_bpe.json";
  if (!root.at("normalizer").is_null()) root.at("normalizer").fail("null");
  const Node splitter = root.at("pre_tokenizer");
  splitter.at("type").expect_text("Sequence");
  const std::vector<Node> steps = splitter.at("pretokenizers").items();
  if (steps.size() != 2) splitter.fail("a Split and a ByteLevel step");
  steps[0].at("type").expect_text("Split");
  steps[0].at("behavior").expect_text("Isolated");
  steps[0].at("invert").expect_flag(false, false);
  steps[1].at("type").expect_text("ByteLevel");
  steps[1].at("add_prefix_space").expect_flag(false, true);
  steps[1].at("use_regex").expect_flag(false, true);
  root.at("decoder").at("type").expect_text("ByteLevel");

  const Node model = root.at("model");
  ByteBpeModel bpe;
  bpe.split_regex = steps[0].at("pattern").at("Regex").text();
  // The first LLaMA3 exports lack the flag and were made for the behaviour it now names.
  bpe.whole_piece_first = model.at("ignore_merges").flag(true);
  const Ids ids = read_vocabulary(model.at("vocab"));
  bpe.merges = read_merges(model.at("merges"), ids);
  bpe.tokens.resize(table_size(ids));
  for (const auto& [text, id] : ids) {
    std::string bytes;
    if (map_to_bytes(text, bytes)) {
      bpe.tokens[static_cast<std::size_t>(id)] = std::move(bytes);
    } else if (find_added(info, text) != id) {
      throw FormatError(info.file, "model.vocab, id " + std::to_string(id),
                        "characters that stand for bytes", text.substr(0, 100));
    }
  }
  return make_byte_bpe(std::move(bpe), std::move(info));
}

std::unique_ptr<Tokenizer> spm_from_json(const Node& root, TokenizerInfo info) {
  info.kind = "sentencepiece.json";
  if (!root.at("pre_tokenizer").is_null()) root.at("pre_tokenizer").fail("null");
  SpmModel spm;
  spm.add_dummy_prefix = false;
  const Node normalizer = root.at("normalizer");
  normalizer.at("type").expect_text("Sequence");
  const std::vector<Node> steps = normalizer.at("normalizers").items();
  if (steps.empty() || steps.size() > 2) normalizer.fail("an optional Prepend and a Replace step");
  if (steps.size() == 2) {
    steps[0].at("type").expect_text("Prepend");
    steps[0].at("prepend").expect_text(spm_space);
    spm.add_dummy_prefix = true;
  }
  steps.back().at("type").expect_text("Replace");
  steps.back().at("pattern").at("String").expect_text(" ");
  steps.back().at("content").expect_text(spm_space);

  const Node model = root.at("model");
  model.at("ignore_merges").expect_flag(false, false);
  const Ids ids = read_vocabulary(model.at("vocab"));
  spm.merges = read_merges(model.at("merges"), ids);
  spm.pieces.resize(table_size(ids));
  for (const auto& [text, id] : ids) {
    SpmPiece& piece = spm.pieces[static_cast<std::size_t>(id)];
    piece.text = text;
    if (byte_piece_value(text) >= 0) piece.type = SpmPiece::Type::byte;
  }
  for (const AddedToken& token : info.added) {
    const auto id = static_cast<std::size_t>(token.id);
    if (id < spm.pieces.size()) spm.pieces[id].type = SpmPiece::Type::control;
  }
  return make_spm_from_merges(std::move(spm), std::move(info));
}

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_from_json(std::string_view bytes, TokenizerInfo info) {
  Json json;
  try {
    json = Json::parse(bytes.begin(), bytes.end());
  } catch (const Json::exception& error) {
    throw FormatError(info.file, "JSON", "a JSON document", error.what());
  }
  const std::string file = info.file;
  const Node root(json, file, "$");
  read_roles(root, info);
  const Node model = root.at("model");
  model.at("type").expect_text("BPE");
  if (!model.at("dropout").is_null()) model.at("dropout").fail("null");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.at(affix).is_null()) model.at(affix).expect_text("");
  }
  if (model.at("byte_fallback").flag(false)) return spm_from_json(root, std::move(info));
  return byte_bpe_from_json(root, std::move(info));
}

}  // namespace engine
