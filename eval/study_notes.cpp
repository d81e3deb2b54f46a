#include "eval/study_notes.h"

#include <algorithm>
#include <array>

namespace engine {
namespace {

enum class Kind : std::uint8_t { perplexity, choice, mmlu, image };

Kind kind_of(const PaperTable& table) {
  const Figure first = table.columns.front().figure;
  if (first <= Figure::ptb) return Kind::perplexity;
  if (first <= Figure::average) return Kind::choice;
  return first <= Figure::mmlu ? Kind::mmlu : Kind::image;
}

constexpr std::string_view synthetic_prefix = "synthetic:";

// The methods of the tables about fine-tuning.
bool fine_tuned(const StudyRow& row) {
  constexpr std::array<std::string_view, 3> methods = {"normalfloat", "qlora", "irqlora"};
  return std::find(methods.begin(), methods.end(), row.method) != methods.end();
}

// The table for models that the paper does not have.
int table_of_others(Kind kind) {
  switch (kind) {
    case Kind::perplexity:
      return 1;
    case Kind::choice:
      return 3;
    case Kind::mmlu:
      return 7;
    case Kind::image:
      break;
  }
  return 12;
}

bool about(const PaperTable& table, std::string_view model) {
  return std::any_of(table.columns.begin(), table.columns.end(),
                     [&](const PaperColumn& c) { return c.model == model; });
}

bool has_figure(const StudyRow& row, const PaperTable& table) {
  return std::any_of(table.columns.begin(), table.columns.end(),
                     [&](const PaperColumn& c) { return our_figure(row, c.figure).has_value(); });
}

struct Size {
  const char* name;
  Figure figure;
  std::int64_t questions;
};

// Questions of the splits that published figures are of.
constexpr Size full_sizes[] = {
    {"piqa", Figure::piqa, 1838},
    {"arc_easy", Figure::arc_easy, 2376},
    {"arc_challenge", Figure::arc_challenge, 1172},
    {"hellaswag", Figure::hellaswag, 10042},
    {"winogrande", Figure::winogrande, 1267},
    {"mmlu.humanities", Figure::humanities, 4705},
    {"mmlu.stem", Figure::stem, 3018},
    {"mmlu.social", Figure::social, 3077},
    {"mmlu.other", Figure::other, 3242},
    {"mmlu", Figure::mmlu, 14042},
};

// The category averages of MMLU and of the five tasks have the same short title.
std::string score_title(const Size& size) {
  return size.figure == Figure::mmlu ? "MMLU" : figure_title(size.figure);
}

std::string joined(const std::vector<std::string>& parts) {
  std::string out;
  for (const std::string& p : parts) out += (out.empty() ? "" : ", ") + p;
  return out;
}

void add_once(std::vector<std::string>& list, const std::string& text) {
  if (!text.empty() && std::find(list.begin(), list.end(), text) == list.end()) {
    list.push_back(text);
  }
}

std::string row_title(const StudyRow& row) {
  return row.model + ", " + (row.label.empty() ? method_title(row.method) : row.label);
}

void perplexity_notes(StudyTable& table, const std::vector<const StudyRow*>& rows) {
  std::vector<std::string> texts;
  for (const StudyRow* row : rows) {
    for (const StudyRow::Perplexity& p : row->perplexity) add_once(texts, p.text);
  }
  for (const std::string& text : texts) {
    std::vector<std::string> protocols;
    for (const StudyRow* row : rows) {
      for (const StudyRow::Perplexity& p : row->perplexity) {
        if (p.text == text) add_once(protocols, p.protocol);
      }
    }
    if (!protocols.empty()) table.notes.push_back(text + ": protocol " + joined(protocols) + ".");
  }
}

void score_notes(StudyTable& table, const std::vector<const StudyRow*>& rows, Kind kind) {
  std::vector<std::string> common;
  std::vector<std::string> single;
  bool any = false;
  for (const Size& size : full_sizes) {
    const bool mmlu = size.figure >= Figure::humanities;
    if (mmlu != (kind == Kind::mmlu)) continue;
    std::vector<std::string> counts, protocols, notes;
    for (const StudyRow* row : rows) {
      for (const StudyRow::Score& s : row->scores) {
        if (s.name != size.name) continue;
        any = true;
        if (s.n != size.questions) add_once(counts, std::to_string(s.n));
        add_once(protocols, s.protocol);
        add_once(notes, s.note);
      }
    }
    const std::string title = score_title(size);
    if (!counts.empty()) {
      single.push_back(title + ": " + joined(counts) + " questions; the full set has " +
                       std::to_string(size.questions) + ".");
    }
    for (const std::string& note : notes) single.push_back(title + ": " + note);
    for (const std::string& p : protocols) add_once(common, p);
  }
  if (any) {
    table.notes.emplace_back(
        kind == Kind::mmlu
            ? "Accuracies in percent, Avg. over all questions; standard errors are in the JSON "
              "file."
            : "Accuracies in percent, not normalized by length (acc); acc_norm and standard errors "
              "are in the JSON file.");
  }
  if (!common.empty()) table.notes.push_back("Protocol: " + joined(common) + ".");
  for (const std::string& note : single) table.notes.push_back(note);
}

// What rows say of themselves: once if all quantized rows agree, else with the rows' names.
void row_notes(StudyTable& table, const std::vector<const StudyRow*>& rows) {
  std::vector<std::string> notes;
  for (const StudyRow* row : rows) {
    for (const std::string& note : row->notes) add_once(notes, note);
  }
  for (const std::string& note : notes) {
    std::vector<std::string> who;
    std::size_t quantized = 0, quantized_with = 0;
    for (const StudyRow* row : rows) {
      const bool with = std::find(row->notes.begin(), row->notes.end(), note) != row->notes.end();
      if (with) add_once(who, row_title(*row));
      if (row->method == "fp") continue;
      ++quantized;
      quantized_with += with ? 1 : 0;
    }
    if (quantized == quantized_with) {
      table.notes.push_back(note);
      continue;
    }
    const std::size_t more = who.size() > 3 ? who.size() - 3 : 0;
    who.resize(who.size() - more);
    table.notes.push_back(joined(who) + (more > 0 ? " and " + std::to_string(more) + " more" : "") +
                          ": " + note);
  }
}

}  // namespace

std::string quality_model(const StudyRow& row) {
  if (row.synthetic || row.model.starts_with(synthetic_prefix)) return "";
  if (!row.compared_with.empty()) return row.compared_with;
  const std::string model = paper_model_of_name(row.model);
  return row.shape.empty() || row.shape == model ? model : "";
}

std::string cost_model(const StudyRow& row) {
  if (!row.compared_with.empty()) return row.compared_with;
  if (!row.shape.empty()) return row.shape;
  std::string_view name = row.model;
  if (name.starts_with(synthetic_prefix)) name.remove_prefix(synthetic_prefix.size());
  return paper_model_of_name(name);
}

bool belongs(const StudyRow& row, const PaperTable& table) {
  const Kind kind = kind_of(table);
  // Failed rows have no figures, but must not go unseen.
  const bool shown = has_figure(row, table) || (!row.failed.empty() && kind == Kind::perplexity);
  if (!shown) return false;
  if (table.number == fine_tuning_table) return fine_tuned(row);
  if (kind == Kind::choice && fine_tuned(row)) return false;
  const std::string model = quality_model(row);
  if (about(table, model)) return true;
  // Models that have no table go where LLaMA3-8B goes.
  return table.number == table_of_others(kind) &&
         std::none_of(paper_tables().begin(), paper_tables().end(), [&](const PaperTable& other) {
           return kind_of(other) == kind && about(other, model);
         });
}

void add_notes(StudyTable& table, const std::vector<const StudyRow*>& rows,
               const StudyTableOptions& options) {
  const PaperTable* paper = find_paper_table(table.number);
  std::vector<std::string> about_models;
  if (paper != nullptr) {
    for (const PaperColumn& c : paper->columns) {
      add_once(about_models, paper_model_title(c.model));
    }
  } else {
    about_models = {"LLaMA2-7B", "LLaMA3-8B"};
  }
  if (table.rows.empty()) {
    table.notes.push_back("Nothing in this study belongs here; the paper's table is about " +
                          joined(about_models) + ".");
    return;
  }
  if (options.paper) {
    if (table.with_paper) {
      table.notes.push_back(
          "Published / ours / difference. Published: W. Huang et al., Visual Intelligence 2:36 "
          "(2024), " +
          paper_source(table.number) + ".");
    }
    std::vector<std::string> others;
    for (const StudyRow* row : rows) {
      const std::string model = paper != nullptr ? quality_model(*row) : cost_model(*row);
      const bool known =
          paper != nullptr ? about(*paper, model) : model == "llama2-7b" || model == "llama3-8b";
      if (!known) add_once(others, row->model);
    }
    if (!others.empty()) {
      table.notes.push_back(joined(others) + ": the paper's rows are of " + joined(about_models) +
                            ", so only ours are shown.");
    }
    if (table.with_paper && paper != nullptr) {
      for (const std::string& remark : paper->remarks) table.notes.push_back(remark);
    }
  }
  if (paper == nullptr) {
    std::vector<std::string> devices;
    for (const StudyRow* row : rows) add_once(devices, row->device);
    if (!devices.empty()) table.notes.push_back("Device: " + joined(devices) + ".");
    if (table.with_paper) {
      table.notes.emplace_back(
          "Published: 4 bits, on an NVIDIA A800 with 80 GB; the speed with groups of 128.");
    }
    table.notes.emplace_back(
        "Memory: peak of what the engine held on the device, 1e9 bytes. Speed: decoding of one "
        "sequence.");
  } else {
    const Kind kind = kind_of(*paper);
    if (kind == Kind::perplexity) perplexity_notes(table, rows);
    if (kind == Kind::choice || kind == Kind::mmlu) score_notes(table, rows, kind);
  }
  row_notes(table, rows);
  for (const StudyRow* row : rows) {
    if (!row->failed.empty()) {
      table.notes.push_back(row_title(*row) + ": failed: " + row->failed);
    }
  }
}

}  // namespace engine
