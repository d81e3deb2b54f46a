// Bytes -> the `.qw` reader and the journal parser. Only Error may come out, and a file that
// verifies must be readable plane by plane.
//
// The first byte selects how the others become a file, because checksums would stop random
// changes at the door: as they are; with the checksums repaired; as patches {u16 offset, u8 value}
// to a small valid file, repaired; as a journal, repaired.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "formats/packed.h"
#include "formats/packed_layout.h"

namespace {

using namespace engine;
using Bytes = std::vector<std::byte>;

constexpr std::uint32_t base_chunk_bytes = 64;

template <class T>
void put(Bytes& bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

struct Base {
  Bytes file;
  Bytes journal;
};

Base make_base() {
  PackedHeader header;
  header.zstd_version = 1;
  header.chunk_bytes = base_chunk_bytes;
  Bytes out = qw::encode_header(header);
  std::vector<PlaneInfo> planes;
  for (const std::size_t size : {150U, 0U, 30U}) {
    Bytes raw(size, std::byte{1});
    for (std::size_t i = 0; i < size && size < 100; ++i) raw[i] = static_cast<std::byte>(i * 37);
    out.resize(qw::align_up(out.size()));
    PlaneInfo plane;
    plane.name = "p" + std::to_string(planes.size());
    plane.offset = out.size();
    plane.raw_bytes = size;
    plane.chunks = compress_chunks(raw, {.chunk_bytes = base_chunk_bytes}, out.size(),
                                   [&out](std::span<const std::byte> stored) {
                                     out.insert(out.end(), stored.begin(), stored.end());
                                   });
    planes.push_back(plane);
  }
  Base base;
  base.journal = qw::encode_journal(planes, out.size(), "{\"step\":1}");
  out.resize(qw::align_up(out.size()));
  const Bytes directory = qw::encode_directory(planes, R"({"a":1,"required_features":[]})");
  const Bytes trailer = qw::encode_trailer({out.size(), directory.size(), xxh3(directory)});
  out.insert(out.end(), directory.begin(), directory.end());
  out.insert(out.end(), trailer.begin(), trailer.end());
  base.file = out;
  return base;
}

void apply_patches(Bytes& bytes, std::span<const std::byte> patches) {
  for (; patches.size() >= 3; patches = patches.subspan(3)) {
    std::uint16_t at = 0;
    std::memcpy(&at, patches.data(), sizeof at);
    bytes[at % bytes.size()] = patches[2];
  }
}

void repair_file(Bytes& bytes) {
  if (bytes.size() < qw::header_bytes + qw::trailer_bytes) return;
  put(bytes, 56, xxh3(std::span(bytes).first(56)));
  const std::size_t start = bytes.size() - qw::trailer_bytes;
  std::uint64_t offset = 0;
  std::memcpy(&offset, bytes.data() + start, sizeof offset);
  if (offset <= start) put(bytes, start + 16, xxh3(std::span(bytes).first(start).subspan(offset)));
  put(bytes, start + 24, xxh3(std::span(bytes).subspan(start, 24)));
}

void read(const Bytes& bytes) {
  bool verified = false;
  try {
    const PackedReader reader = PackedReader::from_bytes(bytes, "fuzz.qw");
    verified = reader.verify_all(1);
    for (std::uint32_t i = 0; i < reader.planes().size(); ++i) {
      const PlaneInfo& plane = reader.planes()[i];
      if (plane.raw_bytes > (1U << 20U)) continue;
      Bytes raw(plane.raw_bytes);
      reader.read_plane(i, raw, 1);
      if (reader.index_of(plane.name) != i) std::abort();
    }
  } catch (const Error&) {
    if (verified) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Base base = make_base();
  if (size == 0) return 0;
  const auto rest = std::as_bytes(std::span(data, size)).subspan(1);
  Bytes bytes(rest.begin(), rest.end());
  switch (data[0] % 5) {
    case 0:
      read(bytes);
      break;
    case 1:
      repair_file(bytes);
      read(bytes);
      break;
    case 2:
      bytes = base.file;
      apply_patches(bytes, rest);
      repair_file(bytes);
      read(bytes);
      break;
    case 3:
      bytes = base.journal;
      apply_patches(bytes, rest);
      [[fallthrough]];
    default:
      if (bytes.size() >= qw::hash_bytes) {
        const std::size_t end = bytes.size() - qw::hash_bytes;
        put(bytes, end, xxh3(std::span(bytes).first(end)));
      }
      try {
        static_cast<void>(qw::decode_journal(bytes, base_chunk_bytes, "fuzz.journal"));
      } catch (const Error&) {
        break;
      }
  }
  return 0;
}
