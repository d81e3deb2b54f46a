// engine inspect: what is in a packed file, a checkpoint or a report; two of them give a diff.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <thread>

#include "engine/cmd/commands.h"
#include "engine/core/interrupt.h"
#include "engine/core/progress.h"
#include "engine/model/packed_model.h"
#include "engine/weight/bits.h"
#include "engine/weight/pattern.h"

namespace engine {
namespace {

// Everything there is to say about one argument, as one document.
Json inspect_packed(const std::filesystem::path& path, bool verify) {
  const PackedReader reader(path);
  const PackedModel model = read_packed_model(reader);
  Json j;
  j["kind"] = "packed model";
  j["file"] = path.filename().string();
  j["file_bytes"] = reader.file_bytes();
  j["planes"] = reader.planes().size();
  for (const char* key : {"engine", "method", "options", "compute_dtype", "device", "source",
                          "calibration", "config", "bits", "blocks"}) {
    if (model.directory.contains(key)) j[key] = model.directory[key];
  }
  if (!model.tokenizer_name.empty()) j["tokenizer"] = model.tokenizer_name;
  Json rows = Json::array();
  for (std::int64_t layer = 0; layer < model.config.layers; ++layer) {
    for (const Site s : all_sites) {
      const std::string name = linear_name(layer, s);
      const PackedLinear& linear = model.linears.at(name);
      Json row;
      row["linear"] = name;
      row["scheme"] = scheme_name(linear.weight);
      for (const char* key : {"outcome", "relative_error", "bits_nominal", "bits_stored",
                              "bytes_stored", "bytes_on_disk"}) {
        if (linear.entry.contains(key)) row[key] = linear.entry[key];
      }
      rows.push_back(row);
    }
  }
  j["linears"] = rows;
  if (verify) {
    Progress progress("verify", static_cast<std::int64_t>(reader.planes().size()));
    reader.verify_all(std::max(1U, std::thread::hardware_concurrency()),
                      [&](std::size_t, std::size_t) {
                        check_interrupt();
                        progress.advance(1);
                        return true;
                      });
    j["checksums"] = "all verified";
  }
  return j;
}

Json inspect_dense(const std::string& argument) {
  const std::unique_ptr<WeightSource> source = open_model(argument);
  const ModelConfig& c = source->config();
  Json j = source->describe();
  j["config"] = Json::parse(config_to_json(c));
  j["parameters"] = parameter_count(c);
  j["tokenizer"] = source->tokenizer_name().empty() ? "none" : source->tokenizer_name();
  Json rows = Json::array();
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(c, s);
    Json row;
    row["linear"] = site_name(s);
    row["rows"] = shape.rows;
    row["cols"] = shape.cols;
    row["dtype"] = dtype_name(source->linear_dtype());
    row["blocks"] = c.layers;
    rows.push_back(row);
  }
  j["linears"] = rows;
  return j;
}

Json inspect_one(const std::string& argument, bool verify) {
  const std::filesystem::path path(argument);
  std::error_code error;
  if (path.extension() == ".json" && std::filesystem::is_regular_file(path, error)) {
    return read_json_file(path);
  }
  if (std::filesystem::is_regular_file(path, error)) return inspect_packed(path, verify);
  return inspect_dense(argument);
}

// Leaves as "a.b[2].c" -> value.
void flatten(const Json& value, const std::string& path,
             std::vector<std::pair<std::string, Json>>& out) {
  if (value.is_object()) {
    for (const auto& [key, v] : value.items())
      flatten(v, path.empty() ? key : path + "." + key, out);
  } else if (value.is_array()) {
    // Rows of linears are found by name, so that a missing one does not shift all others.
    for (std::size_t i = 0; i < value.size(); ++i) {
      const bool named =
          value[i].is_object() && value[i].contains("linear") && value[i]["linear"].is_string();
      flatten(
          value[i],
          path + "[" + (named ? value[i]["linear"].get<std::string>() : std::to_string(i)) + "]",
          out);
    }
  } else {
    out.emplace_back(path, value);
  }
}

Json difference(const Json& a, const Json& b) {
  std::vector<std::pair<std::string, Json>> left, right;
  flatten(a, "", left);
  flatten(b, "", right);
  const auto by_key = [](const auto& x, const auto& y) { return x.first < y.first; };
  std::stable_sort(left.begin(), left.end(), by_key);
  std::stable_sort(right.begin(), right.end(), by_key);
  Json rows = Json::array();
  const auto add = [&](const std::string& key, const Json& l, const Json& r) {
    Json row;
    row["key"] = key;
    row["first"] = l;
    row["second"] = r;
    if (l.is_number() && r.is_number()) row["difference"] = r.get<double>() - l.get<double>();
    rows.push_back(row);
  };
  std::size_t i = 0, k = 0;
  while (i < left.size() || k < right.size()) {
    if (k == right.size() || (i < left.size() && left[i].first < right[k].first)) {
      add(left[i].first, left[i].second, "-");
      ++i;
    } else if (i == left.size() || right[k].first < left[i].first) {
      add(right[k].first, "-", right[k].second);
      ++k;
    } else {
      if (left[i].second != right[k].second) add(left[i].first, left[i].second, right[k].second);
      ++i;
      ++k;
    }
  }
  return rows;
}

class InspectCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "inspect"; }
  [[nodiscard]] const char* summary() const override {
    return "Show and verify a model or report; two arguments: what differs";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app.add_option("first", first_,
                   "Packed .qw file, checkpoint directory, synthetic:NAME or report")
        ->required();
    app.add_option("second", second_, "Another one, to compare with");
    app.add_flag("--no-verify", no_verify_, "Read the directory only, not every checksum");
    app.add_flag("--json", json_, "Print JSON");
  }

  void run() override {
    Json document = inspect_one(first_, !no_verify_);
    if (!second_.empty()) {
      const Json rows = difference(document, inspect_one(second_, !no_verify_));
      document = Json::object();
      document["first"] = first_;
      document["second"] = second_;
      document["differences"] = rows;
    }
    std::cout << (json_ ? document.dump(1) + "\n" : json_to_text(document));
  }

 private:
  std::string first_, second_;
  bool no_verify_ = false, json_ = false;
};

}  // namespace

std::unique_ptr<Command> make_inspect_command() { return std::make_unique<InspectCommand>(); }

}  // namespace engine
