// The ops of a decoding step on the CPU.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/core/rng.h"
#include "engine/ops/cpu_attention.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_pack.h"
#include "engine/ops/cpu_rows.h"
#include "engine/ops/step_check.h"

namespace engine {
namespace {

constexpr std::int64_t max_head_dim = 256;
constexpr int code_zero = 128;  // the code of the value 0
constexpr float code_limit = 127.0F;

// position[0], which must be a token of a cache or table of `limit` rows.
std::int64_t position_of(const char* op, View position, std::int64_t limit) {
  const std::int64_t p = *position.host<std::int32_t>();
  REQUIRE(p >= 0 && p < limit, std::string(op) + ": position " + std::to_string(p) +
                                   ", expected 0 to " + std::to_string(limit - 1));
  return p;
}

void require_host(const char* op, std::initializer_list<View> views) {
  for (const View& v : views) {
    REQUIRE(v.device == DeviceKind::cpu, std::string(op) + ": host views");
  }
}

// Codes of one head and their scale. A head with NaN or infinity gets the scale NaN, so that
// attention shows it.
float quantize_head(const float* x, std::int64_t n, std::uint8_t* codes) {
  float peak = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < n; ++i) {
    peak = std::max(peak, std::abs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  if (!finite) {
    std::fill(codes, codes + n, static_cast<std::uint8_t>(code_zero));
    return std::numeric_limits<float>::quiet_NaN();
  }
  float scale = peak / code_limit;
  if (scale == 0.0F) scale = 1.0F;
  for (std::int64_t i = 0; i < n; ++i) {
    // A subnormal scale is coarse: the quotient may then exceed the limit.
    const float code = std::clamp(std::nearbyint(x[i] / scale), -code_limit, code_limit);
    codes[i] = static_cast<std::uint8_t>(code_zero + static_cast<int>(code));
  }
  return scale;
}

// Row `row` of x becomes row `at` of one half of a cache.
void append_row(const View& x, std::int64_t row, std::int64_t head_dim, const View& to,
                const View& scale, std::int64_t at) {
  const auto size = static_cast<std::int64_t>(dtype_bytes(to.dtype));
  if (to.dtype != DType::u8) {
    std::memcpy(static_cast<char*>(to.data) + at * to.stride * size,
                static_cast<const char*>(x.data) + row * x.stride * size,
                static_cast<std::size_t>(x.cols * size));
    return;
  }
  float head[max_head_dim];
  for (std::int64_t c = 0; c < x.cols; c += head_dim) {
    load_row(x, row, c, head_dim, head);
    scale.host<float>()[at * scale.stride + c / head_dim] =
        quantize_head(head, head_dim, to.host<std::uint8_t>() + at * to.stride + c);
  }
}

// Head `head` of row `row` of an 8-bit half of a cache, rounded to `dtype`.
void read_codes(const View& codes, const View& scale, DType dtype, std::int64_t row,
                std::int64_t head, std::int64_t head_dim, float* out) {
  const std::uint8_t* from = codes.host<std::uint8_t>() + row * codes.stride + head * head_dim;
  const float s = scale.host<float>()[row * scale.stride + head];
  for (std::int64_t i = 0; i < head_dim; ++i) {
    out[i] = round_to(dtype, s * static_cast<float>(static_cast<int>(from[i]) - code_zero));
  }
}

// Rows first .. first + k.rows - 1 of an 8-bit half of a cache.
void read_rows(ThreadPool& pool, const View& codes, const View& scale, std::int64_t head_dim,
               std::int64_t first, const View& out) {
  pool.run(out.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    float head[max_head_dim];
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t c = 0; c < out.cols; c += head_dim) {
        read_codes(codes, scale, out.dtype, first + r, c / head_dim, head_dim, head);
        const auto write = [&](auto* data) {
          for (std::int64_t i = 0; i < head_dim; ++i) store(data[r * out.stride + c + i], head[i]);
        };
        if (out.dtype == DType::f32) write(out.host<float>());
        if (out.dtype == DType::f16) write(out.host<f16>());
        if (out.dtype == DType::bf16) write(out.host<bf16>());
      }
    }
  });
}

// The query heads of one kv head of one sequence over an 8-bit cache: online softmax, key by key.
void attend_codes(const View& q, const KvCache& cache, const AttnShape& shape, std::int64_t len,
                  std::int64_t sequence, std::int64_t kv_head, const View& out) {
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t hd = shape.head_dim;
  const std::int64_t first_col = kv_head * group * hd;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(hd)));
  thread_local Scratch scratch;
  float* const queries = scratch.floats(group * (2 * hd + 2));  // [group, hd]
  float* const sums = queries + group * hd;                     // [group, hd]
  float* const peak = sums + group * hd;                        // [group]
  float* const total = peak + group;                            // [group]
  std::fill(sums, peak, 0.0F);
  std::fill(peak, total, -std::numeric_limits<float>::infinity());
  std::fill(total, total + group, 0.0F);
  load_row(q, sequence, first_col, group * hd, queries);
  float key[max_head_dim];
  float value[max_head_dim];
  for (std::int64_t p = 0; p < len; ++p) {
    const std::int64_t row = sequence * cache.capacity + p;
    read_codes(cache.k, cache.k_scale, q.dtype, row, kv_head, hd, key);
    read_codes(cache.v, cache.v_scale, q.dtype, row, kv_head, hd, value);
    for (std::int64_t g = 0; g < group; ++g) {
      const float* query = queries + g * hd;
      float* sum = sums + g * hd;
      float score = 0;
      for (std::int64_t i = 0; i < hd; ++i) score += query[i] * key[i];
      score *= scale;
      if (score > peak[g]) {
        const float shrink = std::exp(peak[g] - score);
        total[g] *= shrink;
        for (std::int64_t i = 0; i < hd; ++i) sum[i] *= shrink;
        peak[g] = score;
      }
      const float weight = std::exp(score - peak[g]);
      total[g] += weight;
      for (std::int64_t i = 0; i < hd; ++i) sum[i] += weight * value[i];
    }
  }
  const auto write = [&](auto* data) {
    data += sequence * out.stride + first_col;
    for (std::int64_t i = 0; i < group * hd; ++i) store(data[i], sums[i] / total[i / hd]);
  };
  if (out.dtype == DType::f32) write(out.host<float>());
  if (out.dtype == DType::f16) write(out.host<f16>());
  if (out.dtype == DType::bf16) write(out.host<bf16>());
}

// The next token of one row, or -1 if it has NaN or infinity.
std::int32_t sample_row(const float* logits, std::int64_t vocab, const SampleOptions& options,
                        double uniform) {
  if (!std::all_of(logits, logits + vocab, [](float v) { return std::isfinite(v); })) return -1;
  const auto best = static_cast<std::int32_t>(std::max_element(logits, logits + vocab) - logits);
  if (options.temperature == 0) return best;
  std::vector<std::int32_t> order(static_cast<std::size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  if (options.top_p < 1) {
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return logits[a] > logits[b]; });
  }
  std::vector<double> p(order.size());
  double total = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double below = static_cast<double>(logits[order[i]]) - static_cast<double>(logits[best]);
    p[i] = std::exp(below / static_cast<double>(options.temperature));
    total += p[i];
  }
  std::size_t kept = p.size();
  double mass = total;
  if (options.top_p < 1) {
    const double wanted = static_cast<double>(options.top_p) * total;
    kept = 1;
    mass = p[0];
    while (kept < p.size() && mass < wanted) mass += p[kept++];
  }
  const double target = uniform * mass;
  double running = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    running += p[i];
    if (running > target) return order[i];
  }
  return order[kept - 1];
}

}  // namespace

void CpuOps::rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) {
  check_rope_step(x, head_dim, cos, sin, position);
  rope(x, head_dim, cos, sin, {position_of("rope_step", position, cos.rows), 1});
}

void CpuOps::kv_append_step(View k, View v, std::int64_t head_dim, const KvCache& cache,
                            View position) {
  check_append("kv_append_step", k, v, cache.batch, head_dim, cache);
  check_scalar("kv_append_step", position);
  kv_append(k, v, head_dim, cache, 0, cache.batch,
            position_of("kv_append_step", position, cache.capacity));
}

void CpuOps::kv_append(View k, View v, std::int64_t head_dim, const KvCache& cache,
                       std::int64_t first, std::int64_t n, std::int64_t start) {
  check_append("kv_append", k, v, k.rows, head_dim, cache);
  check_append_range(k, cache, first, n, start);
  require_host("kv_append", {k, v, cache.k, cache.v});
  const std::int64_t len = k.rows / n;
  pool_.run(k.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t at = (first + r / len) * cache.capacity + start + r % len;
      append_row(k, r, head_dim, cache.k, cache.k_scale, at);
      append_row(v, r, head_dim, cache.v, cache.v_scale, at);
    }
  });
}

void CpuOps::kv_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
                     View v) {
  check_read(cache, head_dim, sequence, k, v);
  const std::int64_t first = sequence * cache.capacity;
  if (!cache.quantized()) {
    copy(cache.k.row_range(first, k.rows), k);
    copy(cache.v.row_range(first, v.rows), v);
    return;
  }
  require_host("kv_read", {k, v, cache.k, cache.v});
  read_rows(pool_, cache.k, cache.k_scale, head_dim, first, k);
  read_rows(pool_, cache.v, cache.v_scale, head_dim, first, v);
}

void CpuOps::attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                            View out, View) {
  check_attention_step(q, cache, shape, position, out);
  const std::int64_t len = position_of("attention_step", position, cache.capacity) + 1;
  if (!cache.quantized()) {
    for (std::int64_t b = 0; b < cache.batch; ++b) {
      cpu_attention(pool_, q.row_range(b, 1), cache.k.row_range(b * cache.capacity, len),
                    cache.v.row_range(b * cache.capacity, len), shape, 1, out.row_range(b, 1));
    }
    return;
  }
  require_host("attention_step", {q, cache.k, cache.v, out});
  pool_.run(cache.batch * shape.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      attend_codes(q, cache, shape, len, i / shape.kv_heads, i % shape.kv_heads, out);
    }
  });
}

std::int64_t CpuOps::attention_step_bytes(const AttnShape&, std::int64_t, std::int64_t) const {
  return 0;  // a task's few rows are its own
}

void CpuOps::sample_step(View logits, const SampleOptions& options, const StepState& state, View) {
  check_sample_step(logits, options, state);
  require_host("sample_step", {logits, state.token, state.history});
  const float* data = logits.host<float>();
  auto* step = state.step.host<std::int32_t>();
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(logits.rows));
  pool_.run(logits.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const double uniform = uniform_value(options.seed + static_cast<std::uint64_t>(b),
                                           sampling_stream, static_cast<std::uint64_t>(*step));
      tokens[static_cast<std::size_t>(b)] =
          sample_row(data + b * logits.stride, logits.cols, options, uniform);
    }
  });
  for (std::int64_t b = 0; b < logits.rows; ++b) {
    std::int32_t token = tokens[static_cast<std::size_t>(b)];
    if (token < 0) {
      ++*state.bad.host<std::int32_t>();
      token = 0;
    }
    state.token.host<std::int32_t>()[b * state.token.stride] = token;
    if (*step >= 0 && *step < state.history.cols) {
      state.history.host<std::int32_t>()[b * state.history.stride + *step] = token;
    }
  }
  ++*step;
  ++*state.position.host<std::int32_t>();
}

std::int64_t CpuOps::sample_step_bytes(std::int64_t, std::int64_t) const { return 0; }

}  // namespace engine
