// engine decode: a packed file back to a dense Hugging Face checkpoint directory.
#include "engine/cmd/commands.h"
#include "engine/core/args.h"
#include "engine/core/interrupt.h"
#include "engine/core/progress.h"
#include "engine/model/source.h"
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
  const std::unique_ptr<WeightSource> source = open_model(model_);
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
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  report.add_device(*ops);
  const std::filesystem::path directory(out_);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw IoError(out_, "cannot create the directory", error.value());
  ShardedCheckpointWriter writer(directory, tensors);

  const auto widest = [&](Arena& arena) {
    View widest_view;
    for (const Site s : all_sites) {
      const SiteShape shape = site_shape(config, s);
      if (shape.rows * shape.cols > widest_view.count()) {
        widest_view = make_view(nullptr, dtype_, ops->kind(), shape.rows, shape.cols);
      }
    }
    return arena.make(MemTag::weights, dtype_, 1, widest_view.count());
  };
  Arena plan = Arena::measuring(ops->kind());
  widest(plan);
  static_cast<void>(Loader(*ops, ledger, plan));
  source->plan_load(plan);
  Arena arena(ops->memory(), ledger, plan.peak());
  const View device = widest(arena);
  Loader loader(*ops, ledger, arena);

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
      const SiteShape shape = site_shape(config, s);
      const View w = make_view(device.data, dtype_, ops->kind(), shape.rows, shape.cols);
      source->load_linear(i, s, loader, w);
      const Buffer raw = host_bytes(w.bytes());
      ops->download(w, make_view(raw.view().data, dtype_, DeviceKind::cpu, shape.rows, shape.cols));
      append("model." + linear_name(i, s) + ".weight", raw);
    }
  }
  write_file_atomically(directory / "config.json", std::string_view(config_to_json(config)));
  if (!source->tokenizer_name().empty()) {
    write_file_atomically(directory / source->tokenizer_name(),
                          std::string_view(source->tokenizer_bytes()));
  }
  writer.commit();
  report.add_ledger(ledger);
  report["directory"] = out_;
  report["tensors"] = tensors.size();
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_decode_command() { return std::make_unique<DecodeCommand>(); }

}  // namespace engine
