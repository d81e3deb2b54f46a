// Online-softmax attention over blocks of keys (Dao et al., FlashAttention, arXiv:2205.14135),
// computed transposed: a lane of the register tile is a query, so that the softmax runs down the
// columns without horizontal sums, and the block of probabilities [keys, lanes] is at once the
// packed right-hand side of the second product.
#include "engine/ops/cpu_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_pack.h"

namespace engine {
namespace {

constexpr std::int64_t key_block = 256;
constexpr std::int64_t max_head_dim = 512;

std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

char* element(const View& v, std::int64_t row, std::int64_t col) {
  return static_cast<char*>(v.data) +
         (row * v.stride + col) * static_cast<std::int64_t>(dtype_bytes(v.dtype));
}

struct Problem {
  View q, k, v, out;
  std::span<const QueryRun> runs;
  std::int64_t head_dim = 0;
  std::int64_t share = 0;  // query heads per key head
  float scale = 0.0F;
};

// The queries of one run and the heads that share one key head. Lane l of the task is query
// l / share, head l % share of the group; `panel` lanes make one tile.
class Task {
 public:
  Task(const Problem& problem, const CpuKernels& kernels, std::int64_t item)
      : p_(problem), kernels_(kernels), tile_(kernels.attention) {
    const auto runs = static_cast<std::int64_t>(p_.runs.size());
    run_ = &p_.runs[static_cast<std::size_t>(item % runs)];
    kv_head_ = item / runs;
    for (const KeySpan& span : run_->spans) keys_seen_ += span.keys;
    lanes_ = run_->queries * p_.share;
    panels_ = (lanes_ + tile_.cols - 1) / tile_.cols;
    dims_ = round_up(p_.head_dim, tile_.rows);
  }

  void run() {
    thread_local Scratch scratch;
    const std::int64_t cols = tile_.cols;
    const std::int64_t all = panels_ * cols;
    float* at = scratch.floats(all * (p_.head_dim + dims_ + 3) + cols +
                               key_block * (p_.head_dim + dims_ + cols));
    const auto take = [&at](std::int64_t n) {
      float* p = at;
      at += n;
      return p;
    };
    // The multiples of 16 floats first, to keep the tiles' operands aligned.
    q_ = take(all * p_.head_dim);
    sums_ = take(all * dims_);
    keys_ = take(key_block * p_.head_dim);
    values_ = take(key_block * dims_);
    scores_ = take(key_block * cols);
    peak_ = take(all);
    total_ = take(all);
    rescale_ = take(cols);

    pack_queries();
    std::fill(sums_, sums_ + all * dims_, 0.0F);
    std::fill(peak_, peak_ + all, -std::numeric_limits<float>::infinity());
    std::fill(total_, total_ + all, 0.0F);
    std::int64_t first = 0;
    // A block does not reach across spans, so that its keys are neighbours.
    for (const KeySpan& span : run_->spans) {
      for (std::int64_t done = 0; done < span.keys; done += key_block) {
        const std::int64_t n = std::min(key_block, span.keys - done);
        key_step(first, span.row + done, n);
        first += n;
      }
    }
    write();
  }

 private:
  [[nodiscard]] std::int64_t position(std::int64_t lane) const {
    return keys_seen_ - run_->queries + std::min(lane, lanes_ - 1) / p_.share;
  }
  [[nodiscard]] std::int64_t row_of(std::int64_t lane) const {
    return run_->first_query + lane / p_.share;
  }
  [[nodiscard]] std::int64_t col_of(std::int64_t lane) const {
    return (kv_head_ * p_.share + lane % p_.share) * p_.head_dim;
  }

  // q_ becomes panels [head_dim, cols] times the scale; the lanes that are missing are 0.
  void pack_queries() {
    float row[max_head_dim];
    for (std::int64_t lane = 0; lane < panels_ * tile_.cols; ++lane) {
      float* to = q_ + lane / tile_.cols * tile_.cols * p_.head_dim + lane % tile_.cols;
      if (lane < lanes_) {
        kernels_.to_f32(p_.q.dtype, element(p_.q, row_of(lane), col_of(lane)), row, p_.head_dim);
      } else {
        std::fill(row, row + p_.head_dim, 0.0F);
      }
      for (std::int64_t d = 0; d < p_.head_dim; ++d) to[d * tile_.cols] = row[d] * p_.scale;
    }
  }

  // Keys [first, first + n) of the chain, which lie from row `base` on.
  void key_step(std::int64_t first, std::int64_t base, std::int64_t n) {
    const std::int64_t rows = tile_.rows;
    const std::int64_t cols = tile_.cols;
    const std::int64_t col = kv_head_ * p_.head_dim;
    pack_panels(kernels_, {element(p_.k, base, col), p_.k.dtype, p_.k.stride, false}, 0, n, 0,
                p_.head_dim, rows, keys_);
    pack_panels(kernels_, {element(p_.v, base, col), p_.v.dtype, p_.v.stride, true}, 0, p_.head_dim,
                0, n, rows, values_);
    for (std::int64_t panel = 0; panel < panels_; ++panel) {
      // No lane of this panel sees further.
      const std::int64_t seen = std::min(n, position(panel * cols + cols - 1) + 1 - first);
      if (seen <= 0) continue;
      const float* q = q_ + panel * cols * p_.head_dim;
      for (std::int64_t key = 0; key < seen; key += rows) {
        tile_.run(p_.head_dim, keys_ + key * p_.head_dim, q, scores_ + key * cols, cols, false);
      }
      std::int32_t positions[max_tile_cols];
      for (std::int64_t l = 0; l < cols; ++l) {
        positions[l] = static_cast<std::int32_t>(position(panel * cols + l));
      }
      kernels_.softmax_step(scores_, seen, first, positions, peak_ + panel * cols,
                            total_ + panel * cols, rescale_);
      float* sums = sums_ + panel * cols * dims_;
      if (first > 0) kernels_.scale_lanes(sums, dims_, rescale_);
      // Value panels are `n` deep; the keys not seen are at their end.
      for (std::int64_t d = 0; d < dims_; d += rows) {
        tile_.run(seen, values_ + d * n, scores_, sums + d * cols, cols, true);
      }
    }
  }

  void write() const {
    float row[max_head_dim];
    for (std::int64_t lane = 0; lane < lanes_; ++lane) {
      const float* from = sums_ + lane / tile_.cols * tile_.cols * dims_ + lane % tile_.cols;
      for (std::int64_t d = 0; d < p_.head_dim; ++d) row[d] = from[d * tile_.cols] / total_[lane];
      kernels_.from_f32(p_.out.dtype, row, element(p_.out, row_of(lane), col_of(lane)),
                        p_.head_dim);
    }
  }

  const Problem& p_;
  const CpuKernels& kernels_;
  const Tile& tile_;
  const QueryRun* run_ = nullptr;
  std::int64_t kv_head_ = 0;
  std::int64_t keys_seen_ = 0;  // by the last query
  std::int64_t lanes_ = 0;
  std::int64_t panels_ = 0;
  std::int64_t dims_ = 0;    // head_dim in whole tiles
  float* q_ = nullptr;       // panels [head_dim, cols]
  float* sums_ = nullptr;    // panels [dims, cols]
  float* keys_ = nullptr;    // panels [head_dim, rows]
  float* values_ = nullptr;  // panels [keys, rows]
  float* scores_ = nullptr;  // [keys, cols]
  float* peak_ = nullptr;
  float* total_ = nullptr;
  float* rescale_ = nullptr;
};

}  // namespace

void cpu_attention(ThreadPool& pool, View q, View k, View v, const AttnShape& shape,
                   std::int64_t batch, View out, Isa isa) {
  REQUIRE(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
          "attention: kv_heads must divide heads");
  REQUIRE(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= max_head_dim,
          "attention: head_dim is even and at most 512");
  REQUIRE(batch > 0 && q.rows % batch == 0 && k.rows % batch == 0, "attention: rows of a batch");
  REQUIRE(q.cols == shape.heads * shape.head_dim && k.cols == shape.kv_heads * shape.head_dim,
          "attention: q " + q.shape() + ", k " + k.shape());
  REQUIRE(v.rows == k.rows && v.cols == k.cols && out.rows == q.rows && out.cols == q.cols,
          "attention: v " + v.shape() + ", out " + out.shape());
  REQUIRE(q.dtype == k.dtype && q.dtype == v.dtype && q.dtype == out.dtype, "attention: one dtype");
  REQUIRE(q.device == DeviceKind::cpu && k.device == DeviceKind::cpu &&
              v.device == DeviceKind::cpu && out.device == DeviceKind::cpu,
          "attention: host views");
  const std::int64_t q_len = q.rows / batch;
  const std::int64_t kv_len = k.rows / batch;
  REQUIRE(q_len <= kv_len && kv_len <= std::numeric_limits<std::int32_t>::max(),
          "attention: more queries than keys");
  if (q_len == 0) return;
  const std::int64_t share = shape.heads / shape.kv_heads;
  const std::int64_t queries = std::max<std::int64_t>(1, attention_lanes / share);
  const std::int64_t blocks = (q_len + queries - 1) / queries;
  std::vector<QueryRun> runs(static_cast<std::size_t>(batch * blocks));
  for (std::int64_t i = 0; i < batch * blocks; ++i) {
    // The longest, those with the last queries, come first.
    const std::int64_t sequence = i / blocks;
    const std::int64_t first = (blocks - 1 - i % blocks) * queries;
    QueryRun& run = runs[static_cast<std::size_t>(i)];
    run.first_query = sequence * q_len + first;
    run.queries = std::min(queries, q_len - first);
    run.spans[0] = {sequence * kv_len, kv_len - q_len + first + run.queries};
  }
  cpu_attend(pool, q, k, v, shape, runs, out, isa);
}

void cpu_attend(ThreadPool& pool, View q, View k, View v, const AttnShape& shape,
                std::span<const QueryRun> runs, View out, Isa isa) {
  Problem p;
  p.q = q;
  p.k = k;
  p.v = v;
  p.out = out;
  p.runs = runs;
  p.head_dim = shape.head_dim;
  p.share = shape.heads / shape.kv_heads;
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
  const CpuKernels& kernels = cpu_kernels(isa);
  const std::int64_t items = shape.kv_heads * static_cast<std::int64_t>(runs.size());
  pool.run(items, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) Task(p, kernels, item).run();
  });
}

void cpu_rope(ThreadPool& pool, View x, std::int64_t head_dim, View cos, View sin,
              const std::function<std::int64_t(std::int64_t)>& position) {
  REQUIRE(x.device == DeviceKind::cpu, "rope: host views");
  const std::int64_t half = head_dim / 2;
  const float* cos_table = cos.host<float>();
  const float* sin_table = sin.host<float>();
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool.run(x.rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t at = position(r);
      for (std::int64_t c = 0; c < x.cols; c += head_dim) {
        kernels.rotate(x.dtype, element(x, r, c), element(x, r, c + half),
                       cos_table + at * cos.stride, sin_table + at * sin.stride, half);
      }
    }
  });
}

void CpuOps::attention(View q, View k, View v, const AttnShape& shape, std::int64_t batch, View out,
                       View) {
  cpu_attention(pool_, q, k, v, shape, batch, out);
}

std::int64_t CpuOps::attention_workspace_bytes(const AttnShape&, std::int64_t, std::int64_t,
                                               std::int64_t) const {
  return 0;  // a task's blocks live in the thread's own scratch
}

void CpuOps::rope(View x, std::int64_t head_dim, View cos, View sin, Positions positions) {
  REQUIRE(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0,
          "rope: x " + x.shape() + ", head_dim " + std::to_string(head_dim));
  REQUIRE(cos.cols == head_dim / 2 && sin.cols == head_dim / 2 && cos.rows == sin.rows,
          "rope: table shape");
  REQUIRE(positions.start >= 0 && positions.period > 0, "rope: positions");
  REQUIRE(x.rows == 0 || positions.start + std::min(x.rows, positions.period) <= cos.rows,
          "rope: positions beyond the table of " + std::to_string(cos.rows));
  cpu_rope(pool_, x, head_dim, cos, sin,
           [positions](std::int64_t r) { return positions.start + r % positions.period; });
}

}  // namespace engine
