// The figures of a study's row, and how they are written.
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "eval/study_tables.h"

namespace engine {
namespace {

struct Column {
  Figure figure;
  const char* title;
  const char* name;  // of the text, or of the score
};

constexpr Column columns[] = {
    {Figure::wikitext2, "WikiText2", "wikitext2"},
    {Figure::c4, "C4", "c4"},
    {Figure::ptb, "PTB", "ptb"},
    {Figure::piqa, "PIQA", "piqa"},
    {Figure::arc_easy, "ARC-e", "arc_easy"},
    {Figure::arc_challenge, "ARC-c", "arc_challenge"},
    {Figure::hellaswag, "HellaSwag", "hellaswag"},
    {Figure::winogrande, "Wino", "winogrande"},
    {Figure::average, "Avg.", ""},
    {Figure::humanities, "Hums.", "mmlu.humanities"},
    {Figure::stem, "STEM", "mmlu.stem"},
    {Figure::social, "Social", "mmlu.social"},
    {Figure::other, "Other", "mmlu.other"},
    {Figure::mmlu, "Avg.", "mmlu"},
    {Figure::ai2d, "AI2D", "ai2d"},
    {Figure::chartqa, "ChartQA", "chartqa"},
    {Figure::docvqa, "DocVQA", "docvqa"},
    {Figure::mmbench, "MMBench", "mmbench"},
    {Figure::mme_cognition, "MME Cognition", "mme.cognition"},
    {Figure::mme_perception, "MME Perception", "mme.perception"},
    {Figure::memory_gb, "Memory (GB)", ""},
    {Figure::minutes, "Time (min)", ""},
    {Figure::token_per_s, "Speed (token/s)", ""},
};

const Column& column_of(Figure figure) {
  for (const Column& c : columns) {
    if (c.figure == figure) return c;
  }
  return columns[0];
}

bool is_perplexity(Figure figure) { return figure <= Figure::ptb; }
bool is_cost(Figure figure) { return figure >= Figure::memory_gb; }
bool is_points(Figure figure) {
  return figure == Figure::mme_cognition || figure == Figure::mme_perception;
}

// "1.9e3": two digits and the exponent without padding, as the paper prints large numbers.
std::string exponent_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", value);
  std::string out(text);
  const std::size_t e = out.find('e');
  if (e == std::string::npos) return out;  // inf, nan
  const int exponent = std::stoi(out.substr(e + 1));
  return out.substr(0, e) + "e" + std::to_string(exponent);
}

std::string fixed_text(double value, int digits) {
  char text[400];  // any double
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::optional<OurFigure> finite(OurFigure figure) {
  if (!std::isfinite(figure.value)) return std::nullopt;
  if (figure.standard_error && !std::isfinite(*figure.standard_error)) {
    figure.standard_error.reset();
  }
  return figure;
}

void add(Json& details, const char* key, const std::optional<double>& value) {
  if (value && std::isfinite(*value)) details[key] = *value;
}

std::optional<OurFigure> perplexity_of(const StudyRow& row, Figure figure) {
  const std::string_view name = column_of(figure).name;
  const StudyRow::Perplexity* found = nullptr;
  for (const StudyRow::Perplexity& p : row.perplexity) {
    if (p.text == name) {
      found = &p;
      break;
    }
    if (found == nullptr && p.text.starts_with(name)) found = &p;  // "c4-new"
  }
  if (found == nullptr) return std::nullopt;
  OurFigure out;
  out.value = found->value;
  out.standard_error = found->value * found->standard_error;  // exp's derivative
  out.details["text"] = found->text;
  out.details["protocol"] = found->protocol;
  add(out.details, "loss_standard_error", found->standard_error);
  return finite(std::move(out));
}

std::optional<OurFigure> score_of(const StudyRow& row, Figure figure) {
  const std::string_view name = column_of(figure).name;
  for (const StudyRow::Score& s : row.scores) {
    if (s.name != name) continue;
    const double unit = is_points(figure) ? 1 : 100;
    OurFigure out;
    out.value = unit * s.acc;
    if (s.acc_stderr) out.standard_error = unit * *s.acc_stderr;
    out.details["questions"] = s.n;
    add(out.details, "acc", s.acc);
    add(out.details, "acc_stderr", s.acc_stderr);
    add(out.details, "acc_norm", s.acc_norm);
    add(out.details, "acc_norm_stderr", s.acc_norm_stderr);
    if (!s.protocol.empty()) out.details["protocol"] = s.protocol;
    if (!s.note.empty()) out.details["note"] = s.note;
    return finite(std::move(out));
  }
  return std::nullopt;
}

std::optional<OurFigure> average_of(const StudyRow& row) {
  OurFigure out;
  double variance = 0;
  bool errors = true;
  constexpr std::array tasks = {Figure::piqa, Figure::arc_easy, Figure::arc_challenge,
                                Figure::hellaswag, Figure::winogrande};
  for (const Figure task : tasks) {
    const std::optional<OurFigure> one = score_of(row, task);
    if (!one) return std::nullopt;  // the mean of fewer is another figure
    out.value += one->value / tasks.size();
    errors = errors && one->standard_error.has_value();
    if (errors) variance += *one->standard_error * *one->standard_error;
  }
  if (errors) out.standard_error = std::sqrt(variance) / tasks.size();
  return finite(std::move(out));
}

std::optional<OurFigure> plain(std::optional<double> value) {
  if (!value) return std::nullopt;
  OurFigure out;
  out.value = *value;
  return finite(std::move(out));
}

}  // namespace

std::string figure_title(Figure figure) { return column_of(figure).title; }

std::string figure_text(Figure figure, double value) {
  if (is_perplexity(figure) && std::abs(value) >= 999.95) return exponent_text(value);
  if (is_cost(figure) && std::abs(value) < 9.995) return fixed_text(value, 2);
  return fixed_text(value, 1);
}

std::string published_text(Figure figure, double value) {
  if (is_perplexity(figure) && value >= 100) return exponent_text(value);
  char text[64];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed).ptr;
  std::string out(text, end);
  if (figure != Figure::minutes && out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::optional<OurFigure> our_figure(const StudyRow& row, Figure figure) {
  if (is_perplexity(figure)) return perplexity_of(row, figure);
  switch (figure) {
    case Figure::average:
      return average_of(row);
    case Figure::memory_gb: {
      if (!row.quantize_peak_bytes) return std::nullopt;
      return plain(static_cast<double>(*row.quantize_peak_bytes) * 1e-9);
    }
    case Figure::minutes: {
      if (!row.quantize_s) return std::nullopt;
      return plain(*row.quantize_s / 60);
    }
    case Figure::token_per_s:
      return plain(row.decode_token_per_s);
    default:
      return score_of(row, figure);
  }
}

}  // namespace engine
