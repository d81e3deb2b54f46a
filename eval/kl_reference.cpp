#include "eval/kl_reference.h"

#include <algorithm>
#include <cstring>

#include "engine/core/interrupt.h"
#include "formats/sha256.h"

namespace engine {
namespace {

constexpr const char* format_name = "lowbit-kl-reference-1";
constexpr std::int64_t piece_bytes = 64 << 20;

TensorDType stored_dtype(DType d) {
  switch (d) {
    case DType::f32:
      return TensorDType::f32;
    case DType::f16:
      return TensorDType::f16;
    case DType::bf16:
      return TensorDType::bf16;
    default:
      throw Error(ErrorCode::internal, "not a compute dtype");
  }
}

std::string metadata_text(const SafetensorsFile& file, std::string_view key) {
  for (const auto& [name, text] : file.metadata()) {
    if (name == key) return text;
  }
  throw FormatError(file.path().string(), "__metadata__." + std::string(key),
                    "a text, as engine kl --save-reference writes it", "nothing");
}

const TensorInfo& tensor(const SafetensorsFile& file, const char* name, TensorDType dtype) {
  const TensorInfo* info = file.find(name);
  const std::string expected =
      "a matrix of " + std::string(dtype_name(dtype)) + " with at least one row and column";
  if (info == nullptr) throw FormatError(file.path().string(), name, expected, "no such tensor");
  if (info->dtype != dtype || info->shape.size() != 2 || info->shape[0] < 1 || info->shape[1] < 1) {
    throw FormatError(file.path().string(), name, expected,
                      std::string(dtype_name(info->dtype)) + " " + shape_text(info->shape));
  }
  return *info;
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string hash_text(const std::string& hash) { return hash.empty() ? "none" : hash; }

SafetensorsWriter open_writer(const std::filesystem::path& file, const ReferenceKey& key,
                              const Json& model, const Json& protocols, const TokenWindows& tokens,
                              std::int64_t hidden) {
  const TensorDType dtype = stored_dtype(key.dtype);
  return {file,
          {{"tokens", TensorDType::i32, {tokens.windows, tokens.seq}},
           {"hidden", dtype, {tokens.rows(), hidden}},
           {"head", dtype, {key.vocab, hidden}}},
          {{"format", format_name},
           {"dtype", dtype_name(key.dtype)},
           {"tokenizer_sha256", key.tokenizer_sha256},
           {"tokens_sha256", tokens_sha256(tokens)},
           {"model", model.dump()},
           {"protocols", protocols.dump()}}};
}

}  // namespace

std::string tokens_sha256(const TokenWindows& tokens) {
  return sha256_hex(std::as_bytes(std::span(tokens.ids)));
}

std::string tokenizer_sha256(const WeightSource& source) {
  const std::string bytes = source.tokenizer_bytes();
  return bytes.empty() ? std::string() : sha256_hex(std::string_view(bytes));
}

StoredReference::StoredReference(const std::filesystem::path& file) : file_(file) {
  const std::string name = file.string();
  const std::string format = metadata_text(file_, "format");
  if (format != format_name) {
    throw FormatError(name, "__metadata__.format", format_name, quote_text(format));
  }
  const std::string dtype = metadata_text(file_, "dtype");
  const DType known[] = {DType::f32, DType::bf16, DType::f16};
  const auto* found = std::find_if(std::begin(known), std::end(known),
                                   [&](DType d) { return dtype == dtype_name(d); });
  if (found == std::end(known)) {
    throw FormatError(name, "__metadata__.dtype", "f32, bf16 or f16", quote_text(dtype));
  }
  key_.dtype = *found;
  tokens_ = &tensor(file_, "tokens", TensorDType::i32);
  hidden_ = &tensor(file_, "hidden", stored_dtype(key_.dtype));
  head_ = &tensor(file_, "head", stored_dtype(key_.dtype));
  const std::int64_t rows = tokens_->shape[0] * tokens_->shape[1];
  if (hidden_->shape[0] != rows) {
    throw FormatError(name, "hidden", std::to_string(rows) + " rows, one for each token",
                      std::to_string(hidden_->shape[0]));
  }
  if (head_->shape[1] != hidden()) {
    throw FormatError(name, "head", std::to_string(hidden()) + " columns, as \"hidden\" has",
                      std::to_string(head_->shape[1]));
  }
  key_.vocab = head_->shape[0];
  key_.tokenizer_sha256 = metadata_text(file_, "tokenizer_sha256");
  if (!key_.tokenizer_sha256.empty() && !is_sha256(key_.tokenizer_sha256)) {
    throw FormatError(name, "__metadata__.tokenizer_sha256", "64 hexadecimal digits or nothing",
                      quote_text(key_.tokenizer_sha256));
  }
  tokens_sha256_ = sha256_hex(file_.bytes(*tokens_));
  const std::string claimed = metadata_text(file_, "tokens_sha256");
  if (claimed != tokens_sha256_) {
    throw FormatError(name, "tokens", "SHA-256 " + quote_text(claimed) + " (metadata)",
                      tokens_sha256_);
  }
  model_ = parse_json(metadata_text(file_, "model"), name + " (metadata \"model\")");
}

void StoredReference::check(const ReferenceKey& run, const TokenWindows& tokens) const {
  const auto require = [&](const char* what, const std::string& expected,
                           const std::string& found) {
    if (expected == found) return;
    throw Error(ErrorCode::mismatch, file_.path().string() + ": stored reference: " + what +
                                         ": expected " + expected + " as in this run, found " +
                                         found);
  };
  require("vocabulary", std::to_string(run.vocab), std::to_string(key_.vocab));
  require("tokenizer SHA-256", hash_text(run.tokenizer_sha256), hash_text(key_.tokenizer_sha256));
  require("compute dtype", dtype_name(run.dtype), dtype_name(key_.dtype));
  require("tokens", shape_text(std::vector{tokens.windows, tokens.seq}),
          shape_text(tokens_->shape));
  require("SHA-256 of the tokens", engine::tokens_sha256(tokens), tokens_sha256_);
}

ModelConfig StoredReference::config() const {
  ModelConfig c;
  c.vocab = key_.vocab;
  c.hidden = hidden();
  return c;
}

Json StoredReference::describe() const {
  Json j;
  j["kind"] = "stored reference";
  j["name"] = file_.path().filename().string();
  j["dtype"] = dtype_name(key_.dtype);
  j["tokens_sha256"] = tokens_sha256_;
  j["model"] = model_;
  return j;
}

void StoredReference::load_hidden(Loader& loader, View out) const {
  loader.put(file_.bytes(*hidden_), key_.dtype, out);
}

void StoredReference::load_head(Loader& loader, View out) const {
  loader.put(file_.bytes(*head_), key_.dtype, out);
}

ReferenceWriter::ReferenceWriter(const std::filesystem::path& file, const ReferenceKey& key,
                                 const Json& model, const Json& protocols,
                                 const TokenWindows& tokens, std::int64_t hidden)
    : writer_(open_writer(file, key, model, protocols, tokens, hidden)) {
  writer_.append("tokens", std::as_bytes(std::span(tokens.ids)));
}

void ReferenceWriter::add(const char* name, Ops& ops, Ledger& ledger, View matrix) {
  const auto row = matrix.cols * static_cast<std::int64_t>(dtype_bytes(matrix.dtype));
  const std::int64_t rows = std::clamp<std::int64_t>(piece_bytes / row, 1, matrix.rows);
  const Buffer piece(ops.staging_memory(), ledger, MemTag::staging, matrix.dtype, rows,
                     matrix.cols);
  for (std::int64_t r = 0; r < matrix.rows; r += rows) {
    check_interrupt();
    const View host = piece.view().row_range(0, std::min(rows, matrix.rows - r));
    ops.download(matrix.row_range(r, host.rows), host);
    writer_.append(
        name, {static_cast<const std::byte*>(host.data), static_cast<std::size_t>(host.bytes())});
  }
}

}  // namespace engine
