// The command line describes itself, the documentation describes the same command line, and wrong
// usage ends in one line and exit code 2.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

const std::vector<std::string> commands = {"quantize", "ppl",      "eval",     "kl",     "study",
                                           "inspect",  "generate", "tokenize", "decode", "table"};
const std::vector<std::string> bench_commands = {"latency", "kernels", "memory", "load", "table6"};

struct Outcome {
  int exit_code = -1;
  std::string out;  // standard output and standard error, or only the latter
};

// Runs `engine ARGUMENTS` in a shell; `redirect` decides what is read back.
Outcome run(const std::string& arguments, const std::string& redirect = "2>&1",
            const std::string& program = LOWBIT_PROGRAM) {
  const std::string line = "'" + program + "' " + arguments + " " + redirect;
  Outcome outcome;
  std::FILE* pipe = ::popen(line.c_str(), "r");
  if (pipe == nullptr) return outcome;
  char buffer[4096];
  std::size_t n = 0;
  while ((n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0) outcome.out.append(buffer, n);
  const int status = ::pclose(pipe);
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  return outcome;
}
Outcome run_for_errors(const std::string& arguments) { return run(arguments, "2>&1 >/dev/null"); }

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// The options that a help text defines, each with the line that does.
std::map<std::string, std::string> defined_options(const std::string& help) {
  static const std::regex definition("^ {1,8}(-[a-zA-Z], *)?(--[a-z][a-z0-9-]*)(.*)$");
  std::map<std::string, std::string> options;
  const std::vector<std::string> lines = lines_of(help);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    std::smatch match;
    if (!std::regex_match(lines[i], match, definition)) continue;
    // A long name pushes the description to the next line.
    std::string rest = match[3];
    if (i + 1 < lines.size() && !std::regex_match(lines[i + 1], definition)) rest += lines[i + 1];
    options[match[2]] = rest;
  }
  return options;
}

std::map<std::string, std::string> options_of(const std::string& command,
                                              const std::string& method = "") {
  const Outcome help =
      run(command + (method.empty() ? std::string() : " --method " + method) + " --help");
  EXPECT_EQ(help.exit_code, 0) << command << " " << method << ": " << help.out;
  return defined_options(help.out);
}

std::map<std::string, std::string> bench_options_of(const std::string& command) {
  const Outcome help = run(command + " --help", "2>&1", LOWBIT_BENCH);
  EXPECT_EQ(help.exit_code, 0) << "bench " << command << ": " << help.out;
  return defined_options(help.out);
}

// The methods as the help of quantize lists them.
std::vector<std::string> methods() {
  const std::string help = run("quantize --help").out;
  static const std::regex list("One of: ([a-z0-9_, -]+)\\.");
  static const std::regex name("[a-z0-9_-]+");
  std::smatch match;
  std::vector<std::string> found;
  if (!std::regex_search(help, match, list)) return found;
  const std::string names = match[1];
  for (std::sregex_iterator it(names.begin(), names.end(), name), end; it != end; ++it) {
    found.push_back(it->str());
  }
  return found;
}

std::set<std::string> mentioned_options(const std::string& text) {
  static const std::regex option("(^|[^-a-zA-Z0-9])(--[a-z][a-z0-9-]*)");
  std::set<std::string> found;
  for (std::sregex_iterator it(text.begin(), text.end(), option), end; it != end; ++it) {
    found.insert((*it)[2]);
  }
  return found;
}

struct Page {
  std::string name;
  std::vector<std::string> lines;  // with lines that end in a backslash joined
};

std::vector<Page> pages() {
  namespace fs = std::filesystem;
  const fs::path root = LOWBIT_SOURCE_DIR;
  std::vector<fs::path> files = {root / "README.md"};
  for (const auto& entry : fs::recursive_directory_iterator(root / "docs")) {
    if (entry.path().extension() == ".md") files.push_back(entry.path());
  }
  std::vector<Page> all;
  for (const fs::path& file : files) {
    std::ifstream in(file);
    EXPECT_TRUE(in.good()) << file;
    Page page{fs::relative(file, root).string(), {}};
    std::string pending;
    for (std::string line; std::getline(in, line);) {
      if (line.ends_with('\\')) {
        pending += line.substr(0, line.size() - 1);
        continue;
      }
      page.lines.push_back(pending + line);
      pending.clear();
    }
    all.push_back(std::move(page));
  }
  return all;
}

TEST(Help, ListsEveryCommandAndTheVersion) {
  const Outcome help = run("--help");
  EXPECT_EQ(help.exit_code, 0);
  for (const std::string& command : commands) {
    EXPECT_NE(help.out.find("\n  " + command + " "), std::string::npos) << command;
  }
  const Outcome version = run("--version");
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_TRUE(std::regex_search(version.out, std::regex("^engine [0-9]+\\.[0-9]+\\.[0-9]+")))
      << version.out;
}

TEST(Help, BenchListsItsCommandsAndTheVersion) {
  const Outcome help = run("--help", "2>&1", LOWBIT_BENCH);
  EXPECT_EQ(help.exit_code, 0);
  for (const std::string& command : bench_commands) {
    EXPECT_NE(help.out.find("\n  " + command + " "), std::string::npos) << command;
  }
  const Outcome version = run("--version", "2>&1", LOWBIT_BENCH);
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_TRUE(std::regex_search(version.out, std::regex("^bench [0-9]+\\.[0-9]+\\.[0-9]+")))
      << version.out;
}

TEST(Help, EveryOptionOfEveryCommandIsDescribed) {
  static const std::regex words("[a-zA-Z]{2,}.* .*[a-zA-Z]{2,}");
  for (const std::string& command : commands) {
    const auto options = options_of(command);
    EXPECT_TRUE(options.contains("--help")) << command;
    for (const auto& [option, description] : options) {
      EXPECT_TRUE(std::regex_search(description, words))
          << command << " " << option << ": \"" << description << "\"";
    }
  }
  for (const std::string& command : bench_commands) {
    const auto options = bench_options_of(command);
    EXPECT_TRUE(options.contains("--help")) << "bench " << command;
    for (const auto& [option, description] : options) {
      EXPECT_TRUE(std::regex_search(description, words))
          << "bench " << command << " " << option << ": \"" << description << "\"";
    }
  }
}

TEST(Help, MethodsListTheirOptions) {
  const std::set<std::string> grid = {"--bits", "--group", "--sym", "--mse", "--scale-dtype"};
  const std::set<std::string> on_grids = {"rtn", "gptq", "awq"};  // methods with all of these
  std::map<std::string, std::set<std::string>> own;
  own["rtn"] = {"--rule", "--arithmetic"};
  own["gptq"] = {"--act-order",  "--static-groups", "--true-sequential", "--damp",
                 "--damp-tries", "--block",         "--factor"};
  own["awq"] = {"--rule",       "--arithmetic", "--ratios",      "--search-samples", "--clip",
                "--clip-steps", "--max-shrink", "--clip-tokens", "--clip-stride",    "--division"};
  own["pbllm"] = {"--bits",  "--salient",         "--high-bits", "--metric",
                  "--group", "--no-compensation", "--block",     "--scale-dtype",
                  "--damp",  "--damp-tries",      "--factor"};
  own["billm"] = {"--metric", "--search",      "--rest-passes", "--max-salient", "--no-mean",
                  "--block",  "--scale-dtype", "--damp",        "--damp-tries",  "--factor"};
  own["slimllm"] = {"--bits",     "--group",      "--scale-dtype",
                    "--salience", "--divergence", "--allocation",
                    "--lambda",   "--bit-table",  "--no-scale-search",
                    "--damp",     "--damp-tries", "--no-leading-middle-zero",
                    "--factor",   "--search-damp"};
  own["quipsharp"] = {"--bits",       "--scale-factor", "--tune-iters",     "--sigma-reg",
                      "--damp-tries", "--factor",       "--transform-seed", "--calibration-stream"};
  own["quip"] = {"--bits",       "--grid",           "--transform",  "--transform-seed",
                 "--no-rescale", "--diagonal-dtype", "--rho",        "--order",
                 "--passes",     "--damp",           "--damp-tries", "--factor"};
  const auto plain = options_of("quantize");
  EXPECT_GE(methods().size(), own.size());
  for (const std::string& method : methods()) {
    ASSERT_TRUE(own.contains(method)) << "this test does not know the options of " << method;
    const auto options = options_of("quantize", method);
    std::set<std::string> expected = own.at(method);
    if (on_grids.contains(method)) expected.insert(grid.begin(), grid.end());
    for (const std::string& option : expected) {
      EXPECT_TRUE(options.contains(option)) << method << " " << option;
      EXPECT_FALSE(plain.contains(option)) << option << " without a method";
    }
    // What is listed beyond the command's own options is exactly the method's.
    EXPECT_EQ(options.size(), plain.size() + expected.size()) << method;
  }
}

// In the documentation, a line that runs `engine COMMAND` must fit that command's help (with its
// --method, if it names one), one that runs `bench COMMAND` that one's; a page of docs/methods fits
// its method; other text may mention any option of either program.
TEST(Docs, EveryMentionedOptionExists) {
  // Options of other programs that the pages may mention.
  const std::set<std::string> foreign = {"--data", "--output-on-failure", "--gtest_filter"};
  std::map<std::string, std::set<std::string>> known;  // by "command" and "quantize METHOD"
  std::set<std::string> any = foreign;
  const auto learn = [&](const std::string& key, const std::map<std::string, std::string>& from) {
    for (const auto& [option, text] : from) {
      known[key].insert(option);
      any.insert(option);
    }
  };
  for (const std::string& command : commands) learn(command, options_of(command));
  for (const std::string& method : methods())
    learn("quantize " + method, options_of("quantize", method));
  for (const std::string& command : bench_commands)
    learn("bench " + command, bench_options_of(command));
  any.insert("--version");

  static const std::regex call(
      "(?:^|[ `/(])engine "
      "(quantize|ppl|eval|kl|study|inspect|generate|tokenize|decode|table)\\b");
  static const std::regex method_name("--method[ =]([a-z0-9-]+)");
  static const std::regex bench_call("(?:^|[ `/(])bench (latency|kernels|memory|load|table6)\\b");
  static const std::regex other_program("\\b(ctest|cmake|parity_tests|conformance_tests) ");
  std::size_t mentions = 0;
  for (const Page& page : pages()) {
    const std::filesystem::path path(page.name);
    const bool of_method = path.parent_path().filename() == "methods" &&
                           known.contains("quantize " + path.stem().string());
    for (const std::string& line : page.lines) {
      const std::set<std::string> found = mentioned_options(line);
      if (found.empty()) continue;
      mentions += found.size();
      std::smatch match;
      const std::set<std::string>* allowed = &any;
      std::string where = "any command";
      if (std::regex_search(line, match, call)) {
        where = match[1];
        std::smatch method;
        if (where == "quantize" && std::regex_search(line, method, method_name) &&
            known.contains("quantize " + method[1].str())) {
          where += " " + method[1].str();
        }
        allowed = &known.at(where);
      } else if (std::regex_search(line, match, bench_call)) {
        where = "bench " + match[1].str();
        allowed = &known.at(where);
      } else if (std::regex_search(line, other_program)) {
        continue;
      } else if (of_method) {
        where = "quantize " + path.stem().string();
        allowed = &known.at(where);
      }
      for (const std::string& option : found) {
        EXPECT_TRUE(allowed->contains(option))
            << page.name << ": " << option << " is not an option of " << where << ": " << line;
      }
    }
  }
  EXPECT_GT(mentions, 30U) << "the pages were not read";
}

TEST(Docs, EveryMethodHasItsPageAndEveryOptionIsOnIt) {
  ASSERT_FALSE(methods().empty());
  const auto plain = options_of("quantize");
  for (const std::string& method : methods()) {
    const std::filesystem::path file =
        std::filesystem::path(LOWBIT_SOURCE_DIR) / "docs/methods" / (method + ".md");
    std::ifstream in(file);
    ASSERT_TRUE(in.good()) << file;
    std::stringstream text;
    text << in.rdbuf();
    const std::set<std::string> mentioned = mentioned_options(text.str());
    for (const auto& [option, description] : options_of("quantize", method)) {
      if (!plain.contains(option)) {
        EXPECT_TRUE(mentioned.contains(option)) << method << " " << option;
      }
    }
  }
}

void expect_usage_error(const std::string& arguments, const std::string& part) {
  const Outcome outcome = run_for_errors(arguments);
  EXPECT_EQ(outcome.exit_code, 2) << arguments << ": " << outcome.out;
  EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 1)
      << arguments << ": " << outcome.out;
  EXPECT_EQ(outcome.out.rfind("engine: error: ", 0), 0U) << arguments << ": " << outcome.out;
  EXPECT_NE(outcome.out.find(part), std::string::npos) << arguments << ": " << outcome.out;
}

TEST(Usage, UnknownOptionsAreRefused) {
  const std::map<std::string, std::string> complete = {
      {"quantize", "--model m --method rtn --out o.qw"},
      {"ppl", "--model m --text t"},
      {"eval", "--model m --tasks piqa --data d"},
      {"kl", "--reference m --text t"},
      {"study", "--config c"},
      {"inspect", "m"},
      {"generate", "--model m"},
      {"tokenize", "--model m --prompt x"},
      {"decode", "--model m --out o"},
      {"table", "folder"}};
  for (const std::string& command : commands) {
    const std::string arguments = command + " " + complete.at(command);
    expect_usage_error(arguments + " --no-such-option 3", "--no-such-option");
  }
  // Another method's option is unknown, too.
  expect_usage_error("quantize " + complete.at("quantize") + " --act-order", "--act-order");
  expect_usage_error("--no-such-option", "subcommand");
}

TEST(Usage, MissingAndMisspeltPartsAreRefused) {
  expect_usage_error("", "subcommand");
  expect_usage_error("quantise", "subcommand");
  expect_usage_error("quantize --method rtn --out o.qw", "--model");
  expect_usage_error("quantize --model m --out o.qw", "--method");
  expect_usage_error("quantize --model m --method rtn", "--out");
  expect_usage_error("quantize --model m --out o.qw --method rtm", "rtn, gptq");
  expect_usage_error("quantize --model m --out o.qw --method", "--method");
  expect_usage_error("quantize --model m --method rtn --out o.qw --bits four", "--bits");
  expect_usage_error("ppl --model m", "--text");
  expect_usage_error("ppl --model m --text t --bos maybe", "stream-start");
  expect_usage_error("table", "folder");
  expect_usage_error("kl --reference m", "--text");
  expect_usage_error("kl --model m --text t", "--reference");
  expect_usage_error("kl --reference m --text t", "--save-reference");
}

}  // namespace
