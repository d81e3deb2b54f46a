// The LLaMA decoder as data and one readable function per block (llama_block.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "engine/core/memory.h"
#include "engine/model/config.h"
#include "engine/ops/ops.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// The seven linears of a block: what weight quantization quantizes.
enum class Site : std::uint8_t { q, k, v, o, gate, up, down };
inline constexpr std::size_t site_count = 7;
inline constexpr std::array<Site, site_count> all_sites = {Site::q,    Site::k,  Site::v,   Site::o,
                                                           Site::gate, Site::up, Site::down};
// The distinct inputs of those linears: sites that share one share its statistics.
enum class Tap : std::uint8_t { attn_in, attn_out, mlp_in, mlp_out };
inline constexpr std::size_t tap_count = 4;
inline constexpr std::array<Tap, tap_count> all_taps = {Tap::attn_in, Tap::attn_out, Tap::mlp_in,
                                                        Tap::mlp_out};

struct SiteShape {
  std::int64_t rows = 0;  // outputs
  std::int64_t cols = 0;  // inputs
};

[[nodiscard]] const char* site_name(Site site);  // "self_attn.q_proj", as Hugging Face spells it
[[nodiscard]] const char* tap_name(Tap tap);
[[nodiscard]] Tap tap_of(Site site);
[[nodiscard]] SiteShape site_shape(const ModelConfig& config, Site site);
[[nodiscard]] std::int64_t tap_width(const ModelConfig& config, Tap tap);
// "layers.3.self_attn.q_proj": the key of a linear in reports and packed files.
[[nodiscard]] std::string linear_name(std::int64_t layer, Site site);

// Weights of one block on the ops' device: norms and dense matrices in the compute dtype, or packed
// linears.
struct BlockWeights {
  View attn_norm;                           // [1, hidden]
  View mlp_norm;                            // [1, hidden]
  std::array<Linear, site_count> linear{};  // [rows, cols] each
  [[nodiscard]] const Linear& operator[](Site s) const {
    return linear[static_cast<std::size_t>(s)];
  }
  [[nodiscard]] Linear& operator[](Site s) { return linear[static_cast<std::size_t>(s)]; }
};
// All dense. Blocks with packed linears: make_block_weights of source.h.
BlockWeights make_block_weights(Arena& arena, const ModelConfig& config, DType dtype);

// Activations of one block for `rows` stacked tokens.
struct BlockScratch {
  View h, q, a, g, u, workspace;
  View k, v;            // [kept + rows, kv_heads * head_dim]
  View k_read, v_read;  // [capacity, kv_heads * head_dim]: one sequence of an 8-bit cache, or empty
};
// `packed_bytes`: what the products with packed weights need (packed_workspace_bytes below).
// `kept`: rows of keys and values in front of the batch's own, for BlockRun::ragged.
BlockScratch make_block_scratch(Arena& arena, Ops& ops, const ModelConfig& config, DType dtype,
                                std::int64_t batch, std::int64_t q_len, std::int64_t kv_len,
                                std::int64_t packed_bytes = 0, std::int64_t kept = 0);

// The largest PackedOps::packed_workspace_bytes of these shapes for 1 to `rows` rows of x.
[[nodiscard]] std::int64_t packed_workspace_bytes(const Ops& ops,
                                                  std::span<const PackedShape> shapes,
                                                  std::int64_t rows, DType dtype,
                                                  PackedKernel kernel);

// cos and sin of the rotary angles, f32 [positions, head_dim / 2], on the ops' device.
struct RopeTable {
  View cos;
  View sin;
};
RopeTable make_rope_table(Arena& arena, Ops& ops, const ModelConfig& config,
                          std::int64_t positions);

// Sequences of any lengths side by side, which may share their beginnings. Rows of keys and values
// are counted from the first kept one: those of the batch's row r stand in row kept + r.
struct RaggedBatch {
  View positions;         // i32 [rows, 1]: of each row of x in its sequence
  View runs;              // as EvalOps::attention_runs takes them
  std::int64_t kept = 0;  // as given to make_block_scratch
};

struct BlockRun {
  Ops& ops;
  const ModelConfig& config;
  RopeTable rope;
  std::int64_t batch = 1;          // sequences stacked in x
  std::int64_t start = 0;          // position of each sequence's first row
  const KvCache* cache = nullptr;  // rows are appended to it; null: whole sequences
  std::int64_t first = 0;          // the cache's sequence that x begins with
  PackedKernel kernel = PackedKernel::automatic;
  const RaggedBatch* ragged = nullptr;  // replaces batch, start and cache
};

// Called with each tap's input as it appears; returning false ends the block there.
using TapFn = std::function<bool(Tap, const View&)>;

// The two halves, from the normalized input h [batch * len, hidden] to what joins the residual
// stream: out = half(h), or out += half(h). h may be s.h, which is left as it is. Returns false if
// `tap` (attn_out or mlp_out) ended it; out is then untouched.
bool llama_attention(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View h,
                     View out, bool accumulate, const TapFn& tap);
bool llama_mlp(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View h, View out,
               bool accumulate, const TapFn& tap);

// x [batch * len, hidden] becomes the block's output in place (unless `tap` ended it).
void llama_block(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View x,
                 const TapFn& tap);

}  // namespace engine
