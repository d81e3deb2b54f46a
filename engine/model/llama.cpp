#include "engine/model/llama.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace engine {

const char* site_name(Site site) {
  static constexpr const char* names[site_count] = {
      "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  return names[static_cast<std::size_t>(site)];
}

const char* tap_name(Tap tap) {
  static constexpr const char* names[tap_count] = {"attn_in", "attn_out", "mlp_in", "mlp_out"};
  return names[static_cast<std::size_t>(tap)];
}

Tap tap_of(Site site) {
  switch (site) {
    case Site::q:
    case Site::k:
    case Site::v:
      return Tap::attn_in;
    case Site::o:
      return Tap::attn_out;
    case Site::gate:
    case Site::up:
      return Tap::mlp_in;
    case Site::down:
      return Tap::mlp_out;
  }
  throw Error(ErrorCode::internal, "unknown site");
}

SiteShape site_shape(const ModelConfig& c, Site site) {
  const std::int64_t q_dim = c.heads * c.head_dim;
  const std::int64_t kv_dim = c.kv_heads * c.head_dim;
  switch (site) {
    case Site::q:
      return {q_dim, c.hidden};
    case Site::k:
    case Site::v:
      return {kv_dim, c.hidden};
    case Site::o:
      return {c.hidden, q_dim};
    case Site::gate:
    case Site::up:
      return {c.intermediate, c.hidden};
    case Site::down:
      return {c.hidden, c.intermediate};
  }
  throw Error(ErrorCode::internal, "unknown site");
}

std::int64_t tap_width(const ModelConfig& c, Tap tap) {
  switch (tap) {
    case Tap::attn_in:
    case Tap::mlp_in:
      return c.hidden;
    case Tap::attn_out:
      return c.heads * c.head_dim;
    case Tap::mlp_out:
      return c.intermediate;
  }
  throw Error(ErrorCode::internal, "unknown tap");
}

std::string linear_name(std::int64_t layer, Site site) {
  return "layers." + std::to_string(layer) + "." + site_name(site);
}

BlockWeights make_block_weights(Arena& arena, const ModelConfig& config, DType dtype) {
  BlockWeights w;
  w.attn_norm = arena.make(MemTag::weights, dtype, 1, config.hidden);
  w.mlp_norm = arena.make(MemTag::weights, dtype, 1, config.hidden);
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(config, s);
    w[s].dense = arena.make(MemTag::weights, dtype, shape.rows, shape.cols);
  }
  return w;
}

BlockScratch make_block_scratch(Arena& arena, Ops& ops, const ModelConfig& config, DType dtype,
                                std::int64_t batch, std::int64_t q_len, std::int64_t kv_len,
                                std::int64_t packed_bytes, std::int64_t kept) {
  const std::int64_t rows = batch * q_len;
  const std::int64_t q_dim = config.heads * config.head_dim;
  const std::int64_t kv_dim = config.kv_heads * config.head_dim;
  const auto make = [&](std::int64_t cols, std::int64_t more = 0) {
    return arena.make(MemTag::activations, dtype, rows + more, cols);
  };
  BlockScratch s;
  s.h = make(config.hidden);
  s.q = make(q_dim);
  s.k = make(kv_dim, kept);
  s.v = make(kv_dim, kept);
  s.a = make(q_dim);
  s.g = make(config.intermediate);
  s.u = make(config.intermediate);
  const AttnShape shape{config.heads, config.kv_heads, config.head_dim};
  s.workspace = arena.make(
      MemTag::workspace, DType::u8, 1,
      std::max(packed_bytes, ops.attention_workspace_bytes(shape, batch, q_len, kv_len)));
  return s;
}

std::int64_t packed_workspace_bytes(const Ops& ops, std::span<const PackedShape> shapes,
                                    std::int64_t rows, DType dtype, PackedKernel kernel) {
  std::int64_t bytes = 0;
  // Fewer rows may take another kernel, and so more.
  for (const PackedShape& shape : shapes) {
    for (std::int64_t m = 1; m <= rows; ++m) {
      bytes = std::max(bytes, ops.packed_workspace_bytes(shape, m, dtype, kernel));
    }
  }
  return bytes;
}

RopeTable make_rope_table(Arena& arena, Ops& ops, const ModelConfig& config,
                          std::int64_t positions) {
  const std::int64_t half = config.head_dim / 2;
  RopeTable table{arena.make(MemTag::weights, DType::f32, positions, half),
                  arena.make(MemTag::weights, DType::f32, positions, half)};
  if (arena.is_measuring()) return table;
  // Angles in f32 from integer positions, as the reference computes them.
  const std::vector<float> frequency = rope_inverse_frequencies(config);
  std::vector<float> cos(static_cast<std::size_t>(positions * half));
  std::vector<float> sin(cos.size());
  for (std::int64_t p = 0; p < positions; ++p) {
    for (std::int64_t j = 0; j < half; ++j) {
      const float angle = static_cast<float>(p) * frequency[static_cast<std::size_t>(j)];
      cos[static_cast<std::size_t>(p * half + j)] = std::cos(angle);
      sin[static_cast<std::size_t>(p * half + j)] = std::sin(angle);
    }
  }
  ops.upload(host_view(cos.data(), positions, half), table.cos);
  ops.upload(host_view(sin.data(), positions, half), table.sin);
  ops.synchronize();
  return table;
}

}  // namespace engine
