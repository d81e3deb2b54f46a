// What a quantization method is to the driver: it says what it needs and turns the linears that
// share one input into packed weights. One method, one file in methods/; registry.cpp lists them.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/model/llama.h"
#include "engine/ops/ops.h"
#include "engine/weight/linear_weight.h"
#include "formats/json.h"

namespace engine {

struct Needs {
  bool hessian = false;    // GroupPass::hessian; without it no calibration data is read
  bool tap_order = false;  // one pass per tap, each through the sites already quantized
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
  View hessian;                // f32 [d, d], lower triangle of the sum of x^T x over all tokens
  std::int64_t sequences = 0;  // calibration sequences summed up in it

  // A measuring run: take memory from the arena, describe the results, compute nothing.
  [[nodiscard]] bool dry() const { return arena.is_measuring(); }
};

// A quantized linear with its planes in host memory, and what happened on the way.
struct SiteResult {
  LinearWeight weight;
  Buffer codes;  // this and `small` own the bytes behind weight.planes; empty in a dry run
  std::vector<std::vector<std::byte>> small;
  std::string outcome = "ok";     // or "damped(LAMBDA, TRIES)"
  Json details = Json::object();  // numbers worth keeping: the method's own loss, damping, ...
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
  // One result per pass.sites, in their order.
  virtual std::vector<SiteResult> quantize_group(GroupPass& pass) = 0;
};

[[nodiscard]] std::vector<std::string> method_names();
// Throws Error(usage) listing the names for an unknown one.
[[nodiscard]] std::unique_ptr<Method> make_method(const std::string& name);

}  // namespace engine
