#include "engine/model/scheme.h"

#include "engine/model/packed_install.h"

namespace engine {

void check_scheme(const SchemeOptions& o, const ModelConfig& config) {
  if (o.bits < 1 || o.bits > 8) {
    throw Error(ErrorCode::usage, "bits: expected 1 to 8, found " + std::to_string(o.bits));
  }
  if (!(o.group == 0 || o.group == 32 || o.group == 64 ||
        (o.group > 0 && o.group % record_cols == 0))) {
    throw Error(ErrorCode::usage, "group: expected 0, 32, 64 or a multiple of " +
                                      std::to_string(record_cols) + ", found " +
                                      std::to_string(o.group));
  }
  for (const Site s : all_sites) {
    const std::int64_t cols = site_shape(config, s).cols;
    if (o.group != 0 && cols % o.group != 0) {
      throw Error(ErrorCode::usage, "group: expected a divisor of " + std::to_string(cols) +
                                        " (the inputs of " + site_name(s) + "), found " +
                                        std::to_string(o.group));
    }
  }
}

namespace {

class QuantizedOnLoad final : public WeightSource {
 public:
  QuantizedOnLoad(WeightSource& source, const SchemeOptions& options)
      : source_(source), grid_(options.grid()) {
    check_scheme(options, source.config());
  }

  [[nodiscard]] const ModelConfig& config() const override { return source_.config(); }
  [[nodiscard]] Json describe() const override {
    Json j = source_.describe();
    Json& q = j["quantized_on_load"];
    q["bits"] = grid_.bits;
    q["group"] = grid_.group;
    q["symmetric"] = grid_.symmetric;
    q["scale_dtype"] = dtype_name(grid_.scale_dtype);
    return j;
  }
  [[nodiscard]] std::string tokenizer_bytes() const override { return source_.tokenizer_bytes(); }
  [[nodiscard]] std::string tokenizer_name() const override { return source_.tokenizer_name(); }
  [[nodiscard]] DenseInfo dense_info(const std::string& name) const override {
    return source_.dense_info(name);
  }
  void load_dense(const std::string& name, Loader& loader, View out) override {
    source_.load_dense(name, loader, out);
  }
  void read_raw(const std::string& name, Loader& loader, std::span<std::byte> out) override {
    source_.read_raw(name, loader, out);
  }
  [[nodiscard]] DType linear_dtype() const override { return source_.linear_dtype(); }

  void load_linear(std::int64_t layer, Site site, Loader& loader, View out) override {
    const Arena::Scope scope(loader.arena());
    const Codes c = quantize(layer, site, loader);
    if (loader.arena().is_measuring()) return;
    loader.ops().dequantize_codes(c.codes, grid_, c.scales, c.zeros, View{}, View{}, out);
  }
  [[nodiscard]] std::optional<PackedLayout> packed_layout(std::int64_t, Site site) const override {
    const SiteShape site_extent = site_shape(config(), site);
    PackedShape shape;
    shape.rows = site_extent.rows;
    shape.cols = site_extent.cols;
    shape.bits = grid_.bits;
    shape.group = grid_.group == shape.cols ? 0 : grid_.group;
    shape.scale_dtype = grid_.scale_dtype;
    shape.zeros = !grid_.symmetric;
    return PackedLayout{shape, false};
  }
  void load_packed(std::int64_t layer, std::span<const Site> sites, Loader& loader,
                   std::span<const PackedWeight> out) override {
    for (std::size_t i = 0; i < sites.size(); ++i) {
      const Arena::Scope scope(loader.arena());
      const Codes c = quantize(layer, sites[i], loader);
      repack(loader, linear_name(layer, sites[i]), c.codes, c.scales,
             grid_.symmetric ? View{} : c.zeros, out[i]);
    }
  }

 private:
  struct Codes {
    View codes, scales, zeros;
  };
  // In the caller's scope.
  Codes quantize(std::int64_t layer, Site site, Loader& loader) {
    Arena& arena = loader.arena();
    const SiteShape shape = site_shape(config(), site);
    const std::int64_t groups = grid_.groups(shape.cols);
    const View w = arena.make(MemTag::staging, linear_dtype(), shape.rows, shape.cols);
    const Codes c{.codes = arena.make(MemTag::staging, DType::u8, shape.rows, shape.cols),
                  .scales = arena.make(MemTag::staging, DType::f32, shape.rows, groups),
                  .zeros = arena.make(MemTag::staging, DType::i32, shape.rows, groups)};
    source_.load_linear(layer, site, loader, w);
    if (arena.is_measuring()) return c;
    const std::int64_t bad = loader.ops().count_nonfinite(w);
    if (bad != 0) {
      throw Error(ErrorCode::numeric, linear_name(layer, site) +
                                          ": expected finite weights, found " +
                                          std::to_string(bad) + " NaN or infinite values");
    }
    loader.ops().find_grid(w, grid_, c.scales, c.zeros);
    loader.ops().quantize_codes(w, grid_, c.scales, c.zeros, View{}, c.codes);
    return c;
  }

  WeightSource& source_;
  GridSpec grid_;
};

}  // namespace

std::unique_ptr<WeightSource> quantize_on_load(WeightSource& source, const SchemeOptions& options) {
  return std::make_unique<QuantizedOnLoad>(source, options);
}

}  // namespace engine
