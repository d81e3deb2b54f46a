// A model of a published shape with weights from the counter RNG, made tensor by tensor on the
// device: time, memory and latency need nothing more.
#include <xxhash.h>

#include <cmath>

#include "engine/model/source.h"

namespace engine {
namespace {

class SyntheticSource final : public WeightSource {
 public:
  explicit SyntheticSource(const std::string& name)
      : name_(name), config_(synthetic_config(name)) {}

  [[nodiscard]] const ModelConfig& config() const override { return config_; }
  [[nodiscard]] Json describe() const override {
    Json j;
    j["kind"] = "synthetic";
    j["name"] = name_;
    j["rng"] = "philox4x32-10, seed 0, one stream per tensor name";
    return j;
  }
  [[nodiscard]] std::string tokenizer_bytes() const override { return {}; }
  [[nodiscard]] std::string tokenizer_name() const override { return {}; }

  [[nodiscard]] DenseInfo dense_info(const std::string& name) const override {
    if (name == "embed_tokens.weight" || name == "lm_head.weight") {
      return {DType::bf16, config_.vocab, config_.hidden};
    }
    return {DType::bf16, 1, config_.hidden};
  }
  void load_dense(const std::string& name, Loader& loader, View out) override {
    const bool norm = name.ends_with("norm.weight");
    make(name, loader, norm ? 0.05F : 0.02F, norm ? 1.0F : 0.0F, out);
  }
  void read_raw(const std::string& name, Loader& loader, std::span<std::byte> out) override {
    const DenseInfo info = dense_info(name);
    const Arena::Scope scope(loader.arena());
    const View device = loader.arena().make(MemTag::weights, info.dtype, info.rows, info.cols);
    load_dense(name, loader, device);
    if (loader.arena().is_measuring()) return;
    loader.ops().download(device,
                          make_view(out.data(), info.dtype, DeviceKind::cpu, info.rows, info.cols));
  }
  void load_linear(std::int64_t layer, Site site, Loader& loader, View out) override {
    // LLaMA's own initial spread; the two linears that write the residual stream get the usual
    // 1/sqrt(2 layers), so that activations stay of order one.
    float scale = 0.02F;
    if (site == Site::o || site == Site::down) {
      scale /= std::sqrt(2.0F * static_cast<float>(config_.layers));
    }
    make(linear_name(layer, site), loader, scale, 0.0F, out);
  }
  [[nodiscard]] DType linear_dtype() const override { return DType::bf16; }

 private:
  // Values are those of a bf16 checkpoint, whatever dtype they are asked in.
  static void make(const std::string& name, Loader& loader, float scale, float shift, View out) {
    Ops& ops = loader.ops();
    const std::uint64_t stream = XXH3_64bits(name.data(), name.size());
    const bool dry = loader.arena().is_measuring();
    if (out.dtype == DType::bf16) {
      if (!dry) ops.fill_bell(out, 0, stream, scale, shift);
      return;
    }
    const Arena::Scope scope(loader.arena());
    const View exact = loader.arena().make(MemTag::weights, DType::bf16, out.rows, out.cols);
    if (dry) return;
    ops.fill_bell(exact, 0, stream, scale, shift);
    ops.convert(exact, out);
  }

  std::string name_;
  ModelConfig config_;
};

}  // namespace

std::unique_ptr<WeightSource> open_synthetic(const std::string& name) {
  return std::make_unique<SyntheticSource>(name);
}

}  // namespace engine
