// A thin layer over nlohmann-json: bounded parsing and typed getters whose errors name the key.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/error.h"

namespace engine {

// Objects keep the order of the file, and what we write keeps the order we chose.
// Looking a key up is linear in the object's size: iterate over large objects instead.
using Json = nlohmann::ordered_json;

struct JsonLimits {
  std::size_t max_bytes = std::size_t{64} << 20;
  std::size_t max_depth = 64;  // nested arrays and objects
};

// Parses exactly one JSON value. `file` names the source in errors. Throws FormatError naming the
// byte position for text over the limits, invalid JSON or UTF-8, and an object with a key twice.
[[nodiscard]] Json parse_json(std::string_view text, const std::string& file,
                              const JsonLimits& limits = {});

// The whole content of a regular file. Throws IoError when the system refuses and FormatError when
// the file is larger than `max_bytes`; nothing is allocated before that check.
[[nodiscard]] std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes);

[[nodiscard]] Json read_json_file(const std::filesystem::path& path, const JsonLimits& limits = {});

// Untrusted text made fit for an error line: quoted, control characters escaped, cut to ~80 bytes.
[[nodiscard]] std::string quote_text(std::string_view text);

// A JSON value as an error shows it: compact and cut to ~80 bytes.
[[nodiscard]] std::string describe(const Json& value);

// A JSON object seen together with its file and key path. It refers to the value, which must
// outlive it. A key that is absent and a key that is null are the same: "not there".
// Every getter throws FormatError "FILE: path.to.key: expected ..., found ...".
class JsonObject {
 public:
  // Throws unless `value` is an object. `path` is empty for the top level.
  JsonObject(const Json& value, std::string file, std::string path = "");
  JsonObject(const Json&& value, std::string file, std::string path = "") = delete;

  // The value at `key`, or nullptr if it is not there.
  [[nodiscard]] const Json* find(std::string_view key) const;
  [[nodiscard]] bool has(std::string_view key) const { return find(key) != nullptr; }

  // The getters without a default require the key; those with one return it if it is not there.
  [[nodiscard]] std::int64_t integer(std::string_view key, std::int64_t low,
                                     std::int64_t high) const;
  [[nodiscard]] std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high,
                                     std::int64_t fallback) const;
  // A finite number; integers are accepted.
  [[nodiscard]] double number(std::string_view key) const;
  [[nodiscard]] double number(std::string_view key, double fallback) const;
  [[nodiscard]] bool boolean(std::string_view key) const;
  [[nodiscard]] bool boolean(std::string_view key, bool fallback) const;
  [[nodiscard]] std::string text(std::string_view key) const;
  [[nodiscard]] std::string text(std::string_view key, std::string_view fallback) const;
  [[nodiscard]] JsonObject object(std::string_view key) const;
  // Always throws: `key` holds something else than `expected`.
  [[noreturn]] void fail(std::string_view key, const std::string& expected) const;

  [[nodiscard]] const Json& value() const { return *value_; }
  [[nodiscard]] const std::string& file() const { return file_; }
  [[nodiscard]] std::string path_of(std::string_view key) const;

 private:
  const Json* value_;
  std::string file_;
  std::string path_;
};

}  // namespace engine
