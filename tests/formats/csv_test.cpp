#include "formats/csv.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;
using Cells = std::vector<std::string>;

std::vector<Cells> cells_of(std::string_view text) {
  std::vector<Cells> out;
  for (CsvRow& row : parse_csv(text, "t.csv").rows) out.push_back(std::move(row.cells));
  return out;
}

TEST(Csv, PlainRows) {
  EXPECT_TRUE(cells_of("").empty());
  EXPECT_EQ(cells_of("a,b\nc,d\n"), (std::vector<Cells>{{"a", "b"}, {"c", "d"}}));
  EXPECT_EQ(cells_of("a,b\nc,d"), (std::vector<Cells>{{"a", "b"}, {"c", "d"}}));
  EXPECT_EQ(cells_of("a, b ,\n,\n"), (std::vector<Cells>{{"a", " b ", ""}, {"", ""}}));
  EXPECT_EQ(cells_of("a\n\nb\n"), (std::vector<Cells>{{"a"}, {""}, {"b"}}));
  EXPECT_EQ(cells_of("a,"), (std::vector<Cells>{{"a", ""}}));
}

TEST(Csv, QuotedCells) {
  EXPECT_EQ(cells_of("\"a,b\",c\n"), (std::vector<Cells>{{"a,b", "c"}}));
  EXPECT_EQ(cells_of("\"say \"\"so\"\"\",\"\"\n"), (std::vector<Cells>{{"say \"so\"", ""}}));
  EXPECT_EQ(cells_of("\"\"\"\"\n"), (std::vector<Cells>{{"\""}}));
  EXPECT_EQ(cells_of("\"one\ntwo\r\nthree\",x"), (std::vector<Cells>{{"one\ntwo\r\nthree", "x"}}));
  EXPECT_EQ(cells_of("5\" pipe,a\"b\"\n"), (std::vector<Cells>{{"5\" pipe", "a\"b\""}}));
}

TEST(Csv, LineEndsAndByteOrderMark) {
  const CsvTable dos = parse_csv(
      "\xEF\xBB\xBF"
      "a,\"b\r\nc\"\r\nd,e\r\n",
      "t.csv");
  EXPECT_TRUE(dos.crlf);
  ASSERT_EQ(dos.rows.size(), 2U);
  EXPECT_EQ(dos.rows[0].cells, (Cells{"a", "b\r\nc"}));
  EXPECT_EQ(dos.rows[1].cells, (Cells{"d", "e"}));
  EXPECT_FALSE(parse_csv("a\nb\r\n", "t.csv").crlf);
}

TEST(Csv, RowsKnowTheirLines) {
  const CsvTable table = parse_csv("a\n\"b\nb\nb\",c\nd\r\n\"e\"", "t.csv");
  std::vector<std::size_t> lines;
  for (const CsvRow& row : table.rows) lines.push_back(row.line);
  EXPECT_EQ(lines, (std::vector<std::size_t>{1, 2, 5, 6}));
}

TEST(Csv, MalformedTextNamesFileAndLine) {
  const auto message = [](std::string_view text) {
    return error_of([&] { (void)parse_csv(text, "t.csv"); });
  };
  EXPECT_EQ(message("a\nb,\"c\nd\n"),
            "t.csv: line 2: expected a quote that closes the cell, found the end of the file");
  EXPECT_EQ(message("a\n\"b\nc\" d\n"),
            "t.csv: line 3: expected a comma or a line end after the closing quote, found \" \"");
  expect_contains(message("\"b\"\xC3\xA9\n"), "found \"\xC3\xA9\"");
  EXPECT_EQ(message("a\nb\rc\n"),
            "t.csv: line 2: expected rows that end in \\n or \\r\\n, found \\r alone");
  expect_contains(message("a\r"), "line 1: expected rows that end in");
  expect_contains(message("a\nb\xFF\n"), "t.csv: line 2: expected valid UTF-8");
}

TEST(Csv, Limits) {
  CsvLimits limits;
  limits.max_bytes = 4;
  EXPECT_EQ(parse_csv("a,b\n", "t.csv", limits).rows.size(), 1U);
  expect_contains(error_of([&] { (void)parse_csv("a,b\n\n", "t.csv", limits); }),
                  "expected at most 4 bytes, found 5");
  limits.max_bytes = 100;
  limits.max_cells = 3;
  EXPECT_EQ(parse_csv("a,b\nc", "t.csv", limits).rows.size(), 2U);
  expect_contains(error_of([&] { (void)parse_csv("a,b\nc,d\n", "t.csv", limits); }),
                  "line 2: expected at most 3 cells, found more");
}

}  // namespace
}  // namespace engine
