// engine decode: a packed file back to a dense Hugging Face checkpoint directory.
#include <algorithm>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/core/args.h"
#include "engine/core/interrupt.h"
#include "engine/core/progress.h"
#include "engine/model/source.h"
#include "engine/ops/trace_ops.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

TensorDType tensor_dtype(DType d) {
  switch (d) {
    case DType::f32:
      return TensorDType::f32;
    case DType::f16:
      return TensorDType::f16;
    default:
      return TensorDType::bf16;
  }
}

// The output directory: unless keep() is called, it goes again with the files written into it, if
// it was not there before.
class NewDirectory {
 public:
  explicit NewDirectory(std::filesystem::path path) : path_(std::move(path)) {
    if (path_.empty()) throw Error(ErrorCode::usage, "--out: expected a directory, found nothing");
    std::error_code error;
    const std::filesystem::path parent =
        path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
    if (!std::filesystem::is_directory(parent, error)) {
      throw IoError(path_.string(), "cannot create the directory: no directory " + parent.string(),
                    0);
    }
    fresh_ = std::filesystem::create_directory(path_, error);
    if (error) throw IoError(path_.string(), "cannot create the directory", error.value());
  }
  ~NewDirectory() {
    if (kept_) return;
    std::error_code ignored;
    for (const std::filesystem::path& file : written_) std::filesystem::remove(file, ignored);
    if (fresh_) std::filesystem::remove(path_, ignored);  // only if it is empty
  }
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;

  void require_absent(const std::string& name) const {
    std::error_code error;
    if (std::filesystem::exists(path_ / name, error)) {
      throw Error(ErrorCode::usage,
                  path_.string() + ": already holds " + name + "; choose an empty directory");
    }
  }
  void write(const std::string& name, std::string_view text) {
    write_file_atomically(path_ / name, text);
    written_.push_back(path_ / name);
  }
  void keep() { kept_ = true; }

 private:
  std::filesystem::path path_;
  std::vector<std::filesystem::path> written_;
  bool fresh_ = false, kept_ = false;
};

class DecodeCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "decode"; }
  [[nodiscard]] const char* summary() const override {
    return "Write a packed model as a dense Hugging Face checkpoint";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--model", model_, "Packed .qw file, or any other model")->required();
    app.add_option("--out", out_, "Directory to create")->required();
    add_choice<DType>(app, "--out-dtype", dtype_,
                      {{"bf16", DType::bf16}, {"f16", DType::f16}, {"f32", DType::f32}},
                      "Dtype of the linears (f32 is exact; other tensors keep their own)");
    device_.declare(app);
  }
  void run() override;

 private:
  CLI::App* app_ = nullptr;
  std::string model_, out_;
  DType dtype_ = DType::bf16;
  DeviceOptions device_;
};

void DecodeCommand::run() {
  Report report("engine decode");
  report["options"] = parsed_options(*app_);
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  ModelConfig config = source->config();
  config.torch_dtype = tensor_dtype(dtype_);
  report["model"] = source->describe();

  // Declared in the order they will be written: block by block.
  std::vector<TensorDecl> tensors;
  const auto declare_dense = [&](const std::string& name) {
    const DenseInfo info = source->dense_info(name);
    const bool matrix = info.rows > 1;
    tensors.push_back({name == "lm_head.weight" ? name : "model." + name, tensor_dtype(info.dtype),
                       matrix ? std::vector<std::int64_t>{info.rows, info.cols}
                              : std::vector<std::int64_t>{info.cols}});
  };
  for (const std::string& name : dense_names(config)) declare_dense(name);
  for (std::int64_t i = 0; i < config.layers; ++i) {
    for (const Site s : all_sites) {
      const SiteShape shape = site_shape(config, s);
      tensors.push_back({"model." + linear_name(i, s) + ".weight",
                         tensor_dtype(dtype_),
                         {shape.rows, shape.cols}});
    }
  }

  Ledger ledger;
  const std::unique_ptr<Ops> backend = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*backend, true);
  Ops* const ops = traced ? &*traced : backend.get();
  report.add_device(*ops);
  const std::filesystem::path directory(out_);
  NewDirectory created(directory);
  ShardedCheckpointWriter writer(directory, tensors);
  created.require_absent("config.json");
  if (!source->tokenizer_name().empty()) created.require_absent(source->tokenizer_name());

  // One device matrix serves all linears.
  const auto widest = [&](Arena& arena) {
    std::int64_t count = 0;
    for (const Site s : all_sites) {
      const SiteShape shape = site_shape(config, s);
      count = std::max(count, shape.rows * shape.cols);
    }
    return arena.make(MemTag::weights, dtype_, 1, count);
  };
  const auto shaped = [&](const View& memory, Site s) {
    const SiteShape shape = site_shape(config, s);
    return make_view(memory.data, dtype_, ops->kind(), shape.rows, shape.cols);
  };
  Arena plan = Arena::measuring(ops->kind());
  {
    const View any = widest(plan);
    Loader loader(*ops, ledger, plan, config);
    for (const std::string& name : dense_names(config)) source->read_raw(name, loader, {});
    for (std::int64_t i = 0; i < config.layers; ++i) {
      for (const Site s : all_sites) source->load_linear(i, s, loader, shaped(any, s));
    }
  }
  Arena arena(ops->memory(), ledger, plan.peak());
  const View device = widest(arena);
  Loader loader(*ops, ledger, arena, config);

  Progress progress("decode", static_cast<std::int64_t>(tensors.size()));
  const auto host_bytes = [&](std::int64_t bytes) {
    return Buffer(host_memory(), ledger, MemTag::staging, DType::u8, 1, bytes);
  };
  const auto append = [&](const std::string& name, const Buffer& b) {
    writer.append(name, {static_cast<const std::byte*>(b.view().data),
                         static_cast<std::size_t>(b.view().count())});
    progress.advance(1, name);
  };
  for (const std::string& name : dense_names(config)) {
    check_interrupt();
    const DenseInfo info = source->dense_info(name);
    const Buffer raw =
        host_bytes(info.rows * info.cols * static_cast<std::int64_t>(dtype_bytes(info.dtype)));
    source->read_raw(
        name, loader,
        {static_cast<std::byte*>(raw.view().data), static_cast<std::size_t>(raw.view().count())});
    append(name == "lm_head.weight" ? name : "model." + name, raw);
  }
  for (std::int64_t i = 0; i < config.layers; ++i) {
    for (const Site s : all_sites) {
      check_interrupt();
      const View w = shaped(device, s);
      source->load_linear(i, s, loader, w);
      if (ops->count_nonfinite(w) != 0) {
        throw Error(ErrorCode::numeric, linear_name(i, s) + ": --out-dtype: expected values that " +
                                            dtype_name(dtype_) + " can hold, found larger ones");
      }
      const Buffer raw = host_bytes(w.bytes());
      ops->download(w, make_view(raw.view().data, dtype_, DeviceKind::cpu, w.rows, w.cols));
      append("model." + linear_name(i, s) + ".weight", raw);
    }
  }
  created.write("config.json", config_to_json(config));
  if (!source->tokenizer_name().empty()) {
    created.write(source->tokenizer_name(), source->tokenizer_bytes());
  }
  writer.commit();
  created.keep();
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  report["directory"] = out_;
  report["tensors"] = tensors.size();
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_decode_command() { return std::make_unique<DecodeCommand>(); }

}  // namespace engine
