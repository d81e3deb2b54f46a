// `.qw` files that are wrong although every checksum is right: each is built from a good one, the
// checksums are repaired, and the reader must say what it expected.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "formats/packed.h"
#include "formats/packed_layout.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using Bytes = std::vector<std::byte>;
using testing::error_of;
using testing::expect_contains;

template <class T>
T get(const Bytes& bytes, std::size_t at) {
  T value;
  std::memcpy(&value, &bytes.at(at + sizeof(T) - 1) - (sizeof(T) - 1), sizeof(T));
  return value;
}

template <class T>
void put(Bytes& bytes, std::size_t at, T value) {
  std::memcpy(&bytes.at(at + sizeof(T) - 1) - (sizeof(T) - 1), &value, sizeof(T));
}

// Planes "a" (compressed, 2 chunks), "b" (incompressible, 1 chunk), "c" (empty) in memory, with
// the offsets that the cases damage.
struct Sample {
  static constexpr std::uint32_t chunk_bytes = 128;
  std::vector<PlaneInfo> planes;
  Bytes data;  // header and planes, padded to the directory

  Sample() {
    PackedHeader header;
    header.zstd_version = 10504;
    header.chunk_bytes = chunk_bytes;
    data = qw::encode_header(header);
    add("a", Bytes(200, std::byte{3}));
    Bytes noise(100);
    for (std::size_t i = 0; i < noise.size(); ++i) {
      noise[i] = static_cast<std::byte>((i * 2654435761U) >> 13U);
    }
    add("b", noise);
    add("c", {});
    pad();
  }
  void pad() { data.resize(qw::align_up(data.size())); }
  void add(const std::string& name, const Bytes& raw) {
    pad();
    PlaneInfo plane;
    plane.name = name;
    plane.offset = data.size();
    plane.raw_bytes = raw.size();
    plane.chunks = compress_chunks(raw, {.chunk_bytes = chunk_bytes}, data.size(),
                                   [this](std::span<const std::byte> stored) {
                                     data.insert(data.end(), stored.begin(), stored.end());
                                   });
    planes.push_back(std::move(plane));
  }

  // The whole file around a directory, trailer included.
  [[nodiscard]] Bytes file(const Bytes& directory) const {
    Bytes out = data;
    out.insert(out.end(), directory.begin(), directory.end());
    const auto trailer = qw::encode_trailer({data.size(), directory.size(), xxh3(directory)});
    out.insert(out.end(), trailer.begin(), trailer.end());
    return out;
  }
  [[nodiscard]] Bytes with_json(const std::string& json) const {
    return file(qw::encode_directory(planes, json));
  }
  [[nodiscard]] Bytes good() const { return with_json("{}"); }

  // One directory field replaced; `at` counts from the directory's start.
  template <class T>
  [[nodiscard]] Bytes with_field(std::size_t at, T value) const {
    Bytes directory = qw::encode_directory(planes, "{}");
    put(directory, at, value);
    return file(directory);
  }
  template <class T>
  [[nodiscard]] Bytes with_header_field(std::size_t at, T value) const {
    Bytes out = good();
    put(out, at, value);
    put(out, 56, xxh3(std::span(out).first(56)));
    return out;
  }
  template <class T>
  [[nodiscard]] Bytes with_trailer_field(std::size_t at, T value) const {
    Bytes out = good();
    const std::size_t start = out.size() - qw::trailer_bytes;
    put(out, start + at, value);
    put(out, start + 24, xxh3(std::span(out).subspan(start, 24)));
    return out;
  }
};

// Offsets within the directory: head (24), then the record of "a" with one name byte and two
// chunks, then the record of "b" with one chunk.
constexpr std::size_t record_a = 24;
constexpr std::size_t chunk_a0 = record_a + 24 + 1;
constexpr std::size_t record_b = chunk_a0 + 2 * 24;
constexpr std::size_t chunk_b0 = record_b + 24 + 1;

std::string open_and_verify(const Bytes& bytes) {
  return error_of([&] { PackedReader::from_bytes(bytes, "bad.qw").verify_all(1); });
}

TEST(PackedMalformed, TheSampleItselfIsGood) {
  const Sample sample;
  ASSERT_EQ(sample.planes[0].chunks.size(), 2U);
  ASSERT_EQ(sample.planes[0].chunks[0].flags, 0U);
  ASSERT_EQ(sample.planes[1].chunks.size(), 1U);
  ASSERT_EQ(sample.planes[1].chunks[0].flags, chunk_is_raw);
  const Bytes good = sample.good();
  const auto reader = PackedReader::from_bytes(good, "good.qw");
  EXPECT_EQ(reader.planes().size(), 3U);
  EXPECT_TRUE(std::equal(reader.planes().begin(), reader.planes().end(), sample.planes.begin()));
  EXPECT_TRUE(reader.verify_all(1));
}

struct Malformed {
  const char* what;
  std::function<Bytes(const Sample&)> make;
  std::string message;  // a part of it
};

TEST(PackedMalformed, EveryCaseIsRefusedWithItsReason) {
  const Sample sample;
  const std::string directory_offset = std::to_string(sample.data.size());
  const auto stored_a0 = sample.planes[0].chunks[0].stored_bytes;
  const std::uint64_t offset_b = sample.planes[1].offset;
  const std::string deep(100, '[');
  const Malformed cases[] = {
      {"empty file", [](const Sample&) { return Bytes(); },
       "bad.qw: size: expected at least 128 bytes, found 0"},
      {"zeros", [](const Sample&) { return Bytes(1000); },
       "offset 0: expected header magic 'LOWBITQW'"},
      {"newer format", [](const Sample& s) { return s.with_header_field<std::uint32_t>(8, 2); },
       "offset 8: expected format version 1, found 2"},
      {"required flag", [](const Sample& s) { return s.with_header_field<std::uint32_t>(12, 4); },
       "offset 12: expected known required flags, found flag bits 4"},
      {"chunk size 0", [](const Sample& s) { return s.with_header_field<std::uint32_t>(24, 0); },
       "offset 24: expected a chunk size of 64 to"},
      {"chunk size odd", [](const Sample& s) { return s.with_header_field<std::uint32_t>(24, 65); },
       "a multiple of 64, found 65"},
      {"huge chunk size",
       [](const Sample& s) { return s.with_header_field<std::uint32_t>(24, 0xFFFFFFC0U); },
       "a multiple of 64, found 4294967232"},
      {"header padding", [](const Sample& s) { return s.with_header_field<std::uint8_t>(55, 1); },
       "offset 28: expected zero padding of the header"},
      {"header checksum",
       [](const Sample& s) {
         Bytes out = s.good();
         out[20] ^= std::byte{1};
         return out;
       },
       "header: expected bytes that match the checksum"},
      {"no trailer",
       [](const Sample& s) {
         Bytes out = s.good();
         out.erase(out.end() - qw::trailer_bytes, out.end());
         return out;
       },
       "expected trailer magic of a complete file, 'LOWBITQE'"},
      {"trailer checksum",
       [](const Sample& s) {
         Bytes out = s.good();
         out[out.size() - 20] ^= std::byte{1};
         return out;
       },
       "trailer: expected bytes that match the checksum"},
      {"directory beyond the end",
       [](const Sample& s) {
         return s.with_trailer_field<std::uint64_t>(0, std::uint64_t{1} << 40U);
       },
       "expected a directory offset of 64 to"},
      {"directory in the header",
       [](const Sample& s) { return s.with_trailer_field<std::uint64_t>(0, 0); },
       "expected a directory offset of 64 to"},
      {"directory not aligned",
       [](const Sample& s) { return s.with_trailer_field<std::uint64_t>(0, s.data.size() + 1); },
       "a multiple of 64, found " + std::to_string(sample.data.size() + 1)},
      {"directory too long",
       [](const Sample& s) { return s.with_trailer_field<std::uint64_t>(8, ~std::uint64_t{0}); },
       "bytes, found 18446744073709551615"},
      {"directory too short", [](const Sample& s) { return s.file(Bytes(10)); },
       "expected a directory of 24 to"},
      {"directory checksum",
       [](const Sample& s) { return s.with_trailer_field<std::uint64_t>(16, 5); },
       "directory: expected bytes that match the checksum"},
      {"newer directory", [](const Sample& s) { return s.with_field<std::uint32_t>(0, 7); },
       "offset " + directory_offset + ": expected directory version 1, found 7"},
      {"plane count too large",
       [](const Sample& s) { return s.with_field<std::uint32_t>(4, 0xFFFFFFFFU); },
       "planes in this table, found 4294967295"},
      {"plane count one more", [](const Sample& s) { return s.with_field<std::uint32_t>(4, 4); },
       "expected 4 bytes of name length, found 0 bytes before the end"},
      {"plane count one less", [](const Sample& s) { return s.with_field<std::uint32_t>(4, 2); },
       "expected the end of the plane table, found 25 more bytes"},
      {"table longer than the directory",
       [](const Sample& s) { return s.with_field<std::uint64_t>(8, ~std::uint64_t{0}); },
       "expected 18446744073709551615 bytes of plane table"},
      {"table one byte shorter",
       [](const Sample& s) {
         const auto bytes = get<std::uint64_t>(qw::encode_directory(s.planes, "{}"), 8);
         return s.with_field<std::uint64_t>(8, bytes - 1);
       },
       "expected directory JSON of 3 bytes, found 2"},
      {"JSON size", [](const Sample& s) { return s.with_field<std::uint64_t>(16, 3); },
       "expected directory JSON of 2 bytes, found 3"},
      {"empty name", [](const Sample& s) { return s.with_field<std::uint32_t>(record_a, 0); },
       "plane 0: expected a name of 1 to 255 bytes, found 0"},
      {"huge name",
       [](const Sample& s) { return s.with_field<std::uint32_t>(record_a, 0xFFFFFFFFU); },
       "plane 0: expected a name of 1 to 255 bytes, found 4294967295"},
      {"control character in a name",
       [](const Sample& s) { return s.with_field<std::uint8_t>(record_a + 24, 10); },
       "plane 0: expected a name of visible ASCII characters"},
      {"name twice", [](const Sample& s) { return s.with_field<std::uint8_t>(record_b + 24, 'a'); },
       "plane 1: expected a plane name not used before, found \"a\""},
      {"chunk count too small",
       [](const Sample& s) { return s.with_field<std::uint32_t>(record_a + 4, 1); },
       "plane 0: expected 2 chunks for 200 bytes, found 1"},
      {"chunk count too large",
       [](const Sample& s) { return s.with_field<std::uint32_t>(record_a + 4, 0xFFFFFFFFU); },
       "plane 0: expected 2 chunks for 200 bytes, found 4294967295"},
      {"size and chunk count beyond the table",
       [](const Sample& s) {
         Bytes directory = qw::encode_directory(s.planes, "{}");
         put<std::uint32_t>(directory, record_a + 4, 1U << 24U);
         put<std::uint64_t>(directory, record_a + 16, std::uint64_t{128} << 24U);
         return s.file(directory);
       },
       "chunk records of plane 'a', found 16777216"},
      {"size 2^64 - 1",
       [](const Sample& s) {
         return s.with_field<std::uint64_t>(record_a + 16, ~std::uint64_t{0});
       },
       "plane 0: expected 144115188075855872 chunks for 18446744073709551615 bytes"},
      {"plane not aligned",
       [](const Sample& s) { return s.with_field<std::uint64_t>(record_a + 8, 65); },
       "plane 0: expected plane offset 64, found 65"},
      {"overlapping planes",
       [](const Sample& s) { return s.with_field<std::uint64_t>(record_b + 8, 64); },
       "plane 1: expected plane offset " + std::to_string(offset_b) + ", found 64"},
      {"gap between planes",
       [offset_b](const Sample& s) {
         return s.with_field<std::uint64_t>(record_b + 8, offset_b + 64);
       },
       "plane 1: expected plane offset " + std::to_string(offset_b) + ", found " +
           std::to_string(offset_b + 64)},
      {"unknown chunk flag",
       [](const Sample& s) { return s.with_field<std::uint32_t>(chunk_a0 + 4, 2); },
       "plane 'a', chunk 0: expected known chunk flags, found 2"},
      {"uncompressed chunk of another size",
       [](const Sample& s) { return s.with_field<std::uint32_t>(chunk_b0, 99); },
       "plane 'b', chunk 0: expected an uncompressed size of 100, found 99"},
      {"uncompressed chunk with two hashes",
       [](const Sample& s) { return s.with_field<std::uint64_t>(chunk_b0 + 16, 1); },
       "plane 'b', chunk 0: expected equal hashes of an uncompressed chunk"},
      {"compressed chunk that did not shrink",
       [](const Sample& s) { return s.with_field<std::uint32_t>(chunk_a0, 128); },
       "plane 'a', chunk 0: expected a compressed size below 128, found 128"},
      {"compressed chunk of no bytes",
       [](const Sample& s) { return s.with_field<std::uint32_t>(chunk_a0, 0); },
       "plane 'a', chunk 0: expected a compressed size that can hold 128 bytes, found 0"},
      {"planes beyond the directory",
       [](const Sample& s) {
         Sample longer = s;
         longer.data.resize(64);
         return longer.good();
       },
       "expected stored bytes that end by offset 64"},
      {"planes end before the directory",
       [](const Sample& s) {
         Sample longer = s;
         longer.data.resize(s.data.size() + 64);
         return longer.good();
       },
       "expected the planes to end just before the directory"},
      {"chunk one byte longer",
       [stored_a0](const Sample& s) {
         return s.with_field<std::uint32_t>(chunk_a0, stored_a0 + 1);
       },
       "plane 'a', chunk 0 at offset 64: expected stored bytes with XXH3"},
      {"wrong raw hash",
       [](const Sample& s) { return s.with_field<std::uint64_t>(chunk_a0 + 8, 1); },
       "plane 'a', chunk 0 at offset 64: expected raw bytes with XXH3 0000000000000001"},
      {"padding between planes",
       [offset_b](const Sample& s) {
         Sample dirty = s;
         dirty.data.at(offset_b - 1) = std::byte{9};
         return dirty.good();
       },
       "offset " + std::to_string(offset_b - 1) + ": expected zero padding, found 9"},
      {"padding before the directory",
       [](const Sample& s) {
         Sample dirty = s;
         dirty.data.back() = std::byte{1};
         return dirty.good();
       },
       "expected zero padding, found 1"},
      {"no JSON", [](const Sample& s) { return s.with_json(""); }, "bad.qw: "},
      {"broken JSON", [](const Sample& s) { return s.with_json("{\"a\":"); }, "bad.qw: "},
      {"JSON with more behind it", [](const Sample& s) { return s.with_json("{} {}"); },
       "bad.qw: "},
      {"JSON with a key twice", [](const Sample& s) { return s.with_json(R"({"a":1,"a":2})"); },
       "bad.qw: "},
      {"JSON not UTF-8", [](const Sample& s) { return s.with_json("{\"a\":\"\xFF\"}"); },
       "bad.qw: "},
      {"JSON too deep", [deep](const Sample& s) { return s.with_json(deep); }, "bad.qw: "},
      {"JSON array", [](const Sample& s) { return s.with_json("[]"); },
       "directory: expected a JSON object, found []"},
      {"features no array",
       [](const Sample& s) { return s.with_json(R"({"required_features":"x"})"); },
       "required_features: expected an array of strings"},
      {"feature no string",
       [](const Sample& s) { return s.with_json(R"({"required_features":[1]})"); },
       "required_features: expected strings, found 1"},
      {"unknown feature",
       [](const Sample& s) { return s.with_json(R"({"required_features":["warp"]})"); },
       "required_features: expected features this program supports, found \"warp\""},
  };
  for (const Malformed& test : cases) {
    SCOPED_TRACE(test.what);
    expect_contains(open_and_verify(test.make(sample)), test.message);
  }
}

TEST(PackedMalformed, UnknownOptionalPartsAreSkipped) {
  const Sample sample;
  const Bytes optional_flag = sample.with_header_field<std::uint32_t>(12, 0x10000U);
  EXPECT_TRUE(PackedReader::from_bytes(optional_flag, "ok").verify_all(1));
  const Bytes fields = sample.with_json(R"({"later":[1,2],"required_features":[]})");
  EXPECT_TRUE(PackedReader::from_bytes(fields, "ok").verify_all(1));
  const Bytes feature = sample.with_json(R"({"required_features":["warp"]})");
  EXPECT_TRUE(PackedReader::from_bytes(feature, "ok", {{"warp"}}).verify_all(1));
}

// The journal's own checks, behind a right checksum.
TEST(PackedMalformed, Journals) {
  const Sample sample;
  const std::uint64_t end = sample.planes.back().offset;
  const Bytes good = qw::encode_journal(sample.planes, end, "[1]");
  const auto decode = [](const Bytes& bytes) {
    return qw::decode_journal(bytes, Sample::chunk_bytes, "bad.journal");
  };
  EXPECT_EQ(decode(good).state, Json({1}));
  EXPECT_EQ(decode(good).table.planes, sample.planes);
  const auto with_field = [&good]<class T>(std::size_t at, T value) {
    Bytes out = good;
    put(out, at, value);
    put(out, out.size() - 8, xxh3(std::span(out).first(out.size() - 8)));
    return out;
  };
  const std::pair<Bytes, std::string> cases[] = {
      {Bytes(100), "offset 0: expected journal magic 'LOWBITQJ'"},
      {with_field(8, std::uint32_t{2}), "expected journal version 1, found 2"},
      {with_field(12, std::uint32_t{9999}), "planes in this table, found 9999"},
      {with_field(16, std::uint64_t{0}), "expected a data size of at least 64, found 0"},
      {with_field(16, std::uint64_t{end + 1}), "expected a data size of " + std::to_string(end)},
      {with_field(16, std::uint64_t{64}), "expected stored bytes that end by offset 64"},
      {with_field(24, std::uint64_t{1} << 60U), "bytes of plane table"},
      {with_field(32, std::uint64_t{2}), "expected a state of 3 bytes, found 2"},
      {qw::encode_journal(sample.planes, end, "[1"), "bad.journal: "},
  };
  for (const auto& [bytes, message] : cases) {
    expect_contains(error_of([&] { static_cast<void>(decode(bytes)); }), message);
  }
}

}  // namespace
}  // namespace engine
