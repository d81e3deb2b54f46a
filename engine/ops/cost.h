// What each op must move and compute at least: every input element read once, every output element
// written once. This is the floor a kernel is measured against, not what a kernel really does; row
// gaps and workspaces do not count. Only multiplications and additions that the op's definition
// asks for are flops (an exponential or a division counts as one); pure data movement has none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "engine/ops/attn_ops.h"
#include "engine/ops/quant_ops.h"

namespace engine {

struct OpCost {
  std::int64_t bytes = 0;
  std::int64_t flops = 0;
};

namespace cost {

// The bytes of all elements; absent (empty) views count nothing.
inline std::int64_t bytes_of(std::initializer_list<View> views) {
  std::int64_t sum = 0;
  for (const View& v : views) sum += v.bytes();
  return sum;
}

// One pass over the views with `per_element` flops for each element of the first.
inline OpCost pass(std::initializer_list<View> views, std::int64_t per_element = 0) {
  return {bytes_of(views), per_element * views.begin()->count()};
}

// Only the rows that are looked up are read.
inline OpCost embed(const View& ids, const View& out) { return {ids.bytes() + 2 * out.bytes(), 0}; }

// Square, add; scale, weigh.
inline OpCost rmsnorm(const View& x, const View& weight, const View& out) {
  return pass({x, weight, out}, 4);
}

inline OpCost matmul(const View& x, const View& w, const View& out, bool accumulate) {
  return {bytes_of({x, w, out}) + (accumulate ? out.bytes() : 0), 2 * x.rows * w.rows * x.cols};
}

// exp, add, divide, multiply.
inline OpCost silu_mul(const View& gate, const View& up, const View& out) {
  return pass({gate, up, out}, 4);
}

// Subtract, exp, add.
inline OpCost row_nll(const View& logits, const View& target, const View& nll) {
  return pass({logits, target, nll}, 3);
}

// Difference and two multiply-adds.
inline OpCost square_sums(const View& a, const View& b, const View& out) {
  return pass({a, b, out}, 5);
}

// Two products and a sum for each element; the tables' rows that are used are read once.
inline OpCost rope(const View& x, const View& cos, const View& sin, const Positions& positions) {
  const std::int64_t used = std::min({x.rows, positions.period, cos.rows});
  const std::int64_t table = used * (cos.cols + sin.cols) * 4;
  return {2 * x.bytes() + table, 3 * x.count()};
}

// q, k, v read and out written once; 4 * head_dim flops for each visible (query, key) pair.
inline OpCost attention(const View& q, const View& k, const View& v, const View& out,
                        const AttnShape& shape, std::int64_t batch) {
  const std::int64_t q_len = batch > 0 ? q.rows / batch : 0;
  const std::int64_t kv_len = batch > 0 ? k.rows / batch : 0;
  // Query i sees kv_len - q_len + i + 1 keys.
  const std::int64_t pairs = q_len * (kv_len - q_len) + q_len * (q_len + 1) / 2;
  return {bytes_of({q, k, v, out}), 4 * shape.head_dim * shape.heads * batch * pairs};
}

// Minimum and maximum; with the search, 80 candidates of about eight operations.
inline OpCost find_grid(const View& w, const GridSpec& spec, const View& scales,
                        const View& zeros) {
  return pass({w, scales, zeros}, spec.mse ? 2 + 80 * 8 : 2);
}

// Divide, round, shift, clamp twice.
inline OpCost quantize_codes(const View& w, const View& scales, const View& zeros,
                             const View& column_group, const View& codes) {
  return pass({w, scales, zeros, column_group, codes}, 5);
}

inline OpCost dequantize_codes(const View& codes, const View& scales, const View& zeros,
                               const View& column_group, const View& perm, const View& out) {
  return pass({codes, scales, zeros, column_group, perm, out}, 2);
}

// The lower triangle of h is read and written.
inline OpCost gram(const View& x, const View& h) {
  const std::int64_t triangle = h.rows * (h.rows + 1) / 2;
  return {x.bytes() + 2 * triangle * 4, x.rows * x.cols * (x.cols + 1)};
}

inline OpCost diagonal(const View& out) { return {2 * out.bytes(), 0}; }

inline OpCost damp_hessian(const View& h, const View& perm, const View& a, const View& dead,
                           const View& damping) {
  const std::int64_t triangle = h.rows * (h.rows + 1) / 2;
  return {triangle * 4 + bytes_of({perm, a, dead, damping}), h.count() + 2 * h.rows};
}

// The symmetric matrix read once, the factor written once.
inline OpCost factor_upper(const View& a) { return {2 * a.bytes(), a.rows * a.rows * a.rows / 3}; }

// The compensation alone: one multiply-add per (row, pair of columns j < k) within the whole width,
// and five operations to quantize each weight.
inline OpCost gptq_sweep(const GptqProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto size = static_cast<std::int64_t>(dtype_bytes(p.r.dtype));
  const std::int64_t factor = d * (d + 1) / 2 * size;
  return {2 * p.w.bytes() + factor + bytes_of({p.column_group, p.scales, p.zeros, p.codes, p.loss}),
          rows * d * (d - 1) + 5 * rows * d};
}

}  // namespace cost
}  // namespace engine
