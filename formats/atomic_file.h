// Files that exist completely or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

namespace engine {

// Writes to "PATH.partial-PID[-N]" beside the final file; commit() makes it durable and renames it
// over PATH. Destroyed without a commit, it removes the temporary file and PATH is untouched.
// Every failure (full disk, read-only file system, no permission) is an IoError naming PATH.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends; unbuffered, so pass large pieces.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  // fsync, rename, fsync of the directory. At most once; no write may follow.
  void commit();

  [[nodiscard]] std::uint64_t bytes_written() const { return written_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  void close_and_remove() noexcept;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  std::uint64_t written_ = 0;
};

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

}  // namespace engine
