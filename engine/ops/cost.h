// What each op must move and compute at least: every input element read once, every output element
// written once. This is the floor a kernel is measured against, not what a kernel really does; row
// gaps and workspaces do not count. Only multiplications and additions that the op's definition
// asks for are flops (an exponential or a division counts as one); pure data movement has none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "engine/ops/attn_ops.h"
#include "engine/ops/awq_ops.h"
#include "engine/ops/billm_ops.h"
#include "engine/ops/fused_ops.h"
#include "engine/ops/packed_ops.h"
#include "engine/ops/pbllm_ops.h"
#include "engine/ops/quant_ops.h"
#include "engine/ops/quip_ops.h"
#include "engine/ops/quipsharp_ops.h"
#include "engine/ops/slim_ops.h"
#include "engine/ops/step_ops.h"
#include "engine/ops/transform_ops.h"

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

// As rope, from one row of each table for every row.
inline OpCost rope_rows(const View& x, const View& positions) {
  return {2 * x.bytes() + positions.bytes(), 3 * x.count()};
}

// Bytes as of attention. Which pairs are visible is data on the device, so no flops are counted.
inline OpCost attention_runs(const View& q, const View& k, const View& v, const View& runs,
                             const View& out) {
  return {bytes_of({q, k, v, runs, out}), 0};
}

// Twice row_nll, then a difference, a product and a sum.
inline OpCost compare_logits(const View& reference, const View& logits, const View& out) {
  return {bytes_of({reference, logits, out}), 9 * logits.count()};
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

// The compensation, one multiply-add per (row, pair of columns), and the two searches: a pass of
// binarization costs four operations a weight (two sums, a difference, a sign), an error three.
inline OpCost billm_sweep(const BillmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto size = static_cast<std::int64_t>(dtype_bytes(p.r.dtype));
  OpCost c{2 * p.w.bytes() + d * (d + 1) / 2 * size +
               bytes_of({p.first, p.second, p.salient, p.percent, p.loss}),
           0};
  for (const View& v : p.scales) c.bytes += v.bytes();
  for (const View& v : p.means) c.bytes += v.bytes();
  const std::int64_t columns = std::min(p.max_salient, p.block - 1);
  const std::int64_t breaks = billm_last_percent - billm_first_percent + 1;
  c.flops = rows * d * (d - 1) + rows * d * (columns * (4 * p.rest_passes + 3) + breaks * (4 + 3));
  return c;
}

inline OpCost add_abs_sums(const View& x, const View& sums) {
  return {x.bytes() + 2 * sums.bytes(), x.count()};
}

// Scale, minimum and maximum, five operations onto the grid, two back, unscale.
inline OpCost round_trip_scaled(const View& w, const View& s, const View& out) {
  return pass({w, s, out}, 11);
}

// The lower triangle of h is read.
inline OpCost moment_loss(const View& a, const View& b, const View& h) {
  return {bytes_of({a, b}) + h.rows * (h.rows + 1) / 2 * 4,
          a.count() + a.rows * h.rows * (h.rows + 1)};
}

// Each candidate: onto the grid and back (about ten operations), and its error through the smaller
// of the samples and their moment.
inline OpCost awq_clip(const AwqClipProblem& p) {
  const std::int64_t unit = p.grid.unit(p.w.cols), n = p.x.rows;
  const std::int64_t moment = unit <= n ? n * p.w.cols * unit : 0;
  return {2 * p.w.bytes() + bytes_of({p.x, p.choice, p.loss, p.plain_loss}),
          moment + p.candidates * p.w.count() * (10 + 2 * std::min(unit, n))};
}

// hadamard: an addition per element and level, K additions for the small matrix, the scale and the
// sign. butterfly: both stages.
inline OpCost transform_rows(const View& x, const TransformView& q, const View& out) {
  OpCost c = pass({x, out});
  c.bytes += q.bytes();
  if (q.kind == TransformKind::butterfly) c.flops = 2 * x.count() * (q.p1 + q.p2);
  if (q.kind == TransformKind::hadamard) {
    std::int64_t per_element = (q.order > 1 ? q.order : 0) + 2;
    for (std::int64_t n = q.d / q.order; n > 1; n /= 2) ++per_element;
    c.flops = x.count() * per_element;
  }
  return c;
}

inline OpCost decode_lattice(const View& codes, const View& scales, bool accumulate,
                             const View& out) {
  return {bytes_of({codes, scales, out}) + (accumulate ? out.bytes() : 0),
          (accumulate ? 2 : 1) * out.count()};
}

// The diagonal alone, or the triangle and its inversion.
inline OpCost slim_divisors(const View& r, bool inverse, const View& out) {
  const std::int64_t d = r.rows;
  const auto size = static_cast<std::int64_t>(dtype_bytes(r.dtype));
  if (!inverse) return {d * size + out.bytes(), d};
  return {d * (d + 1) / 2 * size + out.bytes(), d * d * d / 3};
}

// At each of the three widths: minimum, maximum, five operations onto the grid, two back.
inline OpCost slim_candidates(const View& w, const View& base, const View& lower,
                              const View& higher) {
  return pass({w, base, lower, higher}, 3 * 9 + 2);
}

// Two softmaxes of three operations; a difference, an exponential, a product, a sum.
inline OpCost softmax_kl(const View& y, const View& reference, const View& kl) {
  return {bytes_of({y, reference}) + 2 * kl.bytes(), 10 * y.count()};
}

// The compensation as in gptq_sweep, and 101 candidates of about eight operations.
inline OpCost slim_sweep(const SlimProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto size = static_cast<std::int64_t>(dtype_bytes(p.r.dtype));
  return {2 * p.w.bytes() + d * (d + 1) / 2 * size +
              bytes_of({p.bits, p.middle_zero, p.scales, p.zeros, p.means, p.codes, p.loss}),
          rows * d * (d - 1) + rows * d * (5 + (p.search ? 101 * 8 : 0))};
}

// A difference and a product.
inline OpCost slim_decode(const SlimDecode& p) {
  return pass({p.bits, p.codes, p.scales, p.means, p.zeros, p.out}, 2);
}

// Four passes for the order statistic, of three operations a weight with the Hessian's metric, and
// two sums.
inline OpCost pbllm_select(const PbllmSelect& p) {
  const std::int64_t n = p.w.count();
  return {p.w.bytes() + bytes_of({p.salient, p.means, p.scales}),
          (p.metric == PbllmMetric::hessian ? 4 * 3 * n : 0) + 4 * n};
}

// The compensation as in gptq_sweep, and about four operations to quantize each weight.
inline OpCost pbllm_sweep(const PbllmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto size = static_cast<std::int64_t>(dtype_bytes(p.r.dtype));
  return {
      2 * p.w.bytes() + d * (d + 1) / 2 * size +
          bytes_of({p.salient, p.means, p.scales, p.high_scales, p.high_zeros, p.codes, p.loss}),
      (p.compensate ? rows * d * (d - 1) : 0) + 4 * rows * d};
}

inline OpCost pbllm_split(const View& mask, const View& codes, const View& out, const View& ones) {
  return {bytes_of({mask, codes, out, ones}), 0};
}

inline OpCost pbllm_decode(const PbllmDecode& p) {
  return {
      bytes_of({p.bitmap, p.signs, p.high, p.means, p.scales, p.high_scales, p.high_zeros, p.out}),
      2 * p.out.count()};
}

// Of h the lower triangle is read.
inline OpCost scale_moment(const View& h, const View& s, const View& out) {
  return {h.rows * (h.rows + 1) / 2 * 4 + bytes_of({s, out}), 3 * h.count()};
}

// One multiply-add per (row, pair of columns), and five operations a weight.
inline OpCost ldlq_sweep(const LdlqProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto size = static_cast<std::int64_t>(dtype_bytes(p.r.dtype));
  return {2 * p.w.bytes() + d * (d + 1) / 2 * size + bytes_of({p.codes, p.loss}),
          rows * d * (d - 1) + 5 * rows * d};
}

// All of h for every weight, and five operations on it.
inline OpCost ldlq_greedy(const GreedyProblem& p) {
  return {2 * bytes_of({p.e, p.codes}) + bytes_of({p.h, p.changed}),
          2 * p.e.count() * p.e.cols + 5 * p.e.count()};
}

// One multiply-add per (row, pair of columns) in the first pass, two in every other one. The search
// of a point is counted as 128 operations a weight: about what the kernels' search takes.
inline OpCost quipsharp_sweep(const QuipSharpProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  return {bytes_of({p.w, p.r, p.h, p.e, p.codes, p.residual, p.loss}),
          rows * d * d * (1 + 2 * p.tuning) + 128 * rows * d * (1 + p.tuning)};
}

// Subtract the zero, scale; once for each term.
inline OpCost expand(const PackedWeight& w, const View& out) {
  return {w.bytes() + out.bytes(), 2 * w.shape.terms() * out.count()};
}

// The flops of the product alone: decoding is the price of the layout.
inline OpCost packed_matmul(const View& x, const PackedWeight& w, const View& out,
                            bool accumulate) {
  return {w.bytes() + bytes_of({x, out}) + (accumulate ? out.bytes() : 0),
          2 * x.rows * w.shape.rows * x.cols};
}

inline OpCost linear(const View& x, const Linear& w, const View& out, bool accumulate) {
  return w.is_packed() ? packed_matmul(x, w.packed, out, accumulate)
                       : matmul(x, w.dense, out, accumulate);
}

// Every row stands at the one position, so one row of each table is read.
inline OpCost rope_step(const View& x, const View& cos, const View& sin, const View& position) {
  return {2 * x.bytes() + (cos.cols + sin.cols) * 4 + position.bytes(), 3 * x.count()};
}

// `tokens` rows of keys and values in the cache, with their scales.
inline std::int64_t cache_rows(const KvCache& cache, std::int64_t tokens) {
  std::int64_t row = 0;
  for (const View& v : {cache.k, cache.v, cache.k_scale, cache.v_scale}) {
    row += v.cols * static_cast<std::int64_t>(dtype_bytes(v.dtype));
  }
  return tokens * row;
}

// Rows of k and v into the cache or out of it. To or from 8 bits an element costs two operations
// (a maximum and a division; a subtraction and a product).
inline OpCost kv_copy(const View& k, const View& v, const KvCache& cache) {
  return {bytes_of({k, v}) + cache_rows(cache, k.rows),
          cache.quantized() ? 2 * (k.count() + v.count()) : 0};
}

inline OpCost kv_append_step(const View& k, const View& v, const KvCache& cache,
                             const View& position) {
  OpCost c = kv_copy(k, v, cache);
  c.bytes += position.bytes();
  return c;
}

// How many tokens are read is known on the device only (the position is data there), so this counts
// the cache's full capacity: an upper bound, unlike every other cost here.
inline OpCost attention_step(const View& q, const KvCache& cache, const AttnShape& shape,
                             const View& out) {
  const std::int64_t tokens = cache.batch * cache.capacity;
  return {bytes_of({q, out}) + cache_rows(cache, tokens),
          4 * shape.head_dim * shape.heads * tokens};
}

// Greedy: comparisons only. Otherwise subtract, divide, exp, add.
inline OpCost sample_step(const View& logits, const SampleOptions& options,
                          const StepState& state) {
  return {logits.bytes() + 2 * state.token.bytes(),
          options.temperature > 0 ? 4 * logits.count() : 0};
}

// A normalized input read by `n` linears: the intermediate results of a fused op stay on the chip.
inline OpCost norm_linears(const View& x, const View& norm,
                           std::initializer_list<const Linear*> linears) {
  OpCost c{bytes_of({x, norm}), 4 * x.count()};
  for (const Linear* w : linears) {
    c.bytes += w->bytes();
    c.flops += 2 * x.rows * w->rows() * x.cols;
  }
  return c;
}

inline OpCost qkv_step(const QkvStep& s) {
  OpCost c = norm_linears(s.x, s.norm, {s.q, s.k, s.v});
  c.bytes += s.q_out.bytes() + (s.cos.cols + s.sin.cols) * 4 + s.position.bytes() +
             cache_rows(s.cache, s.x.rows);
  const std::int64_t keys = s.x.rows * s.k->rows();
  c.flops += 3 * (s.q_out.count() + keys);                // rotation
  if (s.cache.quantized()) c.flops += 2 * (keys + keys);  // keys and values to 8 bits
  return c;
}

inline OpCost gate_up(const GateUp& s) {
  OpCost c = norm_linears(s.x, s.norm, {s.gate, s.up});
  c.bytes += s.out.bytes();
  c.flops += 4 * s.out.count();
  return c;
}

inline OpCost norm_linear(const NormLinear& s) {
  OpCost c = norm_linears(s.x, s.norm, {s.w});
  c.bytes += s.out.bytes();
  return c;
}

// The sum of its parts: what they hand to each other is counted, though it may stay on the chip.
inline OpCost block_tail(const BlockTail& s) {
  OpCost c = gate_up(s.mlp);
  const auto add = [&](const OpCost& other) {
    c.bytes += other.bytes;
    c.flops += other.flops;
  };
  add(linear(s.a, *s.o, s.mlp.x, true));
  add(linear(s.mlp.out, *s.down, s.mlp.x, true));
  if (s.next.q != nullptr) add(qkv_step(s.next));
  return c;
}

}  // namespace cost
}  // namespace engine
