#include "eval/text_options.h"

#include <filesystem>

#include "engine/cmd/command.h"
#include "engine/core/args.h"

namespace engine {
namespace {

// The short names stand for the variants that GPTQ's code evaluates by default.
Dataset dataset_option(const std::string& name) {
  if (name == "ptb") return Dataset::ptb_old;
  if (name == "c4") return Dataset::c4_old;
  return dataset_from_name(name);
}

}  // namespace

void TextOptions::declare(CLI::App& app) {
  app_ = &app;
  app.add_option("--text", texts_,
                 "Text file, FILE.safetensors:TENSOR of token ids, or synthetic:COUNT; repeatable")
      ->required();
  app.add_option("--dataset", datasets_,
                 "How a text becomes one string: plain, wikitext2, ptb-old (= ptb), ptb-new, "
                 "c4-old (= c4), c4-new; once for all texts or once for each")
      ->default_str("plain");
  app.add_option("--seq", seq_, "Tokens per window")->capture_default_str();
  app.add_option("--limit", limit_, "At most so many windows per text; 0: all")
      ->capture_default_str();
  add_choice<BosPolicy>(app, "--bos", bos_,
                        {{"model", BosPolicy::model},
                         {"stream-start", BosPolicy::stream_start},
                         {"per-window", BosPolicy::per_window},
                         {"none", BosPolicy::none}},
                        "Where BOS stands; model: as the model's tokenizer says");
  app.add_option("--batch", batch_, "Windows at a time; 0: chosen from the device")
      ->capture_default_str();
  add_choice<Exec>(app, "--exec", exec_, {{"decoded", Exec::decoded}, {"packed", Exec::packed}},
                   "Hold packed linears decoded to dense matrices, or packed");
  add_choice<PackedKernel>(app, "--packed-kernel", kernel_,
                           {{"auto", PackedKernel::automatic},
                            {"vector", PackedKernel::vector},
                            {"matrix", PackedKernel::matrix},
                            {"expand", PackedKernel::expand}},
                           "How products with packed linears are computed (--exec packed)");
}

void TextOptions::check() const {
  if (seq_ < 2 || seq_ > (1 << 20)) {
    throw Error(ErrorCode::usage, "--seq: expected 2 to 1048576, found " + std::to_string(seq_));
  }
  if (limit_ < 0) {
    throw Error(ErrorCode::usage, "--limit: expected 0 or more, found " + std::to_string(limit_));
  }
  check_batch(batch_);
  if (!packed() && app_->get_option("--packed-kernel")->count() > 0) {
    throw Error(ErrorCode::usage,
                "--packed-kernel: expected with --exec packed, found --exec decoded");
  }
  if (datasets_.size() > 1 && datasets_.size() != texts_.size()) {
    throw Error(ErrorCode::usage, "--dataset: expected one, or one for each of the " +
                                      std::to_string(texts_.size()) + " texts, found " +
                                      std::to_string(datasets_.size()));
  }
}

TextWindows TextOptions::load(const WeightSource& source, const Tokenizer* tokenizer) const {
  TextWindows all;
  for (std::size_t i = 0; i < texts_.size(); ++i) {
    const std::string dataset = datasets_.empty()       ? "plain"
                                : datasets_.size() == 1 ? datasets_.front()
                                                        : datasets_[i];
    EvalWindows w = load_eval_windows({texts_[i], dataset_option(dataset)}, source, tokenizer, seq_,
                                      bos_, limit_);
    all.windows += w.tokens.windows;
    all.texts.push_back(std::move(w.tokens));
    all.protocols.push_back(std::move(w.protocol));
  }
  return all;
}

std::string TextOptions::label(std::size_t i) const {
  const std::string& text = texts_.at(i);
  return text.starts_with("synthetic:") ? text : std::filesystem::path(text).filename().string();
}

void TextOptions::describe_exec(Json& numerics) const {
  numerics["exec"] = packed() ? "packed" : "decoded";
  if (packed()) numerics["packed_kernel"] = app_->get_option("--packed-kernel")->as<std::string>();
}

}  // namespace engine
