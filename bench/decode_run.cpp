#include "bench/decode_run.h"

#include <algorithm>

#include "engine/core/interrupt.h"

namespace engine {
namespace {

double elapsed(Ops& ops, std::int64_t from, std::int64_t to) {
  const double ms = ops.elapsed_ms(from, to);
  if (!(ms > 0)) throw Error(ErrorCode::numeric, "a clock that does not advance");
  return ms;
}

// The prompt, and its first sampled token. Returns the prompt's milliseconds.
double start(Decoder& decoder, Ops& ops, std::span<const std::int32_t> prompts) {
  check_interrupt();
  decoder.reset();
  ops.synchronize();
  const std::int64_t from = ops.mark();
  decoder.prefill(prompts);
  const std::int64_t to = ops.mark();
  decoder.sample();
  return elapsed(ops, from, to);
}

}  // namespace

Json measure_decoding(Decoder& decoder, Ops& ops, const DecodeRun& run, const Ceilings& ceilings) {
  const std::int64_t batch = decoder.batch();
  const std::vector<std::int32_t> prompts =
      random_prompts(decoder.config(), batch, run.prompt, run.seed);
  // Plans of the libraries, pages of fresh memory, and the recording, which the second step makes.
  const std::int64_t warm = std::min<std::int64_t>(run.steps, 4);
  for (std::int64_t done = 0; done < 2; done += warm) {
    static_cast<void>(start(decoder, ops, prompts));
    decoder.run_steps(warm);
    decoder.synchronize();
  }

  std::vector<double> prefill_ms, token_ms, step_ms;
  for (int r = 0; r < run.repeat; ++r) {
    prefill_ms.push_back(start(decoder, ops, prompts));
    ops.synchronize();
    const std::int64_t from = ops.mark();
    decoder.run_steps(run.steps);
    const std::int64_t to = ops.mark();
    step_ms.push_back(elapsed(ops, from, to) / static_cast<double>(run.steps));
  }
  for (int r = 0; r < run.repeat; ++r) {
    static_cast<void>(start(decoder, ops, prompts));
    ops.synchronize();
    std::vector<std::int64_t> marks = {ops.mark()};
    for (std::int64_t i = 0; i < run.steps; ++i) {
      decoder.run_steps(1);
      marks.push_back(ops.mark());
    }
    for (std::size_t i = 1; i < marks.size(); ++i) {
      token_ms.push_back(elapsed(ops, marks[i - 1], marks[i]));
    }
  }
  static_cast<void>(decoder.tokens(0, decoder.sampled()));  // throws for logits that are not finite

  Json row;
  row["batch"] = batch;
  row["repeats"] = run.repeat;
  const Spread prefill = spread_of(prefill_ms), step = spread_of(step_ms);
  add_spread(row, "prefill_ms", prefill);
  row["prefill_token_per_s"] = static_cast<double>(batch * run.prompt) / (prefill.median * 1e-3);
  row["p50_token_ms"] = percentile(token_ms, 0.50);
  row["p90_token_ms"] = percentile(token_ms, 0.90);
  row["p99_token_ms"] = percentile(token_ms, 0.99);
  add_spread(row, "step_ms", step);
  row["token_per_s"] = static_cast<double>(batch) / (step.median * 1e-3);
  const StepBytes bytes = decoder.step_bytes(run.prompt + (run.steps - 1) / 2);
  const auto total = static_cast<double>(bytes.total());
  const double rate = total / (step.median * 1e-3);
  const double floor_s = total / ceilings.read_bytes_per_s;
  row["weight_bytes"] = bytes.weights;
  row["kv_bytes"] = bytes.kv;
  row["gb_per_s"] = rate * 1e-9;
  row["read_share"] = rate / ceilings.read_bytes_per_s;
  row["copy_share"] = rate / ceilings.copy_bytes_per_s;
  row["floor_ms"] = floor_s * 1e3;
  row["floor_token_per_s"] = static_cast<double>(batch) / floor_s;
  row["floor_share"] = floor_s * 1e3 / step.median;
  return row;
}

std::string decoding_table(const Json& rows) {
  std::vector<std::vector<std::string>> cells = {
      {"batch", "prefill ms", "prefill token/s", "p50 ms", "p90 ms", "p99 ms", "step ms", "token/s",
       "MB per step", "GB/s", "of read", "of copy", "floor ms", "floor token/s"}};
  for (const Json& row : rows) {
    const auto number = [&](const char* key, int digits) {
      return fixed(row.at(key).get<double>(), digits);
    };
    const double bytes = row.at("weight_bytes").get<double>() + row.at("kv_bytes").get<double>();
    cells.push_back({number("batch", 0), number("median_prefill_ms", 3),
                     number("prefill_token_per_s", 0), number("p50_token_ms", 4),
                     number("p90_token_ms", 4), number("p99_token_ms", 4),
                     number("median_step_ms", 4), number("token_per_s", 1), fixed(bytes * 1e-6, 2),
                     number("gb_per_s", 1), percent(row.at("read_share").get<double>()),
                     percent(row.at("copy_share").get<double>()), number("floor_ms", 4),
                     number("floor_token_per_s", 1)});
  }
  return markdown_table(cells);
}

}  // namespace engine
