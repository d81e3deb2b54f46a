// The CUDA backend: one device, one stream, one class. Kernels live in the .cu files of their
// family. The constructor makes the device current in the calling thread; one CudaOps is used from
// that one thread, and outlives every Buffer and Arena taken from its memories. Only one of them may
// decode on a device at a time (vector_chain, cuda/vector.h).
#pragma once

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <map>
#include <memory>
#include <vector>

#include "cuda/scheme.h"
#include "cuda/vector.h"
#include "engine/ops/ops.h"

namespace engine {

class GemmPlans;  // cublasLt descriptors and chosen algorithms, one per shape (gemm_lt.cu)

class CudaOps final : public Ops {
 public:
  // Creates the context, the library handles and their workspaces (counted in the ledger).
  CudaOps(Ledger& ledger, int device_index);
  ~CudaOps() override;

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
  [[nodiscard]] DeviceKind kind() const override { return DeviceKind::cuda; }
  [[nodiscard]] DeviceInfo info() override;
  [[nodiscard]] RawMemory& memory() override;
  [[nodiscard]] RawMemory& staging_memory() override;
  void upload(View host, View device) override;
  void download(View device, View host) override;
  void copy(View from, View to) override;
  void synchronize() override;
  [[nodiscard]] bool can_record() const override { return true; }
  [[nodiscard]] std::unique_ptr<Recording> record(const std::function<void()>& body) override;
  void replay(Recording& recording) override;
  [[nodiscard]] std::int64_t mark() override;
  [[nodiscard]] double elapsed_ms(std::int64_t from, std::int64_t to) override;

  [[nodiscard]] cudaStream_t stream() const { return stream_; }

 private:
  [[nodiscard]] VectorResources vector_resources() const;
  [[nodiscard]] SchemeDevice scheme_device() const;
  // packed_matmul and its workspace for weights with transforms.
  [[nodiscard]] bool streams_rotated(const PackedShape& shape, std::int64_t rows,
                                     PackedKernel kernel) const;
  [[nodiscard]] std::int64_t rotated_workspace_bytes(const PackedShape& shape, std::int64_t rows,
                                                     DType dtype, PackedKernel kernel) const;
  void rotated_matmul(View x, const PackedWeight& w, View out, bool accumulate,
                      PackedKernel kernel, View workspace);
  // Computes p by a streaming kernel; false if none can.
  [[nodiscard]] bool stream_product(const VectorProblem& p);
  // The same in one launch for problems that follow each other.
  [[nodiscard]] bool stream_chain(const VectorProblem& first, const VectorProblem& second);

  explicit CudaOps(int device_index);  // nothing acquired yet; see context.cu

  int device_index_;
  cudaDeviceProp properties_{};
  bool sm90_code_ = false;  // what runs was compiled for sm_90 or later
  std::int64_t context_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  cublasLtHandle_t cublas_lt_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  cusolverDnHandle_t cusolver_ = nullptr;
  std::unique_ptr<RawMemory> memory_;
  std::unique_ptr<RawMemory> pinned_;
  Buffer lt_workspace_;     // u8, shared by all matrix products
  Buffer small_device_;     // u8, 64 KiB: reduction results, status words
  Buffer small_host_;       // u8, 64 KiB pinned: where they are read back to
  Buffer vector_partials_;  // f32, partial sums of vector_product
  Buffer vector_counters_;  // i32, zero between its launches
  Buffer vector_arrivals_;  // i32, zero between its launches
  std::unique_ptr<GemmPlans> plans_;
  std::vector<cudaEvent_t> events_;  // a ring, grown on demand
  std::int64_t marks_ = 0;           // marks made so far
};

}  // namespace engine
