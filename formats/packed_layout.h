// The fixed-layout records of a `.qw` file and its journal, to and from bytes. Internal to the
// container (reader, writer, their tests); docs/packed-format.md is the specification.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "formats/bytes.h"
#include "formats/packed.h"

namespace engine::qw {

inline constexpr char header_magic[9] = "LOWBITQW";
inline constexpr char trailer_magic[9] = "LOWBITQE";
inline constexpr char journal_magic[9] = "LOWBITQJ";
inline constexpr std::uint32_t format_version = 1;
inline constexpr std::uint32_t directory_version = 1;
inline constexpr std::uint32_t journal_version = 1;
inline constexpr std::uint32_t required_flag_bits = 0xFFFF;  // unknown ones refuse the file
inline constexpr std::uint32_t known_flag_bits = 0;

inline constexpr std::uint64_t alignment = 64;
inline constexpr std::size_t header_bytes = 64;
inline constexpr std::size_t trailer_bytes = 40;
inline constexpr std::size_t directory_head_bytes = 24;
inline constexpr std::size_t journal_head_bytes = 40;
inline constexpr std::size_t hash_bytes = 8;
inline constexpr std::size_t plane_head_bytes = 24;
inline constexpr std::size_t chunk_record_bytes = 24;
inline constexpr std::size_t max_name_bytes = 255;
inline constexpr std::uint64_t max_json_bytes = std::uint64_t{64} << 20U;
inline constexpr std::uint64_t max_table_bytes = std::uint64_t{192} << 20U;

constexpr std::uint64_t align_up(std::uint64_t offset) {
  return (offset + alignment - 1) / alignment * alignment;
}

struct Trailer {
  std::uint64_t directory_offset = 0;
  std::uint64_t directory_bytes = 0;
  std::uint64_t directory_xxh3 = 0;
};

using NameIndex = std::map<std::string, std::uint32_t, std::less<>>;

struct PlaneTable {
  std::vector<PlaneInfo> planes;
  NameIndex index;
  std::uint64_t end = header_bytes;  // behind the last plane's bytes
};

std::vector<std::byte> encode_header(const PackedHeader& header);
// `bytes` are the first header_bytes of the file.
PackedHeader decode_header(std::span<const std::byte> bytes, const std::string& file);

std::vector<std::byte> encode_trailer(const Trailer& trailer);
// Also checks that directory and trailer end the file of `file_bytes` bytes.
Trailer decode_trailer(std::span<const std::byte> bytes, std::uint64_t file_bytes,
                       const std::string& file);

void require_plane_name(std::string_view name);  // Error(usage)

std::vector<std::byte> encode_plane_table(std::span<const PlaneInfo> planes);
// Checks that the planes follow each other without gaps from the header on and end at or before
// `data_limit`. `table` stands at the reader's position and is consumed completely.
PlaneTable decode_plane_table(ByteReader table, std::uint32_t plane_count,
                              std::uint32_t chunk_bytes, std::uint64_t data_limit);

std::vector<std::byte> encode_directory(std::span<const PlaneInfo> planes, const std::string& json);
struct Directory {
  PlaneTable table;
  Json json;
};
// `bytes` start at `offset` in the file and were verified against their hash.
Directory decode_directory(std::span<const std::byte> bytes, std::uint64_t offset,
                           std::uint32_t chunk_bytes, const std::string& file);

std::vector<std::byte> encode_journal(std::span<const PlaneInfo> planes, std::uint64_t data_bytes,
                                      const std::string& state);
struct Journal {
  PlaneTable table;
  Json state;
};
Journal decode_journal(std::span<const std::byte> bytes, std::uint32_t chunk_bytes,
                       const std::string& file);

// Compact JSON that reads back as the same value, else Error(usage) naming `what`: a NaN, invalid
// UTF-8 or a value over the limits of reading must not reach a file.
std::string dump_json(const Json& value, const std::string& file, const char* what);

}  // namespace engine::qw
