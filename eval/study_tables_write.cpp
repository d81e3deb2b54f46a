// Tables as Markdown, CSV and JSON.
#include <algorithm>

#include "eval/study_tables.h"
#include "formats/atomic_file.h"

namespace engine {
namespace {

// Text that Markdown shows as it is, on one line and in one cell.
std::string markdown_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (std::string_view("\\|*_`<>[]").find(c) != std::string_view::npos) out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

std::string csv_text(std::string_view text) {
  if (text.find_first_of(",\"\r\n") == std::string_view::npos) return std::string(text);
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

// Columns on the screen: code points, for names that are not ASCII.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

std::string csv_line(const std::vector<std::string>& fields) {
  std::string out;
  for (std::size_t i = 0; i < fields.size(); ++i) out += (i > 0 ? "," : "") + csv_text(fields[i]);
  return out + "\n";
}

// Whether any row has a published figure in this column.
bool has_paper(const StudyTable& table, std::size_t column) {
  return std::any_of(table.rows.begin(), table.rows.end(),
                     [&](const StudyTableRow& row) { return row.cells[column].paper_text != "-"; });
}

// Names come from the user's configuration: bytes that are not UTF-8 must not lose the table.
std::string json_text(const Json& document) {
  return document.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string table_markdown(const StudyTable& table) {
  std::string out = "# ";
  if (table.number > 0) out += "Table " + std::to_string(table.number) + ". ";
  out += markdown_text(table.title) + "\n\n";
  std::vector<std::vector<std::string>> lines;
  lines.emplace_back();
  for (const std::string& c : table.columns) lines.back().push_back(markdown_text(c));
  for (const StudyTableRow& row : table.rows) {
    lines.emplace_back();
    for (const StudyCell& cell : row.cells) lines.back().push_back(markdown_text(cell.text));
  }
  std::vector<std::size_t> width(table.columns.size(), 3);
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) width[i] = std::max(width[i], width_of(line[i]));
  }
  for (std::size_t r = 0; r < lines.size(); ++r) {
    out += "|";
    for (std::size_t i = 0; i < width.size(); ++i) {
      const std::string pad(width[i] - width_of(lines[r][i]), ' ');
      out += " " + (i == 0 ? lines[r][i] + pad : pad + lines[r][i]) + " |";
    }
    out += "\n";
    if (r > 0) continue;
    out += "|";
    for (std::size_t i = 0; i < width.size(); ++i) {
      out += std::string(width[i] + 1, '-') + (i == 0 ? "-|" : ":|");
    }
    out += "\n";
  }
  if (!table.notes.empty()) out += "\n";
  for (const std::string& note : table.notes) out += "- " + markdown_text(note) + "\n";
  return out;
}

std::string table_csv(const StudyTable& table) {
  std::vector<bool> three;
  std::vector<std::string> header;
  for (std::size_t i = 0; i < table.columns.size(); ++i) {
    three.push_back(has_paper(table, i));
    if (three[i]) {
      for (const char* kind : {" paper", " ours", " difference"}) {
        header.push_back(table.columns[i] + kind);
      }
    } else {
      header.push_back(table.columns[i]);
    }
  }
  std::string out = csv_line(header);
  for (const StudyTableRow& row : table.rows) {
    std::vector<std::string> fields;
    for (std::size_t i = 0; i < row.cells.size(); ++i) {
      const StudyCell& cell = row.cells[i];
      if (three[i]) {
        for (const std::string* text : {&cell.paper_text, &cell.ours_text, &cell.difference_text}) {
          fields.push_back(*text);
        }
      } else {
        fields.push_back(cell.figure ? cell.ours_text : cell.text);
      }
    }
    out += csv_line(fields);
  }
  return out;
}

Json table_json(const StudyTable& table) {
  Json out;
  if (table.number > 0) out["table"] = table.number;
  out["title"] = table.title;
  out["columns"] = table.columns;
  out["rows"] = Json::array();
  for (const StudyTableRow& row : table.rows) {
    Json line;
    line["cells"] = Json::array();
    for (std::size_t i = 0; i < row.cells.size(); ++i) {
      const StudyCell& cell = row.cells[i];
      Json c;
      c["column"] = table.columns[i];
      c["text"] = cell.text;
      if (cell.ours) c["ours"] = *cell.ours;
      if (cell.standard_error) c["standard_error"] = *cell.standard_error;
      if (cell.paper) c["paper"] = *cell.paper;
      if (cell.ours && cell.paper) c["difference"] = *cell.ours - *cell.paper;
      if (!cell.details.empty()) c["details"] = cell.details;
      line["cells"].push_back(std::move(c));
    }
    if (!row.source.empty()) line["source"] = row.source;
    out["rows"].push_back(std::move(line));
  }
  out["notes"] = table.notes;
  return out;
}

void write_study_tables(const std::vector<StudyTable>& tables,
                        const std::filesystem::path& folder) {
  for (const StudyTable& table : tables) {
    write_file_atomically(folder / (table.stem + ".md"), table_markdown(table));
    write_file_atomically(folder / (table.stem + ".csv"), table_csv(table));
    write_file_atomically(folder / (table.stem + ".json"), json_text(table_json(table)));
  }
}

}  // namespace engine
