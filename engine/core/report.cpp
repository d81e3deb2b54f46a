#include "engine/core/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "engine/ops/ops.h"
#include "formats/atomic_file.h"

namespace engine {
namespace {

std::string scalar_text(const Json& v) {
  if (v.is_string()) return v.get<std::string>();
  if (v.is_number_float()) {
    const double d = v.get<double>();
    char text[40];
    const double a = std::fabs(d);
    if (a != 0 && (a < 1e-3 || a >= 1e7)) {
      std::snprintf(text, sizeof text, "%.4g", d);
    } else {
      std::snprintf(text, sizeof text, "%.4f", d);
    }
    return text;
  }
  return v.dump();
}

bool is_flat(const Json& v) {
  return std::none_of(v.begin(), v.end(), [](const Json& x) { return x.is_structured(); });
}

void table_text(const Json& rows, const std::string& indent, std::string& out) {
  std::vector<std::string> columns;
  for (const Json& row : rows) {
    for (const auto& [key, value] : row.items()) {
      if (std::find(columns.begin(), columns.end(), key) == columns.end()) columns.push_back(key);
    }
  }
  std::vector<std::vector<std::string>> cells = {columns};
  for (const Json& row : rows) {
    std::vector<std::string> line;
    for (const std::string& c : columns) {
      line.push_back(row.contains(c) ? scalar_text(row[c]) : std::string());
    }
    cells.push_back(line);
  }
  std::vector<std::size_t> width(columns.size(), 0);
  for (const auto& line : cells) {
    for (std::size_t i = 0; i < line.size(); ++i) width[i] = std::max(width[i], line[i].size());
  }
  for (const auto& line : cells) {
    std::string text = indent;
    for (std::size_t i = 0; i < line.size(); ++i) {
      text += line[i] + std::string(width[i] - line[i].size() + 2, ' ');
    }
    while (!text.empty() && text.back() == ' ') text.pop_back();
    out += text + "\n";
  }
}

void append_text(const Json& value, const std::string& indent, std::string& out) {
  for (const auto& [key, v] : value.items()) {
    if (!v.is_structured()) {
      out += indent + key + ": " + scalar_text(v) + "\n";
    } else if (v.empty()) {
      out += indent + key + ": none\n";
    } else if (v.is_array() && v.front().is_object() &&
               std::all_of(v.begin(), v.end(),
                           [](const Json& x) { return x.is_object() && is_flat(x); })) {
      out += indent + key + ":\n";
      table_text(v, indent + "  ", out);
    } else if (v.is_array() && is_flat(v)) {
      out += indent + key + ": " + v.dump() + "\n";
    } else {
      out += indent + key + ":\n";
      append_text(v, indent + "  ", out);
    }
  }
}

}  // namespace

Report::Report(std::string command) {
  document_["command"] = std::move(command);
  document_["engine_version"] = engine_version;
}

void Report::add_time(const std::string& phase, double seconds) {
  Json& total = document_["time_s"][phase];
  total = (total.is_number() ? total.get<double>() : 0.0) + seconds;
}

void Report::add_device(Ops& ops) {
  const DeviceInfo info = ops.info();
  Json& d = document_["device"];
  d["name"] = info.name;
  d["model"] = info.model;
  d["features"] = info.features;
  d["memory_total_bytes"] = info.total_bytes;
}

void Report::add_plan(std::int64_t device_bytes, const TagBytes& by_tag) {
  Json& plan = document_["plan"];
  plan["device_bytes"] = device_bytes;
  for (std::size_t t = 0; t < mem_tag_count; ++t) {
    if (by_tag[t] > 0) plan[mem_tag_name(static_cast<MemTag>(t))] = by_tag[t];
  }
}

void Report::add_driver_memory(Ops& ops, const Ledger& ledger) {
  if (ops.kind() != DeviceKind::cuda) return;
  const DeviceInfo info = ops.info();
  const std::int64_t used = info.total_bytes - info.free_bytes;
  const std::int64_t counted = ledger.entry(info.name).reserved;
  Json& d = document_["driver_memory"];
  d["used_bytes"] = used;
  d["ledger_bytes"] = counted;
  d["context_bytes"] = info.context_bytes;
  const std::int64_t unaccounted = used - counted - info.context_bytes;
  d["unaccounted_bytes"] = unaccounted;
  d["unaccounted_share"] = static_cast<double>(unaccounted) / static_cast<double>(used);
}

void Report::add_ledger(const Ledger& ledger) {
  Json rows = Json::array();
  for (const auto& [memory, entry] : ledger.entries()) {
    Json row;
    row["memory"] = memory;
    row["peak_bytes"] = entry.peak_total;
    row["peak_reserved_bytes"] = entry.peak_reserved;
    for (std::size_t t = 0; t < mem_tag_count; ++t) {
      if (entry.peak[t] > 0) row[mem_tag_name(static_cast<MemTag>(t))] = entry.peak[t];
    }
    rows.push_back(row);
  }
  document_["memory"] = rows;
}

std::string Report::to_text() const { return json_to_text(document_); }

void Report::write_json(const std::filesystem::path& path) const {
  write_file_atomically(path, std::string_view(document_.dump(1) + "\n"));
}

std::string json_to_text(const Json& document) {
  std::string out;
  append_text(document, "", out);
  return out;
}

}  // namespace engine
