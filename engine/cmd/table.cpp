// engine table: the reports of a folder as one table, a row per evaluated model.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>

#include "engine/cmd/commands.h"

namespace engine {
namespace {

std::string number(double v, int digits) {
  char text[40];
  if (v >= 1e6) {
    std::snprintf(text, sizeof text, "%.3g", v);
  } else {
    std::snprintf(text, sizeof text, "%.*f", digits, v);
  }
  return text;
}

// Peak of the memory of the report's device; host staging beside a GPU does not count.
std::string peak_text(const Json& report) {
  for (const Json& row : report.at("memory")) {
    if (row.at("memory") == report.at("device").at("name")) {
      return human_bytes(row.at("peak_bytes").get<std::int64_t>());
    }
  }
  return "-";
}

// Bits per weight of a dense model, by the dtype of its linears.
std::string dense_bits(const Json& model) {
  const std::string dtype = model.value("dtype", std::string());
  for (const DType d : {DType::f32, DType::f16, DType::bf16}) {
    if (dtype == dtype_name(d)) return std::to_string(8 * dtype_bytes(d));
  }
  return "-";
}

std::string seconds_text(const Json& report) {
  const Json time = report.value("time_s", Json::object());
  if (time.contains("total")) return number(time["total"].get<double>(), 1);
  return "-";
}

class TableCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "table"; }
  [[nodiscard]] const char* summary() const override {
    return "Print the reports of a folder as one table";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app.add_option("folder", folder_,
                   "Folder with NAME.ppl.json and, for quantized models, NAME.quantize.json")
        ->required();
  }

  void run() override {
    std::error_code error;
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
      if (entry.path().filename().string().ends_with(".ppl.json")) files.push_back(entry.path());
    }
    if (error) throw IoError(folder_, "cannot read the folder", error.value());
    if (files.empty()) {
      throw Error(ErrorCode::usage, folder_ + ": expected at least one NAME.ppl.json, found none");
    }
    std::sort(files.begin(), files.end());
    for (const auto& file : files) {
      try {
        add(file);
      } catch (const nlohmann::json::exception& e) {
        throw FormatError(file.string(), "report", "what engine ppl and engine quantize write",
                          e.what());
      }
    }
    print();
  }

 private:
  void add(const std::filesystem::path& file) {
    const Json ppl = read_json_file(file);
    std::string base = file.filename().string();
    base.resize(base.size() - std::string_view(".ppl.json").size());
    const std::filesystem::path quantize_file = file.parent_path() / (base + ".quantize.json");
    const bool quantized = std::filesystem::exists(quantize_file);
    const Json quantize = quantized ? read_json_file(quantize_file) : Json::object();
    std::vector<std::string> row = {base};
    std::vector<std::string> head = {"model"};
    for (const Json& r : ppl.at("results")) {
      head.push_back("ppl " + r.at("text").get<std::string>());
      row.push_back(number(r.at("perplexity").get<double>(), 3));
    }
    for (const char* h : {"bits nominal", "stored", "on disk", "whole model", "file"})
      head.emplace_back(h);
    // A packed model's report carries its bits itself.
    const Json& model = ppl.at("model");
    if (model.at("kind") == "packed") {
      const Json& linears = model.at("bits").at(0);
      row.push_back(number(linears.at("bits_nominal").get<double>(), 2));
      row.push_back(number(linears.at("bits_stored").get<double>(), 3));
      row.push_back(number(linears.at("bits_on_disk").get<double>(), 3));
      row.push_back(number(model.at("bits").at(1).at("bits_on_disk").get<double>(), 3));
      row.push_back(human_bytes(model.at("file_bytes").get<std::int64_t>()));
    } else {
      const std::int64_t bytes = model.value("tensors_bytes", std::int64_t{0});
      row.push_back(dense_bits(model));
      for (int i = 0; i < 3; ++i) row.emplace_back("-");
      row.push_back(bytes > 0 ? human_bytes(bytes) : "-");
    }
    for (const char* h : {"quantize peak", "quantize s", "eval peak", "eval s"})
      head.emplace_back(h);
    row.push_back(quantized ? peak_text(quantize) : "-");
    row.push_back(quantized ? seconds_text(quantize) : "-");
    row.push_back(peak_text(ppl));
    row.push_back(number(ppl.at("speed").at("seconds").get<double>(), 1));
    if (rows_.empty()) rows_.push_back(head);
    if (head != rows_.front()) {
      throw Error(ErrorCode::mismatch,
                  file.string() +
                      ": expected results on the same texts as in the other reports, found others");
    }
    rows_.push_back(std::move(row));
  }

  void print() const {
    std::vector<std::size_t> width(rows_.front().size(), 3);
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
    }
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      std::cout << '|';
      for (std::size_t i = 0; i < width.size(); ++i) {
        const std::string& cell = rows_[r][i];
        const std::string pad(width[i] - cell.size(), ' ');
        std::cout << ' ' << (i == 0 ? cell + pad : pad + cell) << " |";
      }
      std::cout << '\n';
      if (r == 0) {
        std::cout << '|';
        for (std::size_t i = 0; i < width.size(); ++i) {
          std::cout << std::string(width[i] + 1, '-') << (i == 0 ? "-|" : ":|");
        }
        std::cout << '\n';
      }
    }
  }

  std::string folder_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace

std::unique_ptr<Command> make_table_command() { return std::make_unique<TableCommand>(); }

}  // namespace engine
