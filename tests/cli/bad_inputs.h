// One row of the tables of bad inputs: what is wrong, how it is run, and what must come back.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "tests/cli/program.h"

namespace engine::test {

struct BadInput {
  std::string name;
  // Makes the files of the case in its own, empty directory.
  std::function<void(const std::filesystem::path& directory)> prepare;
  Arguments arguments;  // "{d}" stands for the directory, "{t}" for the checkpoint of the tests
  int exit_code = 0;
  std::vector<std::string> fragments;  // of the one line on standard error; "{d}" as above
  RunLimits limits{};
};

// Runs the row: its exit code, exactly one line "engine: error: ...", every fragment in it, and
// not one file or directory more, less or of another size than before.
void expect_refused(const BadInput& row);

// The same check of an outcome, for tests that need more than a row.
void expect_one_error(const Outcome& outcome, const Arguments& arguments, int exit_code,
                      const std::vector<std::string>& fragments);

// So that a failure names the row and not its bytes.
inline void PrintTo(const BadInput& row, std::ostream* out) { *out << row.name; }

inline std::string row_name(const testing::TestParamInfo<BadInput>& info) {
  return info.param.name;
}

// `arguments` with more at the end.
Arguments operator+(Arguments arguments, const Arguments& more);

}  // namespace engine::test
