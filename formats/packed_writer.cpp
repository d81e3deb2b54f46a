// Writing `.qw`: planes are appended to PATH.partial; finish() adds directory and trailer and
// renames. The order of durability is what makes a crash harmless: data before the journal that
// describes it, the complete file before the rename, the rename before the journal's removal.
#include <unistd.h>
#include <zstd.h>

#include <array>
#include <cerrno>
#include <limits>
#include <utility>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/packed.h"
#include "formats/packed_layout.h"

namespace engine {
namespace {

constexpr std::uint64_t writeback_bytes = std::uint64_t{8} << 20U;

std::filesystem::path with_suffix(std::filesystem::path path, const char* suffix) {
  path += suffix;
  return path;
}

PackedHeader header_of(const PackedWriterOptions& options) {
  PackedHeader header;
  header.zstd_version = ZSTD_versionNumber();
  header.zstd_level = static_cast<std::uint32_t>(options.compress.level);
  header.chunk_bytes = options.compress.chunk_bytes;
  return header;
}

// The bytes of a run that stopped must continue with the parameters it started with.
void expect_same(const std::string& file, const char* what, std::uint32_t expected,
                 std::uint32_t found) {
  if (expected != found) {
    throw Error(ErrorCode::mismatch, file + ": cannot resume: expected " + what + " " +
                                         std::to_string(expected) + " of the earlier run, found " +
                                         std::to_string(found));
  }
}

}  // namespace

PackedWriter::PackedWriter(Unopened, std::filesystem::path path, PackedWriterOptions options)
    : path_(std::move(path)),
      partial_path_(with_suffix(path_, ".partial")),
      journal_path_(with_suffix(path_, ".journal")),
      options_(std::move(options)) {
  check_compress_options(options_.compress);
}

PackedWriter::PackedWriter(std::filesystem::path path, PackedWriterOptions options)
    : PackedWriter(Unopened{}, std::move(path), std::move(options)) {
  if (!options_.discard_unfinished) {
    for (const auto& leftover : {partial_path_, journal_path_}) {
      if (std::filesystem::exists(std::filesystem::symlink_status(leftover))) {
        throw IoError(path_.string(),
                      "an unfinished earlier run left " + leftover.filename().string() +
                          ": resume it or discard it",
                      0);
      }
    }
  }
  file_ = PackedFile::open_locked(partial_path_, true, path_.string());
  // Locked first: the files of a run that is still alive are not touched. The constructor this one
  // delegates to has completed, so from here on the destructor cleans up after an exception.
  if (::unlink(journal_path_.c_str()) != 0 && errno != ENOENT) {
    throw IoError(path_.string(), "cannot remove " + journal_path_.filename().string(), errno);
  }
  file_.truncate(0);
  append(qw::encode_header(header_of(options_)));
}

std::optional<PackedWriter::Resumed> PackedWriter::resume(std::filesystem::path path,
                                                          PackedWriterOptions options) {
  PackedWriter writer(Unopened{}, std::move(path), std::move(options));
  const std::string journal_name = writer.journal_path_.string();
  if (!std::filesystem::exists(std::filesystem::symlink_status(writer.journal_path_))) {
    return std::nullopt;
  }
  // Neither a resume that is refused nor a resumed run that fails destroys what it continues.
  writer.keep_ = true;
  writer.has_journal_ = true;
  if (!std::filesystem::exists(writer.partial_path_)) {
    throw IoError(writer.path_.string(),
                  "cannot resume: " + writer.journal_path_.filename().string() + " exists but " +
                      writer.partial_path_.filename().string() +
                      " does not (was it finished? then delete the journal)",
                  0);
  }
  writer.file_ = PackedFile::open_locked(writer.partial_path_, false, writer.path_.string());
  const std::string partial_name = writer.partial_path_.string();

  const std::uint64_t partial_bytes = writer.file_.size();
  if (partial_bytes < qw::header_bytes) {
    throw FormatError(partial_name, "header", std::to_string(qw::header_bytes) + " bytes",
                      std::to_string(partial_bytes));
  }
  std::array<std::byte, qw::header_bytes> head{};
  writer.file_.read_at(0, head);
  const PackedHeader header = qw::decode_header(head, partial_name);
  const PackedHeader ours = header_of(writer.options_);
  expect_same(writer.path_.string(), "zstd version", header.zstd_version, ours.zstd_version);
  expect_same(writer.path_.string(), "zstd level", header.zstd_level, ours.zstd_level);
  expect_same(writer.path_.string(), "chunk size", header.chunk_bytes, ours.chunk_bytes);
  expect_same(writer.path_.string(), "flags", header.flags, ours.flags);

  const std::string text =
      read_text_file(writer.journal_path_, qw::journal_head_bytes + qw::max_table_bytes +
                                               qw::max_json_bytes + qw::hash_bytes);
  qw::Journal journal =
      qw::decode_journal(std::as_bytes(std::span(text)), header.chunk_bytes, journal_name);
  if (partial_bytes < journal.table.end) {
    throw FormatError(partial_name, "size",
                      "at least " + std::to_string(journal.table.end) + " bytes",
                      std::to_string(partial_bytes));
  }
  writer.file_.truncate(journal.table.end);
  writer.end_ = journal.table.end;
  writer.on_its_way_ = journal.table.end;
  writer.checkpoint_end_ = journal.table.end;
  writer.planes_ = std::move(journal.table.planes);
  writer.index_ = std::move(journal.table.index);
  return Resumed{std::move(writer), std::move(journal.state)};
}

PackedWriter::~PackedWriter() {
  if (file_.is_open()) drop_after_failure();
}

void PackedWriter::require_open(const char* action) const {
  if (!file_.is_open()) {
    throw Error(ErrorCode::internal, path_.string() + ": cannot " + action +
                                         ": the writer was finished, abandoned or failed");
  }
}

void PackedWriter::append(std::span<const std::byte> bytes) {
  file_.write_at(end_, bytes);
  end_ += bytes.size();
  // So that the next checkpoint finds little left to wait for.
  if (end_ - on_its_way_ >= writeback_bytes) {
    file_.start_writeback(on_its_way_, end_ - on_its_way_);
    on_its_way_ = end_;
  }
}

void PackedWriter::pad_to_alignment() {
  static constexpr std::array<std::byte, qw::alignment> zeros{};
  append(std::span(zeros).first(static_cast<std::size_t>(qw::align_up(end_) - end_)));
}

std::uint32_t PackedWriter::add_plane(std::string name, std::span<const std::byte> raw) {
  require_open("add a plane");
  qw::require_plane_name(name);
  if (index_.contains(name)) {
    throw Error(ErrorCode::mismatch,
                path_.string() + ": plane '" + name + "': expected a name not used before");
  }
  if (planes_.size() >= std::numeric_limits<std::uint32_t>::max() ||
      raw.size() / options_.compress.chunk_bytes >= std::numeric_limits<std::uint32_t>::max()) {
    throw Error(ErrorCode::usage, path_.string() + ": plane '" + name + "': too large");
  }
  try {
    pad_to_alignment();
    PlaneInfo plane;
    plane.name = std::move(name);
    plane.offset = end_;
    plane.raw_bytes = raw.size();
    plane.chunks = codec_.compress(raw, options_.compress, end_,
                                   [this](std::span<const std::byte> stored) { append(stored); });
    const auto index = static_cast<std::uint32_t>(planes_.size());
    planes_.push_back(std::move(plane));
    index_.emplace(planes_.back().name, index);
    return index;
  } catch (...) {
    drop_after_failure();
    throw;
  }
}

void PackedWriter::read_plane(std::uint32_t index, std::span<std::byte> dst) const {
  require_open("read a plane");
  if (index >= planes_.size()) {
    throw Error(ErrorCode::usage, path_.string() + ": expected a plane index below " +
                                      std::to_string(planes_.size()) + ", found " +
                                      std::to_string(index));
  }
  const PlaneInfo& plane = planes_[index];
  codec_.decode(
      {partial_path_.string(), plane.name}, plane.chunks,
      [this](std::uint64_t offset, std::span<std::byte> out) { file_.read_at(offset, out); }, dst,
      options_.compress.threads);
}

void PackedWriter::verify_planes() const {
  require_open("verify its planes");
  for (const PlaneInfo& plane : planes_) {
    codec_.verify(
        {partial_path_.string(), plane.name}, plane.chunks,
        [this](std::uint64_t offset, std::span<std::byte> out) { file_.read_at(offset, out); },
        options_.compress.threads);
  }
}

void PackedWriter::checkpoint(const Json& state) {
  require_open("write a checkpoint");
  const std::string text = qw::dump_json(state, path_.string(), "checkpoint state");
  // A failure below leaves either journal in place: until it is known which, nothing may be cut
  // that the new one describes.
  checkpoint_end_ = 0;
  try {
    file_.sync_data();
    write_file_atomically(journal_path_, qw::encode_journal(planes_, end_, text));
    has_journal_ = true;
    checkpoint_end_ = end_;
  } catch (...) {
    drop_after_failure();
    throw;
  }
}

void PackedWriter::finish(const Json& directory) {
  require_open("finish");
  if (!directory.is_object()) {
    throw Error(ErrorCode::usage, path_.string() + ": directory: expected a JSON object, found " +
                                      describe(directory));
  }
  const std::string text = qw::dump_json(directory, path_.string(), "directory");
  try {
    pad_to_alignment();
    qw::Trailer trailer;
    trailer.directory_offset = end_;
    const auto bytes = qw::encode_directory(planes_, text);
    trailer.directory_bytes = bytes.size();
    trailer.directory_xxh3 = xxh3(bytes);
    append(bytes);
    append(qw::encode_trailer(trailer));
    file_.sync();
    if (::rename(partial_path_.c_str(), path_.c_str()) != 0) {
      throw IoError(path_.string(),
                    "cannot rename " + partial_path_.filename().string() + " into place", errno);
    }
  } catch (...) {
    drop_after_failure();
    throw;
  }
  file_.close();
  sync_directory_of(path_);
  if (has_journal_ && ::unlink(journal_path_.c_str()) != 0 && errno != ENOENT) {
    throw IoError(path_.string(), "cannot remove " + journal_path_.filename().string(), errno);
  }
}

void PackedWriter::abandon() {
  require_open("abandon");
  remove_files(true);
}

// Still locked while it unlinks, so it cannot hit the files of a later run.
void PackedWriter::remove_files(bool report) {
  // The journal goes first: one without its partial file would be refused by resume().
  for (const auto& path : {journal_path_, partial_path_}) {
    const bool failed = ::unlink(path.c_str()) != 0 && errno != ENOENT;
    if (failed && report) {
      const int problem = errno;
      file_.close();
      throw IoError(path_.string(), "cannot remove " + path.filename().string(), problem);
    }
  }
  file_.close();
}

void PackedWriter::drop_after_failure() noexcept {
  if (keep_ && has_journal_) {
    try {
      if (checkpoint_end_ != 0) file_.truncate(checkpoint_end_);
    } catch (const Error&) {
      // Resuming cuts the file, too.
    }
    file_.close();
  } else {
    remove_files(false);
  }
}

}  // namespace engine
