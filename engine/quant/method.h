// What a quantization method is to the driver: it says what it needs and turns the linears that
// share one input into packed weights. One method, one file in methods/; registry.cpp lists them.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/model/llama.h"
#include "engine/model/stream.h"
#include "engine/ops/ops.h"
#include "engine/weight/linear_weight.h"
#include "formats/json.h"

namespace engine {

struct Needs {
  bool hessian = false;    // GroupPass::hessian; without it no calibration data is read
  bool tap_order = false;  // one pass per tap, each through the sites already quantized
  bool study = false;      // study_group before the taps are quantized; needs the hessian
  // quantize_block() instead of quantize_group(): the block's inputs, not their moments.
  bool block = false;
  // With `block` or `hessian`: the next block gets what the original block makes of its inputs.
  // Otherwise what the quantized one does. Not with tap_order or study.
  bool original_stream = false;

  // Whether calibration data is read at all.
  [[nodiscard]] bool data() const { return hessian || block; }
};

struct SiteTask {
  Site site = Site::q;
  View weight;  // [rows, cols] in the compute dtype: the original weights, never written
};

// The linears fed by one tap of one block, with the statistics of that tap.
struct GroupPass {
  Ops& ops;
  Arena& arena;  // for the method's own memory, inside a scope of the driver
  Ledger& ledger;
  const ModelConfig& config;
  std::int64_t layer = 0;
  Tap tap = Tap::attn_in;
  std::vector<SiteTask> sites;
  View hessian;                 // f32 [d, d], lower triangle of the sum of x^T x over all tokens
  std::int64_t sequences = 0;   // calibration sequences summed up in it
  std::int64_t input_rows = 0;  // rows of the largest batch of inputs; 0 without calibration data

  // A measuring run: take memory from the arena, describe the results, compute nothing.
  [[nodiscard]] bool dry() const { return arena.is_measuring(); }
};

// Passes the calibration sequences through the block once more: `visit` gets the tap's input, a
// batch [at most GroupPass::input_rows, d] at a time, in order. In a dry run it is not called.
using InputReplay = std::function<void(const std::function<void(const View& x)>& visit)>;

// A whole block before anything of it is quantized, with its inputs: for methods that compare the
// outputs of its halves, or move factors between neighbouring weights. The method may run
// `capture` (engine/model/stream.h) on stream, hidden and copy with any weights of the same shapes.
struct BlockPass {
  Ops& ops;
  Arena& arena;  // for the method's own memory, inside a scope of the driver
  Ledger& ledger;
  const ModelConfig& config;
  std::int64_t layer = 0;
  StreamPass stream;  // weights: the original ones, never written; scratch for one batch
  View hidden;        // [windows * seq, hidden] in the compute dtype: the block's inputs, read only
  View copy;          // [batch * seq, hidden] for capture()

  // What multiplies the normalized inputs from now on, f32 [1, hidden], at first the original
  // norms. A method that moves factors into them writes them and sets norms_changed; they are then
  // stored in f32. Rows of a linear are scaled in the method's own copy.
  View attn_norm;
  View mlp_norm;
  bool norms_changed = false;

  [[nodiscard]] bool dry() const { return arena.is_measuring(); }
  [[nodiscard]] std::int64_t tokens() const { return hidden.rows; }
  // The same places as a pass over one tap, without statistics: for the encoders.
  [[nodiscard]] GroupPass group(Tap tap) {
    return {.ops = ops,
            .arena = arena,
            .ledger = ledger,
            .config = config,
            .layer = layer,
            .tap = tap,
            .sites = {},
            .hessian = {},
            .sequences = hidden.rows / stream.seq};
  }
};

// A quantized linear with its planes in host memory, and what happened on the way.
struct SiteResult {
  LinearWeight weight;
  Buffer codes;  // this and `small` own the bytes behind weight.planes; empty in a dry run
  std::vector<std::vector<std::byte>> small;
  std::string outcome = "ok";  // or "damped(LAMBDA, TRIES)"
  // Numbers worth keeping: the method's own loss, damping, ... A "relative_error" here replaces the
  // driver's, which compares with the original weight: for weights with factors moved in.
  Json details = Json::object();
};

class Method {
 public:
  virtual ~Method() = default;
  [[nodiscard]] virtual const char* name() const = 0;
  [[nodiscard]] virtual const char* summary() const = 0;
  // Adds the method's options, bound to its own members.
  virtual void declare_options(CLI::App& app) = 0;
  // After parsing: throws Error(usage) for options that are impossible by themselves or with this
  // model (a group that does not divide a linear's inputs).
  virtual void check(const ModelConfig& config) const = 0;
  // Every option as parsed; goes into the file and the report.
  [[nodiscard]] virtual Json options() const = 0;
  [[nodiscard]] virtual Needs needs() const = 0;
  // With Needs::study: called for every tap before any of the taps that share its capture pass is
  // quantized. The method keeps what it learns in its own members, on the host, until
  // quantize_group of the same tap. `replay` may be called once, also in a dry run.
  virtual void study_group(GroupPass& /*pass*/, const InputReplay& /*replay*/) {}
  // One result per pass.sites, in their order. Called unless needs().block.
  virtual std::vector<SiteResult> quantize_group(GroupPass& pass);
  // One result per site, in the order of all_sites. Called if needs().block.
  virtual std::vector<SiteResult> quantize_block(BlockPass& pass);
};

[[nodiscard]] std::vector<std::string> method_names();
// Throws Error(usage) listing the names for an unknown one.
[[nodiscard]] std::unique_ptr<Method> make_method(const std::string& name);

}  // namespace engine
