// RTN: round to nearest on a min-max grid, no data (docs/methods/rtn.md).
//   s, z from the unit's range by --rule;  q = clamp(rne(w / s) + z, 0, 2^b - 1);  w^ = s (q - z)
// Sources: Huang et al. 2024, Eq. 1; the conventions of GPTQ's, AWQ's and OmniQuant's code.
#include "engine/core/args.h"
#include "engine/quant/encode.h"
#include "engine/quant/grid_options.h"
#include "engine/quant/method.h"

namespace engine {
namespace {

class Rtn final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "rtn"; }
  [[nodiscard]] const char* summary() const override {
    return "round to nearest, no calibration data";
  }

  void declare_options(CLI::App& app) override {
    declare_grid_options(app, spec_);
    add_choice<GridRule>(app, "--rule", spec_.rule,
                         {{"gptq", GridRule::gptq},
                          {"awq", GridRule::awq},
                          {"omniquant", GridRule::omniquant},
                          {"paper", GridRule::paper}},
                         "How scale and zero follow from a unit's range: V-G, V-A, V-O, V-P");
    add_choice<DType>(app, "--arithmetic", spec_.arithmetic,
                      {{"f32", DType::f32}, {"f16", DType::f16}},
                      "f16: every operation rounded to half precision, as AWQ's and OmniQuant's "
                      "code computes");
  }
  void check(const ModelConfig& config) const override {
    check_grid_options(spec_, config);
    if (spec_.arithmetic == DType::f16 && spec_.scale_dtype == DType::bf16) {
      throw Error(ErrorCode::usage,
                  "--arithmetic f16: expected --scale-dtype f32 or f16, found bf16");
    }
  }
  [[nodiscard]] Json options() const override { return grid_options(spec_); }
  [[nodiscard]] Needs needs() const override { return {}; }

  std::vector<SiteResult> quantize_group(GroupPass& pass) override {
    std::vector<SiteResult> results;
    for (const SiteTask& task : pass.sites) {
      const Arena::Scope scope(pass.arena);
      const std::int64_t rows = task.weight.rows, cols = task.weight.cols;
      AffineCodes c{.spec = spec_, .codes = {}, .scales = {}, .zeros = {}, .permutation = {}};
      c.codes = pass.arena.make(MemTag::solver, DType::u8, rows, cols);
      c.scales = pass.arena.make(MemTag::solver, DType::f32, rows, spec_.groups(cols));
      c.zeros = pass.arena.make(MemTag::solver, DType::i32, rows, spec_.groups(cols));
      if (!pass.dry()) {
        pass.ops.find_grid(task.weight, spec_, c.scales, c.zeros);
        pass.ops.quantize_codes(task.weight, spec_, c.scales, c.zeros, View{}, c.codes);
      }
      results.push_back(encode_affine(pass, c));
    }
    return results;
  }

 private:
  GridSpec spec_;
};

}  // namespace

std::unique_ptr<Method> make_rtn() { return std::make_unique<Rtn>(); }

}  // namespace engine
