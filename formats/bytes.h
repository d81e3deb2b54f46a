// A bounds-checked little-endian reader over bytes that somebody else owns.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "formats/error.h"

namespace engine {

static_assert(std::endian::native == std::endian::little, "the formats are little-endian");

class ByteReader {
 public:
  // `file` names the source in errors; `base` is the offset of bytes[0] inside that file.
  ByteReader(std::span<const std::byte> bytes, std::string file, std::uint64_t base = 0)
      : bytes_(bytes), file_(std::move(file)), base_(base) {}

  [[nodiscard]] std::size_t remaining() const { return bytes_.size() - at_; }
  [[nodiscard]] std::uint64_t offset() const { return base_ + at_; }
  [[nodiscard]] const std::string& file() const { return file_; }

  // Reads a trivially copyable value at any alignment.
  template <class T>
  T read(const char* what) {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  // The next `count` bytes, which must exist.
  std::span<const std::byte> take(std::uint64_t count, const char* what) {
    if (count > remaining()) {
      throw FormatError(file_, "offset " + std::to_string(offset()),
                        std::to_string(count) + " bytes of " + what,
                        std::to_string(remaining()) + " bytes before the end");
    }
    const auto out = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += static_cast<std::size_t>(count);
    return out;
  }

  std::string_view take_text(std::uint64_t count, const char* what) {
    const auto raw = take(count, what);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }

 private:
  std::span<const std::byte> bytes_;
  std::string file_;
  std::uint64_t base_ = 0;
  std::size_t at_ = 0;
};

}  // namespace engine
