// Writes a packed model while the driver produces it, and continues an interrupted one.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/core/report.h"
#include "engine/model/packed_model.h"
#include "engine/quant/method.h"
#include "engine/quant/write_queue.h"

namespace engine {

struct QuantizeJob;

// Compressing and writing happen on a thread behind the driver, in the order of the calls; the
// bytes that wait are counted in the job's ledger and bounded. An error there comes out of a later
// call, settle_for_resume() or finish() at the latest.
class ModelWriter {
 public:
  // Starts job.out, or with job.resume continues it. Throws Error(mismatch) if the unfinished file
  // was made with other inputs or options, Error(usage) if there is nothing to resume.
  explicit ModelWriter(const QuantizeJob& job);

  // Blocks that an earlier run completed.
  [[nodiscard]] std::int64_t resumed_blocks() const { return resumed_; }
  // Decodes the linears of a resumed block from the file into `out`, and its norms if they were
  // replaced; before anything is added.
  void install(std::int64_t layer, Loader& loader, const BlockWeights& out) const;

  void add_linear(const std::string& name, SiteResult result);
  // Relative squared error of the block's output against the original block on the same inputs.
  void note_block(std::int64_t layer, double relative_error);
  // Norms of the current block that replace the source's, f32 on the host, one per hidden unit.
  void replace_norms(std::int64_t layer, std::vector<float> attn, std::vector<float> mlp);
  // Writes the block's norms and a checkpoint. While the writing lags behind the driver, a
  // checkpoint that the next one follows at once is left out, but not for longer than a second.
  void finish_block(std::int64_t layer, Loader& loader);
  // Embedding, final norm and head are written one per block, before the block, so that they, too,
  // are written while the driver works; `layer` beyond the last writes what is left.
  void add_outer_tensors(std::int64_t layer, Loader& loader);
  // Directory and trailer; fills the report's tables of bits, blocks and linears.
  void finish(Report& report);

  // Waits until everything added is written; returns the blocks of the last checkpoint, which are
  // kept from then on if the run fails.
  std::int64_t settle_for_resume();

 private:
  void check_resumed(const JsonObject& state) const;
  void install_linear_of(const std::string& name, Loader& loader, View out) const;
  void install_norm(const std::string& name, Loader& loader, View out) const;
  void add_dense(const std::string& name, Loader& loader);
  [[nodiscard]] std::int64_t queue_bytes() const;
  [[nodiscard]] Json bits() const;

  const QuantizeJob& job_;
  ModelConfig config_;              // of the file: fewer layers when job.blocks is set
  std::string processor_;           // of the run: the last bits of sums depend on it
  std::vector<std::string> outer_;  // tensors outside the blocks that are still to be added
  std::map<std::string, std::vector<float>> replaced_;  // norms of the current block
  Json identity_;                                       // everything that decides the file's bytes
  std::int64_t resumed_ = 0;
  std::atomic<int> checkpoints_waiting_{0};

  // The queue's tasks alone use these until settle_for_resume() or finish() has drained it.
  std::optional<PackedWriter> writer_;
  std::int64_t finished_ = 0;
  std::chrono::steady_clock::time_point last_checkpoint_;
  Json linears_ = Json::object();
  Json dense_ = Json::object();
  Json blocks_ = Json::array();

  std::optional<WriteQueue> queue_;  // last: its thread ends before what it uses
};

}  // namespace engine
