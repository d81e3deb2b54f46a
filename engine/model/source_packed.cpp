// A packed .qw file as a weight source: planes are read, verified and decoded on the device.
#include <algorithm>
#include <thread>

#include "engine/model/install.h"
#include "engine/model/packed_model.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

class PackedSource final : public WeightSource {
 public:
  explicit PackedSource(const std::filesystem::path& file)
      : reader_(file), model_(read_packed_model(reader_)) {}

  [[nodiscard]] const ModelConfig& config() const override { return model_.config; }
  [[nodiscard]] Json describe() const override {
    Json j;
    j["kind"] = "packed";
    j["name"] = std::filesystem::path(reader_.name()).filename().string();
    j["file_bytes"] = reader_.file_bytes();
    for (const char* key : {"method", "options", "source", "calibration", "bits"}) {
      if (model_.directory.contains(key)) j[key] = model_.directory[key];
    }
    return j;
  }
  [[nodiscard]] std::string tokenizer_bytes() const override {
    if (model_.tokenizer_name.empty()) return {};
    std::string bytes(reader_.planes()[model_.tokenizer_plane].raw_bytes, '\0');
    reader_.read_plane(model_.tokenizer_plane, std::as_writable_bytes(std::span(bytes)), threads_);
    return bytes;
  }
  [[nodiscard]] std::string tokenizer_name() const override { return model_.tokenizer_name; }

  [[nodiscard]] DenseInfo dense_info(const std::string& name) const override {
    return dense(name).info;
  }
  void load_dense(const std::string& name, Loader& loader, View out) override {
    const PackedDense& d = dense(name);
    if (loader.arena().is_measuring()) return;
    const Buffer bytes = read(loader, d.plane);
    loader.put(span_of(bytes), d.info.dtype, out);
    loader.ops().synchronize();
  }
  void read_raw(const std::string& name, Loader& loader, std::span<std::byte> out) override {
    if (loader.arena().is_measuring()) return;
    reader_.read_plane(dense(name).plane, out, threads_);
  }
  void load_linear(std::int64_t layer, Site site, Loader& loader, View out) override {
    const std::string name = linear_name(layer, site);
    const PackedLinear& linear = model_.linears.at(name);
    if (loader.arena().is_measuring()) {
      plan_install(linear.weight, name, loader.arena());
      return;
    }
    LinearWeight weight = linear.weight;
    std::vector<Buffer> bytes;
    for (std::size_t i = 0; i < linear.planes.size(); ++i) {
      bytes.push_back(read(loader, linear.planes[i]));
      weight.planes[i].data = bytes.back().view();
    }
    validate(weight, reader_.name(), "linears." + name);
    install_linear(weight, name, loader, out);
  }
  [[nodiscard]] DType linear_dtype() const override { return dense("norm.weight").info.dtype; }

 private:
  [[nodiscard]] const PackedDense& dense(const std::string& name) const {
    const auto it = model_.dense.find(
        name == "lm_head.weight" && model_.config.tie_embeddings ? "embed_tokens.weight" : name);
    REQUIRE(it != model_.dense.end(), name);
    return it->second;
  }
  [[nodiscard]] Buffer read(Loader& loader, std::uint32_t plane) const {
    Buffer bytes(host_memory(), loader.ledger(), MemTag::staging, DType::u8, 1,
                 static_cast<std::int64_t>(reader_.planes()[plane].raw_bytes));
    reader_.read_plane(plane,
                       {reinterpret_cast<std::byte*>(bytes.view().host<std::uint8_t>()),
                        static_cast<std::size_t>(bytes.view().count())},
                       threads_);
    return bytes;
  }
  static std::span<const std::byte> span_of(const Buffer& b) {
    return {reinterpret_cast<const std::byte*>(b.view().host<std::uint8_t>()),
            static_cast<std::size_t>(b.view().count())};
  }

  PackedReader reader_;
  PackedModel model_;
  unsigned threads_ = std::max(1U, std::thread::hardware_concurrency());
};

}  // namespace

std::unique_ptr<WeightSource> open_packed(const std::filesystem::path& file) {
  return std::make_unique<PackedSource>(file);
}

}  // namespace engine
