// Where a model's weights come from: a Hugging Face directory, a packed file, or a synthetic shape.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/model/config.h"
#include "engine/model/llama.h"
#include "formats/json.h"

namespace engine {

// Host staging and device scratch through which tensors travel in pieces of bounded size.
class Loader {
 public:
  static constexpr std::int64_t max_piece_bytes = 64 << 20;

  // The staging buffer comes from ops.staging_memory(), the scratch from `arena`; both are no
  // larger than the model's largest tensor needs. On a measuring arena only the layout is recorded.
  Loader(Ops& ops, Ledger& ledger, Arena& arena, const ModelConfig& config);

  [[nodiscard]] Ops& ops() const { return ops_; }
  [[nodiscard]] Arena& arena() const { return arena_; }
  [[nodiscard]] Ledger& ledger() const { return ledger_; }

  // Copies raw row-major elements (any alignment) of `dtype` into `out`, converting if out's dtype
  // differs. bytes.size() must be out.count() elements. Waits until the copy is done.
  void put(std::span<const std::byte> bytes, DType dtype, View out);

 private:
  Ops& ops_;
  Ledger& ledger_;
  Arena& arena_;
  std::int64_t piece_bytes_;
  Buffer staging_;  // u8 [2, piece_bytes_]
  View scratch_;    // u8 [2, piece_bytes_] on the device, for dtype conversion
};

struct DenseInfo {
  DType dtype = DType::bf16;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

// The three loading functions also run on a loader whose arena only measures: they then take the
// scratch they need and touch nothing else, so that plans come from the same code as the run.
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  // What it is, for reports and packed files: kind, path or name, hashes; for a packed file also
  // the method and its options.
  [[nodiscard]] virtual Json describe() const = 0;
  // The tokenizer file's bytes and name; empty bytes for synthetic models.
  [[nodiscard]] virtual std::string tokenizer_bytes() const = 0;
  [[nodiscard]] virtual std::string tokenizer_name() const = 0;

  // Tensors outside the quantized linears, by Hugging Face name without the "model." prefix:
  // "embed_tokens.weight", "norm.weight", "lm_head.weight" (the embedding when tied),
  // "layers.N.input_layernorm.weight", "layers.N.post_attention_layernorm.weight".
  [[nodiscard]] virtual DenseInfo dense_info(const std::string& name) const = 0;
  // out: any float dtype, device of loader.ops().
  virtual void load_dense(const std::string& name, Loader& loader, View out) = 0;
  // Their bytes as stored, for copying into a packed file or a decoded checkpoint.
  virtual void read_raw(const std::string& name, Loader& loader, std::span<std::byte> out) = 0;

  // The linear as a dense matrix, decoded if it is packed.
  virtual void load_linear(std::int64_t layer, Site site, Loader& loader, View out) = 0;
  // The dtype in which linears are stored or were before quantization.
  [[nodiscard]] virtual DType linear_dtype() const = 0;
};

// Every dense tensor name of a model, in file order: embedding, norms by layer, final norm, head.
[[nodiscard]] std::vector<std::string> dense_names(const ModelConfig& config);

// Norms and all linears of one block. Runs on a measuring arena too. Throws Error(numeric) naming a
// tensor with NaN or infinity.
void load_block(WeightSource& source, std::int64_t layer, Loader& loader, const BlockWeights& out);

// `model` is a directory, a .qw file or "synthetic:NAME".
std::unique_ptr<WeightSource> open_model(const std::string& model);

// The parts, for callers that know what they have.
std::unique_ptr<WeightSource> open_checkpoint(const std::filesystem::path& directory);
std::unique_ptr<WeightSource> open_packed(const std::filesystem::path& file);
std::unique_ptr<WeightSource> open_synthetic(const std::string& name);

}  // namespace engine
