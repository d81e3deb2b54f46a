// TOML to JSON: alone in its file, because the library's header takes long to compile.
#include <toml++/toml.h>

#include <cmath>

#include "eval/study_config.h"

namespace engine {
namespace {

class Converter {
 public:
  explicit Converter(std::string file) : file_(std::move(file)) {}

  Json value(const toml::node& node, const std::string& path) const {
    if (const toml::table* table = node.as_table()) {
      Json j = Json::object();
      for (const auto& [key, child] : *table) {
        const std::string name(key.str());
        j[name] = value(child, path.empty() ? name : path + "." + name);
      }
      return j;
    }
    if (const toml::array* array = node.as_array()) {
      Json j = Json::array();
      for (const toml::node& child : *array) {
        j.push_back(value(child, path + "[" + std::to_string(j.size()) + "]"));
      }
      return j;
    }
    if (const auto* text = node.as_string()) return text->get();
    if (const auto* number = node.as_integer()) return number->get();
    if (const auto* flag = node.as_boolean()) return flag->get();
    if (const auto* number = node.as_floating_point(); number != nullptr) {
      if (std::isfinite(number->get())) return number->get();
      throw FormatError(file_, path, "a finite number", "infinity or NaN");
    }
    throw FormatError(file_, path, "text, a number, true or false, a list or a table",
                      "a date or time");
  }

 private:
  std::string file_;
};

}  // namespace

Json toml_to_json(std::string_view text, const std::string& file) {
  try {
    const toml::table table = toml::parse(text);
    return Converter(file).value(table, "");
  } catch (const toml::parse_error& e) {
    throw FormatError(file,
                      "line " + std::to_string(e.source().begin.line) + ", column " +
                          std::to_string(e.source().begin.column),
                      "valid TOML", std::string(e.description()));
  }
}

}  // namespace engine
