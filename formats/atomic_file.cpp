#include "formats/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "formats/error.h"

namespace engine {

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  // A crashed process with our id, or a second writer in this process, may hold the first name.
  constexpr int kAttempts = 100;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    temporary_ = path_;
    temporary_ += ".partial-" + std::to_string(::getpid());
    if (attempt > 0) temporary_ += "-" + std::to_string(attempt);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ >= 0) return;
    if (errno != EEXIST) break;
  }
  throw IoError(path_.string(), "cannot create", errno);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) close_and_remove();
}

void AtomicFile::close_and_remove() noexcept {
  ::close(fd_);
  ::unlink(temporary_.c_str());
  fd_ = -1;
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (fd_ < 0) throw Error(ErrorCode::internal, path_.string() + ": write after commit");
  constexpr std::size_t kLargestCall = std::size_t{1} << 30;  // Linux caps one call below 2 GiB
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd_, bytes.data(), std::min(bytes.size(), kLargestCall));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw IoError(path_.string(), "cannot write", errno);
    written_ += static_cast<std::uint64_t>(put);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
}

void AtomicFile::commit() {
  if (fd_ < 0) throw Error(ErrorCode::internal, path_.string() + ": commit twice");
  const auto refuse = [&](const char* action) {
    const int problem = errno;
    close_and_remove();
    throw IoError(path_.string(), action, problem);
  };
  if (::fsync(fd_) != 0) refuse("cannot write to disk");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) refuse("cannot rename into place");
  const int closed = ::close(std::exchange(fd_, -1));
  if (closed != 0) throw IoError(path_.string(), "cannot close", errno);

  // The rename itself is durable only once the directory is.
  const std::filesystem::path parent = path_.has_parent_path() ? path_.parent_path() : ".";
  const int directory = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) throw IoError(path_.string(), "cannot open its directory", errno);
  const int synced = ::fsync(directory);
  const int problem = errno;
  ::close(directory);
  // Some network file systems cannot sync a directory and say EINVAL; the file itself is safe.
  if (synced != 0 && problem != EINVAL) {
    throw IoError(path_.string(), "cannot write its directory to disk", problem);
  }
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

}  // namespace engine
