// engine generate: text from a prompt, streamed, or token streams into a file.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/core/interrupt.h"
#include "engine/core/progress.h"
#include "engine/model/decoder.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

class GenerateCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "generate"; }
  [[nodiscard]] const char* summary() const override { return "Generate text from a prompt"; }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--model", model_, "Checkpoint directory, .qw file, or synthetic:NAME")
        ->required();
    app.add_option("--prompt", prompt_, "The text to continue; empty: from BOS alone");
    app.add_option("--max-tokens", max_tokens_, "Tokens to generate at most")
        ->capture_default_str();
    app.add_option("--temperature", sampling_.temperature, "0: greedy")->capture_default_str();
    app.add_option("--top-p", sampling_.top_p, "Sample among the likeliest tokens of this mass")
        ->capture_default_str();
    app.add_option("--seed", sampling_.seed, "Seed of the sampling")->capture_default_str();
    app.add_option("--samples", samples_, "Independent texts, with seeds seed, seed+1, ...")
        ->capture_default_str();
    app.add_option("--tokens-out", tokens_out_,
                   "Write all ids, prompt included, as I32 [samples, length] to this safetensors "
                   "file (tensor \"tokens\"; short samples are padded with -1)");
    app.add_option("--text-out", text_out_, "Write the texts to this file, one after another");
    app.add_flag("--ignore-eos", ignore_eos_, "Go on after an end-of-text token");
    app.add_flag("--plain-prompt", plain_,
                 "Names of special tokens in the prompt are ordinary text");
    device_.declare(app);
    device_.declare_dtype(app);
  }
  void run() override;

 private:
  void check() const;

  CLI::App* app_ = nullptr;
  std::string model_, prompt_, tokens_out_, text_out_;
  std::int64_t max_tokens_ = 128, samples_ = 1;
  SamplingOptions sampling_;
  bool ignore_eos_ = false, plain_ = false;
  DeviceOptions device_;
};

void GenerateCommand::check() const {
  if (max_tokens_ < 1 || max_tokens_ > (1 << 20)) {
    throw Error(ErrorCode::usage,
                "--max-tokens: expected 1 to 1048576, found " + std::to_string(max_tokens_));
  }
  if (!(sampling_.temperature >= 0 && sampling_.temperature <= 100)) {
    throw Error(ErrorCode::usage,
                "--temperature: expected 0 to 100, found " + std::to_string(sampling_.temperature));
  }
  if (!(sampling_.top_p > 0 && sampling_.top_p <= 1)) {
    throw Error(ErrorCode::usage, "--top-p: expected above 0 and at most 1, found " +
                                      std::to_string(sampling_.top_p));
  }
  if (samples_ < 1 || samples_ > (1 << 20)) {
    throw Error(ErrorCode::usage,
                "--samples: expected 1 to 1048576, found " + std::to_string(samples_));
  }
  if (!tokens_out_.empty()) check_writable("--tokens-out", tokens_out_);
  if (!text_out_.empty()) check_writable("--text-out", text_out_);
}

void GenerateCommand::run() {
  check();
  Report report("engine generate");
  report["options"] = parsed_options(*app_);
  const std::unique_ptr<WeightSource> source = open_model(model_);
  const ModelConfig& config = source->config();
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(*source);

  std::vector<std::int32_t> prompt;
  std::vector<std::int64_t> eos = config.eos;
  if (tokenizer) {
    if (tokenizer->adds_bos()) prompt.push_back(tokenizer->bos_id());
    const auto ids = tokenizer->encode(prompt_, plain_ ? SpecialText::plain : SpecialText::parse);
    prompt.insert(prompt.end(), ids.begin(), ids.end());
    eos.insert(eos.end(), tokenizer->eos_ids().begin(), tokenizer->eos_ids().end());
  } else if (config.bos >= 0) {
    prompt.push_back(static_cast<std::int32_t>(config.bos));
  }
  if (prompt.empty()) {
    throw Error(ErrorCode::usage, "--prompt: empty, and the model has no BOS token to start from");
  }
  const auto capacity = static_cast<std::int64_t>(prompt.size()) + max_tokens_;
  if (config.max_positions > 0 && capacity > config.max_positions) {
    throw Error(ErrorCode::usage, "--max-tokens: prompt and output would take " +
                                      std::to_string(capacity) + " positions, the model has " +
                                      std::to_string(config.max_positions));
  }

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  Ops& used = traced ? static_cast<Ops&>(*traced) : *ops;
  report.add_device(*ops);
  std::unique_ptr<Decoder> decoder;
  {
    const PhaseTimer timer(report, "load");
    decoder = std::make_unique<Decoder>(
        *source, used, ledger, device_.compute_dtype(*ops, source->linear_dtype()), capacity);
  }

  const bool stream = tokenizer != nullptr && samples_ == 1 && text_out_.empty();
  std::vector<std::vector<std::int32_t>> all;
  std::string texts;
  std::int64_t generated = 0;
  {
    std::optional<Progress> progress;  // not beside streamed text
    if (!stream) progress.emplace("generate", samples_);
    const PhaseTimer timer(report, "generate");
    for (std::int64_t s = 0; s < samples_; ++s) {
      SamplingOptions options = sampling_;
      options.seed += static_cast<std::uint64_t>(s);
      decoder->reset();
      std::vector<std::int32_t> tokens = prompt;
      std::span<const float> logits = decoder->feed(prompt);
      std::unique_ptr<StreamDecoder> text;
      if (tokenizer) text = std::make_unique<StreamDecoder>(*tokenizer);
      for (std::int64_t i = 0; i < max_tokens_; ++i) {
        check_interrupt();
        const std::int32_t id = sample_token(logits, options, static_cast<std::uint64_t>(i));
        tokens.push_back(id);
        ++generated;
        const bool ends = std::find(eos.begin(), eos.end(), id) != eos.end();
        if (ends && !ignore_eos_) break;
        if (text) {
          // A model's embedding may have rows beyond its tokenizer.
          const std::string piece = tokenizer->contains(id) ? text->push(id) : std::string();
          if (stream) {
            std::fwrite(piece.data(), 1, piece.size(), stdout);
            std::fflush(stdout);
          } else {
            texts += piece;
          }
        }
        if (i + 1 < max_tokens_) logits = decoder->feed({&id, 1});
      }
      if (text) {
        const std::string rest = text->flush();
        if (stream) {
          std::fwrite(rest.data(), 1, rest.size(), stdout);
        } else {
          texts += rest + "\n";
        }
      }
      all.push_back(std::move(tokens));
      if (progress) progress->advance(1);
    }
  }
  if (stream) std::fputs("\n\n", stdout);
  if (!text_out_.empty()) {
    write_file_atomically(text_out_, std::string_view(texts));
  } else if (!stream && tokenizer) {
    std::fwrite(texts.data(), 1, texts.size(), stdout);
  }
  if (!tokens_out_.empty()) {
    std::size_t longest = 0;
    for (const auto& t : all) longest = std::max(longest, t.size());
    for (auto& t : all) t.resize(longest, -1);
    SafetensorsWriter writer(
        tokens_out_,
        {{"tokens",
          TensorDType::i32,
          {static_cast<std::int64_t>(all.size()), static_cast<std::int64_t>(longest)}}});
    for (const auto& t : all) writer.append("tokens", std::as_bytes(std::span(t)));
    writer.commit();
  }
  const double seconds = report["time_s"]["generate"].get<double>();
  report["prompt_tokens"] = prompt.size();
  report["generated_tokens"] = generated;
  report["tokens_per_s"] = static_cast<double>(generated) / seconds;
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  if (!device_.report.empty()) report.write_json(device_.report);
  std::fprintf(stderr, "%lld tokens, %.1f token/s on %s\n", static_cast<long long>(generated),
               static_cast<double>(generated) / seconds, ops->info().name.c_str());
}

}  // namespace

std::unique_ptr<Command> make_generate_command() { return std::make_unique<GenerateCommand>(); }

}  // namespace engine
