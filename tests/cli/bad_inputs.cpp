#include "tests/cli/bad_inputs.h"

#include <algorithm>

#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

std::string filled(std::string text, const std::filesystem::path& directory) {
  const std::pair<std::string, std::string> places[] = {{"{d}", directory.string()},
                                                        {"{t}", tiny_llama3().string()}};
  for (const auto& [mark, value] : places) {
    for (std::size_t at = 0; (at = text.find(mark, at)) != std::string::npos; at += value.size()) {
      text.replace(at, mark.size(), value);
    }
  }
  return text;
}

}  // namespace

Arguments operator+(Arguments arguments, const Arguments& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

void expect_one_error(const Outcome& outcome, const Arguments& arguments, int exit_code,
                      const std::vector<std::string>& fragments) {
  const std::string what = command_text(arguments) + "\nsaid: " + outcome.err;
  EXPECT_FALSE(outcome.timed_out) << what;
  EXPECT_EQ(outcome.signal, 0) << what;
  EXPECT_EQ(outcome.exit_code, exit_code) << what;
  EXPECT_TRUE(outcome.err.starts_with("engine: error: ")) << what;
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << what;
  EXPECT_TRUE(outcome.err.ends_with('\n')) << what;
  EXPECT_LT(outcome.err.size(), 1000U) << what;
  for (const std::string& fragment : fragments) {
    EXPECT_NE(outcome.err.find(fragment), std::string::npos)
        << "expected \"" << fragment << "\" from " << what;
  }
}

void expect_refused(const BadInput& row) {
  const TemporaryDirectory directory;
  if (row.prepare) row.prepare(directory.path());
  Arguments arguments;
  for (const std::string& a : row.arguments) arguments.push_back(filled(a, directory.path()));
  std::vector<std::string> fragments;
  for (const std::string& f : row.fragments) fragments.push_back(filled(f, directory.path()));
  const auto before = contents(directory.path());
  const Outcome outcome = run_program(arguments, row.limits);
  expect_one_error(outcome, arguments, row.exit_code, fragments);
  EXPECT_EQ(contents(directory.path()), before) << command_text(arguments);
}

}  // namespace engine::test
