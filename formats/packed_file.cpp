#include "formats/packed_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/error.h"

namespace engine {
namespace {

constexpr std::size_t largest_call = std::size_t{1} << 30U;  // Linux caps one call below 2 GiB

}  // namespace

PackedFile::~PackedFile() { close(); }

PackedFile::PackedFile(PackedFile&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), shown_(std::move(other.shown_)) {}

PackedFile& PackedFile::operator=(PackedFile&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::exchange(other.fd_, -1);
    shown_ = std::move(other.shown_);
  }
  return *this;
}

void PackedFile::close() noexcept {
  // What must be durable was synced before, so an error here tells nothing new.
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

PackedFile PackedFile::open_read(const std::filesystem::path& path) {
  PackedFile file;
  file.shown_ = path.string();
  // O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
  file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd_ < 0) throw IoError(file.shown_, "cannot open", errno);
  static_cast<void>(file.size());
  return file;
}

PackedFile PackedFile::open_locked(const std::filesystem::path& path, bool create,
                                   std::string shown) {
  PackedFile file;
  file.shown_ = std::move(shown);
  file.fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0666);
  if (file.fd_ < 0) {
    throw IoError(
        file.shown_,
        std::string("cannot ") + (create ? "create " : "open ") + path.filename().string(), errno);
  }
  static_cast<void>(file.size());
  if (::flock(file.fd_, LOCK_EX | LOCK_NB) != 0) {
    throw IoError(file.shown_,
                  "cannot lock " + path.filename().string() + " (is another run writing it?)",
                  errno);
  }
  // Between open and lock another run may have renamed its finished file away: what is locked then
  // is not what the path names.
  struct stat opened {};
  struct stat named {};
  if (::fstat(file.fd_, &opened) != 0 || ::stat(path.c_str(), &named) != 0 ||
      opened.st_dev != named.st_dev || opened.st_ino != named.st_ino) {
    throw IoError(file.shown_, path.filename().string() + " was replaced while it was opened", 0);
  }
  return file;
}

std::uint64_t PackedFile::size() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) throw IoError(shown_, "cannot stat", errno);
  if (!S_ISREG(info.st_mode)) throw IoError(shown_, "is not a regular file", 0);
  return static_cast<std::uint64_t>(info.st_size);
}

void PackedFile::read_at(std::uint64_t offset, std::span<std::byte> dst) const {
  while (!dst.empty()) {
    const ssize_t got =
        ::pread(fd_, dst.data(), std::min(dst.size(), largest_call), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError(shown_, "cannot read", errno);
    if (got == 0) {
      throw FormatError(shown_, "offset " + std::to_string(offset),
                        std::to_string(dst.size()) + " more bytes", "the end of the file");
    }
    offset += static_cast<std::uint64_t>(got);
    dst = dst.subspan(static_cast<std::size_t>(got));
  }
}

void PackedFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = ::pwrite(fd_, bytes.data(), std::min(bytes.size(), largest_call),
                                 static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw IoError(shown_, "cannot write", errno);
    offset += static_cast<std::uint64_t>(put);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
}

void PackedFile::start_writeback(std::uint64_t offset, std::uint64_t bytes) const noexcept {
#ifdef SYNC_FILE_RANGE_WRITE
  // File systems without it refuse; what must be durable is synced all the same.
  static_cast<void>(::sync_file_range(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                                      SYNC_FILE_RANGE_WRITE));
#else
  static_cast<void>(offset);
  static_cast<void>(bytes);
#endif
}

void PackedFile::truncate(std::uint64_t bytes) {
  if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) {
    throw IoError(shown_, "cannot truncate", errno);
  }
}

void PackedFile::sync_data() {
  if (::fdatasync(fd_) != 0) throw IoError(shown_, "cannot write to disk", errno);
}

void PackedFile::sync() {
  if (::fsync(fd_) != 0) throw IoError(shown_, "cannot write to disk", errno);
}

void sync_directory_of(const std::filesystem::path& path) {
  const std::filesystem::path parent = path.has_parent_path() ? path.parent_path() : ".";
  const int fd = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw IoError(path.string(), "cannot open its directory", errno);
  const int result = ::fsync(fd);
  const int problem = errno;
  ::close(fd);
  // Some network file systems cannot sync a directory and answer EINVAL.
  if (result != 0 && problem != EINVAL) {
    throw IoError(path.string(), "cannot write its directory to disk", problem);
  }
}

}  // namespace engine
