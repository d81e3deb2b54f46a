#include "eval/study_record.h"

namespace engine {
namespace {

template <class T>
void put(Json& j, const char* key, const std::optional<T>& value) {
  if (value) j[key] = *value;
}

Json to_json(const StudyRow::Perplexity& p) {
  Json j;
  j["text"] = p.text;
  j["protocol"] = p.protocol;
  j["perplexity"] = p.value;
  j["nll_standard_error"] = p.standard_error;
  return j;
}

Json to_json(const StudyRow::Score& s) {
  Json j;
  j["name"] = s.name;
  j["n"] = s.n;
  j["acc"] = s.acc;
  put(j, "acc_stderr", s.acc_stderr);
  put(j, "acc_norm", s.acc_norm);
  put(j, "acc_norm_stderr", s.acc_norm_stderr);
  if (!s.protocol.empty()) j["protocol"] = s.protocol;
  if (!s.note.empty()) j["note"] = s.note;
  return j;
}

Json to_json(const StudyRow::Divergence& d) {
  Json j;
  j["text"] = d.text;
  j["mean"] = d.mean;
  j["median"] = d.median;
  j["p99"] = d.p99;
  j["max"] = d.maximum;
  j["same_top"] = d.same_top;
  return j;
}

Json to_json(const StudyRow::LinearError& e) {
  Json j;
  j["linear"] = e.name;
  j["relative_error"] = e.relative_error;
  return j;
}

template <class T>
void put_list(Json& j, const char* key, const std::vector<T>& values) {
  if (values.empty()) return;
  Json& list = j[key] = Json::array();
  for (const T& v : values) list.push_back(to_json(v));
}

}  // namespace

Json to_json(const StudyRow& row) {
  Json j;
  j["model"] = row.model;
  if (!row.compared_with.empty()) j["compared_with"] = row.compared_with;
  if (!row.shape.empty()) j["shape"] = row.shape;
  if (row.synthetic) j["synthetic"] = true;
  j["method"] = row.method;
  j["label"] = row.label;
  if (!row.options.empty()) j["options"] = row.options;
  j["weight_bits"] = row.weight_bits;
  j["activation_bits"] = row.activation_bits;
  j["group"] = row.group;
  put(j, "bits_nominal", row.bits_nominal);
  put(j, "bits_stored", row.bits_stored);
  put(j, "bits_on_disk", row.bits_on_disk);
  put(j, "model_bits_on_disk", row.model_bits_on_disk);
  put_list(j, "perplexity", row.perplexity);
  put_list(j, "scores", row.scores);
  put_list(j, "divergence", row.divergence);
  if (!row.block_error.empty()) j["block_error"] = row.block_error;
  put_list(j, "linear_error", row.linear_error);
  put(j, "quantize_s", row.quantize_s);
  put(j, "quantize_peak_bytes", row.quantize_peak_bytes);
  put(j, "file_bytes", row.file_bytes);
  put(j, "prefill_token_per_s", row.prefill_token_per_s);
  put(j, "decode_token_per_s", row.decode_token_per_s);
  if (!row.device.empty()) j["device"] = row.device;
  if (!row.notes.empty()) j["notes"] = row.notes;
  if (!row.failed.empty()) j["failed"] = row.failed;
  return j;
}

}  // namespace engine
