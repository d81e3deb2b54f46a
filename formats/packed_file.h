// A file opened for positioned reads and writes, as the packed container needs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace engine {

// Move-only owner of a file descriptor. Reads are thread-safe. Every failure is an IoError that
// names `shown`, the path the user knows, which for a partial file is the final one.
class PackedFile {
 public:
  PackedFile() = default;
  ~PackedFile();
  PackedFile(PackedFile&& other) noexcept;
  PackedFile& operator=(PackedFile&& other) noexcept;
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  // An existing regular file.
  static PackedFile open_read(const std::filesystem::path& path);
  // For reading and writing, with an exclusive lock (a second locker fails); `create` also makes a
  // missing file. The content is kept.
  static PackedFile open_locked(const std::filesystem::path& path, bool create, std::string shown);

  [[nodiscard]] bool is_open() const { return fd_ >= 0; }
  void close() noexcept;

  [[nodiscard]] std::uint64_t size() const;
  // Fills dst; FormatError if the file ends before.
  void read_at(std::uint64_t offset, std::span<std::byte> dst) const;
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  // Asks the kernel to begin writing these bytes to disk; a hint that promises nothing.
  void start_writeback(std::uint64_t offset, std::uint64_t bytes) const noexcept;
  void truncate(std::uint64_t bytes);
  void sync_data();  // fdatasync: content and size are durable
  void sync();       // fsync

 private:
  int fd_ = -1;
  std::string shown_;
};

// Makes renames and removals in the directory of `path` durable.
void sync_directory_of(const std::filesystem::path& path);

}  // namespace engine
