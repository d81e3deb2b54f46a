// Comma-separated values (RFC 4180): quoted cells may hold commas, line ends and doubled quotes.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace engine {

struct CsvRow {
  std::size_t line = 0;  // where the row begins, counted from 1
  std::vector<std::string> cells;
};

struct CsvTable {
  std::vector<CsvRow> rows;  // a header line, if the file has one, is the first
  bool crlf = false;         // whether the first row ends in \r\n
};

struct CsvLimits {
  std::size_t max_bytes = std::size_t{64} << 20;
  std::size_t max_cells = std::size_t{1} << 22;  // of all rows together
};

// Rows end in \n or \r\n; the last may end with the text. A blank line is a row of one empty cell.
// Rows may have different numbers of cells. A byte order mark in front is dropped. A quote inside a
// cell that does not begin with one is an ordinary character, as common readers take it.
// Throws FormatError naming `file` and the line for text over the limits or not UTF-8, a quote that
// is never closed, characters after a closing quote, and a \r that ends no row.
[[nodiscard]] CsvTable parse_csv(std::string_view text, const std::string& file,
                                 const CsvLimits& limits = {});

}  // namespace engine
