// A decorator that counts what passes through a backend: calls, the bytes and flops that each call
// must cost (engine/ops/cost.h) and, if asked, the time on the device.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/ops/cost.h"
#include "engine/ops/ops.h"
#include "formats/json.h"

namespace engine {

struct OpStats {
  std::int64_t calls = 0;
  std::int64_t bytes = 0;
  std::int64_t flops = 0;
  double ms = 0;  // 0 unless timed
};

class TraceOps final : public Ops {
 public:
  // `ops` must outlive this. With `time`, each op that does work on the device stands between two
  // marks; the marks are read when stats are asked for, and now and then when many have gathered
  // (a backend keeps a bounded number of them). Reading them waits for the device.
  explicit TraceOps(Ops& ops, bool time = false);

  // Every op of the contract by its name: all virtual functions of Ops except the five that only
  // describe the device (kind, info, memory, staging_memory, can_record). Sorted. A fused op is one
  // entry: it goes to the wrapped backend's own kernel, whose parts are not seen.
  static const std::vector<std::string>& op_names();

  // One entry for every name, ops never called included. A call that threw is not counted.
  std::map<std::string, OpStats> stats();
  // {"matmul": {"calls", "bytes", "flops"[, "ms", "gb_per_s", "gflop_per_s"]}, ...}: the ops that
  // were called; the last three only when timed.
  Json to_json();
  // Forgets everything counted so far.
  void reset();

  // DenseOps
  void embed(View ids, View table, View out) override;
  void rmsnorm(View x, View weight, float eps, View out) override;
  void matmul(View x, View w, View out, bool accumulate) override;
  void silu_mul(View gate, View up, View out) override;
  void convert(View in, View out) override;
  void row_nll(View logits, View target, View nll) override;
  void row_argmax(View logits, View out) override;
  std::int64_t count_nonfinite(View x) override;
  void square_sums(View a, View b, View out) override;
  void fill_bell(View out, std::uint64_t seed, std::uint64_t stream, float scale,
                 float shift) override;
  void zero(View out) override;

  // AttnOps
  void rope(View x, std::int64_t head_dim, View cos, View sin, Positions positions) override;
  void attention(View q, View k, View v, const AttnShape& shape, std::int64_t batch, View out,
                 View workspace) override;
  [[nodiscard]] std::int64_t attention_workspace_bytes(const AttnShape& shape, std::int64_t batch,
                                                       std::int64_t q_len,
                                                       std::int64_t kv_len) const override;

  // QuantOps
  void find_grid(View w, const GridSpec& spec, View scales, View zeros) override;
  void quantize_codes(View w, const GridSpec& spec, View scales, View zeros, View column_group,
                      View codes) override;
  void dequantize_codes(View codes, const GridSpec& spec, View scales, View zeros,
                        View column_group, View perm, View out) override;
  void pack_codes(View codes, int bits, View packed) override;
  void unpack_codes(View packed, int bits, View codes) override;
  void gram(View x, View h) override;
  void diagonal(View h, View out) override;
  void damp_hessian(View h, View perm, double scale, double damp, View a, View dead,
                    View damping) override;
  [[nodiscard]] bool factor_upper(View a, View workspace) override;
  [[nodiscard]] std::int64_t factor_workspace_bytes(std::int64_t d, DType dtype) override;
  void gather_columns(View in, View perm, View dead, View out) override;
  void gptq_sweep(const GptqProblem& problem) override;
  [[nodiscard]] std::int64_t gptq_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                  std::int64_t block, DType factor) override;

  // AwqOps
  void add_abs_sums(View x, View sums) override;
  void scale_weights(View w, View s, View t, View out) override;
  void round_trip_scaled(View w, View s, const GridSpec& spec, View out) override;
  void moment_loss(View a, View b, View h, View out, View workspace) override;
  [[nodiscard]] std::int64_t moment_loss_bytes(std::int64_t rows, std::int64_t d) override;
  void awq_clip(const AwqClipProblem& problem) override;
  [[nodiscard]] std::int64_t awq_clip_bytes(std::int64_t rows, std::int64_t d, const GridSpec& grid,
                                            std::int64_t n) override;

  // SlimOps
  void slim_divisors(View r, bool inverse, View out, View workspace) override;
  [[nodiscard]] std::int64_t slim_divisors_bytes(std::int64_t d, bool inverse,
                                                 DType factor) override;
  void slim_salience(View w, View divisors, std::int64_t group, View out) override;
  void slim_candidates(View w, int bits, std::int64_t group, DType scale_dtype, View base,
                       View lower, View higher) override;
  void softmax_kl(View y, View reference, double floor, View kl) override;
  void slim_sweep(const SlimProblem& problem) override;
  void slim_decode(const SlimDecode& problem) override;
  [[nodiscard]] std::int64_t slim_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                  std::int64_t group, DType factor) override;

  // PbllmOps
  void pbllm_select(const PbllmSelect& problem) override;
  [[nodiscard]] std::int64_t pbllm_select_bytes(std::int64_t rows, std::int64_t d,
                                                std::int64_t groups) override;
  void pbllm_sweep(const PbllmProblem& problem) override;
  [[nodiscard]] std::int64_t pbllm_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                   std::int64_t block, DType factor) override;
  void pbllm_split(View mask, View codes, View out, View ones, View workspace) override;
  [[nodiscard]] std::int64_t pbllm_split_bytes(std::int64_t rows, std::int64_t d) override;
  void pbllm_decode(const PbllmDecode& problem) override;

  // TransformOps
  void transform_rows(View x, const TransformView& q, bool inverse, View out) override;
  void transpose(View in, View out) override;
  void decode_midrise(View codes, int bits, View scales, View out) override;
  void decode_lattice(View codes, LatticeBook book, View scales, bool accumulate,
                      View out) override;
  void place_columns(View x, View perm, View diagonal, View out) override;

  // QuipOps
  void column_squares(View w, View out) override;
  void scale_moment(View h, View s, double scale, View out) override;
  void code_targets(View w, View perm, View scales, View zeros, int bits, View out) override;
  void ldlq_sweep(const LdlqProblem& problem) override;
  [[nodiscard]] std::int64_t ldlq_workspace_bytes(std::int64_t rows, std::int64_t d) override;
  void ldlq_greedy(const GreedyProblem& problem) override;
  [[nodiscard]] std::int64_t greedy_workspace_bytes(std::int64_t rows, std::int64_t d) override;

  // QuipSharpOps
  void quipsharp_targets(View w, View squares, double factor, View out, View scale) override;
  void quipsharp_sweep(const QuipSharpProblem& problem) override;
  [[nodiscard]] std::int64_t quipsharp_workspace_bytes(std::int64_t rows, std::int64_t d) override;

  // PackedOps
  void repack(View codes, View scales, View zeros, const PackedWeight& out) override;
  void unpack(const PackedWeight& w, View codes, View scales, View zeros) override;
  void expand(const PackedWeight& w, View out) override;
  void packed_matmul(View x, const PackedWeight& w, View out, bool accumulate, PackedKernel kernel,
                     View workspace) override;
  [[nodiscard]] std::int64_t packed_workspace_bytes(const PackedShape& shape, std::int64_t rows,
                                                    DType dtype,
                                                    PackedKernel kernel) const override;

  // StepOps
  void rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) override;
  void kv_append_step(View k, View v, std::int64_t head_dim, const KvCache& cache,
                      View position) override;
  void kv_append(View k, View v, std::int64_t head_dim, const KvCache& cache, std::int64_t first,
                 std::int64_t n, std::int64_t start) override;
  void kv_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
               View v) override;
  void attention_step(View q, const KvCache& cache, const AttnShape& shape, View position, View out,
                      View workspace) override;
  [[nodiscard]] std::int64_t attention_step_bytes(const AttnShape& shape, std::int64_t batch,
                                                  std::int64_t capacity) const override;
  void sample_step(View logits, const SampleOptions& options, const StepState& state,
                   View workspace) override;
  [[nodiscard]] std::int64_t sample_step_bytes(std::int64_t batch,
                                               std::int64_t vocab) const override;

  // BillmOps
  void billm_sweep(const BillmProblem& problem) override;
  [[nodiscard]] std::int64_t billm_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                   std::int64_t block, DType factor) override;

  // EvalOps
  void rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) override;
  void attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out) override;
  void compare_logits(View reference, View logits, View target, View out) override;

  // Fused ops
  void qkv_step(const QkvStep& s) override;
  void gate_up(const GateUp& s) override;
  void norm_linear(const NormLinear& s) override;
  void block_tail(const BlockTail& s) override;
  void linear(View x, const Linear& w, View out, bool accumulate, View workspace,
              PackedKernel kernel) override;
  void linears(View x, std::span<const LinearOut> all, View workspace) override;

  // Ops
  [[nodiscard]] DeviceKind kind() const override { return ops_.kind(); }
  [[nodiscard]] DeviceInfo info() override { return ops_.info(); }
  [[nodiscard]] RawMemory& memory() override { return ops_.memory(); }
  [[nodiscard]] RawMemory& staging_memory() override { return ops_.staging_memory(); }
  void upload(View host, View device) override;
  void download(View device, View host) override;
  void copy(View from, View to) override;
  void synchronize() override;
  // Bodies may call this object's ops. They count once, when they are recorded, and have no time of
  // their own: marks would become part of the recording. A replay counts as a call, and is timed.
  [[nodiscard]] bool can_record() const override { return ops_.can_record(); }
  [[nodiscard]] std::unique_ptr<Recording> record(const std::function<void()>& body) override;
  void replay(Recording& recording) override;
  [[nodiscard]] std::int64_t mark() override;
  [[nodiscard]] double elapsed_ms(std::int64_t from, std::int64_t to) override;

 private:
  struct Span {
    OpStats* stats;
    std::int64_t from;
    std::int64_t to;
  };
  // The entry of a name in op_names(); anything else is an internal error.
  OpStats& entry(const char* name) const;
  // Runs `call` as the op `name`, between two marks when timing and not recording.
  template <class Call>
  void run(const char* name, const OpCost& cost, Call&& call);
  void resolve_spans();

  Ops& ops_;
  const bool time_;
  bool recording_ = false;
  mutable std::map<std::string, OpStats> stats_;  // workspace queries are const and counted too
  std::vector<Span> spans_;
};

}  // namespace engine
