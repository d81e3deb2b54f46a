// engine generate: text from a prompt, streamed, or token streams into a file.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/core/args.h"
#include "engine/core/progress.h"
#include "engine/model/decoder.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

// Sequences that are generated at a time.
constexpr std::int64_t max_batch = 16;
// Steps between looks at what was sampled, when nobody reads along.
constexpr std::int64_t steps_per_look = 16;

// One text as it grows.
class Sample {
 public:
  // An empty `eos` never ends the text; a null tokenizer leaves only ids.
  Sample(const Tokenizer* tokenizer, std::span<const std::int64_t> eos)
      : tokenizer_(tokenizer), eos_(eos) {
    if (tokenizer != nullptr) decoder_ = std::make_unique<StreamDecoder>(*tokenizer);
  }
  [[nodiscard]] bool ended() const { return ended_; }
  [[nodiscard]] const std::vector<std::int32_t>& ids() const { return ids_; }
  [[nodiscard]] const std::string& text() const { return text_; }

  // Takes one token unless the text has ended. Returns what it adds to the text.
  std::string push(std::int32_t id) {
    if (ended_) return {};
    ids_.push_back(id);
    ended_ = std::find(eos_.begin(), eos_.end(), id) != eos_.end();
    // A model's embedding may have rows beyond its tokenizer.
    if (ended_ || !decoder_ || !tokenizer_->contains(id)) return {};
    return add(decoder_->push(id));
  }
  // What was held back of an unfinished character.
  std::string flush() { return decoder_ ? add(decoder_->flush()) : std::string(); }

 private:
  std::string add(std::string piece) {
    text_ += piece;
    return piece;
  }

  const Tokenizer* tokenizer_;
  std::span<const std::int64_t> eos_;
  std::unique_ptr<StreamDecoder> decoder_;
  std::vector<std::int32_t> ids_;
  std::string text_;
  bool ended_ = false;
};

void print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

enum class ExecChoice : std::uint8_t { automatic, packed, decoded };

class GenerateCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "generate"; }
  [[nodiscard]] const char* summary() const override { return "Generate text from a prompt"; }
  void declare(CLI::App& app, const std::vector<std::string>&) override;
  void run() override;

 private:
  void check() const;
  [[nodiscard]] std::vector<std::int32_t> prompt_ids(const ModelConfig& config,
                                                     const Tokenizer* tokenizer) const;
  [[nodiscard]] DecoderOptions decoder_options(const WeightSource& source, const Ops& ops) const;
  // Continues the prompt once for each sample; returns the seconds that the steps took and adds
  // their number to `steps`.
  double generate(Decoder& decoder, std::span<const std::int32_t> prompt, std::span<Sample> samples,
                  std::uint64_t seed, bool stream, std::int64_t& steps) const;
  void write_tokens(std::vector<std::vector<std::int32_t>> all) const;

  CLI::App* app_ = nullptr;
  std::string model_, prompt_, tokens_out_, text_out_;
  std::int64_t max_tokens_ = 128, samples_ = 1;
  double temperature_ = 0, top_p_ = 1;
  std::uint64_t seed_ = 0;
  ExecChoice exec_ = ExecChoice::automatic;
  bool kv8_ = false, no_graph_ = false;
  bool ignore_eos_ = false, plain_ = false;
  DeviceOptions device_;
};

void GenerateCommand::declare(CLI::App& app, const std::vector<std::string>&) {
  app_ = &app;
  app.add_option("--model", model_, "Checkpoint directory, .qw file, or synthetic:NAME")
      ->required();
  app.add_option("--prompt", prompt_, "The text to continue; empty: from BOS alone");
  app.add_option("--max-tokens", max_tokens_, "Tokens to generate at most")->capture_default_str();
  app.add_option("--temperature", temperature_, "0: greedy")->capture_default_str();
  app.add_option("--top-p", top_p_, "Sample among the likeliest tokens of this mass")
      ->capture_default_str();
  app.add_option("--seed", seed_, "Seed of the sampling")->capture_default_str();
  app.add_option("--samples", samples_,
                 "Independent texts, with seeds seed, seed+1, ...; up to 16 at a time")
      ->capture_default_str();
  add_choice<ExecChoice>(app, "--exec", exec_,
                         {{"auto", ExecChoice::automatic},
                          {"packed", ExecChoice::packed},
                          {"decoded", ExecChoice::decoded}},
                         "Hold packed linears packed, or decoded to dense matrices; auto: packed "
                         "for a .qw file on a GPU, else decoded");
  add_choice<bool>(app, "--kv", kv8_, {{"16", false}, {"8", true}},
                   "Bits of cached keys and values: 16 (--dtype), or 8 with a scale per head");
  app.add_flag("--no-graph", no_graph_, "Launch every kernel of a step instead of replaying it");
  app.add_option("--tokens-out", tokens_out_,
                 "Write all ids, prompt included, as I32 [samples, length] to this safetensors "
                 "file (tensor \"tokens\"; short samples are padded with -1)");
  app.add_option("--text-out", text_out_, "Write the texts to this file, one after another");
  app.add_flag("--ignore-eos", ignore_eos_, "Go on after an end-of-text token");
  app.add_flag("--plain-prompt", plain_, "Names of special tokens in the prompt are ordinary text");
  device_.declare(app);
  device_.declare_dtype(app);
}

void GenerateCommand::check() const {
  if (max_tokens_ < 1 || max_tokens_ > (1 << 20)) {
    throw Error(ErrorCode::usage,
                "--max-tokens: expected 1 to 1048576, found " + std::to_string(max_tokens_));
  }
  if (!(temperature_ >= 0 && temperature_ <= 100)) {
    throw Error(ErrorCode::usage,
                "--temperature: expected 0 to 100, found " + std::to_string(temperature_));
  }
  if (!(top_p_ > 0 && top_p_ <= 1)) {
    throw Error(ErrorCode::usage,
                "--top-p: expected above 0 and at most 1, found " + std::to_string(top_p_));
  }
  if (samples_ < 1 || samples_ > (1 << 20)) {
    throw Error(ErrorCode::usage,
                "--samples: expected 1 to 1048576, found " + std::to_string(samples_));
  }
  if (!tokens_out_.empty()) check_writable("--tokens-out", tokens_out_);
  if (!text_out_.empty()) check_writable("--text-out", text_out_);
}

std::vector<std::int32_t> GenerateCommand::prompt_ids(const ModelConfig& config,
                                                      const Tokenizer* tokenizer) const {
  std::vector<std::int32_t> prompt;
  if (tokenizer != nullptr) {
    if (tokenizer->adds_bos()) prompt.push_back(tokenizer->bos_id());
    const auto ids = tokenizer->encode(prompt_, plain_ ? SpecialText::plain : SpecialText::parse);
    prompt.insert(prompt.end(), ids.begin(), ids.end());
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
  return prompt;
}

DecoderOptions GenerateCommand::decoder_options(const WeightSource& source, const Ops& ops) const {
  DecoderOptions o;
  o.dtype = device_.compute_dtype(ops, source.linear_dtype());
  o.batch = std::min(samples_, max_batch);
  o.kv8 = kv8_;
  o.record = !no_graph_;
  o.max_steps = max_tokens_;
  // Dense matrices are what the CPU is quick at. On a GPU, a scheme without a packed kernel is an
  // error that says what to do, not a slower run.
  const bool packed = exec_ == ExecChoice::packed ||
                      (exec_ == ExecChoice::automatic && ops.kind() == DeviceKind::cuda &&
                       !packed_shapes(source).empty());
  o.exec = packed ? Exec::packed : Exec::decoded;
  return o;
}

void GenerateCommand::write_tokens(std::vector<std::vector<std::int32_t>> all) const {
  std::size_t longest = 0;
  for (const auto& t : all) longest = std::max(longest, t.size());
  for (auto& t : all) t.resize(longest, -1);
  SafetensorsWriter writer(
      tokens_out_, {{"tokens",
                     TensorDType::i32,
                     {static_cast<std::int64_t>(all.size()), static_cast<std::int64_t>(longest)}}});
  for (const auto& t : all) writer.append("tokens", std::as_bytes(std::span(t)));
  writer.commit();
}

double GenerateCommand::generate(Decoder& decoder, std::span<const std::int32_t> prompt,
                                 std::span<Sample> samples, std::uint64_t seed, bool stream,
                                 std::int64_t& steps) const {
  const auto take = [&](std::int64_t first, std::int64_t count) {
    const std::vector<std::int32_t> ids = decoder.tokens(first, count);
    for (std::size_t b = 0; b < samples.size(); ++b) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
        const std::string piece = samples[b].push(ids[b * static_cast<std::size_t>(count) + i]);
        if (stream) print(piece);
      }
    }
  };
  decoder.reset({.temperature = static_cast<float>(temperature_),
                 .top_p = std::max(static_cast<float>(top_p_), std::numeric_limits<float>::min()),
                 .seed = seed});
  decoder.prefill_shared(prompt);
  decoder.sample();
  take(0, 1);
  const auto start = std::chrono::steady_clock::now();
  const auto ended = [](const Sample& s) { return s.ended(); };
  while (decoder.sampled() < max_tokens_ && !std::all_of(samples.begin(), samples.end(), ended)) {
    const std::int64_t first = decoder.sampled();
    const std::int64_t count = std::min(stream ? 1 : steps_per_look, max_tokens_ - first);
    decoder.run_steps(count);
    take(first, count);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  steps += decoder.sampled() - 1;
  for (Sample& s : samples) {
    const std::string rest = s.flush();
    if (stream) print(rest);
  }
  return took.count();
}

void GenerateCommand::run() {
  check();
  Report report("engine generate");
  report["options"] = parsed_options(*app_);
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  const ModelConfig& config = source->config();
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(*source);
  const std::vector<std::int32_t> prompt = prompt_ids(config, tokenizer.get());
  std::vector<std::int64_t> eos;
  if (!ignore_eos_) {
    eos = config.eos;
    if (tokenizer) eos.insert(eos.end(), tokenizer->eos_ids().begin(), tokenizer->eos_ids().end());
  }

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  report.add_device(*ops);
  DecoderOptions options = decoder_options(*source, *ops);
  options.capacity = static_cast<std::int64_t>(prompt.size()) + max_tokens_;
  std::unique_ptr<Decoder> decoder;
  {
    const PhaseTimer timer(report, "load");
    decoder = std::make_unique<Decoder>(*source, traced ? static_cast<Ops&>(*traced) : *ops, ledger,
                                        options);
  }

  const bool stream = tokenizer != nullptr && samples_ == 1 && text_out_.empty();
  std::vector<std::vector<std::int32_t>> all;
  std::string texts;
  std::int64_t generated = 0, steps = 0;
  double step_seconds = 0;
  {
    std::optional<Progress> progress;  // not beside streamed text
    if (!stream) progress.emplace("generate", samples_);
    const PhaseTimer timer(report, "generate");
    for (std::int64_t first = 0; first < samples_; first += options.batch) {
      // The batch stays as large for the last samples; what is beyond them is left out.
      const std::int64_t count = std::min(options.batch, samples_ - first);
      std::vector<Sample> samples;
      for (std::int64_t b = 0; b < count; ++b) samples.emplace_back(tokenizer.get(), eos);
      step_seconds += generate(*decoder, prompt, samples, seed_ + static_cast<std::uint64_t>(first),
                               stream, steps);
      for (const Sample& s : samples) {
        std::vector<std::int32_t>& ids = all.emplace_back(prompt);
        ids.insert(ids.end(), s.ids().begin(), s.ids().end());
        generated += static_cast<std::int64_t>(s.ids().size());
        texts += s.text() + "\n";
      }
      if (progress) progress->advance(count);
    }
  }
  if (stream) std::fputs("\n\n", stdout);
  if (!text_out_.empty()) {
    write_file_atomically(text_out_, std::string_view(texts));
  } else if (!stream && tokenizer) {
    std::fwrite(texts.data(), 1, texts.size(), stdout);
  }
  if (!tokens_out_.empty()) write_tokens(std::move(all));

  const double seconds = report["time_s"]["generate"].get<double>();
  report["exec"] = options.exec == Exec::packed ? "packed" : "decoded";
  report["kv_bits"] = kv8_ ? std::size_t{8} : 8 * dtype_bytes(options.dtype);
  report["graph"] = decoder->records();
  report["batch"] = options.batch;
  report["weight_bytes"] = decoder->weight_bytes();
  report["kv_bytes"] = decoder->kv_bytes();
  report["prompt_tokens"] = prompt.size();
  report["generated_tokens"] = generated;
  report["tokens_per_s"] = static_cast<double>(generated) / seconds;
  report["steps"] = steps;
  // Of the steps alone: the first token of each sample comes with the prompt. A step that ran for
  // samples that had ended, or beyond an end, counts with its time but not with a token.
  const std::int64_t stepped = generated - samples_;
  if (stepped > 0) report["step_tokens_per_s"] = static_cast<double>(stepped) / step_seconds;
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  if (!device_.report.empty()) report.write_json(device_.report);
  std::fprintf(stderr, "%lld tokens, %.1f token/s", static_cast<long long>(generated),
               static_cast<double>(generated) / seconds);
  if (stepped > 0) {
    std::fprintf(stderr, " (steps alone: %.1f)", static_cast<double>(stepped) / step_seconds);
  }
  std::fprintf(stderr, " on %s, %s weights of %s, %s\n", ops->info().name.c_str(),
               options.exec == Exec::packed ? "packed" : "dense",
               human_bytes(decoder->weight_bytes()).c_str(),
               decoder->records() ? "replayed steps" : "launched steps");
}

}  // namespace

std::unique_ptr<Command> make_generate_command() { return std::make_unique<GenerateCommand>(); }

}  // namespace engine
