// Generation: the whole model resident, a K/V cache for several sequences, a prompt pass in chunks
// and one step per token, recorded once and replayed where the backend can.
//
//   Decoder d(source, ops, ledger, {.dtype = DType::bf16, .capacity = 1024, .batch = 4});
//   d.reset({.temperature = 0.8F});   // forget, choose the sampling
//   d.prefill(tokens);                // [4, len] ids
//   d.sample();                       // the first token of each sequence
//   d.run_steps(99);                  // 99 more, queued; the host does nothing per token
//   d.tokens(0, 100);                 // [4, 100] ids; waits
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/model/llama.h"
#include "engine/model/llama_step.h"
#include "engine/model/scheme.h"
#include "engine/model/source.h"

namespace engine {

struct DecoderOptions {
  DType dtype = DType::bf16;  // of activations, dense weights and the plain cache
  std::int64_t capacity = 0;  // tokens per sequence: prompt plus generated
  std::int64_t batch = 1;     // sequences, all of one length; 1..1024
  Exec exec = Exec::decoded;
  std::optional<SchemeOptions> scheme = {};       // quantize at load; with either exec
  bool kv8 = false;                               // 8-bit cache (KvCache)
  bool record = true;                             // record the step where ops.can_record()
  PackedKernel kernel = PackedKernel::automatic;  // of prompt passes; steps choose for themselves
  std::int64_t max_steps = 0;                     // tokens sampled between resets; 0: capacity
  std::int64_t prompt_rows = 2048;                // most stacked rows per prompt pass
  bool poison = false;                            // fill memory with NaN before its first use
  bool verify = false;  // read packed weights back and compare them with the planes
};

// What one step reads from device memory at least, in bytes.
struct StepBytes {
  std::int64_t weights = 0;  // linears, norms, head, the embedding's rows
  std::int64_t kv = 0;       // keys and values of all tokens up to the position, scales included
  [[nodiscard]] std::int64_t total() const { return weights + kv; }
};

class Decoder {
 public:
  // Plans, takes the memory and loads every weight. `source`, `ops` and `ledger` must outlive it.
  // Throws Error(usage) for a linear that options.exec cannot hold, or packed with none to pack.
  Decoder(WeightSource& source, Ops& ops, Ledger& ledger, const DecoderOptions& options);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Forgets all tokens; sequence b then samples with seed + b. Waits for what is queued.
  void reset(const SampleOptions& sampling = {});

  // Feeds tokens [batch, len] (row-major) after those already fed; logits() are then those after
  // the last ones. Queued. Throws Error(usage) beyond the capacity, Error(mismatch) for an id
  // outside the vocabulary.
  void prefill(std::span<const std::int32_t> tokens);
  // The same tokens [len] for every sequence, computed once.
  void prefill_shared(std::span<const std::int32_t> tokens);
  // Samples the token after the prompt of each sequence. Queued. Needs a prefill before.
  void sample();
  // `n` times: feeds the tokens sampled last and samples the next. Queued; after the first step of
  // this decoder each is one replay. Checks for Ctrl-C every 16 steps. Throws Error(usage) beyond
  // the capacity or max_steps before anything is queued.
  void run_steps(std::int64_t n);
  // Waits until all that was queued is done.
  void synchronize();

  // Tokens first .. first + count - 1 of each sequence as sampled since reset, [batch, count].
  // Waits. Throws Error(numeric) if logits were not finite.
  [[nodiscard]] std::vector<std::int32_t> tokens(std::int64_t first, std::int64_t count);
  // The logits that the next token was or will be sampled from, f32 [batch, vocab]. Waits. Throws
  // Error(numeric) if they are not finite. The view lasts until the next call.
  [[nodiscard]] std::span<const float> logits();

  // prefill() and logits().
  std::span<const float> feed(std::span<const std::int32_t> tokens);
  // Logits of all rows of one feed of at most prompt_rows tokens, f32 [tokens, vocab]; batch 1.
  std::vector<float> feed_all_logits(std::span<const std::int32_t> tokens);

  [[nodiscard]] std::int64_t position() const { return position_; }  // tokens fed per sequence
  [[nodiscard]] std::int64_t sampled() const { return sampled_; }    // tokens since reset
  [[nodiscard]] std::int64_t capacity() const { return options_.capacity; }
  [[nodiscard]] std::int64_t batch() const { return options_.batch; }
  [[nodiscard]] const DecoderOptions& options() const { return options_; }
  [[nodiscard]] const ModelConfig& config() const;
  // Whether steps are replayed from a recording (from the second step on).
  [[nodiscard]] bool records() const;

  // The plan: bytes of the arena and each tag's peak; the ledger's peaks are the same.
  [[nodiscard]] std::int64_t planned_bytes() const { return planned_bytes_; }
  [[nodiscard]] const TagBytes& planned_tags() const { return planned_tags_; }
  // Held by weights, the rotary tables included, and by the cache.
  [[nodiscard]] std::int64_t weight_bytes() const { return tag_bytes(MemTag::weights); }
  [[nodiscard]] std::int64_t kv_bytes() const { return tag_bytes(MemTag::kv); }
  // The next step if `position` tokens lie before it.
  [[nodiscard]] StepBytes step_bytes(std::int64_t position) const;

 private:
  // Takes all memory from the arena in its order and loads the weights, whose scratch is given back
  // before the activations are laid out. On a measuring arena only the takings happen.
  void build(Arena& arena);
  void make_scratch(Arena& arena);
  void load(Arena& arena);
  [[nodiscard]] std::int64_t rows_per_pass() const;
  [[nodiscard]] std::int64_t workspace_bytes(std::int64_t rows) const;
  [[nodiscard]] std::int64_t tag_bytes(MemTag tag) const {
    return resident_tags_[static_cast<std::size_t>(tag)];
  }
  // Throws unless `count` more tokens fit.
  void require_room(std::int64_t count) const;
  // Readies the feed of `len` tokens per sequence: ids to host_ids_, the position to the device.
  void start_feed(std::span<const std::int32_t> ids, std::int64_t len);
  // Runs `len` tokens each of `n` sequences from `first` on, host ids [n, len], through all blocks.
  // Returns their rows [n * len, hidden].
  View forward(const std::int32_t* ids, std::int64_t first, std::int64_t n, std::int64_t len,
               std::int64_t start);
  // host_ids_ [n, len] through forward() in passes of at most rows_per_pass() rows; the last row of
  // sequence s goes to last_[s].
  void prompt(std::int64_t n, std::int64_t len);
  void finish_feed(std::int64_t len);
  void step();

  std::unique_ptr<WeightSource> quantized_;  // if options.scheme
  WeightSource& source_;
  Ops& ops_;
  Ledger& ledger_;
  DecoderOptions options_;
  SampleOptions sampling_;
  std::int64_t position_ = 0;
  std::int64_t sampled_ = 0;
  bool fed_ = false;      // logits_ wait for sample()
  bool stepped_ = false;  // the first step ever is not recorded: it readies the libraries
  std::int64_t planned_bytes_ = 0;
  TagBytes planned_tags_{};
  TagBytes resident_tags_{};
  std::unique_ptr<Arena> arena_;
  View embedding_, final_norm_;
  Linear head_;
  std::vector<BlockWeights> blocks_;
  std::vector<KvCache> cache_;
  RopeTable rope_;
  BlockScratch scratch_;
  View ids_, x_;        // of a prompt pass
  View last_, logits_;  // [batch, hidden], f32 [batch, vocab]
  View step_workspace_, sample_workspace_;
  StepState state_;
  std::unique_ptr<Recording> recording_;
  std::vector<std::int32_t> host_ids_;  // on their way to the device, as is the position
  std::int32_t host_position_ = 0;
  std::vector<float> host_logits_;
};

}  // namespace engine
