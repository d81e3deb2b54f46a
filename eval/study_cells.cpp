#include "eval/study_cells.h"

#include <cmath>
#include <cstdio>

namespace engine {
namespace {

std::string difference_text(Figure figure, double difference) {
  const std::string size = figure_text(figure, std::abs(difference));
  if (size.find_first_not_of("0.") == std::string::npos) return size;
  return (difference < 0 ? "-" : "+") + size;
}

}  // namespace

StudyCell text_cell(std::string text) {
  StudyCell cell;
  cell.text = std::move(text);
  return cell;
}

StudyCell figure_cell(Figure figure, std::optional<OurFigure> ours, std::optional<double> paper,
                      bool beside) {
  StudyCell cell;
  cell.figure = true;
  if (ours) {
    cell.ours = ours->value;
    cell.standard_error = ours->standard_error;
    cell.details = std::move(ours->details);
    cell.ours_text = figure_text(figure, ours->value);
  }
  cell.text = cell.ours_text;
  if (!beside || (!paper && !cell.ours)) return cell;
  if (paper == no_answers) {
    cell.paper_text = "N";
  } else if (paper) {
    cell.paper = paper;
    cell.paper_text = published_text(figure, *paper);
    if (cell.ours) cell.difference_text = difference_text(figure, *cell.ours - *paper);
  }
  cell.text = cell.paper_text + " / " + cell.ours_text + " / " + cell.difference_text;
  return cell;
}

std::string bits_text(double bits) {
  char text[400];
  std::snprintf(text, sizeof text, "%.2f", bits);
  std::string out(text);
  while (out.ends_with('0')) out.pop_back();
  if (out.ends_with('.')) out.pop_back();
  return out;
}

std::string group_text(std::int64_t group) { return group > 0 ? std::to_string(group) : "-"; }

StudyCell number_cell(std::optional<double> value, int digits) {
  StudyCell cell;
  cell.figure = true;
  if (!value || !std::isfinite(*value)) return cell;
  char text[400];
  std::snprintf(text, sizeof text, "%.*f", digits, *value);
  cell.ours = value;
  cell.text = cell.ours_text = text;
  return cell;
}

StudyCell perplexity_cell(const StudyRow* row, const std::string& text) {
  if (row != nullptr) {
    for (const StudyRow::Perplexity& p : row->perplexity) {
      if (p.text != text || !std::isfinite(p.value)) continue;
      OurFigure ours;
      ours.value = p.value;
      ours.standard_error = p.value * p.standard_error;
      ours.details["text"] = p.text;
      ours.details["protocol"] = p.protocol;
      return figure_cell(Figure::wikitext2, ours, std::nullopt, false);
    }
  }
  return figure_cell(Figure::wikitext2, std::nullopt, std::nullopt, false);
}

}  // namespace engine
