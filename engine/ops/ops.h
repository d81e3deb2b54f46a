// The op contract: what a backend must implement. A missing half does not compile.
//
// Ops run in order on the backend's one stream; they return before the work is done unless a line
// says "Synchronises". Shapes are checked on the host (REQUIRE); outputs never alias inputs unless
// a line allows it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "engine/core/memory.h"
#include "engine/ops/attn_ops.h"
#include "engine/ops/awq_ops.h"
#include "engine/ops/billm_ops.h"
#include "engine/ops/dense_ops.h"
#include "engine/ops/eval_ops.h"
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

struct DeviceInfo {
  std::string name;      // "cpu", "cuda:0"
  std::string model;     // "AMD EPYC ...", "NVIDIA H200"
  std::string features;  // "avx512, 2 threads"; "sm_90, driver 13.0, 132 multiprocessors"
  std::int64_t total_bytes = 0;
  std::int64_t free_bytes = 0;  // as the driver (or the system) reports it now
  // In use on the device when this backend was ready, its ledgered memory not counted: the driver's
  // context, the libraries' code, and whatever other processes hold. 0 on the CPU.
  std::int64_t context_bytes = 0;
};

// Work recorded once, to be launched again as a whole.
class Recording {
 public:
  virtual ~Recording() = default;
};

class Ops : public DenseOps,
            public AttnOps,
            public QuantOps,
            public PackedOps,
            public StepOps,
            public SlimOps,
            public BillmOps,
            public AwqOps,
            public PbllmOps,
            public QuipOps,
            public QuipSharpOps,
            public TransformOps,
            public EvalOps {
 public:
  // Fused ops, defined in fused_ops.cpp by composition.
  virtual void qkv_step(const QkvStep& s);
  virtual void gate_up(const GateUp& s);
  virtual void norm_linear(const NormLinear& s);
  virtual void block_tail(const BlockTail& s);
  // out = x w^T or out += x w^T, by matmul or packed_matmul (kernel: for packed weights).
  // workspace as in packed_matmul; unused for a dense weight.
  virtual void linear(View x, const Linear& w, View out, bool accumulate, View workspace,
                      PackedKernel kernel = PackedKernel::automatic);
  // out = x w^T for each of some linears with the same x; a backend may take them together.
  struct LinearOut {
    const Linear* w;
    View out;
  };
  virtual void linears(View x, std::span<const LinearOut> all, View workspace);

  [[nodiscard]] virtual DeviceKind kind() const = 0;
  [[nodiscard]] virtual DeviceInfo info() = 0;
  [[nodiscard]] virtual RawMemory& memory() = 0;          // the device's own
  [[nodiscard]] virtual RawMemory& staging_memory() = 0;  // host memory that copies fast

  // Copies between host and device views of one shape and dtype (contiguous rows, any stride).
  // upload may return before the copy is done: the source must stay until synchronize().
  // download synchronises.
  virtual void upload(View host, View device) = 0;
  virtual void download(View device, View host) = 0;
  virtual void copy(View from, View to) = 0;  // device to device
  virtual void synchronize() = 0;

  // Whether record() works here (cuda). Elsewhere a step is simply run again.
  [[nodiscard]] virtual bool can_record() const = 0;
  // Records what `body` queues without running it: no allocation, no copy from or to the host and
  // nothing that synchronises inside. The views used must stay. Throws Error(device) where
  // can_record() is false.
  [[nodiscard]] virtual std::unique_ptr<Recording> record(const std::function<void()>& body) = 0;
  // Queues a recording of this backend.
  virtual void replay(Recording& recording) = 0;

  // A point in the stream, for timing. elapsed_ms waits for `to`; with from == to it only waits,
  // and takes any mark ever made. Between two marks it may refuse one with 16384 made since.
  [[nodiscard]] virtual std::int64_t mark() = 0;
  [[nodiscard]] virtual double elapsed_ms(std::int64_t from, std::int64_t to) = 0;
};

// threads 0: as many as the machine has. The ledger counts the backend's own workspaces and must
// outlive it.
std::unique_ptr<Ops> make_cpu_ops(Ledger& ledger, int threads);
// Throws Error(device) "built without CUDA", or that there is no such device.
std::unique_ptr<Ops> make_cuda_ops(Ledger& ledger, int device_index);
// The devices that make_cuda_ops would take; 0 without CUDA or without a GPU.
int cuda_device_count();

// "cpu" or "cuda:N"; throws Error(usage) for anything else.
std::unique_ptr<Ops> make_ops(const std::string& device, Ledger& ledger, int threads);

}  // namespace engine
