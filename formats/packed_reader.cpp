// Reading `.qw`. Trust grows outwards in: header and trailer by their own checksums, the directory
// by the trailer's, the plane table by the file's size, each chunk by the table.
#include <algorithm>
#include <array>
#include <cstring>
#include <thread>
#include <utility>

#include "formats/error.h"
#include "formats/packed.h"
#include "formats/packed_layout.h"

namespace engine {
namespace {

void check_features(const Json& directory, const std::vector<std::string>& supported,
                    const std::string& file) {
  const auto found = directory.find("required_features");
  if (found == directory.end()) return;
  if (!found->is_array()) {
    throw FormatError(file, "required_features", "an array of strings", describe(*found));
  }
  for (const Json& feature : *found) {
    if (!feature.is_string()) {
      throw FormatError(file, "required_features", "strings", describe(feature));
    }
    const auto& name = feature.get_ref<const std::string&>();
    if (std::find(supported.begin(), supported.end(), name) == supported.end()) {
      throw FormatError(file, "required_features", "features this program supports",
                        quote_text(name));
    }
  }
}

}  // namespace

PackedReader::PackedReader(const std::filesystem::path& path, PackedReaderOptions options)
    : name_(path.string()), file_(PackedFile::open_read(path)), file_bytes_(file_.size()) {
  parse(options);
}

PackedReader PackedReader::from_bytes(std::span<const std::byte> bytes, std::string name,
                                      PackedReaderOptions options) {
  PackedReader reader;
  reader.name_ = std::move(name);
  reader.memory_ = bytes;
  reader.file_bytes_ = bytes.size();
  reader.parse(options);
  return reader;
}

void PackedReader::fetch(std::uint64_t offset, std::span<std::byte> dst) const {
  if (file_.is_open()) {
    file_.read_at(offset, dst);
    return;
  }
  if (offset > memory_.size() || dst.size() > memory_.size() - offset) {
    throw FormatError(name_, "offset " + std::to_string(offset),
                      std::to_string(dst.size()) + " bytes", "the end of the file");
  }
  if (!dst.empty()) std::memcpy(dst.data(), memory_.data() + offset, dst.size());
}

std::vector<std::byte> PackedReader::fetch_vector(std::uint64_t offset, std::uint64_t bytes) const {
  std::vector<std::byte> out(static_cast<std::size_t>(bytes));
  fetch(offset, out);
  return out;
}

void PackedReader::set_threads(unsigned threads) {
  threads_ = threads > 0 ? threads : std::max(1U, std::thread::hardware_concurrency());
}

void PackedReader::parse(const PackedReaderOptions& options) {
  set_threads(options.threads);
  const std::uint64_t smallest = qw::header_bytes + qw::directory_head_bytes + qw::trailer_bytes;
  if (file_bytes_ < smallest) {
    throw FormatError(name_, "size", "at least " + std::to_string(smallest) + " bytes",
                      std::to_string(file_bytes_));
  }
  header_ = qw::decode_header(fetch_vector(0, qw::header_bytes), name_);
  const qw::Trailer trailer = qw::decode_trailer(
      fetch_vector(file_bytes_ - qw::trailer_bytes, qw::trailer_bytes), file_bytes_, name_);
  directory_offset_ = trailer.directory_offset;
  const auto bytes = fetch_vector(trailer.directory_offset, trailer.directory_bytes);
  if (xxh3(bytes) != trailer.directory_xxh3) {
    throw FormatError(name_, "directory", "bytes that match the checksum", "damaged bytes");
  }
  qw::Directory directory =
      qw::decode_directory(bytes, trailer.directory_offset, header_.chunk_bytes, name_);
  check_features(directory.json, options.supported_features, name_);
  directory_ = std::move(directory.json);
  planes_ = std::move(directory.table.planes);
  index_ = std::move(directory.table.index);
}

std::optional<std::uint32_t> PackedReader::find(std::string_view plane) const {
  const auto found = index_.find(plane);
  if (found == index_.end()) return std::nullopt;
  return found->second;
}

std::uint32_t PackedReader::index_of(std::string_view plane) const {
  const auto found = find(plane);
  if (!found) {
    throw FormatError(name_, "planes", "a plane named " + quote_text(plane), "none");
  }
  return *found;
}

void PackedReader::read_plane(std::uint32_t index, std::span<std::byte> dst,
                              unsigned threads) const {
  if (index >= planes_.size()) {
    throw Error(ErrorCode::usage, name_ + ": expected a plane index below " +
                                      std::to_string(planes_.size()) + ", found " +
                                      std::to_string(index));
  }
  const PlaneInfo& plane = planes_[index];
  codec_.decode(
      {name_, plane.name}, plane.chunks,
      [this](std::uint64_t offset, std::span<std::byte> out) { fetch(offset, out); }, dst, threads);
}

// The padding in [begin, end), which is shorter than the alignment.
void PackedReader::expect_zero(std::uint64_t begin, std::uint64_t end) const {
  const auto padding = fetch_vector(begin, end - begin);
  const auto bad = std::find_if(padding.begin(), padding.end(),
                                [](std::byte byte) { return byte != std::byte{0}; });
  if (bad != padding.end()) {
    throw FormatError(
        name_,
        "offset " + std::to_string(begin + static_cast<std::uint64_t>(bad - padding.begin())),
        "zero padding", std::to_string(std::to_integer<unsigned>(*bad)));
  }
}

bool PackedReader::verify_all(unsigned threads, const Progress& progress) const {
  std::uint64_t end = qw::header_bytes;
  for (std::size_t i = 0; i < planes_.size(); ++i) {
    const PlaneInfo& plane = planes_[i];
    expect_zero(end, plane.offset);
    codec_.verify(
        {name_, plane.name}, plane.chunks,
        [this](std::uint64_t offset, std::span<std::byte> out) { fetch(offset, out); }, threads);
    end = plane.offset + plane.stored_bytes();
    if (progress && !progress(i + 1, planes_.size())) return false;
  }
  expect_zero(end, directory_offset_);
  return true;
}

}  // namespace engine
