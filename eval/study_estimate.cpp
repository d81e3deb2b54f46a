#include "eval/study_estimate.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>

#include "engine/ops/peak.h"
#include "engine/quant/calibration.h"
#include "engine/quant/driver.h"
#include "eval/ppl.h"
#include "eval/tasks.h"

namespace engine {
namespace {

// How long a job takes beside one forward pass over its tokens at the rate of a large matrix
// product, with everything that comes with it (statistics, solving, packing). Methods, measured
// once: on a GPU LLaMA3-8B with 128 x 2048 tokens on an H200, the product's rate taken as 700
// Tflop/s; on a CPU the small model of the tests with 16 x 512 tokens, as ppl and kl there. The
// other evaluations are guesses. Other sizes and devices shift all by a factor of two or more.
struct Factor {
  const char* job;  // a method, or a kind of evaluation
  double cuda, cpu;
};
constexpr std::array<Factor, 12> factors = {{{"rtn", 0, 0},
                                             {"gptq", 2.8, 1.5},
                                             {"awq", 6.0, 14},
                                             {"quip", 4.3, 3},
                                             {"quipsharp", 4.0, 12},
                                             {"slimllm", 15, 6},
                                             {"pbllm", 3.4, 1.5},
                                             {"billm", 5.7, 6.5},
                                             {"ppl", 1.5, 0.6},
                                             {"kl", 1.8, 0.6},
                                             {"tasks", 2.5, 1},
                                             {"latency", 400, 20}}};
// Bytes per second of a checkpoint that is read, rounded, packed, compressed and written, and of
// one that is only read, with the start of the process in front.
constexpr double packing_rate_cuda = 3.2e9, packing_rate_cpu = 3e7;
constexpr double reading_rate_cuda = 6e9, reading_rate_cpu = 5e8;
constexpr double start_cuda = 1.0, start_cpu = 0.05;

constexpr std::int64_t tokens_without_data = 2048;  // a method without calibration, for flops
constexpr double bytes_per_token = 4;               // of English text, to count tokens of tasks
constexpr std::int64_t question_tokens = 64;        // for the share of attention

double factor_of(const std::string& job, bool cuda) {
  for (const Factor& f : factors) {
    if (job == f.job) return cuda ? f.cuda : f.cpu;
  }
  return 10;  // a method newer than the table
}

double weights_of(const ModelConfig& c, bool blocks_only) {
  double n = blocks_only ? 0 : static_cast<double>(c.vocab * c.hidden) * (c.tie_embeddings ? 1 : 2);
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(c, s);
    n += static_cast<double>(c.layers) * static_cast<double>(shape.rows * shape.cols);
  }
  return n;
}

double flops_of(const ModelConfig& model, std::int64_t windows, std::int64_t seq) {
  return windows > 0 && seq > 0 ? forward_flops(model, windows, seq) : 0;
}

double flops_of_questions(const ModelConfig& model, double tokens) {
  return tokens / static_cast<double>(question_tokens) * forward_flops(model, 1, question_tokens);
}

std::string seconds_text(double s) {
  char text[40];
  if (s < 100) {
    std::snprintf(text, sizeof text, "%.1f s", s);
  } else if (s < 6000) {
    std::snprintf(text, sizeof text, "%.0f min", s / 60);
  } else {
    std::snprintf(text, sizeof text, "%.1f h", s / 3600);
  }
  return text;
}

class Estimator {
 public:
  Estimator(const StudyConfig& config, const StudyPlan& plan, const StudyCache& cache)
      : config_(config), plan_(plan), cache_(cache), cuda_(device_kind(config) == "cuda") {}

  std::vector<JobEstimate> run() {
    std::vector<JobEstimate> estimates(plan_.jobs.size());
    for (std::size_t i = 0; i < plan_.jobs.size(); ++i) {
      if (must_run(plan_, i, cache_)) estimates[i] = estimate(plan_.jobs[i]);
    }
    return estimates;
  }

 private:
  [[nodiscard]] const GridCell& cell(const StudyJob& job) const { return plan_.cells[job.cell]; }
  [[nodiscard]] WeightSource& source(const StudyJob& job) const {
    return *plan_.sources[cell(job).model];
  }

  Ops& ops() {
    if (!ops_) {
      const std::string device =
          config_.device == "auto" ? (cuda_ ? "cuda:0" : "cpu") : config_.device;
      ops_ = make_ops(device, ledger_, static_cast<int>(config_.threads));
    }
    return *ops_;
  }

  DType dtype(const WeightSource& model) const {
    for (const DType d : {DType::f32, DType::bf16, DType::f16}) {
      if (config_.dtype == dtype_name(d)) return d;
    }
    if (!cuda_) return DType::f32;
    return model.linear_dtype() == DType::f16 ? DType::f16 : DType::bf16;
  }

  JobEstimate estimate(const StudyJob& job) {
    JobEstimate e;
    switch (job.kind) {
      case JobKind::quantize:
        estimate_quantization(job, e);
        break;
      case JobKind::ppl:
      case JobKind::kl:
        estimate_texts(job, e);
        break;
      case JobKind::tasks:
        estimate_tasks(job, e);
        break;
      case JobKind::latency:
        estimate_latency(job, e);
        break;
    }
    estimate_time(job, e);
    return e;
  }

  void estimate_quantization(const StudyJob& job, JobEstimate& e) {
    WeightSource& model = source(job);
    const ModelConfig& c = model.config();
    const std::unique_ptr<Method> method = configured_method(cell(job).method, cell(job).words, c);
    QuantizeJob q;
    q.source = &model;
    q.method = method.get();
    q.ops = &ops();
    q.ledger = &ledger_;
    q.dtype = dtype(model);
    if (method->needs().data()) {
      q.calibration.windows = config_.calibration.samples;
      q.calibration.seq = config_.calibration.seq;
      e.flops = flops_of(c, q.calibration.windows, q.calibration.seq);
    } else {
      e.flops = flops_of(c, 1, tokens_without_data);
    }
    e.device_bytes = plan_quantize(q).device_bytes;
    e.planned = true;
    const double group = cell(job).group > 0 ? static_cast<double>(cell(job).group) : 4096;
    const double linears = weights_of(c, true);
    e.file_bytes = static_cast<std::int64_t>(linears * (cell(job).weight_bits + 32 / group) / 8 +
                                             (weights_of(c, false) - linears) * 2);
  }

  // The pass of engine ppl over `windows` windows, on an arena that only measures. The blocks count
  // as dense, as they are held by default.
  std::int64_t planned_pass(WeightSource& model, std::int64_t windows, std::int64_t seq) {
    Arena arena = Arena::measuring(ops().kind());
    EvalModel m;
    m.source = &model;
    m.ops = &ops();
    m.ledger = &ledger_;
    m.dtype = dtype(model);
    Loader loader(ops(), ledger_, arena, model.config());
    TokenWindows tokens;
    tokens.windows = windows;
    tokens.seq = seq;
    const View hidden =
        arena.make(MemTag::hidden_stream, m.dtype, windows * seq, model.config().hidden);
    run_windows(m, loader, tokens, 0, "", hidden, nullptr);
    const Head head(m, loader, windows * seq);
    return arena.peak();
  }

  std::int64_t windows_of(const StudyJob& job, const StudyEvaluation& e) {
    const std::string key = std::to_string(cell(job).model) + "\n" + e.text + "\n" + e.dataset +
                            "\n" + std::to_string(e.seq) + " " + std::to_string(e.limit) + e.bos;
    const auto known = windows_.find(key);
    if (known != windows_.end()) return known->second;
    WeightSource& model = source(job);
    const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(model);
    const std::string dataset =
        e.dataset == "ptb" || e.dataset == "c4" ? e.dataset + "-old" : e.dataset;
    BosPolicy bos = BosPolicy::model;
    for (const BosPolicy p : {BosPolicy::stream_start, BosPolicy::per_window, BosPolicy::none}) {
      if (e.bos == bos_policy_name(p)) bos = p;
    }
    return windows_[key] = load_eval_windows({e.text, dataset_from_name(dataset)}, model,
                                             tokenizer.get(), e.seq, bos, e.limit)
                               .tokens.windows;
  }

  void estimate_texts(const StudyJob& job, JobEstimate& e) {
    std::int64_t windows = 0;
    for (const std::size_t i : job.evaluations) {
      windows += windows_of(job, config_.evaluations[i]);
    }
    const std::int64_t seq = config_.evaluations[job.evaluations.front()].seq;
    const ModelConfig& c = source(job).config();
    e.flops = flops_of(c, windows, seq);
    e.device_bytes = planned_pass(source(job), windows, seq);
    e.planned = true;
    if (job.kind != JobKind::kl) return;
    // Two models: two streams, one block or head at a time.
    e.flops *= 2;
    e.device_bytes += windows * seq * c.hidden * dtype_bytes(dtype(source(job)));
    e.planned = false;
  }

  void estimate_tasks(const StudyJob& job, JobEstimate& e) {
    const StudyEvaluation& evaluation = config_.evaluations[job.evaluations.front()];
    double bytes = 0;
    for (const std::string& name : evaluation.tasks) {
      TaskRequest request;
      request.name = name;
      request.data = evaluation.data;
      request.shots = evaluation.shots.value_or(-1);
      request.limit = evaluation.limit;
      const auto known = task_bytes_.find(name + "\n" + evaluation.place);
      if (known != task_bytes_.end()) {
        bytes += known->second;
        continue;
      }
      // Worked examples that questions share, and contexts that choices share, are computed once.
      double of_task = 0;
      const Task task = load_task(request);
      for (const Preamble& p : task.preambles) {
        of_task += static_cast<double>(p.header.size());
        for (const std::string& shot : p.shots) of_task += static_cast<double>(shot.size());
      }
      for (const Question& q : task.questions) {
        std::size_t context = 0;
        for (const Choice& c : q.choices) {
          context = std::max(context, c.context.size());
          of_task += static_cast<double>(c.continuation.size());
        }
        of_task += static_cast<double>(context);
      }
      bytes += task_bytes_[name + "\n" + evaluation.place] = of_task;
    }
    const ModelConfig& c = source(job).config();
    const double tokens = bytes / bytes_per_token;
    e.flops = flops_of_questions(c, tokens);
    // The stream of one pass, which the command keeps within the memory that is free.
    const auto rows = static_cast<std::int64_t>(std::min(tokens, 262144.0));
    e.device_bytes = planned_pass(source(job), std::max<std::int64_t>(rows / 512, 1), 512);
  }

  void estimate_latency(const StudyJob& job, JobEstimate& e) {
    const StudyEvaluation& evaluation = config_.evaluations[job.evaluations.front()];
    const ModelConfig& c = source(job).config();
    const std::int64_t capacity = evaluation.prompt + evaluation.steps;
    const double linears = weights_of(c, true);
    const auto bytes = static_cast<double>(dtype_bytes(dtype(source(job))));
    const double bits = cell(job).method == "fp" ? 8 * bytes : cell(job).weight_bits + 0.3;
    e.flops = flops_of(c, 1, capacity);
    e.device_bytes = static_cast<std::int64_t>(
        linears * bits / 8 + (weights_of(c, false) - linears) * bytes +
        2 * bytes * static_cast<double>(c.layers * c.kv_heads * c.head_dim * capacity));
  }

  void estimate_time(const StudyJob& job, JobEstimate& e) {
    const std::string& method = cell(job).method;
    std::vector<double> rates;  // seconds per operation
    for (const auto& [key, r] : cache_.records()) {
      if (r.kind == job_kind_name(job.kind) && r.method == method && !r.resumed &&
          r.device == (cuda_ ? "cuda" : "cpu") && r.flops > 0 && r.seconds > 0) {
        rates.push_back(r.seconds / r.flops);
      }
    }
    if (!rates.empty()) {
      std::sort(rates.begin(), rates.end());
      e.seconds = rates[rates.size() / 2] * e.flops;
      e.from_reports = true;
      return;
    }
    const bool quantizes = job.kind == JobKind::quantize;
    const double model_bytes = 2 * weights_of(source(job).config(), false);
    const double per_s = quantizes ? (cuda_ ? packing_rate_cuda : packing_rate_cpu)
                                   : (cuda_ ? reading_rate_cuda : reading_rate_cpu);
    const double factor = factor_of(quantizes ? method : job_kind_name(job.kind), cuda_);
    e.seconds = (cuda_ ? start_cuda : start_cpu) + model_bytes / per_s +
                factor * e.flops / matrix_rate(dtype(source(job)));
  }

  double matrix_rate(DType d) {
    const auto known = rates_.find(d);
    if (known != rates_.end()) return known->second;
    return rates_[d] = measured_matmul_flops(ops(), ledger_, d);
  }

  const StudyConfig& config_;
  const StudyPlan& plan_;
  const StudyCache& cache_;
  bool cuda_;
  Ledger ledger_;
  std::unique_ptr<Ops> ops_;
  std::map<DType, double> rates_;
  std::map<std::string, std::int64_t> windows_;
  std::map<std::string, double> task_bytes_;
};

std::int64_t option_number(const Json& report, const char* key) {
  const std::string text = report.at("options").at(key).get<std::string>();
  std::int64_t n = 0;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), n);
  return failure == std::errc() && end == text.data() + text.size() ? n : 0;
}

}  // namespace

double reported_flops(JobKind kind, const Json& report, const ModelConfig& model) {
  try {
    switch (kind) {
      case JobKind::quantize:
        if (!report.contains("calibration")) return flops_of(model, 1, tokens_without_data);
        return flops_of(model, report["calibration"].at("samples").get<std::int64_t>(),
                        report["calibration"].at("seq").get<std::int64_t>());
      case JobKind::ppl:
      case JobKind::kl: {
        double flops = 0;
        for (const Json& p : report.at("protocols")) {
          flops +=
              flops_of(model, p.at("windows").get<std::int64_t>(), p.at("seq").get<std::int64_t>());
        }
        return kind == JobKind::kl ? 2 * flops : flops;
      }
      case JobKind::tasks:
        return flops_of_questions(model, report.at("packing").at("tokens_computed").get<double>());
      case JobKind::latency:
        return flops_of(model, 1, option_number(report, "prompt") + option_number(report, "steps"));
    }
  } catch (const nlohmann::json::exception&) {
    // A report without these fields is still a result; only estimates go without it.
  }
  return 0;
}

std::vector<JobEstimate> estimate_jobs(const StudyConfig& config, const StudyPlan& plan,
                                       const StudyCache& cache) {
  return Estimator(config, plan, cache).run();
}

std::string plan_text(const StudyConfig& config, const StudyPlan& plan, const StudyCache& cache,
                      const std::vector<JobEstimate>& estimates) {
  std::string text = "study " + config.name + ", results in " + config.out.string() + "\n";
  double seconds = 0;
  std::int64_t memory = 0, largest = 0, all = 0;
  std::size_t to_run = 0;
  for (std::size_t i = 0; i < plan.jobs.size(); ++i) {
    const StudyJob& job = plan.jobs[i];
    text += "  " + job.title + ": ";
    if (!must_run(plan, i, cache)) {
      text += "cached\n";
      continue;
    }
    const JobEstimate& e = estimates[i];
    text += "run, " + seconds_text(e.seconds) +
            (e.from_reports ? " (earlier reports), " : " (matrix rate), ") +
            human_bytes(e.device_bytes) + (e.planned ? " (planned)" : " (formula)") + "\n";
    ++to_run;
    seconds += e.seconds;
    memory = std::max(memory, e.device_bytes);
    largest = std::max(largest, e.file_bytes);
    all += e.file_bytes;
  }
  for (const LeftOut& l : plan.left_out) {
    text += "  left out: " + l.model + ", " + l.setting + ": " + l.reason + "\n";
  }
  text += std::to_string(plan.jobs.size()) + " jobs, " + std::to_string(plan.jobs.size() - to_run) +
          " cached, " + std::to_string(to_run) + " to run; about " + seconds_text(seconds) +
          ", at most " + human_bytes(memory) + " of device memory and " +
          human_bytes(config.keep_models ? all : largest) +
          " of quantized models on disk at a time\n";
  return text;
}

}  // namespace engine
