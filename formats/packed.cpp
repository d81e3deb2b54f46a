#include "formats/packed.h"

#include <algorithm>
#include <concepts>
#include <cstring>

#include "formats/error.h"
#include "formats/packed_layout.h"

namespace engine {

std::uint64_t PlaneInfo::stored_bytes() const {
  std::uint64_t total = 0;
  for (const ChunkRecord& chunk : chunks) total += chunk.stored_bytes;
  return total;
}

namespace qw {
namespace {

// Appends little-endian values.
class ByteWriter {
 public:
  template <std::unsigned_integral T>
  void put(T value) {
    const auto raw = std::as_bytes(std::span(&value, 1));
    bytes_.insert(bytes_.end(), raw.begin(), raw.end());
  }
  void put(std::span<const std::byte> raw) { bytes_.insert(bytes_.end(), raw.begin(), raw.end()); }
  void put_text(std::string_view text) { put(std::as_bytes(std::span(text))); }
  void pad_to(std::size_t size) { bytes_.resize(size); }
  void put_hash() { put(xxh3(bytes_)); }  // of everything so far
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

std::string at(std::uint64_t offset) { return "offset " + std::to_string(offset); }

void expect_magic(ByteReader& in, const char* magic, const char* what) {
  const auto where = at(in.offset());
  if (in.take_text(8, what) != magic) {
    throw FormatError(in.file(), where, std::string(what) + " '" + magic + "'", "other bytes");
  }
}

// The last 8 bytes are the hash of the others.
void expect_hash_at_end(std::span<const std::byte> bytes, const std::string& file,
                        const char* what) {
  const auto body = bytes.first(bytes.size() - hash_bytes);
  std::uint64_t stored = 0;
  std::memcpy(&stored, bytes.data() + body.size(), hash_bytes);
  if (xxh3(body) != stored) {
    throw FormatError(file, what, "bytes that match the checksum", "damaged bytes");
  }
}

void expect_version(ByteReader& in, std::uint32_t known, const char* what) {
  const auto where = at(in.offset());
  const auto version = in.read<std::uint32_t>(what);
  if (version != known) {
    throw FormatError(in.file(), where, std::string(what) + " " + std::to_string(known),
                      std::to_string(version));
  }
}

bool valid_name(std::string_view name) {
  return !name.empty() && name.size() <= max_name_bytes &&
         std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c <= '~'; });
}

Json parse_limited(std::string_view text, const std::string& file) {
  return parse_json(text, file, {.max_bytes = max_json_bytes});
}

// The chunks of one plane; `cursor` advances over their stored bytes.
void decode_chunk_records(ByteReader& in, std::uint32_t count, std::uint32_t chunk_bytes,
                          std::uint64_t data_limit, std::uint64_t& cursor, PlaneInfo& plane) {
  if (count > in.remaining() / chunk_record_bytes) {
    throw FormatError(in.file(), at(in.offset()),
                      "at most " + std::to_string(in.remaining() / chunk_record_bytes) +
                          " chunk records of plane '" + plane.name + "'",
                      std::to_string(count));
  }
  plane.chunks.reserve(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint64_t where = in.offset();
    const auto fail = [&](const std::string& expected, std::uint64_t found) {
      throw FormatError(in.file(),
                        at(where) + ", plane '" + plane.name + "', chunk " + std::to_string(i),
                        expected, std::to_string(found));
    };
    ChunkRecord chunk;
    chunk.offset = cursor;
    chunk.raw_bytes = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(chunk_bytes, plane.raw_bytes - std::uint64_t{i} * chunk_bytes));
    chunk.stored_bytes = in.read<std::uint32_t>("stored size");
    chunk.flags = in.read<std::uint32_t>("chunk flags");
    chunk.raw_xxh3 = in.read<std::uint64_t>("hash of raw bytes");
    chunk.stored_xxh3 = in.read<std::uint64_t>("hash of stored bytes");
    if ((chunk.flags & ~chunk_is_raw) != 0) fail("known chunk flags", chunk.flags);
    if (chunk.flags == chunk_is_raw) {
      if (chunk.stored_bytes != chunk.raw_bytes) {
        fail("an uncompressed size of " + std::to_string(chunk.raw_bytes), chunk.stored_bytes);
      }
      if (chunk.stored_xxh3 != chunk.raw_xxh3) {
        fail("equal hashes of an uncompressed chunk", chunk.stored_xxh3);
      }
    } else {
      if (chunk.stored_bytes >= chunk.raw_bytes) {
        fail("a compressed size below " + std::to_string(chunk.raw_bytes), chunk.stored_bytes);
      }
      if (chunk.raw_bytes > chunk.stored_bytes * max_expansion) {
        fail("a compressed size that can hold " + std::to_string(chunk.raw_bytes) + " bytes",
             chunk.stored_bytes);
      }
    }
    if (chunk.stored_bytes > data_limit - cursor) {
      fail("stored bytes that end by offset " + std::to_string(data_limit), chunk.stored_bytes);
    }
    cursor += chunk.stored_bytes;
    plane.chunks.push_back(chunk);
  }
}

}  // namespace

std::vector<std::byte> encode_header(const PackedHeader& header) {
  ByteWriter out;
  out.put_text(header_magic);
  out.put(format_version);
  out.put(header.flags);
  out.put(header.zstd_version);
  out.put(header.zstd_level);
  out.put(header.chunk_bytes);
  out.pad_to(header_bytes - hash_bytes);
  out.put_hash();
  return out.take();
}

PackedHeader decode_header(std::span<const std::byte> bytes, const std::string& file) {
  ByteReader in(bytes, file);
  expect_magic(in, header_magic, "header magic");
  // Before the checksum: another version may place it elsewhere.
  expect_version(in, format_version, "format version");
  expect_hash_at_end(bytes, file, "header");
  in = ByteReader(bytes.subspan(12, header_bytes - hash_bytes - 12), file, 12);
  PackedHeader header;
  header.flags = in.read<std::uint32_t>("flags");
  header.zstd_version = in.read<std::uint32_t>("zstd version");
  header.zstd_level = in.read<std::uint32_t>("zstd level");
  header.chunk_bytes = in.read<std::uint32_t>("chunk size");
  const std::uint32_t unknown = header.flags & required_flag_bits & ~known_flag_bits;
  if (unknown != 0) {
    throw FormatError(file, at(12), "known required flags", "flag bits " + std::to_string(unknown));
  }
  if (header.chunk_bytes < min_chunk_bytes || header.chunk_bytes > max_chunk_bytes ||
      header.chunk_bytes % 64 != 0) {
    throw FormatError(file, at(24),
                      "a chunk size of " + std::to_string(min_chunk_bytes) + " to " +
                          std::to_string(max_chunk_bytes) + ", a multiple of 64",
                      std::to_string(header.chunk_bytes));
  }
  const auto rest = in.take(in.remaining(), "padding");
  if (std::any_of(rest.begin(), rest.end(), [](std::byte b) { return b != std::byte{0}; })) {
    throw FormatError(file, at(28), "zero padding of the header", "other bytes");
  }
  return header;
}

std::vector<std::byte> encode_trailer(const Trailer& trailer) {
  ByteWriter out;
  out.put(trailer.directory_offset);
  out.put(trailer.directory_bytes);
  out.put(trailer.directory_xxh3);
  out.put_hash();
  out.put_text(trailer_magic);
  return out.take();
}

Trailer decode_trailer(std::span<const std::byte> bytes, std::uint64_t file_bytes,
                       const std::string& file) {
  const std::uint64_t start = file_bytes - trailer_bytes;
  ByteReader magic(bytes.subspan(trailer_bytes - 8), file, file_bytes - 8);
  expect_magic(magic, trailer_magic, "trailer magic of a complete file,");
  expect_hash_at_end(bytes.first(trailer_bytes - 8), file, "trailer");
  ByteReader in(bytes, file, start);
  Trailer trailer;
  trailer.directory_offset = in.read<std::uint64_t>("directory offset");
  trailer.directory_bytes = in.read<std::uint64_t>("directory size");
  trailer.directory_xxh3 = in.read<std::uint64_t>("directory hash");
  if (trailer.directory_offset < header_bytes || trailer.directory_offset > start ||
      trailer.directory_offset % alignment != 0) {
    throw FormatError(file, at(start),
                      "a directory offset of " + std::to_string(header_bytes) + " to " +
                          std::to_string(start) + ", a multiple of " + std::to_string(alignment),
                      std::to_string(trailer.directory_offset));
  }
  if (trailer.directory_bytes != start - trailer.directory_offset) {
    throw FormatError(
        file, at(start + 8),
        "a directory of " + std::to_string(start - trailer.directory_offset) + " bytes",
        std::to_string(trailer.directory_bytes));
  }
  const std::uint64_t most = directory_head_bytes + max_table_bytes + max_json_bytes;
  if (trailer.directory_bytes < directory_head_bytes || trailer.directory_bytes > most) {
    throw FormatError(file, at(start + 8),
                      "a directory of " + std::to_string(directory_head_bytes) + " to " +
                          std::to_string(most) + " bytes",
                      std::to_string(trailer.directory_bytes));
  }
  return trailer;
}

void require_plane_name(std::string_view name) {
  if (!valid_name(name)) {
    throw Error(ErrorCode::usage, "plane name " + quote_text(name) + ": expected 1 to " +
                                      std::to_string(max_name_bytes) + " visible ASCII characters");
  }
}

std::vector<std::byte> encode_plane_table(std::span<const PlaneInfo> planes) {
  ByteWriter out;
  for (const PlaneInfo& plane : planes) {
    out.put(static_cast<std::uint32_t>(plane.name.size()));
    out.put(static_cast<std::uint32_t>(plane.chunks.size()));
    out.put(plane.offset);
    out.put(plane.raw_bytes);
    out.put_text(plane.name);
    for (const ChunkRecord& chunk : plane.chunks) {
      out.put(chunk.stored_bytes);
      out.put(chunk.flags);
      out.put(chunk.raw_xxh3);
      out.put(chunk.stored_xxh3);
    }
  }
  auto table = out.take();
  if (table.size() > max_table_bytes) {
    throw Error(ErrorCode::usage, "plane table: expected at most " +
                                      std::to_string(max_table_bytes) +
                                      " bytes (larger chunks make it smaller), found " +
                                      std::to_string(table.size()));
  }
  return table;
}

PlaneTable decode_plane_table(ByteReader in, std::uint32_t plane_count, std::uint32_t chunk_bytes,
                              std::uint64_t data_limit) {
  if (plane_count > in.remaining() / plane_head_bytes) {
    throw FormatError(
        in.file(), at(in.offset()),
        "at most " + std::to_string(in.remaining() / plane_head_bytes) + " planes in this table",
        std::to_string(plane_count));
  }
  PlaneTable table;
  table.planes.reserve(plane_count);
  for (std::uint32_t i = 0; i < plane_count; ++i) {
    const std::uint64_t where = in.offset();
    PlaneInfo plane;
    const auto fail = [&](const std::string& expected, const std::string& found) {
      throw FormatError(in.file(), at(where) + ", plane " + std::to_string(i), expected, found);
    };
    const auto name_bytes = in.read<std::uint32_t>("name length");
    const auto chunk_count = in.read<std::uint32_t>("chunk count");
    plane.offset = in.read<std::uint64_t>("plane offset");
    plane.raw_bytes = in.read<std::uint64_t>("plane size");
    if (name_bytes < 1 || name_bytes > max_name_bytes) {
      fail("a name of 1 to " + std::to_string(max_name_bytes) + " bytes",
           std::to_string(name_bytes));
    }
    plane.name = in.take_text(name_bytes, "plane name");
    if (!valid_name(plane.name)) fail("a name of visible ASCII characters", quote_text(plane.name));
    if (!table.index.emplace(plane.name, i).second) {
      fail("a plane name not used before", quote_text(plane.name));
    }
    const std::uint64_t chunks =
        plane.raw_bytes / chunk_bytes + (plane.raw_bytes % chunk_bytes != 0 ? 1 : 0);
    if (chunk_count != chunks) {
      fail(std::to_string(chunks) + " chunks for " + std::to_string(plane.raw_bytes) + " bytes",
           std::to_string(chunk_count));
    }
    if (plane.offset != align_up(table.end)) {
      fail("plane offset " + std::to_string(align_up(table.end)), std::to_string(plane.offset));
    }
    if (plane.offset > data_limit) {
      fail("a plane offset up to " + std::to_string(data_limit), std::to_string(plane.offset));
    }
    table.end = plane.offset;
    decode_chunk_records(in, chunk_count, chunk_bytes, data_limit, table.end, plane);
    table.planes.push_back(std::move(plane));
  }
  if (in.remaining() != 0) {
    throw FormatError(in.file(), at(in.offset()), "the end of the plane table",
                      std::to_string(in.remaining()) + " more bytes");
  }
  return table;
}

std::vector<std::byte> encode_directory(std::span<const PlaneInfo> planes,
                                        const std::string& json) {
  const auto table = encode_plane_table(planes);
  ByteWriter out;
  out.put(directory_version);
  out.put(static_cast<std::uint32_t>(planes.size()));
  out.put(std::uint64_t{table.size()});
  out.put(std::uint64_t{json.size()});
  out.put(table);
  out.put_text(json);
  return out.take();
}

Directory decode_directory(std::span<const std::byte> bytes, std::uint64_t offset,
                           std::uint32_t chunk_bytes, const std::string& file) {
  ByteReader in(bytes, file, offset);
  expect_version(in, directory_version, "directory version");
  const auto plane_count = in.read<std::uint32_t>("plane count");
  const auto table_bytes = in.read<std::uint64_t>("plane table size");
  const auto json_bytes = in.read<std::uint64_t>("directory JSON size");
  const std::uint64_t table_offset = in.offset();
  const auto table = in.take(table_bytes, "plane table");
  if (json_bytes != in.remaining()) {
    throw FormatError(file, at(offset + 16),
                      "directory JSON of " + std::to_string(in.remaining()) + " bytes",
                      std::to_string(json_bytes));
  }
  Directory directory;
  directory.table =
      decode_plane_table(ByteReader(table, file, table_offset), plane_count, chunk_bytes, offset);
  if (align_up(directory.table.end) != offset) {
    throw FormatError(file, at(offset), "the planes to end just before the directory",
                      "their end at offset " + std::to_string(directory.table.end));
  }
  directory.json = parse_limited(in.take_text(json_bytes, "directory JSON"), file);
  if (!directory.json.is_object()) {
    throw FormatError(file, "directory", "a JSON object", describe(directory.json));
  }
  return directory;
}

std::vector<std::byte> encode_journal(std::span<const PlaneInfo> planes, std::uint64_t data_bytes,
                                      const std::string& state) {
  const auto table = encode_plane_table(planes);
  ByteWriter out;
  out.put_text(journal_magic);
  out.put(journal_version);
  out.put(static_cast<std::uint32_t>(planes.size()));
  out.put(data_bytes);
  out.put(std::uint64_t{table.size()});
  out.put(std::uint64_t{state.size()});
  out.put(table);
  out.put_text(state);
  out.put_hash();
  return out.take();
}

Journal decode_journal(std::span<const std::byte> bytes, std::uint32_t chunk_bytes,
                       const std::string& file) {
  ByteReader in(bytes, file);
  expect_magic(in, journal_magic, "journal magic");
  expect_version(in, journal_version, "journal version");
  if (bytes.size() < journal_head_bytes + hash_bytes) {
    throw FormatError(file, "journal",
                      "at least " + std::to_string(journal_head_bytes + hash_bytes) + " bytes",
                      std::to_string(bytes.size()));
  }
  expect_hash_at_end(bytes, file, "journal");
  in = ByteReader(bytes.first(bytes.size() - hash_bytes).subspan(12), file, 12);
  const auto plane_count = in.read<std::uint32_t>("plane count");
  const auto data_bytes = in.read<std::uint64_t>("data size");
  const auto table_bytes = in.read<std::uint64_t>("plane table size");
  const auto state_bytes = in.read<std::uint64_t>("state size");
  const std::uint64_t table_offset = in.offset();
  const auto table = in.take(table_bytes, "plane table");
  if (state_bytes != in.remaining()) {
    throw FormatError(file, at(32), "a state of " + std::to_string(in.remaining()) + " bytes",
                      std::to_string(state_bytes));
  }
  if (data_bytes < header_bytes) {
    throw FormatError(file, at(16), "a data size of at least " + std::to_string(header_bytes),
                      std::to_string(data_bytes));
  }
  Journal journal;
  journal.table = decode_plane_table(ByteReader(table, file, table_offset), plane_count,
                                     chunk_bytes, data_bytes);
  if (journal.table.end != data_bytes) {
    throw FormatError(file, at(16), "a data size of " + std::to_string(journal.table.end),
                      std::to_string(data_bytes));
  }
  journal.state = parse_limited(in.take_text(state_bytes, "state"), file);
  return journal;
}

std::string dump_json(const Json& value, const std::string& file, const char* what) {
  const auto refuse = [&](const std::string& found) {
    throw Error(ErrorCode::usage, file + ": " + what +
                                      ": expected JSON that reads back as it was (finite numbers, "
                                      "UTF-8, bounded size and depth), found " +
                                      found);
  };
  std::string text;
  try {
    text = value.dump();
  } catch (const Json::exception& error) {
    refuse(error.what());
  }
  try {
    if (parse_limited(text, file) != value) refuse("a value that changes");
  } catch (const FormatError& error) {
    refuse(error.what());
  }
  return text;
}

}  // namespace qw
}  // namespace engine
