// Small additions to CLI11 for options whose values are names.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/core/error.h"

namespace engine {

// An option that takes one of a list of names. The first name that matches `value` is the default
// shown in the help.
template <class T>
CLI::Option* add_choice(CLI::App& app, const std::string& flag, T& value,
                        std::vector<std::pair<std::string, T>> names, const std::string& help) {
  std::string list;
  std::string shown;
  for (const auto& [name, v] : names) {
    list += (list.empty() ? "" : "|") + name;
    if (shown.empty() && v == value) shown = name;
  }
  const auto parse = [&value, names, flag, list](const std::string& text) {
    for (const auto& [name, v] : names) {
      if (name == text) {
        value = v;
        return;
      }
    }
    throw Error(ErrorCode::usage, flag + ": expected " + list + ", found \"" + text + "\"");
  };
  return app.add_option_function<std::string>(flag, parse, help)
      ->type_name(list)
      ->default_str(shown);
}

}  // namespace engine
