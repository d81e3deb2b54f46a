#include "engine/quant/grid_options.h"

#include "engine/core/args.h"
#include "engine/model/llama.h"

namespace engine {

const char* grid_rule_name(GridRule rule) {
  switch (rule) {
    case GridRule::gptq:
      return "gptq";
    case GridRule::awq:
      return "awq";
    case GridRule::omniquant:
      return "omniquant";
    case GridRule::paper:
      return "paper";
  }
  throw Error(ErrorCode::internal, "unknown grid rule");
}

void declare_grid_options(CLI::App& app, GridSpec& spec) {
  app.add_option("--bits", spec.bits, "Bits per weight, 1 to 8")->capture_default_str();
  app.add_option("--group", spec.group, "Columns per scale; 0: one scale per output row")
      ->capture_default_str();
  app.add_flag("--sym", spec.symmetric, "Symmetric grid: the zero is 2^(bits-1), none is stored");
  app.add_flag("--mse", spec.mse, "Search 80 shrunken ranges for the smallest sum |error|^2.4");
  add_choice<DType>(app, "--scale-dtype", spec.scale_dtype,
                    {{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}},
                    "How scales are stored; they are rounded before use, so nothing is lost later");
}

void check_grid_options(const GridSpec& spec, const ModelConfig& config) {
  if (spec.bits < 1 || spec.bits > 8) {
    throw Error(ErrorCode::usage, "--bits: expected 1 to 8, found " + std::to_string(spec.bits));
  }
  if (spec.group < 0) {
    throw Error(ErrorCode::usage,
                "--group: expected 0 or a positive number, found " + std::to_string(spec.group));
  }
  if ((spec.symmetric || spec.mse) && spec.rule != GridRule::gptq) {
    throw Error(ErrorCode::usage,
                std::string("--sym and --mse belong to the gptq grid rule, not to ") +
                    grid_rule_name(spec.rule));
  }
  if (spec.group == 0) return;
  for (const Site s : all_sites) {
    const std::int64_t cols = site_shape(config, s).cols;
    if (cols % spec.group != 0) {
      throw Error(ErrorCode::usage, "--group: expected a divisor of " + std::to_string(cols) +
                                        " (the inputs of " + site_name(s) + "), found " +
                                        std::to_string(spec.group));
    }
  }
}

Json grid_options(const GridSpec& spec) {
  Json j;
  j["bits"] = spec.bits;
  j["group"] = spec.group;
  j["rule"] = grid_rule_name(spec.rule);
  j["symmetric"] = spec.symmetric;
  j["mse"] = spec.mse;
  j["arithmetic"] = dtype_name(spec.arithmetic);
  j["scale_dtype"] = dtype_name(spec.scale_dtype);
  return j;
}

}  // namespace engine
