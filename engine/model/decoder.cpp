#include "engine/model/decoder.h"

#include <algorithm>
#include <cmath>

#include "engine/core/interrupt.h"
#include "engine/model/stream.h"

namespace engine {
namespace {

constexpr std::int64_t steps_between_checks = 16;  // for Ctrl-C

bool same(const SampleOptions& a, const SampleOptions& b) {
  return a.temperature == b.temperature && a.top_p == b.top_p && a.seed == b.seed;
}

[[noreturn]] void no_room(const char* what, std::int64_t expected, std::int64_t found) {
  throw Error(ErrorCode::usage, std::string(what) + ": expected at most " +
                                    std::to_string(expected) + " tokens, found " +
                                    std::to_string(found));
}

}  // namespace

void Decoder::reset(const SampleOptions& sampling) {
  ops_.synchronize();
  // A recording holds the options of its sampling.
  if (!same(sampling, sampling_)) recording_.reset();
  sampling_ = sampling;
  position_ = 0;
  sampled_ = 0;
  fed_ = false;
  ops_.zero(state_.step);
  ops_.zero(state_.bad);
}

void Decoder::require_room(std::int64_t count) const {
  if (position_ + count > options_.capacity) {
    no_room("the context is full", options_.capacity, position_ + count);
  }
}

void Decoder::start_feed(std::span<const std::int32_t> ids, std::int64_t len) {
  REQUIRE(len > 0, "no tokens");
  check_tokens(ids, config(), "prompt");
  require_room(len);
  ops_.synchronize();  // the buffers below may still be on their way
  host_ids_.assign(ids.begin(), ids.end());
  // Sampling advances the position, so it stands at the last token fed.
  host_position_ = static_cast<std::int32_t>(position_ + len - 1);
  ops_.upload(host_view(&host_position_, 1, 1), state_.position);
}

void Decoder::finish_feed(std::int64_t len) {
  position_ += len;
  fed_ = true;
  ops_.norm_linear({.x = last_,
                    .norm = final_norm_,
                    .eps = static_cast<float>(config().rms_eps),
                    .w = &head_,
                    .out = logits_,
                    .scratch = {.h = scratch_.h,
                                .k = scratch_.k,
                                .v = scratch_.v,
                                .u = scratch_.u,
                                .workspace = scratch_.workspace}});
}

View Decoder::forward(const std::int32_t* ids, std::int64_t first, std::int64_t n, std::int64_t len,
                      std::int64_t start) {
  const View x = x_.row_range(0, n * len);
  const View device_ids = ids_.row_range(0, n * len);
  ops_.upload(host_view(ids, n * len, 1), device_ids);
  ops_.embed(device_ids, embedding_, x);
  BlockRun run{.ops = ops_,
               .config = config(),
               .rope = rope_,
               .batch = n,
               .start = start,
               .first = first,
               .kernel = options_.kernel};
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    run.cache = &cache_[i];
    llama_block(run, blocks_[i], scratch_, x, {});
  }
  return x;
}

void Decoder::prompt(std::int64_t n, std::int64_t len) {
  const std::int64_t rows = rows_per_pass();
  const std::int64_t sequences = std::max<std::int64_t>(1, rows / len);
  for (std::int64_t s = 0; s < n; s += sequences) {
    const std::int64_t count = std::min(sequences, n - s);
    for (std::int64_t t = 0; t < len; t += rows) {
      check_interrupt();
      const std::int64_t part = std::min(rows, len - t);
      View tail = forward(host_ids_.data() + s * len + t, s, count, part, position_ + t)
                      .row_range(part - 1, 1);
      if (t + part < len) continue;
      // The last row of each sequence.
      tail.rows = count;
      tail.stride *= part;
      ops_.copy(tail, last_.row_range(s, count));
    }
  }
}

void Decoder::prefill(std::span<const std::int32_t> tokens) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  REQUIRE(count % options_.batch == 0, "sequences of different lengths");
  const std::int64_t len = count / options_.batch;
  start_feed(tokens, len);
  prompt(options_.batch, len);
  finish_feed(len);
}

void Decoder::prefill_shared(std::span<const std::int32_t> tokens) {
  const auto len = static_cast<std::int64_t>(tokens.size());
  start_feed(tokens, len);
  prompt(1, len);
  for (std::int64_t b = 1; b < options_.batch; ++b) {
    for (const KvCache& cache : cache_) {
      for (const View& v : {cache.k, cache.v, cache.k_scale, cache.v_scale}) {
        if (v.empty()) continue;
        ops_.copy(v.row_range(position_, len), v.row_range(b * options_.capacity + position_, len));
      }
    }
    ops_.copy(last_.row_range(0, 1), last_.row_range(b, 1));
  }
  finish_feed(len);
}

void Decoder::sample() {
  REQUIRE(fed_, "nothing to sample from");
  if (sampled_ >= options_.max_steps) no_room("sampled", options_.max_steps, sampled_ + 1);
  ops_.sample_step(logits_, sampling_, state_, sample_workspace_);
  ++sampled_;
  fed_ = false;
}

bool Decoder::records() const { return options_.record && ops_.can_record(); }

void Decoder::step() {
  const LlamaStep step{.ops = ops_,
                       .config = config(),
                       .embedding = embedding_,
                       .final_norm = final_norm_,
                       .head = head_,
                       .blocks = blocks_,
                       .cache = cache_,
                       .rope = rope_,
                       .scratch = scratch_,
                       .x = x_.row_range(0, options_.batch),
                       .logits = logits_,
                       .attention_workspace = step_workspace_,
                       .sample_workspace = sample_workspace_,
                       .sampling = sampling_,
                       .state = state_};
  if (!records() || !stepped_) {
    llama_step(step);
    stepped_ = true;
  } else {
    if (!recording_) recording_ = ops_.record([&] { llama_step(step); });
    ops_.replay(*recording_);
  }
  ++position_;
  ++sampled_;
}

void Decoder::run_steps(std::int64_t n) {
  REQUIRE(n >= 0, "a negative number of steps");
  REQUIRE(n == 0 || (sampled_ > 0 && !fed_), "no sampled token to feed");
  require_room(n);
  if (sampled_ + n > options_.max_steps) no_room("sampled", options_.max_steps, sampled_ + n);
  for (std::int64_t i = 0; i < n; ++i) {
    if (i % steps_between_checks == 0) check_interrupt();
    step();
  }
}

void Decoder::synchronize() { ops_.synchronize(); }

std::vector<std::int32_t> Decoder::tokens(std::int64_t first, std::int64_t count) {
  REQUIRE(first >= 0 && count >= 0 && first + count <= sampled_, "tokens not sampled yet");
  std::vector<std::int32_t> out(static_cast<std::size_t>(options_.batch * count));
  std::int32_t bad = 0;
  ops_.download(state_.bad, host_view(&bad, 1, 1));
  if (bad != 0) {
    throw Error(ErrorCode::numeric, "sampling: expected finite logits, found NaN or infinity in " +
                                        std::to_string(bad) + " rows");
  }
  if (count > 0) {
    ops_.download(state_.history.col_range(first, count),
                  host_view(out.data(), options_.batch, count));
  }
  return out;
}

std::span<const float> Decoder::logits() {
  REQUIRE(position_ > 0, "no tokens were fed");
  ops_.download(logits_, host_view(host_logits_.data(), options_.batch, config().vocab));
  for (const float v : host_logits_) {
    if (!std::isfinite(v)) {
      throw Error(ErrorCode::numeric, "position " + std::to_string(position_ - 1) +
                                          ": expected finite logits, found NaN or infinity");
    }
  }
  return host_logits_;
}

std::span<const float> Decoder::feed(std::span<const std::int32_t> tokens) {
  prefill(tokens);
  return logits();
}

std::vector<float> Decoder::feed_all_logits(std::span<const std::int32_t> tokens) {
  const auto len = static_cast<std::int64_t>(tokens.size());
  REQUIRE(options_.batch == 1 && len <= rows_per_pass(), "too many tokens at once");
  start_feed(tokens, len);
  const View x = forward(host_ids_.data(), 0, 1, len, position_);
  std::vector<float> out;
  for (std::int64_t i = 0; i < len; ++i) {
    ops_.copy(x.row_range(i, 1), last_);
    finish_feed(1);
    const std::span<const float> row = logits();
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

}  // namespace engine
