#include "formats/csv.h"

#include <algorithm>

#include "formats/error.h"
#include "formats/json.h"
#include "formats/utf8.h"

namespace engine {
namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

class Reader {
 public:
  Reader(std::string_view text, const std::string& file, std::size_t max_cells)
      : text_(text), file_(file), max_cells_(max_cells) {}

  CsvTable read() {
    CsvTable table;
    while (at_ < text_.size()) {
      const bool first = table.rows.empty();
      const bool crlf = read_row(table.rows.emplace_back());
      if (first) table.crlf = crlf;
    }
    return table;
  }

 private:
  [[noreturn]] void fail(std::size_t line, const std::string& expected,
                         const std::string& found) const {
    throw FormatError(file_, "line " + std::to_string(line), expected, found);
  }

  // Whether the row ended in \r\n.
  bool read_row(CsvRow& row) {
    row.line = line_;
    for (;;) {
      if (++cells_ > max_cells_) {
        fail(line_, "at most " + std::to_string(max_cells_) + " cells", "more");
      }
      row.cells.push_back(at_ < text_.size() && text_[at_] == '"' ? quoted_cell() : plain_cell());
      if (at_ == text_.size()) return false;
      const char end = text_[at_++];
      if (end == ',') continue;
      ++line_;
      if (end == '\n') return false;
      if (at_ == text_.size() || text_[at_] != '\n') {
        fail(line_ - 1, "rows that end in \\n or \\r\\n", "\\r alone");
      }
      ++at_;
      return true;
    }
  }

  std::string plain_cell() {
    const std::size_t begin = at_;
    at_ = std::min(text_.find_first_of(",\r\n", at_), text_.size());
    return std::string(text_.substr(begin, at_ - begin));
  }

  std::string quoted_cell() {
    const std::size_t opened = line_;
    std::string cell;
    for (++at_;;) {
      const std::size_t quote = text_.find('"', at_);
      if (quote == std::string_view::npos) {
        fail(opened, "a quote that closes the cell", "the end of the file");
      }
      const std::string_view part = text_.substr(at_, quote - at_);
      line_ += static_cast<std::size_t>(std::count(part.begin(), part.end(), '\n'));
      cell += part;
      at_ = quote + 1;
      if (at_ == text_.size() || text_[at_] != '"') break;
      cell += '"';
      ++at_;
    }
    if (at_ < text_.size() &&
        std::string_view(",\r\n").find(text_[at_]) == std::string_view::npos) {
      // A whole character of the text, not the first byte of one.
      fail(line_, "a comma or a line end after the closing quote",
           quote_text(text_.substr(at_, utf8_step(text_.substr(at_)).length)));
    }
    return cell;
  }

  std::string_view text_;
  const std::string& file_;
  std::size_t max_cells_;
  std::size_t at_ = 0;
  std::size_t line_ = 1;
  std::size_t cells_ = 0;
};

}  // namespace

CsvTable parse_csv(std::string_view text, const std::string& file, const CsvLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw FormatError(file, "CSV", "at most " + std::to_string(limits.max_bytes) + " bytes",
                      std::to_string(text.size()));
  }
  const std::size_t valid = utf8_valid_prefix(text);
  if (valid != text.size()) {
    const auto lines =
        std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(valid), '\n');
    throw FormatError(file, "line " + std::to_string(lines + 1), "valid UTF-8",
                      "something else at byte offset " + std::to_string(valid));
  }
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  return Reader(text, file, limits.max_cells).read();
}

}  // namespace engine
