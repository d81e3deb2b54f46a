#include "engine/ops/step_check.h"

#include <cmath>
#include <limits>
#include <string>

#include "engine/core/error.h"

namespace engine {
namespace {

constexpr std::int64_t max_head_dim = 256;
constexpr std::int64_t max_capacity = 1 << 30;  // positions are i32

bool same_shape(const View& a, const View& b) {
  return a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype;
}

}  // namespace

void check_cache(const char* op, const KvCache& cache, std::int64_t head_dim, DType dtype) {
  const std::string name = op;
  REQUIRE(head_dim > 0 && head_dim % 2 == 0 && head_dim <= max_head_dim,
          name + ": head_dim " + std::to_string(head_dim) + " (even, at most 256)");
  REQUIRE(cache.batch > 0 && cache.capacity > 0 && cache.capacity <= max_capacity &&
              cache.k.rows == cache.batch * cache.capacity && cache.k.cols > 0 &&
              cache.k.cols % head_dim == 0 && same_shape(cache.k, cache.v),
          name + ": a cache of " + std::to_string(cache.batch) + " x " +
              std::to_string(cache.capacity) + " tokens with k " + cache.k.shape() + " and v " +
              cache.v.shape());
  if (!cache.quantized()) {
    REQUIRE(cache.k.dtype == dtype && cache.k_scale.empty() && cache.v_scale.empty(),
            name + ": expected a cache of " + dtype_name(dtype) + " without scales, found " +
                cache.k.shape());
    return;
  }
  REQUIRE(cache.k_scale.dtype == DType::f32 && cache.k_scale.rows == cache.k.rows &&
              cache.k_scale.cols == cache.k.cols / head_dim &&
              same_shape(cache.k_scale, cache.v_scale),
          name + ": codes " + cache.k.shape() + " with scales " + cache.k_scale.shape() + " and " +
              cache.v_scale.shape());
}

void check_scalar(const char* op, View v) {
  REQUIRE(v.rows == 1 && v.cols == 1 && v.dtype == DType::i32,
          std::string(op) + ": expected i32 [1, 1], found " + v.shape());
}

void check_rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) {
  REQUIRE(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0,
          "rope_step of " + x.shape() + " with heads of " + std::to_string(head_dim));
  REQUIRE(cos.cols == head_dim / 2 && sin.cols == head_dim / 2 && cos.rows == sin.rows &&
              cos.rows > 0 && cos.dtype == DType::f32 && sin.dtype == DType::f32,
          "rope_step with tables " + cos.shape() + " and " + sin.shape());
  check_scalar("rope_step", position);
}

void check_append(const char* op, View k, View v, std::int64_t rows, std::int64_t head_dim,
                  const KvCache& cache) {
  check_cache(op, cache, head_dim, k.dtype);
  REQUIRE(is_float(k.dtype) && k.dtype != DType::f64 && same_shape(k, v) && k.rows == rows &&
              k.cols == cache.k.cols,
          std::string(op) + " of " + k.shape() + " and " + v.shape() + " to a cache of " +
              cache.k.shape());
}

void check_append_range(View k, const KvCache& cache, std::int64_t first, std::int64_t n,
                        std::int64_t start) {
  REQUIRE(n > 0 && k.rows % n == 0 && first >= 0 && first + n <= cache.batch && start >= 0 &&
              start + k.rows / n <= cache.capacity,
          "kv_append of " + k.shape() + " as tokens from " + std::to_string(start) + " of " +
              std::to_string(n) + " sequences from " + std::to_string(first) + " to a cache of " +
              std::to_string(cache.batch) + " x " + std::to_string(cache.capacity));
}

void check_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
                View v) {
  check_cache("kv_read", cache, head_dim, k.dtype);
  REQUIRE(is_float(k.dtype) && k.dtype != DType::f64 && same_shape(k, v) &&
              k.cols == cache.k.cols && k.rows <= cache.capacity && sequence >= 0 &&
              sequence < cache.batch,
          "kv_read of sequence " + std::to_string(sequence) + " into " + k.shape() + " and " +
              v.shape() + " from a cache of " + cache.k.shape());
}

void check_attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                          View out) {
  check_cache("attention_step", cache, shape.head_dim, q.dtype);
  REQUIRE(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
          "attention_step with " + std::to_string(shape.heads) + " heads and " +
              std::to_string(shape.kv_heads) + " kv heads");
  REQUIRE(is_float(q.dtype) && q.dtype != DType::f64 && q.rows == cache.batch &&
              q.cols == shape.heads * shape.head_dim && same_shape(q, out) &&
              cache.k.cols == shape.kv_heads * shape.head_dim,
          "attention_step of " + q.shape() + " over " + cache.k.shape() + " into " + out.shape());
  check_scalar("attention_step", position);
}

void check_sample_step(View logits, const SampleOptions& options, const StepState& state) {
  REQUIRE(logits.dtype == DType::f32 && logits.cols > 0 &&
              logits.cols <= std::numeric_limits<std::int32_t>::max(),
          "sample_step of " + logits.shape());
  REQUIRE(options.temperature >= 0 && std::isfinite(options.temperature) && options.top_p > 0 &&
              options.top_p <= 1,
          "sample_step with temperature " + std::to_string(options.temperature) + " and top_p " +
              std::to_string(options.top_p));
  REQUIRE(state.token.dtype == DType::i32 && state.token.rows == logits.rows &&
              state.token.cols == 1 && state.history.dtype == DType::i32 &&
              state.history.rows == logits.rows,
          "sample_step of " + logits.shape() + " into tokens " + state.token.shape() +
              " and history " + state.history.shape());
  check_scalar("sample_step", state.position);
  check_scalar("sample_step", state.step);
  check_scalar("sample_step", state.bad);
}

}  // namespace engine
