// A reference's exact logits in factored form: the hidden states behind the final norm and the head
// matrix, whose product they are. For 289k positions of an 8B model that is 2.4 GB and 1 GB instead
// of 148 GB of logits.
//
// A safetensors file with "tokens" i32 [windows, seq], "hidden" [windows * seq, hidden] and "head"
// [vocab, hidden], the last two in the compute dtype, and metadata that says what they are.
#pragma once

#include <filesystem>
#include <string>

#include "engine/model/stream.h"
#include "formats/safetensors.h"

namespace engine {

// What a reference and whatever is compared with it must have in common, besides the tokens.
struct ReferenceKey {
  DType dtype = DType::bf16;     // compute dtype
  std::int64_t vocab = 0;        // rows of the head
  std::string tokenizer_sha256;  // of the tokenizer's file; empty: none
};

// SHA-256 of the ids as little-endian i32.
[[nodiscard]] std::string tokens_sha256(const TokenWindows& tokens);
// SHA-256 of the model's tokenizer file; empty if it has none.
[[nodiscard]] std::string tokenizer_sha256(const WeightSource& source);

// A stored reference, mapped.
class StoredReference {
 public:
  // Throws IoError, or FormatError naming what is missing or contradicts itself.
  explicit StoredReference(const std::filesystem::path& file);

  // Throws Error(mismatch) naming the file, expected and found, unless it is a reference for a run
  // with this key on these tokens.
  void check(const ReferenceKey& run, const TokenWindows& tokens) const;

  [[nodiscard]] std::int64_t hidden() const { return hidden_->shape[1]; }
  // vocab and hidden only: enough for a Loader.
  [[nodiscard]] ModelConfig config() const;
  // For reports: the model as it was described, dtype and token hash.
  [[nodiscard]] Json describe() const;

  // out [rows, hidden()] and [vocab, hidden()] of the stored dtype.
  void load_hidden(Loader& loader, View out) const;
  void load_head(Loader& loader, View out) const;

 private:
  SafetensorsFile file_;
  ReferenceKey key_;
  Json model_;
  std::string tokens_sha256_;
  const TensorInfo* tokens_ = nullptr;
  const TensorInfo* hidden_ = nullptr;
  const TensorInfo* head_ = nullptr;
};

// Writes one, in pieces of bounded host memory. The file appears at commit() or not at all.
class ReferenceWriter {
 public:
  // `model` and `protocols` as they stand in reports.
  ReferenceWriter(const std::filesystem::path& file, const ReferenceKey& key, const Json& model,
                  const Json& protocols, const TokenWindows& tokens, std::int64_t hidden);

  // The rest in this order: hidden [rows, hidden], then head [vocab, hidden], on the device.
  void add_hidden(Ops& ops, Ledger& ledger, View hidden) { add("hidden", ops, ledger, hidden); }
  void add_head(Ops& ops, Ledger& ledger, View head) { add("head", ops, ledger, head); }
  void commit() { writer_.commit(); }

 private:
  void add(const char* name, Ops& ops, Ledger& ledger, View matrix);
  SafetensorsWriter writer_;
};

}  // namespace engine
