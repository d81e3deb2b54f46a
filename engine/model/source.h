// Where a model's weights come from: a Hugging Face directory, a packed file, or a synthetic shape.
#pragma once

#include <array>
#include <filesystem>
#include <memory>
#include <optional>
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
  ~Loader();  // waits until the stages were read
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  [[nodiscard]] Ops& ops() const { return ops_; }
  [[nodiscard]] Arena& arena() const { return arena_; }
  [[nodiscard]] Ledger& ledger() const { return ledger_; }

  // Copies raw row-major elements (any alignment) of `dtype` into `out`, converting if out's dtype
  // differs. bytes.size() must be out.count() elements. Waits until the copy is done.
  void put(std::span<const std::byte> bytes, DType dtype, View out);

  // `bytes` bytes of host memory that copies fast, at a multiple of 256. Two buffers take turns and
  // are kept: what is handed out is free again, the device having read it, and stays until the call
  // after next. staged() follows the last upload from it.
  std::byte* stage(std::int64_t bytes);
  void staged();

  // Read packed weights back and compare them with their planes (packed_install.h).
  bool verify = false;

 private:
  Ops& ops_;
  Ledger& ledger_;
  Arena& arena_;
  std::int64_t piece_bytes_;
  Buffer staging_;  // u8 [2, piece_bytes_]
  View scratch_;    // u8 [2, piece_bytes_] on the device, for dtype conversion
  std::array<Buffer, 2> stages_;
  std::array<std::int64_t, 2> stage_marks_ = {-1, -1};
  std::size_t stage_ = 0;
};

struct DenseInfo {
  DType dtype = DType::bf16;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

// How linears that are stored packed are held: as they are, or decoded to dense matrices.
enum class Exec : std::uint8_t { decoded, packed };

// How a linear lies in device memory when it is held packed.
struct PackedLayout {
  PackedShape shape;
  bool permuted = false;
};
// Device memory for it.
[[nodiscard]] PackedWeight make_packed_weight(Arena& arena, const PackedLayout& layout);

// The loading functions also run on a loader whose arena only measures: they then take the
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
  // How the linear is held packed; nullopt if it is dense. Throws Error(usage) naming the linear
  // and its scheme if no packed kernel knows it.
  [[nodiscard]] virtual std::optional<PackedLayout> packed_layout(std::int64_t layer,
                                                                  Site site) const {
    static_cast<void>(layer);
    static_cast<void>(site);
    return std::nullopt;
  }
  // Fills `out`, made from the layouts of these sites. Queued; nothing of the host's but the
  // loader's stages is read later.
  virtual void load_packed(std::int64_t layer, std::span<const Site> sites, Loader& loader,
                           std::span<const PackedWeight> out);
  // The dtype in which linears are stored or were before quantization.
  [[nodiscard]] virtual DType linear_dtype() const = 0;
};

// Every dense tensor name of a model, in file order: embedding, norms by layer, final norm, head.
[[nodiscard]] std::vector<std::string> dense_names(const ModelConfig& config);

// Memory for one block whose linears are packed where the source has them so.
BlockWeights make_block_weights(Arena& arena, const WeightSource& source, std::int64_t layer,
                                DType dtype);
// The distinct shapes of all packed linears.
[[nodiscard]] std::vector<PackedShape> packed_shapes(const WeightSource& source);
// Throws Error(usage) if no linear of the source is packed, or one has no packed kernel.
void require_packed(const WeightSource& source);

// Norms and all linears of one block. Runs on a measuring arena too. Throws Error(numeric) naming a
// tensor with NaN or infinity.
void load_block(WeightSource& source, std::int64_t layer, Loader& loader, const BlockWeights& out);
// Its two halves. Norms wait for the device and packed linears do not, so a caller that loads many
// blocks loads all norms first.
void load_norms(WeightSource& source, std::int64_t layer, Loader& loader, const BlockWeights& out);
void load_linears(WeightSource& source, std::int64_t layer, Loader& loader,
                  const BlockWeights& out);

// `model` is a directory, a .qw file or "synthetic:NAME". `threads` decode the planes of a packed
// file; 0: all.
std::unique_ptr<WeightSource> open_model(const std::string& model, int threads = 0);

// The parts, for callers that know what they have.
std::unique_ptr<WeightSource> open_checkpoint(const std::filesystem::path& directory);
std::unique_ptr<WeightSource> open_packed(const std::filesystem::path& file, int threads = 0);
std::unique_ptr<WeightSource> open_synthetic(const std::string& name);

}  // namespace engine
