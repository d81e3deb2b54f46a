// Writes a packed model while the driver produces it, and continues an interrupted one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "engine/core/report.h"
#include "engine/model/packed_model.h"
#include "engine/quant/method.h"

namespace engine {

struct QuantizeJob;

class ModelWriter {
 public:
  // Starts job.out, or with job.resume continues it. Throws Error(mismatch) if the unfinished file
  // was made with other inputs or options, Error(usage) if there is nothing to resume.
  explicit ModelWriter(const QuantizeJob& job);

  // Blocks that an earlier run completed.
  [[nodiscard]] std::int64_t finished_blocks() const { return finished_; }
  // Decodes a linear of a finished block from the file into `out`.
  void install(const std::string& name, Loader& loader, View out) const;

  void add_linear(const std::string& name, const SiteResult& result);
  // Relative squared error of the block's output against the original block on the same inputs.
  void note_block(std::int64_t layer, double relative_error);
  // Writes the block's norms and a checkpoint.
  void finish_block(std::int64_t layer, Loader& loader);
  // Embedding, final norm, head, tokenizer.
  void write_outer_tensors(Loader& loader);
  // Directory and trailer; fills the report's tables of bits, blocks and linears.
  void finish(Report& report);

  void keep_for_resume() { writer_->keep_for_resume(); }

 private:
  void check_resumed(const JsonObject& state) const;
  void add_dense(const std::string& name, Loader& loader);
  [[nodiscard]] Json bits() const;

  const QuantizeJob& job_;
  ModelConfig config_;  // of the file: fewer layers when job.blocks is set
  Json identity_;       // everything that decides the file's bytes
  std::optional<PackedWriter> writer_;
  std::int64_t finished_ = 0;
  Json linears_ = Json::object();
  Json dense_ = Json::object();
  Json blocks_ = Json::array();
};

}  // namespace engine
