// The LLaMA decoder as data and one readable function per block (llama_block.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "engine/core/memory.h"
#include "engine/model/config.h"
#include "engine/ops/ops.h"

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

// Dense weights of one block on the ops' device, all in the compute dtype.
struct BlockWeights {
  View attn_norm;                         // [1, hidden]
  View mlp_norm;                          // [1, hidden]
  std::array<View, site_count> linear{};  // [rows, cols] each
  [[nodiscard]] const View& operator[](Site s) const { return linear[static_cast<std::size_t>(s)]; }
};
BlockWeights make_block_weights(Arena& arena, const ModelConfig& config, DType dtype);

// Activations of one block for `rows` stacked tokens.
struct BlockScratch {
  View h, q, k, v, a, g, u, workspace;
};
BlockScratch make_block_scratch(Arena& arena, Ops& ops, const ModelConfig& config, DType dtype,
                                std::int64_t batch, std::int64_t q_len, std::int64_t kv_len);

// cos and sin of the rotary angles, f32 [positions, head_dim / 2], on the ops' device.
struct RopeTable {
  View cos;
  View sin;
};
RopeTable make_rope_table(Arena& arena, Ops& ops, const ModelConfig& config,
                          std::int64_t positions);

// Keys and values of one layer, [capacity, kv_heads * head_dim].
struct KvLayer {
  View k;
  View v;
};

struct BlockRun {
  Ops& ops;
  const ModelConfig& config;
  RopeTable rope;
  std::int64_t batch = 1;          // sequences stacked in x
  std::int64_t start = 0;          // position of each sequence's first row
  const KvLayer* cache = nullptr;  // null: whole sequences; else batch is 1 and rows are appended
};

// Called with each tap's input as it appears; returning false ends the block there.
using TapFn = std::function<bool(Tap, const View&)>;

// x [batch * len, hidden] becomes the block's output in place (unless `tap` ended it).
void llama_block(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View x,
                 const TapFn& tap);

}  // namespace engine
