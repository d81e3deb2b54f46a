#include "bench/model_options.h"

#include "engine/core/args.h"
#include "engine/quant/calibration.h"

namespace engine {

void ModelOptions::declare(CLI::App& app, bool with_exec) {
  app.add_option("--model", model, "Checkpoint directory, .qw file, or synthetic:NAME")->required();
  if (with_exec) {
    add_choice<std::string>(app, "--exec", exec,
                            {{"auto", "auto"}, {"packed", "packed"}, {"decoded", "decoded"}},
                            "How quantized linears are held; auto: packed where they are");
  }
  auto* with_bits = app.add_option("--bits", bits,
                                   "Round the linears of a dense model to nearest, 1 to 8 bits, "
                                   "while it is loaded");
  app.add_option("--group", group, "With --bits: columns per scale; 0: one scale per row")
      ->capture_default_str()
      ->needs(with_bits);
  app.add_flag("--sym", symmetric, "With --bits: no stored zeros")->needs(with_bits);
  add_choice<DType>(app, "--scale-dtype", scale_dtype,
                    {{"f16", DType::f16}, {"bf16", DType::bf16}, {"f32", DType::f32}},
                    "With --bits: dtype of the scales")
      ->needs(with_bits);
  app.add_option("--kv", kv, "Bits of the cache of keys and values: 16 (the compute dtype) or 8")
      ->capture_default_str();
  app.add_flag("--no-graph", no_graph, "Queue every step anew instead of replaying a recording");
  declare_bench_device(app, device, true);
}

void ModelOptions::check() const {
  if (kv != 16 && kv != 8) {
    throw Error(ErrorCode::usage, "--kv: expected 16 or 8, found " + std::to_string(kv));
  }
  check_range("--bits", bits, 0, 8);
  check_range("--group", group, 0, 1 << 20);
}

std::unique_ptr<WeightSource> ModelOptions::open() const {
  std::unique_ptr<WeightSource> source = open_model(model, device.checked_threads());
  if (bits > 0 && source->describe()["kind"] == "packed") {
    throw Error(ErrorCode::usage, model + ": --bits: expected a dense model, found a packed one");
  }
  return source;
}

Exec ModelOptions::chosen_exec(const WeightSource& source) const {
  if (exec == "packed") return Exec::packed;
  if (exec == "decoded") return Exec::decoded;
  const bool packed = bits > 0 || source.describe()["kind"] == "packed";
  return packed ? Exec::packed : Exec::decoded;
}

DecoderOptions ModelOptions::decoder(const WeightSource& source, const Ops& ops, Exec how,
                                     std::int64_t batch, std::int64_t prompt,
                                     std::int64_t steps) const {
  const std::int64_t capacity = prompt + steps;
  const std::int64_t positions = source.config().max_positions;
  if (positions > 0 && capacity > positions) {
    throw Error(ErrorCode::usage, "--prompt and --steps take " + std::to_string(capacity) +
                                      " positions, the model has " + std::to_string(positions));
  }
  DecoderOptions o;
  o.dtype = device.compute_dtype(ops, source.linear_dtype());
  o.capacity = capacity;
  o.batch = batch;
  o.exec = how;
  o.kv8 = kv == 8;
  o.record = !no_graph;
  o.max_steps = steps + 1;  // the first token is sampled from the prompt
  if (bits > 0) {
    o.scheme = SchemeOptions{static_cast<int>(bits), group, symmetric, scale_dtype};
  }
  return o;
}

const char* exec_name(Exec exec) { return exec == Exec::packed ? "packed" : "decoded"; }

std::vector<std::int32_t> random_prompts(const ModelConfig& config, std::int64_t batch,
                                         std::int64_t len, std::int64_t seed) {
  return synthetic_tokens(batch * len, config.vocab, static_cast<std::uint64_t>(seed));
}

}  // namespace engine
