#include "formats/json.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <unordered_set>
#include <utility>

namespace engine {
namespace {

constexpr std::size_t kShown = 80;

std::string cut(std::string text) {
  if (text.size() <= kShown) return text;
  std::size_t end = kShown;  // never in the middle of a UTF-8 sequence
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) --end;
  return text.substr(0, end) + "...";
}

// Builds the value from parser events. nlohmann's own builder searches an ordered object for
// every key it inserts, quadratic in a hostile (or merely large) object; this one appends and
// keeps a hash set of the keys, which also finds duplicates.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Builder(const std::string& file, const JsonLimits& limits) : file_(file), limits_(limits) {}

  Json root;

  bool null() override { return put(Json(nullptr)); }
  bool boolean(bool value) override { return put(Json(value)); }
  bool number_integer(number_integer_t value) override { return put(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return put(Json(value)); }
  bool number_float(number_float_t value, const string_t&) override { return put(Json(value)); }
  bool string(string_t& value) override { return put(Json(std::move(value))); }
  bool binary(binary_t&) override { return false; }  // never occurs in text
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& value) override {
    if (!stack_.back().keys.insert(value).second) {
      throw FormatError(file_, "key " + quote_text(value), "unique keys", "the key twice");
    }
    stack_.back().key = std::move(value);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& problem) override {
    std::string detail = problem.what();  // "[json.exception...] text"
    const std::size_t bracket = detail.find("] ");
    if (bracket != std::string::npos) detail.erase(0, bracket + 2);
    for (char& c : detail) {
      if (static_cast<unsigned char>(c) < 0x20) c = ' ';
    }
    throw FormatError(file_, "byte " + std::to_string(position), "valid JSON", detail);
  }

 private:
  struct Frame {
    Json value;
    std::string key;  // where the next member of an object goes
    std::unordered_set<std::string> keys;
  };

  bool open(Json value) {
    if (stack_.size() >= limits_.max_depth) {
      throw FormatError(file_, "JSON",
                        "at most " + std::to_string(limits_.max_depth) + " nested levels", "more");
    }
    stack_.push_back({std::move(value), {}, {}});
    return true;
  }

  bool close() {
    Json value = std::move(stack_.back().value);
    stack_.pop_back();
    return put(std::move(value));
  }

  bool put(Json value) {
    if (stack_.empty()) {
      root = std::move(value);
      return true;
    }
    Frame& top = stack_.back();
    if (top.value.is_array()) {
      top.value.get_ref<Json::array_t&>().push_back(std::move(value));
    } else {
      top.value.get_ref<Json::object_t&>().emplace_back(std::move(top.key), std::move(value));
      top.key.clear();
    }
    return true;
  }

  const std::string& file_;
  const JsonLimits& limits_;
  std::vector<Frame> stack_;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& file, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw FormatError(file, "JSON", "at most " + std::to_string(limits.max_bytes) + " bytes",
                      std::to_string(text.size()));
  }
  Builder builder(file, limits);
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    throw FormatError(file, "JSON", "valid JSON", "something the parser refused");
  }
  return std::move(builder.root);
}

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  // O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw IoError(path.string(), "cannot open", errno);
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } const closer{fd};
  struct stat info {};
  if (::fstat(fd, &info) != 0) throw IoError(path.string(), "cannot read its size", errno);
  if (!S_ISREG(info.st_mode)) throw IoError(path.string(), "not a regular file", 0);
  const auto size = static_cast<std::size_t>(info.st_size);
  if (size > max_bytes) {
    throw FormatError(path.string(), "file size", "at most " + std::to_string(max_bytes) + " bytes",
                      std::to_string(size));
  }
  std::string text(size, '\0');
  std::size_t done = 0;
  while (done < size) {
    const ssize_t got = ::read(fd, text.data() + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError(path.string(), "cannot read", errno);
    if (got == 0) throw IoError(path.string(), "became shorter while it was read", 0);
    done += static_cast<std::size_t>(got);
  }
  return text;
}

Json read_json_file(const std::filesystem::path& path, const JsonLimits& limits) {
  return parse_json(read_text_file(path, limits.max_bytes), path.string(), limits);
}

std::string quote_text(std::string_view text) {
  return cut(Json(std::string(text.substr(0, 2 * kShown)))
                 .dump(-1, ' ', false, Json::error_handler_t::replace));
}

std::string describe(const Json& value) {
  if (value.is_string()) return quote_text(value.get_ref<const std::string&>());
  if (value.is_structured() && value.size() > 16) {
    return std::string(value.is_array() ? "an array" : "an object") + " of " +
           std::to_string(value.size()) + " elements";
  }
  return cut(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

JsonObject::JsonObject(const Json& value, std::string file, std::string path)
    : value_(&value), file_(std::move(file)), path_(std::move(path)) {
  if (!value.is_object()) {
    throw FormatError(file_, path_.empty() ? "JSON" : path_, "an object", describe(value));
  }
}

const Json* JsonObject::find(std::string_view key) const {
  for (const auto& [name, member] : value_->get_ref<const Json::object_t&>()) {
    if (name == key) return member.is_null() ? nullptr : &member;
  }
  return nullptr;
}

std::string JsonObject::path_of(std::string_view key) const {
  return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
}

void JsonObject::fail(std::string_view key, const std::string& expected) const {
  const Json* member = find(key);
  throw FormatError(file_, path_of(key), expected,
                    member == nullptr ? "nothing" : describe(*member));
}

std::int64_t JsonObject::integer(std::string_view key, std::int64_t low, std::int64_t high) const {
  const auto expected = [&] {
    if (low == 1 && high == INT64_MAX) return std::string("a positive integer");
    return "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  };
  const Json* member = find(key);
  if (member == nullptr || !member->is_number_integer()) fail(key, expected());
  if (member->is_number_unsigned() &&
      member->get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
    fail(key, expected());
  }
  const auto value = member->get<std::int64_t>();
  if (value < low || value > high) fail(key, expected());
  return value;
}

std::int64_t JsonObject::integer(std::string_view key, std::int64_t low, std::int64_t high,
                                 std::int64_t fallback) const {
  return has(key) ? integer(key, low, high) : fallback;
}

double JsonObject::number(std::string_view key) const {
  const Json* member = find(key);
  if (member == nullptr || !member->is_number()) fail(key, "a number");
  const auto value = member->get<double>();
  if (!std::isfinite(value)) fail(key, "a finite number");
  return value;
}

double JsonObject::number(std::string_view key, double fallback) const {
  return has(key) ? number(key) : fallback;
}

bool JsonObject::boolean(std::string_view key) const {
  const Json* member = find(key);
  if (member == nullptr || !member->is_boolean()) fail(key, "true or false");
  return member->get<bool>();
}

bool JsonObject::boolean(std::string_view key, bool fallback) const {
  return has(key) ? boolean(key) : fallback;
}

std::string JsonObject::text(std::string_view key) const {
  const Json* member = find(key);
  if (member == nullptr || !member->is_string()) fail(key, "a string");
  return member->get<std::string>();
}

std::string JsonObject::text(std::string_view key, std::string_view fallback) const {
  return has(key) ? text(key) : std::string(fallback);
}

JsonObject JsonObject::object(std::string_view key) const {
  const Json* member = find(key);
  if (member == nullptr || !member->is_object()) fail(key, "an object");
  return {*member, file_, path_of(key)};
}

}  // namespace engine
