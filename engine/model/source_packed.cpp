// A packed .qw file as a weight source: planes are read, verified and decoded (install.h).
#include <algorithm>
#include <thread>

#include "engine/core/parallel.h"
#include "engine/model/install.h"
#include "engine/model/packed_install.h"
#include "engine/model/packed_model.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

// Of packed planes at a time; a block of an 8B model in four bits fits.
constexpr std::int64_t max_stage_bytes = 160 << 20;

class PackedSource final : public WeightSource {
 public:
  PackedSource(const std::filesystem::path& file, int threads)
      : reader_(file),
        model_(read_packed_model(reader_)),
        threads_(threads > 0 ? static_cast<unsigned>(threads)
                             : std::max(1U, std::thread::hardware_concurrency())) {}

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
      plan_install(linear.weight, loader.arena());
      return;
    }
    LinearWeight weight = linear.weight;
    std::vector<Buffer> bytes;
    for (std::size_t i = 0; i < linear.planes.size(); ++i) {
      bytes.push_back(read(loader, linear.planes[i]));
      weight.planes[i].data = bytes.back().view();
    }
    validate(weight, reader_.name(), "linears." + name);
    install_linear(weight, name, loader, out, static_cast<int>(threads_));
  }
  [[nodiscard]] std::optional<PackedLayout> packed_layout(std::int64_t layer,
                                                          Site site) const override {
    const std::string name = linear_name(layer, site);
    return packed_layout_of(model_.linears.at(name).weight, name);
  }
  void load_packed(std::int64_t layer, std::span<const Site> sites, Loader& loader,
                   std::span<const PackedWeight> out) override {
    // As many linears at a time as fit a stage, at least one: their planes are decoded side by
    // side. What follows is only queued, so unless the caller waits in between (load_norms() does)
    // the device works on one stage while the next is decoded.
    for (std::size_t first = 0; first < sites.size();) {
      std::vector<StagedLinear> staged;
      std::int64_t bytes = 0;
      while (first + staged.size() < sites.size()) {
        const std::string name = linear_name(layer, sites[first + staged.size()]);
        StagedLinear next = stage_layout(model_.linears.at(name).weight, name);
        if (!staged.empty() && bytes + next.bytes > max_stage_bytes) break;
        bytes += next.bytes;
        staged.push_back(std::move(next));
      }
      std::byte* base = nullptr;
      if (!loader.arena().is_measuring()) {
        base = loader.stage(bytes);
        fill_stage(staged, base);
      }
      std::int64_t at = 0;
      for (std::size_t i = 0; i < staged.size(); ++i) {
        install_packed(staged[i], base == nullptr ? nullptr : base + at, loader, out[first + i]);
        at += staged[i].bytes;
      }
      if (base != nullptr) loader.staged();
      first += staged.size();
    }
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
  // Decodes and checks the planes of all these linears at once, one after another from `base`.
  void fill_stage(std::span<const StagedLinear> staged, std::byte* base) {
    struct Task {
      std::uint32_t plane;
      std::byte* to;
    };
    std::vector<Task> tasks;
    std::vector<std::byte*> bases;
    for (const StagedLinear& s : staged) {
      const std::vector<std::uint32_t>& planes = model_.linears.at(s.name).planes;
      for (std::size_t i = 0; i < planes.size(); ++i) {
        tasks.push_back({planes[i], base + s.plane[i]});
      }
      bases.push_back(base);
      base += s.bytes;
    }
    // The largest first: the last to end decides how long it takes.
    const auto size = [&](const Task& t) { return reader_.planes()[t.plane].raw_bytes; };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const Task& a, const Task& b) { return size(a) > size(b); });
    if (!pool_) pool_ = std::make_unique<ThreadPool>(static_cast<int>(threads_));
    pool_->run(static_cast<std::int64_t>(tasks.size()), 1, [&](std::int64_t i, std::int64_t) {
      const Task& task = tasks[static_cast<std::size_t>(i)];
      const PlaneInfo& info = reader_.planes()[task.plane];
      const auto chunks = static_cast<unsigned>(std::max<std::size_t>(info.chunks.size(), 1));
      reader_.read_plane(task.plane, {task.to, static_cast<std::size_t>(info.raw_bytes)},
                         std::min(threads_, chunks));
    });
    pool_->run(static_cast<std::int64_t>(staged.size()), 1, [&](std::int64_t i, std::int64_t) {
      const auto index = static_cast<std::size_t>(i);
      const StagedLinear& s = staged[index];
      validate(staged_weight(s, bases[index]), reader_.name(), "linears." + s.name);
      prepare_staged(s, bases[index]);
    });
    struct Build {
      std::size_t index;
      std::int64_t first, last;
    };
    std::vector<Build> builds;
    for (std::size_t i = 0; i < staged.size(); ++i) {
      constexpr std::int64_t step = 16;  // row tiles
      for (std::int64_t t = 0; t < build_tiles(staged[i]); t += step) {
        builds.push_back({i, t, std::min(t + step, build_tiles(staged[i]))});
      }
    }
    pool_->run(static_cast<std::int64_t>(builds.size()), 1, [&](std::int64_t i, std::int64_t) {
      const Build& b = builds[static_cast<std::size_t>(i)];
      build_staged(staged[b.index], bases[b.index], b.first, b.last);
    });
  }
  static std::span<const std::byte> span_of(const Buffer& b) {
    return {reinterpret_cast<const std::byte*>(b.view().host<std::uint8_t>()),
            static_cast<std::size_t>(b.view().count())};
  }

  PackedReader reader_;
  PackedModel model_;
  unsigned threads_;
  std::unique_ptr<ThreadPool> pool_;  // made for the first packed block
};

}  // namespace

std::unique_ptr<WeightSource> open_packed(const std::filesystem::path& file, int threads) {
  return std::make_unique<PackedSource>(file, threads);
}

}  // namespace engine
