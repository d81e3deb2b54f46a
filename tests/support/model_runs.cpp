#include "tests/support/model_runs.h"

#include <CLI/CLI.hpp>
#include <limits>

#include "engine/model/decoder.h"
#include "engine/quant/calibration.h"
#include "engine/weight/codec.h"

namespace engine::test {

std::vector<float> logits_of(WeightSource& source, DType dtype, std::span<const std::int32_t> ids) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  Decoder decoder(source, *ops, ledger,
                  {.dtype = dtype, .capacity = static_cast<std::int64_t>(ids.size())});
  return decoder.feed_all_logits(ids);
}

TokenWindows token_rows(const std::filesystem::path& file, std::int64_t first, std::int64_t count,
                        std::int64_t seq) {
  const TokenMatrix m = load_token_matrix(file.string(), "tokens");
  REQUIRE(first + count <= m.rows && seq <= m.cols, "the file holds fewer tokens");
  TokenWindows out;
  out.windows = count;
  out.seq = seq;
  for (std::int64_t r = first; r < first + count; ++r) {
    const auto row = m.ids.begin() + r * m.cols;
    out.ids.insert(out.ids.end(), row, row + seq);
  }
  return out;
}

std::unique_ptr<Method> method_with(const std::string& name, const std::string& options,
                                    const ModelConfig& config) {
  std::unique_ptr<Method> method = make_method(name);
  CLI::App app;
  method->declare_options(app);
  app.parse(options);
  method->check(config);
  return method;
}

QuantOutcome run_quantize(WeightSource& source, const QuantRun& run,
                          const std::filesystem::path& out) {
  const auto method = method_with(run.method, run.options, source.config());
  return run_quantize(source, run, *method, out);
}

QuantOutcome run_quantize(WeightSource& source, const QuantRun& run, Method& method,
                          const std::filesystem::path& out) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  QuantizeJob job;
  job.source = &source;
  job.method = &method;
  job.ops = ops.get();
  job.ledger = &ledger;
  job.dtype = run.dtype;
  if (method.needs().data()) {
    job.calibration = run.calibration;
    job.calibration_protocol["source"] = "test";
  }
  job.batch = run.batch;
  job.blocks = run.blocks;
  job.out = out;
  job.threads = 2;
  job.poison = run.poison;
  Report report("test");
  QuantOutcome outcome;
  outcome.plan = plan_quantize(job);
  quantize(job, report);
  outcome.memory = ledger.entry(ops->memory().name());
  outcome.report = report.document();
  return outcome;
}

double perplexity_of(WeightSource& source, const TokenWindows& tokens, DType dtype, Exec exec) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  PplJob job;
  job.source = &source;
  job.ops = ops.get();
  job.ledger = &ledger;
  job.dtype = dtype;
  job.texts = {tokens};
  job.exec = exec;
  Report report("test");
  return perplexity(job, report).front().perplexity;
}

std::vector<std::int32_t> tokens_of(WeightSource& source, Exec exec) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  Decoder decoder(source, *ops, ledger,
                  {.dtype = DType::f32, .capacity = 24, .exec = exec, .max_steps = 9});
  decoder.prefill(std::vector<std::int32_t>{5, 6, 7, 8});
  decoder.sample();
  decoder.run_steps(8);
  return decoder.tokens(0, decoder.sampled());
}

std::vector<float> load_weight(WeightSource& source, std::int64_t layer, Site site) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  const auto layout = [&](Arena& arena) {
    const SiteShape shape = site_shape(source.config(), site);
    Loader loader(*ops, ledger, arena, source.config());
    const View out = arena.make(MemTag::weights, DType::f32, shape.rows, shape.cols);
    std::vector<float> host(static_cast<std::size_t>(out.count()));
    source.load_linear(layer, site, loader, out);
    if (arena.is_measuring()) return host;
    ops->download(out, host_view(host.data(), out.rows, out.cols));
    return host;
  };
  Arena plan = Arena::measuring(ops->kind());
  static_cast<void>(layout(plan));
  Arena arena(ops->memory(), ledger, plan.peak(), true);
  return layout(arena);
}

PackedFileView::PackedFileView(const std::filesystem::path& file)
    : reader_(file), model_(read_packed_model(reader_)) {}

std::vector<std::byte> PackedFileView::plane(std::uint32_t id) const {
  std::vector<std::byte> out(reader_.planes()[id].raw_bytes);
  reader_.read_plane(id, out, 1);
  return out;
}

std::vector<float> PackedFileView::decode(const std::string& linear) const {
  const PackedLinear& packed = model_.linears.at(linear);
  LinearWeight weight = packed.weight;
  std::vector<std::vector<std::byte>> storage;
  for (std::size_t i = 0; i < packed.planes.size(); ++i) {
    storage.push_back(plane(packed.planes[i]));
    weight.planes[i].data = make_view(storage.back().data(), DType::u8, DeviceKind::cpu, 1,
                                      static_cast<std::int64_t>(storage.back().size()));
  }
  // NaN where the decoder would leave a hole.
  std::vector<float> out(static_cast<std::size_t>(weight.rows * weight.cols),
                         std::numeric_limits<float>::quiet_NaN());
  decode_linear(weight, host_view(out.data(), weight.rows, weight.cols));
  return out;
}

std::vector<std::byte> PackedFileView::bytes(const std::string& linear) const {
  std::vector<std::byte> all;
  for (const std::uint32_t id : model_.linears.at(linear).planes) {
    const std::vector<std::byte> one = plane(id);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

double relative_square_error(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::quiet_NaN();
  double error = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = a[i], y = b[i];
    error += (x - y) * (x - y);
    size += y * y;
  }
  return error / size;
}

}  // namespace engine::test
