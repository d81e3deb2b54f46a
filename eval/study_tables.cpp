// Which results belong into which table, in which order, and what has to be said below.
#include "eval/study_tables.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "eval/study_cells.h"
#include "eval/study_notes.h"

namespace engine {
namespace {

// A model's columns of a line; tables with one model a line have one of these.
struct Group {
  std::string model;        // StudyRow::model; "": nothing of ours
  std::string paper_model;  // "": the paper does not have it
  [[nodiscard]] std::string title() const {
    return model.empty() ? paper_model_title(paper_model) : model;
  }
};

struct Line {
  Setting setting;  // refers to a row of ours or to the paper's
  std::optional<Setting> published;
  std::vector<const StudyRow*> ours;  // one per group, or null
};

// What a table is made of, whichever it is.
struct Layout {
  int number = 0;
  std::vector<Figure> figures;     // of each group
  std::vector<Setting> published;  // the paper's rows in its order
  std::string full_precision = "FP";
  bool activation_bits = false, groups = false;
  bool cost = false;
};

Setting setting_of(const StudyRow& row) {
  return {row.method, row.weight_bits, row.activation_bits, row.group};
}

bool same_line(const Setting& a, const Setting& b) {
  return a.method == b.method && std::abs(a.weight_bits - b.weight_bits) < 0.005 &&
         a.activation_bits == b.activation_bits && a.group == b.group;
}

// A cost holds for any group, except the speed, and the paper's rows say nothing of activations.
bool matches(const Layout& layout, const Setting& ours, const Setting& published) {
  if (layout.cost) {
    return ours.method == published.method && ours.weight_bits == published.weight_bits;
  }
  Setting setting = ours;
  if (!layout.groups) setting.group = published.group;
  return same_setting(setting, published);
}

std::optional<double> published_value(const Layout& layout, const Line& line,
                                      std::string_view model, Figure figure) {
  if (!line.published || model.empty()) return std::nullopt;
  if (!layout.cost) return published_figure(layout.number, *line.published, model, figure);
  for (const PaperCost& row : paper_table6) {
    if (row.method != line.published->method || row.model != model) continue;
    if (figure == Figure::memory_gb) return row.memory_gb;
    if (figure == Figure::minutes) return row.minutes;
    return line.setting.group == paper_group ? row.token_per_s : std::nullopt;
  }
  return std::nullopt;
}

std::size_t rank_of(const Layout& layout, std::string_view method) {
  if (method == "fp") return 0;
  std::size_t rank = 1;
  for (const Setting& s : layout.published) {
    if (s.method == method) return rank;
    ++rank;
  }
  for (const PaperFigures& row : paper_figures()) {  // methods of the other tables, in their order
    if (row.setting.method == method) return rank;
    ++rank;
  }
  return rank;
}

bool goes_before(const Layout& layout, const Setting& a, const Setting& b) {
  const auto key = [&](const Setting& s) {
    const int kind = s.group == paper_group ? 0 : s.group > 0 ? 1 : 2;
    return std::tuple(rank_of(layout, s.method), kind, s.group, -s.weight_bits, -s.activation_bits);
  };
  return key(a) < key(b);
}

std::vector<Line> make_lines(const Layout& layout, const std::vector<Group>& groups,
                             const std::vector<const StudyRow*>& rows, bool with_paper) {
  std::vector<Line> lines;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (const StudyRow* row : rows) {
      if (row->model != groups[g].model) continue;
      const Setting setting = setting_of(*row);
      auto line = std::find_if(lines.begin(), lines.end(), [&](const Line& l) {
        return l.ours[g] == nullptr && same_line(l.setting, setting);
      });
      if (line == lines.end()) {
        lines.push_back({setting, std::nullopt, std::vector<const StudyRow*>(groups.size())});
        line = lines.end() - 1;
      }
      line->ours[g] = row;
    }
  }
  for (const Setting& published : layout.published) {
    bool found = false;
    for (Line& line : lines) {
      if (!matches(layout, line.setting, published)) continue;
      line.published = published;
      found = true;
    }
    if (!found && with_paper) {
      lines.push_back({published, published, std::vector<const StudyRow*>(groups.size())});
    }
  }
  std::stable_sort(lines.begin(), lines.end(), [&](const Line& a, const Line& b) {
    return goes_before(layout, a.setting, b.setting);
  });
  return lines;
}

// The row's method, and its label where the setting alone does not tell it from another row.
std::string line_title(const Layout& layout, const Line& line, const std::vector<Line>& lines,
                       bool paper_model) {
  if (line.setting.method == "fp") return paper_model ? layout.full_precision : "FP";
  std::string title = method_title(line.setting.method);
  const auto alike = std::count_if(lines.begin(), lines.end(), [&](const Line& other) {
    return same_line(other.setting, line.setting);
  });
  if (alike < 2) return title;
  for (const StudyRow* row : line.ours) {
    if (row != nullptr && !row->label.empty()) return title + " (" + row->label + ")";
  }
  return title;
}

std::vector<std::string> other_texts(const std::vector<const StudyRow*>& rows,
                                     const std::vector<Figure>& figures) {
  std::vector<std::string> used, others;
  for (const StudyRow* row : rows) {
    for (const Figure f : figures) {
      if (const auto ours = our_figure(*row, f); ours && ours->details.contains("text")) {
        used.push_back(ours->details["text"].get<std::string>());
      }
    }
  }
  const auto has = [](const std::vector<std::string>& v, const std::string& s) {
    return std::find(v.begin(), v.end(), s) != v.end();
  };
  for (const StudyRow* row : rows) {
    for (const StudyRow::Perplexity& p : row->perplexity) {
      if (!has(used, p.text) && !has(others, p.text)) others.push_back(p.text);
    }
  }
  return others;
}

// Columns and rows of one table. Groups side by side are parts of one line; otherwise each model
// has lines of its own.
class TableMaker {
 public:
  TableMaker(const Layout& layout, std::vector<Group> groups, std::vector<const StudyRow*> rows,
             bool side_by_side, bool paper)
      : layout_(layout),
        groups_(std::move(groups)),
        rows_(std::move(rows)),
        side_by_side_(side_by_side),
        paper_(paper) {
    if (layout.figures.front() == Figure::wikitext2) texts_ = other_texts(rows_, layout.figures);
    const bool other_models = std::any_of(groups_.begin(), groups_.end(),
                                          [](const Group& g) { return g.paper_model.empty(); });
    model_column_ = !side_by_side && (groups_.size() > 1 || other_models);
    group_column_ = layout.groups || std::any_of(rows_.begin(), rows_.end(), [&](auto* row) {
                      const std::int64_t usual = layout.cost ? paper_group : 0;
                      return row->method != "fp" && row->group != usual;
                    });
  }

  void fill(StudyTable& table) {
    add_columns(table);
    if (side_by_side_) {
      add_lines(table, groups_, true);
      return;
    }
    std::vector<std::string> shown;  // the paper's models whose own rows are there already
    for (const Group& group : groups_) {
      const bool first = std::find(shown.begin(), shown.end(), group.paper_model) == shown.end();
      add_lines(table, {group}, first);
      shown.push_back(group.paper_model);
    }
  }

 private:
  void add_columns(StudyTable& table) const {
    if (model_column_) table.columns.emplace_back("Model");
    table.columns.emplace_back("Method");
    table.columns.emplace_back("#W");
    if (layout_.activation_bits) table.columns.emplace_back("#A");
    if (group_column_) table.columns.emplace_back("#G");
    const std::size_t repeats = side_by_side_ ? groups_.size() : 1;
    for (std::size_t g = 0; g < repeats; ++g) {
      const std::string prefix = side_by_side_ ? groups_[g].title() + " " : "";
      for (const Figure f : layout_.figures) table.columns.push_back(prefix + figure_title(f));
      for (const std::string& text : texts_) table.columns.push_back(prefix + text);
    }
  }

  void add_lines(StudyTable& table, const std::vector<Group>& part, bool published_rows) const {
    const bool paper_model = std::any_of(part.begin(), part.end(),
                                         [](const Group& g) { return !g.paper_model.empty(); });
    const std::vector<Line> lines =
        make_lines(layout_, part, rows_, published_rows && paper_model && paper_);
    for (const Line& line : lines) {
      StudyTableRow row;
      if (model_column_) row.cells.push_back(text_cell(part.front().title()));
      row.cells.push_back(text_cell(line_title(layout_, line, lines, paper_model)));
      row.cells.push_back(text_cell(bits_text(line.setting.weight_bits)));
      if (layout_.activation_bits) {
        row.cells.push_back(text_cell(std::to_string(line.setting.activation_bits)));
      }
      if (group_column_) row.cells.push_back(text_cell(group_text(line.setting.group)));
      for (std::size_t g = 0; g < part.size(); ++g) {
        add_figures(table, row, line, line.ours[g], part[g]);
      }
      table.rows.push_back(std::move(row));
    }
  }

  void add_figures(StudyTable& table, StudyTableRow& row, const Line& line, const StudyRow* from,
                   const Group& group) const {
    const bool beside = paper_ && !group.paper_model.empty();
    for (const Figure f : layout_.figures) {
      const auto ours = from != nullptr ? our_figure(*from, f) : std::nullopt;
      const auto paper =
          beside ? published_value(layout_, line, group.paper_model, f) : std::nullopt;
      if (paper) {
        row.source = paper_source(layout_.number);
        table.with_paper = true;
      }
      row.cells.push_back(figure_cell(f, ours, paper, beside));
    }
    for (const std::string& text : texts_) row.cells.push_back(perplexity_cell(from, text));
  }

  const Layout& layout_;
  std::vector<Group> groups_;
  std::vector<const StudyRow*> rows_;
  bool side_by_side_, paper_, model_column_ = false, group_column_ = false;
  std::vector<std::string> texts_;  // perplexities that the paper does not have
};

// Groups in the paper's order, then the study's other models.
std::vector<Group> groups_of(const std::vector<const StudyRow*>& rows,
                             const std::vector<std::string>& paper_order, bool cost) {
  std::vector<Group> groups;
  const auto collect = [&](std::string_view wanted) {
    for (const StudyRow* row : rows) {
      const std::string model = cost ? cost_model(*row) : quality_model(*row);
      const bool known =
          std::find(paper_order.begin(), paper_order.end(), model) != paper_order.end();
      if ((known ? model : "") != wanted) continue;
      if (std::none_of(groups.begin(), groups.end(),
                       [&](const Group& g) { return g.model == row->model; })) {
        groups.push_back({row->model, std::string(wanted)});
      }
    }
  };
  for (const std::string& model : paper_order) collect(model);
  collect("");
  return groups;
}

// The paper's models without results, where its layout has a place for each.
void add_empty_groups(std::vector<Group>& groups, const std::vector<std::string>& paper_order) {
  for (std::size_t i = 0; i < paper_order.size(); ++i) {
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.paper_model == paper_order[i];
    });
    if (found == groups.end()) {
      const auto later = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
        return std::find(paper_order.begin() + static_cast<std::ptrdiff_t>(i), paper_order.end(),
                         g.paper_model) != paper_order.end() ||
               g.paper_model.empty();
      });
      groups.insert(later, {"", paper_order[i]});
    }
  }
}

StudyTable scores_table(const PaperTable& paper, const std::vector<StudyRow>& all,
                        const StudyTableOptions& options) {
  Layout layout;
  layout.number = paper.number;
  layout.full_precision = std::string(paper.full_precision);
  layout.activation_bits = paper.activation_bits;
  layout.groups = paper.groups;
  std::vector<std::string> models;
  for (const PaperColumn& c : paper.columns) {
    if (std::find(models.begin(), models.end(), c.model) == models.end()) {
      models.emplace_back(c.model);
    }
    if (c.model == models.front()) layout.figures.push_back(c.figure);
  }
  for (const PaperFigures& row : paper_figures()) {
    if (row.table == paper.number) layout.published.push_back(row.setting);
  }
  std::vector<const StudyRow*> rows;
  for (const StudyRow& row : all) {
    if (belongs(row, paper)) rows.push_back(&row);
  }
  if (paper.number == fine_tuning_table && !rows.empty()) {
    std::vector<const StudyRow*> full;
    for (const StudyRow& row : all) {
      if (row.method == "fp" && our_figure(row, layout.figures.front()) &&
          std::any_of(rows.begin(), rows.end(),
                      [&](const StudyRow* tuned) { return tuned->model == row.model; })) {
        full.push_back(&row);
      }
    }
    rows.insert(rows.begin(), full.begin(), full.end());
  }
  const bool side_by_side = models.size() > 1;
  std::vector<Group> groups = groups_of(rows, models, false);
  StudyTable table;
  table.number = paper.number;
  table.stem = "table" + std::to_string(paper.number);
  table.title = std::string(paper.title);
  if (!groups.empty() && groups.front().paper_model.empty()) {  // none of the paper's models
    const std::string subject = " of " + paper_model_title(models.front());
    if (const std::size_t at = table.title.find(subject); at != std::string::npos) {
      table.title.erase(at, subject.size());
    }
  }
  if (side_by_side || groups.empty()) add_empty_groups(groups, models);
  // A table without anything of ours says so; published rows alone are the paper's business.
  TableMaker(layout, groups, rows, side_by_side, options.paper && !rows.empty()).fill(table);
  add_notes(table, rows, options);
  return table;
}

StudyTable cost_table(const std::vector<StudyRow>& all, const StudyTableOptions& options) {
  Layout layout;
  layout.number = 6;
  layout.cost = true;
  layout.figures = {Figure::memory_gb, Figure::minutes, Figure::token_per_s};
  for (const PaperCost& row : paper_table6) {
    const Setting setting = {row.method, paper_bits, 16, paper_group};
    if (layout.published.empty() || !same_line(layout.published.back(), setting)) {
      layout.published.push_back(setting);
    }
  }
  std::vector<const StudyRow*> rows;
  for (const StudyRow& row : all) {
    if (std::any_of(layout.figures.begin(), layout.figures.end(),
                    [&](Figure f) { return our_figure(row, f).has_value(); })) {
      rows.push_back(&row);
    }
  }
  const std::vector<std::string> models = {"llama2-7b", "llama3-8b"};
  std::vector<Group> groups = groups_of(rows, models, true);
  if (groups.empty() || std::any_of(groups.begin(), groups.end(),
                                    [](const Group& g) { return !g.paper_model.empty(); })) {
    add_empty_groups(groups, models);
  }
  StudyTable table;
  table.number = 6;
  table.stem = "table6";
  table.title = "Memory and time of the quantization, and speed of the result";
  TableMaker(layout, groups, rows, true, options.paper && !rows.empty()).fill(table);
  add_notes(table, rows, options);
  return table;
}

}  // namespace

std::vector<StudyTable> study_tables(const std::vector<StudyRow>& rows,
                                     const StudyTableOptions& options) {
  std::vector<StudyTable> tables;
  for (const PaperTable& paper : paper_tables()) {
    if (paper.number == 7) tables.push_back(cost_table(rows, options));
    StudyTable table = scores_table(paper, rows, options);
    if (paper.number < 6 || !table.rows.empty()) tables.push_back(std::move(table));
  }
  for (StudyTable table : {real_bits_table(rows), divergence_table(rows)}) {
    if (!table.rows.empty()) tables.push_back(std::move(table));
  }
  return tables;
}

}  // namespace engine
