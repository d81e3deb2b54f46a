#include <iterator>
#include <sstream>

#include "engine/ops/trace_run.h"

namespace engine {

namespace {

// Every op of the contract, in alphabetical order.
constexpr const char* names =
    "add_abs_sums attention attention_runs attention_step attention_step_bytes "
    "attention_workspace_bytes awq_clip awq_clip_bytes billm_sweep billm_workspace_bytes "
    "block_tail code_targets column_squares compare_logits convert copy count_nonfinite "
    "damp_hessian decode_lattice decode_midrise dequantize_codes diagonal download elapsed_ms "
    "embed expand factor_upper factor_workspace_bytes fill_bell find_grid gate_up gather_columns "
    "gptq_sweep gptq_workspace_bytes gram greedy_workspace_bytes kv_append kv_append_step kv_read "
    "ldlq_greedy ldlq_sweep ldlq_workspace_bytes linear linears mark matmul moment_loss "
    "moment_loss_bytes norm_linear pack_codes packed_matmul packed_workspace_bytes pbllm_decode "
    "pbllm_select pbllm_select_bytes pbllm_split pbllm_split_bytes pbllm_sweep "
    "pbllm_workspace_bytes place_columns qkv_step quantize_codes quipsharp_sweep "
    "quipsharp_targets quipsharp_workspace_bytes record repack replay rmsnorm rope rope_rows "
    "rope_step round_trip_scaled row_argmax row_nll sample_step sample_step_bytes scale_moment "
    "scale_weights silu_mul slim_candidates slim_decode slim_divisors slim_divisors_bytes "
    "slim_salience slim_sweep slim_workspace_bytes softmax_kl square_sums synchronize "
    "transform_rows transpose unpack unpack_codes upload zero";

}  // namespace

const std::vector<std::string>& TraceOps::op_names() {
  static const std::vector<std::string> all = [] {
    std::istringstream words(names);
    return std::vector<std::string>{std::istream_iterator<std::string>(words), {}};
  }();
  return all;
}

TraceOps::TraceOps(Ops& ops, bool time) : ops_(ops), time_(time) { reset(); }

void TraceOps::reset() {
  spans_.clear();
  for (const std::string& name : op_names()) stats_[name] = OpStats{};
}

OpStats& TraceOps::entry(const char* name) const {
  const auto found = stats_.find(name);
  REQUIRE(found != stats_.end(), std::string("op_names() lacks ") + name);
  return found->second;
}

void TraceOps::resolve_spans() {
  for (const Span& span : spans_) span.stats->ms += ops_.elapsed_ms(span.from, span.to);
  spans_.clear();
}

std::map<std::string, OpStats> TraceOps::stats() {
  resolve_spans();
  return stats_;
}

Json TraceOps::to_json() {
  Json out = Json::object();
  for (const auto& [name, s] : stats()) {
    if (s.calls == 0) continue;
    Json& op = out[name];
    op["calls"] = s.calls;
    op["bytes"] = s.bytes;
    op["flops"] = s.flops;
    if (!time_) continue;
    op["ms"] = s.ms;
    if (s.ms > 0) {
      op["gb_per_s"] = static_cast<double>(s.bytes) / s.ms * 1e-6;
      op["gflop_per_s"] = static_cast<double>(s.flops) / s.ms * 1e-6;
    }
  }
  return out;
}

// DenseOps

void TraceOps::embed(View ids, View table, View out) {
  run("embed", cost::embed(ids, out), [&] { ops_.embed(ids, table, out); });
}

void TraceOps::rmsnorm(View x, View weight, float eps, View out) {
  run("rmsnorm", cost::rmsnorm(x, weight, out), [&] { ops_.rmsnorm(x, weight, eps, out); });
}

void TraceOps::matmul(View x, View w, View out, bool accumulate) {
  run("matmul", cost::matmul(x, w, out, accumulate), [&] { ops_.matmul(x, w, out, accumulate); });
}

void TraceOps::silu_mul(View gate, View up, View out) {
  run("silu_mul", cost::silu_mul(gate, up, out), [&] { ops_.silu_mul(gate, up, out); });
}

void TraceOps::convert(View in, View out) {
  run("convert", cost::pass({in, out}), [&] { ops_.convert(in, out); });
}

void TraceOps::row_nll(View logits, View target, View nll) {
  run("row_nll", cost::row_nll(logits, target, nll), [&] { ops_.row_nll(logits, target, nll); });
}

void TraceOps::row_argmax(View logits, View out) {
  run("row_argmax", cost::pass({logits, out}), [&] { ops_.row_argmax(logits, out); });
}

std::int64_t TraceOps::count_nonfinite(View x) {
  std::int64_t count = 0;
  run("count_nonfinite", cost::pass({x}), [&] { count = ops_.count_nonfinite(x); });
  return count;
}

void TraceOps::square_sums(View a, View b, View out) {
  run("square_sums", cost::square_sums(a, b, out), [&] { ops_.square_sums(a, b, out); });
}

void TraceOps::fill_bell(View out, std::uint64_t seed, std::uint64_t stream, float scale,
                         float shift) {
  run("fill_bell", cost::pass({out}, 2), [&] { ops_.fill_bell(out, seed, stream, scale, shift); });
}

void TraceOps::zero(View out) {
  run("zero", cost::pass({out}), [&] { ops_.zero(out); });
}

// AttnOps

void TraceOps::rope(View x, std::int64_t head_dim, View cos, View sin, Positions positions) {
  run("rope", cost::rope(x, cos, sin, positions),
      [&] { ops_.rope(x, head_dim, cos, sin, positions); });
}

void TraceOps::attention(View q, View k, View v, const AttnShape& shape, std::int64_t batch,
                         View out, View workspace) {
  run("attention", cost::attention(q, k, v, out, shape, batch),
      [&] { ops_.attention(q, k, v, shape, batch, out, workspace); });
}

std::int64_t TraceOps::attention_workspace_bytes(const AttnShape& shape, std::int64_t batch,
                                                 std::int64_t q_len, std::int64_t kv_len) const {
  ++entry("attention_workspace_bytes").calls;
  return ops_.attention_workspace_bytes(shape, batch, q_len, kv_len);
}

// QuantOps

void TraceOps::find_grid(View w, const GridSpec& spec, View scales, View zeros) {
  run("find_grid", cost::find_grid(w, spec, scales, zeros),
      [&] { ops_.find_grid(w, spec, scales, zeros); });
}

void TraceOps::quantize_codes(View w, const GridSpec& spec, View scales, View zeros,
                              View column_group, View codes) {
  run("quantize_codes", cost::quantize_codes(w, scales, zeros, column_group, codes),
      [&] { ops_.quantize_codes(w, spec, scales, zeros, column_group, codes); });
}

void TraceOps::dequantize_codes(View codes, const GridSpec& spec, View scales, View zeros,
                                View column_group, View perm, View out) {
  run("dequantize_codes", cost::dequantize_codes(codes, scales, zeros, column_group, perm, out),
      [&] { ops_.dequantize_codes(codes, spec, scales, zeros, column_group, perm, out); });
}

void TraceOps::pack_codes(View codes, int bits, View packed) {
  run("pack_codes", cost::pass({codes, packed}), [&] { ops_.pack_codes(codes, bits, packed); });
}

void TraceOps::unpack_codes(View packed, int bits, View codes) {
  run("unpack_codes", cost::pass({packed, codes}), [&] { ops_.unpack_codes(packed, bits, codes); });
}

void TraceOps::gram(View x, View h) {
  run("gram", cost::gram(x, h), [&] { ops_.gram(x, h); });
}

void TraceOps::diagonal(View h, View out) {
  run("diagonal", cost::diagonal(out), [&] { ops_.diagonal(h, out); });
}

void TraceOps::damp_hessian(View h, View perm, double scale, double damp, View a, View dead,
                            View damping) {
  run("damp_hessian", cost::damp_hessian(h, perm, a, dead, damping),
      [&] { ops_.damp_hessian(h, perm, scale, damp, a, dead, damping); });
}

bool TraceOps::factor_upper(View a, View workspace) {
  bool positive_definite = false;
  run("factor_upper", cost::factor_upper(a),
      [&] { positive_definite = ops_.factor_upper(a, workspace); });
  return positive_definite;
}

std::int64_t TraceOps::factor_workspace_bytes(std::int64_t d, DType dtype) {
  ++entry("factor_workspace_bytes").calls;
  return ops_.factor_workspace_bytes(d, dtype);
}

void TraceOps::gather_columns(View in, View perm, View dead, View out) {
  run("gather_columns", cost::pass({in, perm, dead, out}),
      [&] { ops_.gather_columns(in, perm, dead, out); });
}

void TraceOps::gptq_sweep(const GptqProblem& problem) {
  run("gptq_sweep", cost::gptq_sweep(problem), [&] { ops_.gptq_sweep(problem); });
}

std::int64_t TraceOps::gptq_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                            DType factor) {
  ++entry("gptq_workspace_bytes").calls;
  return ops_.gptq_workspace_bytes(rows, d, block, factor);
}

// AwqOps

void TraceOps::add_abs_sums(View x, View sums) {
  run("add_abs_sums", cost::add_abs_sums(x, sums), [&] { ops_.add_abs_sums(x, sums); });
}

void TraceOps::scale_weights(View w, View s, View t, View out) {
  run("scale_weights", cost::pass({w, s, t, out}, 2), [&] { ops_.scale_weights(w, s, t, out); });
}

void TraceOps::round_trip_scaled(View w, View s, const GridSpec& spec, View out) {
  run("round_trip_scaled", cost::round_trip_scaled(w, s, out),
      [&] { ops_.round_trip_scaled(w, s, spec, out); });
}

void TraceOps::moment_loss(View a, View b, View h, View out, View workspace) {
  run("moment_loss", cost::moment_loss(a, b, h),
      [&] { ops_.moment_loss(a, b, h, out, workspace); });
}

std::int64_t TraceOps::moment_loss_bytes(std::int64_t rows, std::int64_t d) {
  std::int64_t bytes = 0;
  run("moment_loss_bytes", {}, [&] { bytes = ops_.moment_loss_bytes(rows, d); });
  return bytes;
}

void TraceOps::awq_clip(const AwqClipProblem& problem) {
  run("awq_clip", cost::awq_clip(problem), [&] { ops_.awq_clip(problem); });
}

std::int64_t TraceOps::awq_clip_bytes(std::int64_t rows, std::int64_t d, const GridSpec& grid,
                                      std::int64_t n) {
  std::int64_t bytes = 0;
  run("awq_clip_bytes", {}, [&] { bytes = ops_.awq_clip_bytes(rows, d, grid, n); });
  return bytes;
}

// SlimOps

void TraceOps::slim_divisors(View r, bool inverse, View out, View workspace) {
  run("slim_divisors", cost::slim_divisors(r, inverse, out),
      [&] { ops_.slim_divisors(r, inverse, out, workspace); });
}

std::int64_t TraceOps::slim_divisors_bytes(std::int64_t d, bool inverse, DType factor) {
  ++entry("slim_divisors_bytes").calls;
  return ops_.slim_divisors_bytes(d, inverse, factor);
}

void TraceOps::slim_salience(View w, View divisors, std::int64_t group, View out) {
  run("slim_salience", cost::pass({w, divisors, out}, 3),
      [&] { ops_.slim_salience(w, divisors, group, out); });
}

void TraceOps::slim_candidates(View w, int bits, std::int64_t group, DType scale_dtype, View base,
                               View lower, View higher) {
  run("slim_candidates", cost::slim_candidates(w, base, lower, higher),
      [&] { ops_.slim_candidates(w, bits, group, scale_dtype, base, lower, higher); });
}

void TraceOps::softmax_kl(View y, View reference, double floor, View kl) {
  run("softmax_kl", cost::softmax_kl(y, reference, kl),
      [&] { ops_.softmax_kl(y, reference, floor, kl); });
}

void TraceOps::slim_sweep(const SlimProblem& problem) {
  run("slim_sweep", cost::slim_sweep(problem), [&] { ops_.slim_sweep(problem); });
}

void TraceOps::slim_decode(const SlimDecode& problem) {
  run("slim_decode", cost::slim_decode(problem), [&] { ops_.slim_decode(problem); });
}

std::int64_t TraceOps::slim_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t group,
                                            DType factor) {
  ++entry("slim_workspace_bytes").calls;
  return ops_.slim_workspace_bytes(rows, d, group, factor);
}

// PbllmOps

void TraceOps::pbllm_select(const PbllmSelect& problem) {
  run("pbllm_select", cost::pbllm_select(problem), [&] { ops_.pbllm_select(problem); });
}

std::int64_t TraceOps::pbllm_select_bytes(std::int64_t rows, std::int64_t d, std::int64_t groups) {
  ++entry("pbllm_select_bytes").calls;
  return ops_.pbllm_select_bytes(rows, d, groups);
}

void TraceOps::pbllm_sweep(const PbllmProblem& problem) {
  run("pbllm_sweep", cost::pbllm_sweep(problem), [&] { ops_.pbllm_sweep(problem); });
}

std::int64_t TraceOps::pbllm_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                             DType factor) {
  ++entry("pbllm_workspace_bytes").calls;
  return ops_.pbllm_workspace_bytes(rows, d, block, factor);
}

void TraceOps::pbllm_split(View mask, View codes, View out, View ones, View workspace) {
  run("pbllm_split", cost::pbllm_split(mask, codes, out, ones),
      [&] { ops_.pbllm_split(mask, codes, out, ones, workspace); });
}

std::int64_t TraceOps::pbllm_split_bytes(std::int64_t rows, std::int64_t d) {
  ++entry("pbllm_split_bytes").calls;
  return ops_.pbllm_split_bytes(rows, d);
}

void TraceOps::pbllm_decode(const PbllmDecode& problem) {
  run("pbllm_decode", cost::pbllm_decode(problem), [&] { ops_.pbllm_decode(problem); });
}

// TransformOps

void TraceOps::transform_rows(View x, const TransformView& q, bool inverse, View out) {
  run("transform_rows", cost::transform_rows(x, q, out),
      [&] { ops_.transform_rows(x, q, inverse, out); });
}

void TraceOps::transpose(View in, View out) {
  run("transpose", cost::pass({in, out}), [&] { ops_.transpose(in, out); });
}

void TraceOps::decode_midrise(View codes, int bits, View scales, View out) {
  run("decode_midrise", cost::pass({out, codes, scales}, 2),
      [&] { ops_.decode_midrise(codes, bits, scales, out); });
}

void TraceOps::decode_lattice(View codes, LatticeBook book, View scales, bool accumulate,
                              View out) {
  run("decode_lattice", cost::decode_lattice(codes, scales, accumulate, out),
      [&] { ops_.decode_lattice(codes, book, scales, accumulate, out); });
}

void TraceOps::place_columns(View x, View perm, View diagonal, View out) {
  run("place_columns", cost::pass({x, perm, diagonal, out}, diagonal.empty() ? 0 : 1),
      [&] { ops_.place_columns(x, perm, diagonal, out); });
}

// QuipOps

void TraceOps::column_squares(View w, View out) {
  run("column_squares", cost::pass({w, out}, 2), [&] { ops_.column_squares(w, out); });
}

void TraceOps::scale_moment(View h, View s, double scale, View out) {
  run("scale_moment", cost::scale_moment(h, s, out), [&] { ops_.scale_moment(h, s, scale, out); });
}

void TraceOps::code_targets(View w, View perm, View scales, View zeros, int bits, View out) {
  run("code_targets", cost::pass({w, perm, scales, zeros, out}, 4),
      [&] { ops_.code_targets(w, perm, scales, zeros, bits, out); });
}

void TraceOps::ldlq_sweep(const LdlqProblem& problem) {
  run("ldlq_sweep", cost::ldlq_sweep(problem), [&] { ops_.ldlq_sweep(problem); });
}

std::int64_t TraceOps::ldlq_workspace_bytes(std::int64_t rows, std::int64_t d) {
  ++entry("ldlq_workspace_bytes").calls;
  return ops_.ldlq_workspace_bytes(rows, d);
}

void TraceOps::ldlq_greedy(const GreedyProblem& problem) {
  run("ldlq_greedy", cost::ldlq_greedy(problem), [&] { ops_.ldlq_greedy(problem); });
}

std::int64_t TraceOps::greedy_workspace_bytes(std::int64_t rows, std::int64_t d) {
  ++entry("greedy_workspace_bytes").calls;
  return ops_.greedy_workspace_bytes(rows, d);
}

// QuipSharpOps

void TraceOps::quipsharp_targets(View w, View squares, double factor, View out, View scale) {
  run("quipsharp_targets", cost::pass({w, squares, out, scale}, 1),
      [&] { ops_.quipsharp_targets(w, squares, factor, out, scale); });
}

void TraceOps::quipsharp_sweep(const QuipSharpProblem& problem) {
  run("quipsharp_sweep", cost::quipsharp_sweep(problem), [&] { ops_.quipsharp_sweep(problem); });
}

std::int64_t TraceOps::quipsharp_workspace_bytes(std::int64_t rows, std::int64_t d) {
  ++entry("quipsharp_workspace_bytes").calls;
  return ops_.quipsharp_workspace_bytes(rows, d);
}

// PackedOps

void TraceOps::repack(View codes, View scales, View zeros, const PackedWeight& out) {
  run("repack", cost::pass({codes, scales, zeros, out.records, out.row_units}),
      [&] { ops_.repack(codes, scales, zeros, out); });
}

void TraceOps::unpack(const PackedWeight& w, View codes, View scales, View zeros) {
  run("unpack", cost::pass({w.records, w.row_units, codes, scales, zeros}),
      [&] { ops_.unpack(w, codes, scales, zeros); });
}

void TraceOps::expand(const PackedWeight& w, View out) {
  run("expand", cost::expand(w, out), [&] { ops_.expand(w, out); });
}

void TraceOps::packed_matmul(View x, const PackedWeight& w, View out, bool accumulate,
                             PackedKernel kernel, View workspace) {
  run("packed_matmul", cost::packed_matmul(x, w, out, accumulate),
      [&] { ops_.packed_matmul(x, w, out, accumulate, kernel, workspace); });
}

std::int64_t TraceOps::packed_workspace_bytes(const PackedShape& shape, std::int64_t rows,
                                              DType dtype, PackedKernel kernel) const {
  ++entry("packed_workspace_bytes").calls;
  return ops_.packed_workspace_bytes(shape, rows, dtype, kernel);
}

// StepOps

void TraceOps::rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) {
  run("rope_step", cost::rope_step(x, cos, sin, position),
      [&] { ops_.rope_step(x, head_dim, cos, sin, position); });
}

void TraceOps::kv_append_step(View k, View v, std::int64_t head_dim, const KvCache& cache,
                              View position) {
  run("kv_append_step", cost::kv_append_step(k, v, cache, position),
      [&] { ops_.kv_append_step(k, v, head_dim, cache, position); });
}

void TraceOps::kv_append(View k, View v, std::int64_t head_dim, const KvCache& cache,
                         std::int64_t first, std::int64_t n, std::int64_t start) {
  run("kv_append", cost::kv_copy(k, v, cache),
      [&] { ops_.kv_append(k, v, head_dim, cache, first, n, start); });
}

void TraceOps::kv_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
                       View v) {
  run("kv_read", cost::kv_copy(k, v, cache),
      [&] { ops_.kv_read(cache, head_dim, sequence, k, v); });
}

void TraceOps::attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                              View out, View workspace) {
  run("attention_step", cost::attention_step(q, cache, shape, out),
      [&] { ops_.attention_step(q, cache, shape, position, out, workspace); });
}

std::int64_t TraceOps::attention_step_bytes(const AttnShape& shape, std::int64_t batch,
                                            std::int64_t capacity) const {
  ++entry("attention_step_bytes").calls;
  return ops_.attention_step_bytes(shape, batch, capacity);
}

void TraceOps::sample_step(View logits, const SampleOptions& options, const StepState& state,
                           View workspace) {
  run("sample_step", cost::sample_step(logits, options, state),
      [&] { ops_.sample_step(logits, options, state, workspace); });
}

std::int64_t TraceOps::sample_step_bytes(std::int64_t batch, std::int64_t vocab) const {
  ++entry("sample_step_bytes").calls;
  return ops_.sample_step_bytes(batch, vocab);
}

// BillmOps

void TraceOps::billm_sweep(const BillmProblem& problem) {
  run("billm_sweep", cost::billm_sweep(problem), [&] { ops_.billm_sweep(problem); });
}

std::int64_t TraceOps::billm_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                             DType factor) {
  ++entry("billm_workspace_bytes").calls;
  return ops_.billm_workspace_bytes(rows, d, block, factor);
}

// Ops

std::unique_ptr<Recording> TraceOps::record(const std::function<void()>& body) {
  REQUIRE(!recording_, "record inside record");
  struct Flag {
    explicit Flag(bool& f) : flag(f) { flag = true; }
    Flag(const Flag&) = delete;
    Flag& operator=(const Flag&) = delete;
    ~Flag() { flag = false; }
    bool& flag;
  };
  const Flag flag(recording_);
  std::unique_ptr<Recording> recording = ops_.record(body);
  ++entry("record").calls;
  return recording;
}

void TraceOps::replay(Recording& recording) {
  run("replay", {}, [&] { ops_.replay(recording); });
}

void TraceOps::upload(View host, View device) {
  run("upload", {device.bytes(), 0}, [&] { ops_.upload(host, device); });
}

void TraceOps::download(View device, View host) {
  run("download", {device.bytes(), 0}, [&] { ops_.download(device, host); });
}

void TraceOps::copy(View from, View to) {
  run("copy", cost::pass({from, to}), [&] { ops_.copy(from, to); });
}

void TraceOps::synchronize() {
  ops_.synchronize();
  ++entry("synchronize").calls;
}

std::int64_t TraceOps::mark() {
  ++entry("mark").calls;
  return ops_.mark();
}

double TraceOps::elapsed_ms(std::int64_t from, std::int64_t to) {
  ++entry("elapsed_ms").calls;
  return ops_.elapsed_ms(from, to);
}

}  // namespace engine
