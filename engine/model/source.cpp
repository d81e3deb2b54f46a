#include "engine/model/source.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "engine/ops/rotation.h"

namespace engine {

Loader::Loader(Ops& ops, Ledger& ledger, Arena& arena, const ModelConfig& config)
    : ops_(ops), ledger_(ledger), arena_(arena) {
  // No tensor has more elements than the embedding or the widest linear, none more than 4 bytes.
  std::int64_t largest = config.vocab * config.hidden;
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(config, s);
    largest = std::max(largest, shape.rows * shape.cols);
  }
  piece_bytes_ = std::min(max_piece_bytes, largest * 4);
  scratch_ = arena.make(MemTag::staging, DType::u8, 2, piece_bytes_);
  if (!arena.is_measuring()) {
    staging_ = Buffer(ops.staging_memory(), ledger, MemTag::staging, DType::u8, 2, piece_bytes_);
  }
}

// A device that fails here has failed a call before, too.
Loader::~Loader() {
  for (const std::int64_t mark : stage_marks_) {
    try {
      if (mark >= 0) static_cast<void>(ops_.elapsed_ms(mark, mark));
    } catch (const Error&) {
    }
  }
}

void Loader::put(std::span<const std::byte> bytes, DType dtype, View out) {
  if (arena_.is_measuring()) return;
  const auto element = static_cast<std::int64_t>(dtype_bytes(dtype));
  REQUIRE(static_cast<std::int64_t>(bytes.size()) == out.count() * element,
          "source bytes do not match " + out.shape());
  const std::int64_t row_bytes = out.cols * element;
  REQUIRE(row_bytes > 0 && row_bytes <= piece_bytes_, "a row is larger than the staging buffer");
  const std::int64_t rows_per_piece = piece_bytes_ / row_bytes;
  // Two halves take turns, so that filling one overlaps the transfer of the other. The marks do not
  // outlive the call: a backend keeps a bounded number of them.
  std::int64_t marks[2] = {-1, -1};
  const auto wait_for = [&](int half) {
    if (marks[half] >= 0) static_cast<void>(ops_.elapsed_ms(marks[half], marks[half]));
  };
  int half = 0;
  for (std::int64_t r = 0; r < out.rows; r += rows_per_piece) {
    const std::int64_t n = std::min(rows_per_piece, out.rows - r);
    wait_for(half);
    std::byte* host =
        reinterpret_cast<std::byte*>(staging_.view().host<std::uint8_t>()) + half * piece_bytes_;
    std::memcpy(host, bytes.data() + r * row_bytes, static_cast<std::size_t>(n * row_bytes));
    const View from = make_view(host, dtype, DeviceKind::cpu, n, out.cols);
    const View to = out.row_range(r, n);
    if (dtype == out.dtype) {
      ops_.upload(from, to);
    } else {
      const View piece = make_view(static_cast<std::byte*>(scratch_.data) + half * piece_bytes_,
                                   dtype, ops_.kind(), n, out.cols);
      ops_.upload(from, piece);
      ops_.convert(piece, to);
    }
    marks[half] = ops_.mark();
    half ^= 1;
  }
  wait_for(0);
  wait_for(1);
}

std::byte* Loader::stage(std::int64_t bytes) {
  stage_ ^= 1U;
  if (stage_marks_[stage_] >= 0) {
    static_cast<void>(ops_.elapsed_ms(stage_marks_[stage_], stage_marks_[stage_]));
    stage_marks_[stage_] = -1;
  }
  Buffer& buffer = stages_[stage_];
  if (buffer.empty() || buffer.view().count() < bytes) {
    buffer = Buffer();  // gives back first
    buffer = Buffer(ops_.staging_memory(), ledger_, MemTag::staging, DType::u8, 1, bytes);
  }
  return reinterpret_cast<std::byte*>(buffer.view().host<std::uint8_t>());
}

void Loader::staged() { stage_marks_[stage_] = ops_.mark(); }

PackedWeight make_packed_weight(Arena& arena, const PackedLayout& layout) {
  const PackedShape& shape = layout.shape;
  PackedWeight w;
  w.shape = shape;
  w.records = arena.make(MemTag::weights, DType::u8, 1, shape.records_bytes());
  if (shape.row_unit_bytes() > 0) {
    w.row_units = arena.make(MemTag::weights, DType::u8, 1, shape.row_unit_bytes());
  }
  if (shape.kind == PackedKind::codebook) w.book = arena.make(MemTag::weights, DType::f32, 1, 16);
  if (layout.permuted) w.permutation = arena.make(MemTag::weights, DType::i32, 1, shape.cols);
  w.rotation = take_rotation(arena, MemTag::weights, shape);
  return w;
}

BlockWeights make_block_weights(Arena& arena, const WeightSource& source, std::int64_t layer,
                                DType dtype) {
  const ModelConfig& config = source.config();
  BlockWeights w;
  w.attn_norm = arena.make(MemTag::weights, dtype, 1, config.hidden);
  w.mlp_norm = arena.make(MemTag::weights, dtype, 1, config.hidden);
  for (const Site s : all_sites) {
    if (const auto layout = source.packed_layout(layer, s)) {
      w[s].packed = make_packed_weight(arena, *layout);
    } else {
      const SiteShape shape = site_shape(config, s);
      w[s].dense = arena.make(MemTag::weights, dtype, shape.rows, shape.cols);
    }
  }
  return w;
}

std::vector<PackedShape> packed_shapes(const WeightSource& source) {
  const auto fields = [](const PackedShape& s) {
    return std::tuple(s.rows, s.cols, s.kind, s.bits, s.group, s.scale_dtype, s.zeros,
                      s.width_blocks, s.salient, s.left, s.right, s.diagonal);
  };
  std::vector<PackedShape> shapes;
  for (std::int64_t layer = 0; layer < source.config().layers; ++layer) {
    for (const Site s : all_sites) {
      const auto layout = source.packed_layout(layer, s);
      if (!layout) continue;
      const bool known = std::any_of(shapes.begin(), shapes.end(), [&](const PackedShape& other) {
        return fields(other) == fields(layout->shape);
      });
      if (!known) shapes.push_back(layout->shape);
    }
  }
  return shapes;
}

void require_packed(const WeightSource& source) {
  if (!packed_shapes(source).empty()) return;
  throw Error(ErrorCode::usage,
              source.describe().value("name", std::string("the model")) +
                  ": expected packed linears, found only dense ones; use --exec decoded");
}

void WeightSource::load_packed(std::int64_t, std::span<const Site>, Loader&,
                               std::span<const PackedWeight>) {
  REQUIRE(false, "a source without packed linears");
}

std::vector<std::string> dense_names(const ModelConfig& config) {
  std::vector<std::string> names = {"embed_tokens.weight"};
  for (std::int64_t i = 0; i < config.layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    names.push_back(prefix + "input_layernorm.weight");
    names.push_back(prefix + "post_attention_layernorm.weight");
  }
  names.emplace_back("norm.weight");
  if (!config.tie_embeddings) names.emplace_back("lm_head.weight");
  return names;
}

namespace {

void check_finite(Loader& loader, const std::string& name, const View& v) {
  if (loader.arena().is_measuring()) return;
  const std::int64_t bad = loader.ops().count_nonfinite(v);
  if (bad != 0) {
    throw Error(ErrorCode::numeric, name + ": expected finite weights, found " +
                                        std::to_string(bad) + " NaN or infinite values");
  }
}

}  // namespace

void load_norms(WeightSource& source, std::int64_t layer, Loader& loader, const BlockWeights& out) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  source.load_dense(prefix + "input_layernorm.weight", loader, out.attn_norm);
  check_finite(loader, prefix + "input_layernorm.weight", out.attn_norm);
  source.load_dense(prefix + "post_attention_layernorm.weight", loader, out.mlp_norm);
  check_finite(loader, prefix + "post_attention_layernorm.weight", out.mlp_norm);
}

void load_linears(WeightSource& source, std::int64_t layer, Loader& loader,
                  const BlockWeights& out) {
  std::vector<Site> packed_sites;
  std::vector<PackedWeight> packed;
  for (const Site s : all_sites) {
    if (out[s].is_packed()) {
      packed_sites.push_back(s);
      packed.push_back(out[s].packed);
    } else {
      source.load_linear(layer, s, loader, out[s].dense);
      check_finite(loader, linear_name(layer, s), out[s].dense);
    }
  }
  if (!packed.empty()) source.load_packed(layer, packed_sites, loader, packed);
}

void load_block(WeightSource& source, std::int64_t layer, Loader& loader, const BlockWeights& out) {
  load_norms(source, layer, loader, out);
  load_linears(source, layer, loader, out);
}

std::unique_ptr<WeightSource> open_model(const std::string& model, int threads) {
  constexpr std::string_view synthetic = "synthetic:";
  if (model.starts_with(synthetic)) return open_synthetic(model.substr(synthetic.size()));
  const std::filesystem::path path(model);
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return open_checkpoint(path);
  if (std::filesystem::is_regular_file(path, error)) {
    if (path.extension() == ".safetensors" || path.extension() == ".json") {
      throw Error(ErrorCode::usage,
                  model +
                      ": expected a model directory, a .qw file or synthetic:NAME; give the "
                      "directory that holds this file");
    }
    return open_packed(path, threads);
  }
  throw Error(ErrorCode::io, model +
                                 ": no such file or directory (expected a model directory, a "
                                 ".qw file or synthetic:NAME)");
}

}  // namespace engine
