// The packed container `.qw`: named planes of bytes, then a directory, then a fixed trailer.
//
// The byte-exact layout is docs/packed-format.md. The container knows planes and a JSON directory;
// what they mean (tensors, linear layers, a model) is the caller's business.
//
// Every byte of a file is covered: header, directory and trailer by checksums that opening
// verifies; planes by checksums of stored and raw bytes, and the padding between them by being
// zero, both verified by verify_all().
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/json.h"
#include "formats/packed_file.h"
#include "formats/zframe.h"

namespace engine {

struct PlaneInfo {
  std::string name;          // 1 to 255 visible ASCII characters, unique in the file
  std::uint64_t offset = 0;  // of the first stored byte in the file, a multiple of 64
  std::uint64_t raw_bytes = 0;
  std::vector<ChunkRecord> chunks;

  [[nodiscard]] std::uint64_t stored_bytes() const;  // without padding and directory entry

  bool operator==(const PlaneInfo&) const = default;
};

// The fixed fields at the start of a file.
struct PackedHeader {
  std::uint32_t flags = 0;         // the low 16 bits must be known, the high 16 may be ignored
  std::uint32_t zstd_version = 0;  // ZSTD_versionNumber() of the writer
  std::uint32_t zstd_level = 1;
  std::uint32_t chunk_bytes = default_chunk_bytes;

  bool operator==(const PackedHeader&) const = default;
};

struct PackedWriterOptions {
  CompressOptions compress;
  // Whether an unfinished file of an earlier run (PATH.partial, PATH.journal) may be deleted. If
  // not, the constructor refuses to start beside one.
  bool discard_unfinished = false;
};

// Writes a file plane by plane. Until finish() only PATH.partial (and after a checkpoint
// PATH.journal) exist; an existing PATH is replaced by finish() and untouched before.
//
// The destructor of an unfinished writer removes both, unless keep_for_resume() was called and a
// checkpoint exists. A failed write (full disk: IoError naming PATH) does the same at once, and the
// writer then refuses further calls. Same planes, options, directory and zstd version give the same
// bytes, whatever the thread count and whether or not the run was interrupted and resumed.
class PackedWriter {
 public:
  struct Resumed;

  // Creates PATH.partial and locks it against a second writer.
  explicit PackedWriter(std::filesystem::path path, PackedWriterOptions options = {});

  // Continues after the last checkpoint of an earlier run: verifies the journal, cuts PATH.partial
  // to the recorded length and restores the planes. nullopt if PATH has no journal (nothing to
  // continue; a PATH.partial without one is left alone). FormatError for a damaged journal or
  // header, Error(mismatch) if level, chunk size or zstd version differ from the earlier run's.
  // Payloads are not read here; read_plane and verify_planes verify them.
  static std::optional<Resumed> resume(std::filesystem::path path,
                                       PackedWriterOptions options = {});

  ~PackedWriter();
  PackedWriter(PackedWriter&&) noexcept = default;
  PackedWriter& operator=(PackedWriter&&) = delete;
  PackedWriter(const PackedWriter&) = delete;
  PackedWriter& operator=(const PackedWriter&) = delete;

  // Compresses and appends; returns the plane's index. Keeps at most 2 * threads chunks of memory.
  // Error(usage) for an invalid name, Error(mismatch) for one already used; both before writing.
  std::uint32_t add_plane(std::string name, std::span<const std::byte> raw);

  [[nodiscard]] std::span<const PlaneInfo> planes() const { return planes_; }

  // Reads back and verifies plane `index` (of this or the resumed run); `dst` has its raw_bytes.
  void read_plane(std::uint32_t index, std::span<std::byte> dst) const;

  // Reads back and verifies every plane without keeping it: what a resumed run builds on.
  void verify_planes() const;

  // Makes the planes so far durable, then replaces PATH.journal atomically by one that records
  // them and `state`, which is any JSON the caller needs to continue.
  void checkpoint(const Json& state);

  // Writes directory and trailer, makes the file durable and renames it to PATH; then removes the
  // journal. `directory` is an object; numbers must be finite and strings UTF-8 (Error(usage)).
  void finish(const Json& directory);

  // Removes PATH.partial and PATH.journal now.
  void abandon();

  // Keeps what the last checkpoint recorded if this writer is destroyed, or fails, unfinished. A
  // resumed writer does so from the start.
  void keep_for_resume() { keep_ = true; }

 private:
  struct Unopened {};
  PackedWriter(Unopened, std::filesystem::path path, PackedWriterOptions options);

  void require_open(const char* action) const;
  void append(std::span<const std::byte> bytes);
  void pad_to_alignment();
  void remove_files(bool report);
  void drop_after_failure() noexcept;

  std::filesystem::path path_;
  std::filesystem::path partial_path_;
  std::filesystem::path journal_path_;
  PackedWriterOptions options_;
  PackedFile file_;  // closed once finished, abandoned or failed
  ChunkCodec codec_;
  std::uint64_t end_ = 0;
  std::uint64_t on_its_way_ = 0;  // up to here the kernel was told to start writing
  std::vector<PlaneInfo> planes_;
  std::map<std::string, std::uint32_t, std::less<>> index_;
  std::uint64_t checkpoint_end_ = 0;  // end_ of the last checkpoint; 0: none, or unknown
  bool keep_ = false;
  bool has_journal_ = false;
};

struct PackedWriter::Resumed {
  PackedWriter writer;
  Json state;  // as passed to the last checkpoint()
};

struct PackedReaderOptions {
  // Features the caller understands. A file whose directory lists another one under
  // "required_features" is refused.
  std::vector<std::string> supported_features = {};
  // Of read_plane() without a number of its own; 0: as many as the machine has.
  unsigned threads = 0;
};

// Reads a finished file. Opening verifies header, directory and trailer and every count in them
// against the file's size; it reads no plane. All errors are FormatError or IoError naming the
// file. const members may be called from several threads at once.
class PackedReader {
 public:
  explicit PackedReader(const std::filesystem::path& path, PackedReaderOptions options = {});

  // The same over bytes in memory, which must outlive the reader; `name` stands for the file.
  static PackedReader from_bytes(std::span<const std::byte> bytes, std::string name,
                                 PackedReaderOptions options = {});

  [[nodiscard]] const PackedHeader& header() const { return header_; }
  [[nodiscard]] const Json& directory() const { return directory_; }
  [[nodiscard]] std::span<const PlaneInfo> planes() const { return planes_; }
  [[nodiscard]] std::uint64_t file_bytes() const { return file_bytes_; }
  [[nodiscard]] const std::string& name() const { return name_; }

  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view plane) const;
  // find(), or a FormatError naming the plane.
  [[nodiscard]] std::uint32_t index_of(std::string_view plane) const;

  // Decodes and verifies plane `index` into `dst`, which has its raw_bytes (else Error(mismatch)).
  // Threads and buffers stay between calls; of calls at the same time only one uses the threads.
  void read_plane(std::uint32_t index, std::span<std::byte> dst) const {
    read_plane(index, dst, threads_);
  }
  void read_plane(std::uint32_t index, std::span<std::byte> dst, unsigned threads) const;

  // For read_plane() without a number; 0: as many as the machine has. Not while another thread
  // reads.
  void set_threads(unsigned threads);

  // Called with the verified and the total number of planes; false stops.
  using Progress = std::function<bool(std::size_t done, std::size_t total)>;

  // Verifies every plane and all padding; throws at the first error. Returns false only if
  // `progress` (may be empty) asked to stop.
  bool verify_all(unsigned threads, const Progress& progress = {}) const;

 private:
  PackedReader() = default;
  void parse(const PackedReaderOptions& options);
  void fetch(std::uint64_t offset, std::span<std::byte> dst) const;
  [[nodiscard]] std::vector<std::byte> fetch_vector(std::uint64_t offset,
                                                    std::uint64_t bytes) const;
  void expect_zero(std::uint64_t begin, std::uint64_t end) const;

  std::string name_;
  PackedFile file_;  // closed if the bytes are in memory
  ChunkCodec codec_;
  unsigned threads_ = 1;
  std::span<const std::byte> memory_;
  std::uint64_t file_bytes_ = 0;
  std::uint64_t directory_offset_ = 0;
  PackedHeader header_;
  Json directory_;
  std::vector<PlaneInfo> planes_;
  std::map<std::string, std::uint32_t, std::less<>> index_;
};

}  // namespace engine
