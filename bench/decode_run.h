// The speed of prompts and decoding steps, against what the memory's bandwidth allows.
#pragma once

#include "bench/model_options.h"
#include "bench/timing.h"

namespace engine {

struct DecodeRun {
  std::int64_t prompt = 128, steps = 128;
  int repeat = 3;
  std::int64_t seed = 0;
};

// One flat row of figures for the decoder's batch:
// - prompt: median_, low_ and high_prefill_ms of `repeat` prompts, prefill_token_per_s of the
//   median.
// - steps, timed one by one between marks: p50_, p90_, p99_token_ms over all steps of all repeats.
// - steps, timed as one run without marks in between: median_, low_, high_step_ms (the run's time
//   divided by its steps), token_per_s of the median, over all sequences.
// - weight_bytes and kv_bytes that a step must read, the latter at the run's mean position;
//   gb_per_s by the median step; read_share and copy_share of the ceilings.
// - floor_ms = bytes / read ceiling, floor_token_per_s, floor_share = floor_ms / median_step_ms.
// Throws Error(numeric) if logits were not finite.
[[nodiscard]] Json measure_decoding(Decoder& decoder, Ops& ops, const DecodeRun& run,
                                    const Ceilings& ceilings);

// Rows of measure_decoding as a table.
[[nodiscard]] std::string decoding_table(const Json& rows);

}  // namespace engine
