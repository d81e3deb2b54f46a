#include "eval/study_rows.h"

#include "engine/core/report.h"
#include "eval/paper_rows.h"

namespace engine {
namespace {

std::optional<double> number_at(const Json& j, const char* key) {
  const auto found = j.find(key);
  if (found == j.end() || !found->is_number()) return std::nullopt;
  return found->get<double>();
}

// The peak of the device the job ran on; host staging beside a GPU does not count.
std::optional<std::int64_t> device_peak(const Json& report) {
  for (const Json& row : report.at("memory")) {
    if (row.at("memory") == report.at("device").at("name")) {
      return row.at("peak_bytes").get<std::int64_t>();
    }
  }
  return std::nullopt;
}

// "NVIDIA H200" or the processor's model.
std::string device_model(const Json& report) {
  return report.at("device").at("model").get<std::string>();
}

// "Calibration: 128 windows of 2048 tokens of calib.txt (plain), seed 0."
std::string calibration_note(const Json& c) {
  std::string text = "Calibration: " + std::to_string(c.at("samples").get<std::int64_t>()) +
                     " windows of " + std::to_string(c.at("seq").get<std::int64_t>()) +
                     " tokens, source " + c.at("source").get<std::string>();
  if (c.contains("dataset")) text += " (" + c["dataset"].get<std::string>() + ")";
  if (c.contains("seed")) text += ", seed " + std::to_string(c["seed"].get<std::int64_t>());
  return text + ".";
}

void take_quantization(StudyRow& row, const Json& report, bool resumed) {
  row.options = report.at("method_options");
  const Json& bits = report.at("bits");
  row.bits_nominal = bits.at(0).at("bits_nominal").get<double>();
  row.bits_stored = bits.at(0).at("bits_stored").get<double>();
  row.bits_on_disk = bits.at(0).at("bits_on_disk").get<double>();
  row.model_bits_on_disk = bits.at(1).at("bits_on_disk").get<double>();
  if (report.contains("blocks")) {
    for (const Json& b : report["blocks"]) {
      row.block_error.push_back(b.at("output_relative_error").get<double>());
    }
  }
  for (const Json& l : report.at("linears")) {
    row.linear_error.push_back(
        {l.at("linear").get<std::string>(), l.at("relative_error").get<double>()});
  }
  // The time of a continued run is not that of all blocks.
  if (!resumed) row.quantize_s = report.at("time_s").at("total").get<double>();
  if (report.contains("calibration")) row.notes.push_back(calibration_note(report["calibration"]));
  row.notes.push_back("Quantized with passes in " + report.at("compute_dtype").get<std::string>() +
                      ".");
  row.quantize_peak_bytes = device_peak(report);
  row.file_bytes = report.at("file_bytes").get<std::int64_t>();
}

// "lmeval-0.4 without BOS, 5-shot, mmlu-harness prompt, spaced letters": what two accuracies must
// share to be compared.
std::string task_protocol(const Json& p) {
  std::string text = p.at("encoding").get<std::string>() +
                     (p.at("bos").get<bool>() ? " with BOS, " : " without BOS, ") +
                     std::to_string(p.at("shots").get<std::int64_t>()) + "-shot";
  if (p.contains("prompt")) text += ", " + p["prompt"].get<std::string>() + " prompt";
  if (p.contains("letter")) text += ", " + p["letter"].get<std::string>() + " letters";
  return text;
}

// What is not as published: fewer questions, a cut list.
std::string task_note(const Json& p) {
  std::string text = p.value("note", std::string());
  const auto asked = p.at("questions").get<std::int64_t>();
  const auto found = p.at("questions_found").get<std::int64_t>();
  if (asked < found) {
    text += (text.empty() ? "" : "; ") + std::string("scored on ") + std::to_string(asked) +
            " of " + std::to_string(found) + " questions";
  }
  return text;
}

void take_scores(StudyRow& row, const Json& report) {
  const Json& protocols = report.at("protocols");
  for (std::size_t i = 0; i < report.at("results").size(); ++i) {
    const Json& r = report["results"].at(i);
    StudyRow::Score s;
    s.protocol = task_protocol(protocols.at(i));
    s.note = task_note(protocols.at(i));
    s.name = r.at("task").get<std::string>();
    s.n = r.at("n").get<std::int64_t>();
    s.acc = r.at("acc").get<double>();
    s.acc_stderr = number_at(r, "acc_stderr");
    s.acc_norm = number_at(r, "acc_norm");
    s.acc_norm_stderr = number_at(r, "acc_norm_stderr");
    row.scores.push_back(s);
    const auto categories = r.find("categories");
    if (categories == r.end()) continue;
    for (const auto& [name, c] : categories->items()) {
      StudyRow::Score part;
      part.name = s.name + "." + name;
      part.protocol = s.protocol;
      part.note = s.note;
      part.n = c.at("n").get<std::int64_t>();
      part.acc = c.at("acc").get<double>();
      part.acc_stderr = number_at(c, "acc_stderr");
      row.scores.push_back(part);
    }
  }
}

void take_divergence(StudyRow& row, const std::string& text, const Json& r) {
  StudyRow::Divergence d;
  d.text = text;
  const Json& kl = r.at("kl");
  d.mean = kl.at("mean").get<double>();
  d.median = kl.at("median").get<double>();
  d.p99 = kl.at("p99").get<double>();
  d.maximum = kl.at("max").get<double>();
  d.same_top = r.at("same_top").get<double>();
  row.divergence.push_back(d);
}

void take_report(StudyRow& row, const StudyConfig& config, const StudyJob& job, const Json& report,
                 bool resumed) {
  row.device = device_model(report);
  switch (job.kind) {
    case JobKind::quantize:
      take_quantization(row, report, resumed);
      return;
    case JobKind::tasks:
      take_scores(row, report);
      return;
    case JobKind::latency: {
      const Json& r = report.at("latency").at(0);
      row.prefill_token_per_s = r.at("prefill_token_per_s").get<double>();
      row.decode_token_per_s = r.at("token_per_s").get<double>();
      return;
    }
    case JobKind::ppl:
    case JobKind::kl:
      break;
  }
  for (std::size_t i = 0; i < job.evaluations.size(); ++i) {
    const std::string& text = config.evaluations[job.evaluations[i]].name;
    const Json& r = report.at("results").at(i);
    if (job.kind == JobKind::kl) {
      take_divergence(row, text, r);
    } else {
      row.perplexity.push_back({text, r.at("protocol").get<std::string>(),
                                r.at("perplexity").get<double>(),
                                r.at("nll_standard_error").get<double>()});
    }
  }
}

const char* status_name(JobStatus status) {
  switch (status) {
    case JobStatus::cached:
    case JobStatus::done:
      return "ok";
    case JobStatus::failed:
      return "failed";
    case JobStatus::skipped:
      return "skipped";
  }
  throw Error(ErrorCode::internal, "unknown status");
}

bool has_result(const JobOutcome& outcome) {
  return outcome.status == JobStatus::cached || outcome.status == JobStatus::done;
}

}  // namespace

std::vector<StudyRow> collect_rows(const StudyConfig& config, const StudyPlan& plan,
                                   const std::vector<JobOutcome>& outcomes,
                                   const StudyCache& cache) {
  std::vector<StudyRow> rows;
  for (const GridCell& cell : plan.cells) {
    const StudyModel& model = config.models[cell.model];
    StudyRow row;
    row.model = model.name;
    row.compared_with = model.shape;
    row.shape = paper_model_of_shape(plan.sources[cell.model]->config());
    row.synthetic = model.path.starts_with("synthetic:");
    row.method = cell.method;
    row.label = cell.label;
    row.options = cell.options;
    row.weight_bits = cell.weight_bits;
    row.group = cell.group;
    for (const std::size_t i : cell.jobs) {
      const StudyJob& job = plan.jobs[i];
      std::string error = outcomes[i].error;
      if (has_result(outcomes[i])) {
        const std::string file = cache.report_file(job.key).string();
        try {
          take_report(row, config, job, cache.report(job.key), outcomes[i].resumed);
        } catch (const nlohmann::json::exception& e) {
          error = file + ": expected the report of a " + job_kind_name(job.kind) +
                  " job, found: " + e.what();
        }
      }
      if (row.failed.empty()) row.failed = error;
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

Json study_results(const StudyConfig& config, const StudyPlan& plan,
                   const std::vector<JobOutcome>& outcomes, const StudyCache& cache,
                   const std::vector<StudyRow>& rows) {
  Json j;
  j["study"] = config.name;
  j["engine"] = engine_version;
  j["config"] = config.document;
  // How the figures were made, from the first report of each model that says so.
  Json& protocol = j["protocol"] = Json::object();
  Json jobs = Json::array();
  for (std::size_t i = 0; i < plan.jobs.size(); ++i) {
    const StudyJob& job = plan.jobs[i];
    Json row;
    row["job"] = job.title;
    row["key"] = job.key;
    row["status"] = status_name(outcomes[i].status);
    if (!outcomes[i].error.empty()) row["error"] = outcomes[i].error;
    if (!job.other_build.empty()) row["other_build"] = job.other_build;
    if (outcomes[i].resumed) row["resumed"] = true;
    jobs.push_back(row);
    if (!has_result(outcomes[i])) continue;
    Json& known = protocol[config.models[plan.cells[job.cell].model].name];
    if (known.contains(job_kind_name(job.kind))) continue;
    const Json report = cache.report(job.key);
    Json found;
    for (const char* key : {"calibration", "protocols", "numerics", "compute_dtype", "device"}) {
      if (report.contains(key)) found[key] = report[key];
    }
    known[job_kind_name(job.kind)] = found;
  }
  Json& left = j["left_out"] = Json::array();
  for (const LeftOut& l : plan.left_out) {
    Json row;
    row["model"] = l.model;
    row["setting"] = l.setting;
    row["reason"] = l.reason;
    left.push_back(row);
  }
  Json& list = j["rows"] = Json::array();
  for (const StudyRow& row : rows) list.push_back(to_json(row));
  j["jobs"] = std::move(jobs);
  return j;
}

}  // namespace engine
