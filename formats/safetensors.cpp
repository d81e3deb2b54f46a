#include "formats/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>

#include "formats/json.h"

namespace engine {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

struct DTypeRow {
  TensorDType dtype;
  std::string_view name;
  std::size_t size;
};

constexpr std::array<DTypeRow, 15> kDTypes = {{
    {TensorDType::f64, "F64", 8},
    {TensorDType::f32, "F32", 4},
    {TensorDType::f16, "F16", 2},
    {TensorDType::bf16, "BF16", 2},
    {TensorDType::f8_e4m3, "F8_E4M3", 1},
    {TensorDType::f8_e5m2, "F8_E5M2", 1},
    {TensorDType::i64, "I64", 8},
    {TensorDType::i32, "I32", 4},
    {TensorDType::i16, "I16", 2},
    {TensorDType::i8, "I8", 1},
    {TensorDType::u64, "U64", 8},
    {TensorDType::u32, "U32", 4},
    {TensorDType::u16, "U16", 2},
    {TensorDType::u8, "U8", 1},
    {TensorDType::boolean, "BOOL", 1},
}};

const DTypeRow& row_of(TensorDType dtype) { return kDTypes.at(static_cast<std::size_t>(dtype)); }

std::uint64_t unsigned_value(const Json& value, const std::string& file, const std::string& place,
                             std::uint64_t high) {
  const bool valid =
      value.is_number_unsigned() || (value.is_number_integer() && value.get<std::int64_t>() >= 0);
  if (!valid || value.get<std::uint64_t>() > high) {
    throw FormatError(file, place, "an integer from 0 to " + std::to_string(high), describe(value));
  }
  return value.get<std::uint64_t>();
}

// Bytes that the shape needs, or nothing if the product overflows.
std::optional<std::uint64_t> shape_bytes(std::span<const std::int64_t> shape, std::size_t size) {
  std::uint64_t bytes = size;
  for (const std::int64_t dim : shape) {
    const auto extent = static_cast<std::uint64_t>(dim);
    if (extent != 0 && bytes > std::numeric_limits<std::uint64_t>::max() / extent) return {};
    bytes *= extent;
  }
  return bytes;
}

// One entry of the header; `data` is the offset of the data in the file, `data_bytes` its size.
TensorInfo parse_entry(const std::string& name, const Json& value, const std::string& file,
                       std::uint64_t data, std::uint64_t data_bytes) {
  const std::string place = "tensor " + quote_text(name);
  const JsonObject entry(value, file, place);
  TensorInfo info;
  info.name = name;

  const std::string dtype = entry.text("dtype");
  const auto* row = std::find_if(kDTypes.begin(), kDTypes.end(),
                                 [&](const DTypeRow& known) { return known.name == dtype; });
  if (row == kDTypes.end()) entry.fail("dtype", "a known dtype such as F16, BF16 or I32");
  info.dtype = row->dtype;

  const Json* shape = entry.find("shape");
  if (shape == nullptr || !shape->is_array()) entry.fail("shape", "an array");
  for (const Json& dim : *shape) {
    info.shape.push_back(static_cast<std::int64_t>(
        unsigned_value(dim, file, entry.path_of("shape"),
                       static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))));
  }
  const std::optional<std::uint64_t> needed = shape_bytes(info.shape, row->size);
  if (!needed) entry.fail("shape", "a size in bytes below 2^64");

  const Json* range = entry.find("data_offsets");
  if (range == nullptr || !range->is_array() || range->size() != 2) {
    entry.fail("data_offsets", "[begin, end]");
  }
  const std::string where = entry.path_of("data_offsets");
  const std::uint64_t begin = unsigned_value((*range)[0], file, where, data_bytes);
  const std::uint64_t end = unsigned_value((*range)[1], file, where, data_bytes);
  if (begin > end) entry.fail("data_offsets", "begin <= end");
  if (end - begin != *needed) {
    throw FormatError(
        file, where, std::to_string(*needed) + " bytes for " + dtype + " " + shape_text(info.shape),
        std::to_string(end - begin));
  }
  info.begin = data + begin;
  info.end = data + end;
  return info;
}

TensorMetadata parse_metadata(const Json& value, const std::string& file) {
  const JsonObject object(value, file, "__metadata__");
  TensorMetadata metadata;
  for (const auto& [key, text] : value.get_ref<const Json::object_t&>()) {
    if (!text.is_string()) {
      throw FormatError(file, "__metadata__." + quote_text(key), "a string", describe(text));
    }
    metadata.emplace_back(key, text.get<std::string>());
  }
  return metadata;
}

}  // namespace

std::size_t dtype_size(TensorDType dtype) { return row_of(dtype).size; }

std::string_view dtype_name(TensorDType dtype) { return row_of(dtype).name; }

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    if (i == 16) return text + "...]";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> bytes, const std::string& file) {
  std::uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes)) {
    throw FormatError(file, "header length", "8 bytes", std::to_string(bytes.size()));
  }
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes) {
    throw FormatError(file, "header length", "at most 100000000", std::to_string(header_bytes));
  }
  const std::span<const std::byte> rest = bytes.subspan(sizeof(header_bytes));
  if (header_bytes > rest.size()) {
    throw FormatError(file, "header length",
                      "at most the " + std::to_string(rest.size()) + " bytes that follow",
                      std::to_string(header_bytes));
  }
  const auto size = static_cast<std::size_t>(header_bytes);
  const std::string_view text(reinterpret_cast<const char*>(rest.data()), size);
  // Names, dtypes and offsets nest three deep.
  const Json root = parse_json(text, file + " (header)", {.max_bytes = size, .max_depth = 8});
  if (!root.is_object()) throw FormatError(file, "header", "a JSON object", describe(root));

  const std::uint64_t data = sizeof(header_bytes) + header_bytes;
  const std::uint64_t data_bytes = rest.size() - header_bytes;
  SafetensorsHeader header;
  for (const auto& [name, value] : root.get_ref<const Json::object_t&>()) {
    if (name == "__metadata__") {
      header.metadata = parse_metadata(value, file);
    } else {
      header.tensors.push_back(parse_entry(name, value, file, data, data_bytes));
    }
  }

  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const TensorInfo& a, const TensorInfo& b) {
                     return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
                   });
  std::uint64_t covered = data;
  for (const TensorInfo& info : header.tensors) {
    if (info.begin != covered) {
      throw FormatError(
          file, "tensor " + quote_text(info.name) + ".data_offsets",
          "to begin at " + std::to_string(covered - data) + " where the tensor before it ends",
          (info.begin < covered ? "an overlap from " : "a gap up to ") +
              std::to_string(info.begin - data));
    }
    covered = info.end;
  }
  if (covered != bytes.size()) {
    throw FormatError(file, "data", std::to_string(covered - data) + " bytes of tensors",
                      std::to_string(data_bytes) + " bytes, the last not part of any tensor");
  }
  return header;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : map_(path), header_(parse_safetensors(map_.bytes(), path.string())) {
  for (std::size_t i = 0; i < header_.tensors.size(); ++i) {
    by_name_.emplace(header_.tensors[i].name, i);
  }
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &header_.tensors[found->second];
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& info) const {
  return map_.bytes().subspan(static_cast<std::size_t>(info.begin),
                              static_cast<std::size_t>(info.end - info.begin));
}

}  // namespace engine
