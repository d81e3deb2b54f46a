#include "eval/study_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <thread>

#include "formats/atomic_file.h"
#include "formats/sha256.h"

namespace engine {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view record_end = ".job.json";
constexpr std::size_t max_files = 20000;

Json to_json(const JobRecord& r) {
  Json j;
  j["key"] = r.key;
  j["work"] = r.work;
  j["build"] = r.build;
  j["kind"] = r.kind;
  j["method"] = r.method;
  j["device"] = r.device;
  j["flops"] = r.flops;
  j["seconds"] = r.seconds;
  j["resumed"] = r.resumed;
  j["identity"] = r.identity;
  j["command"] = r.command;
  return j;
}

JobRecord record_from_json(const Json& j, const std::string& file) {
  const JsonObject o(j, file);
  JobRecord r;
  r.key = o.text("key");
  r.work = o.text("work");
  r.build = o.text("build");
  r.kind = o.text("kind");
  r.method = o.text("method");
  r.device = o.text("device");
  r.flops = o.number("flops");
  r.seconds = o.number("seconds");
  r.resumed = o.boolean("resumed");
  r.identity = o.object("identity").value();
  return r;
}

fs::path with_end(const fs::path& out, const std::string& key, const char* end) {
  return out / "cache" / (key + end);
}

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

}  // namespace

std::string file_sha256(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in || !is_file(file)) throw IoError(file.string(), "cannot open", errno);
  Sha256 hash;
  std::vector<char> piece(std::size_t{1} << 20);
  while (in) {
    in.read(piece.data(), static_cast<std::streamsize>(piece.size()));
    hash.update(std::string_view(piece.data(), static_cast<std::size_t>(in.gcount())));
  }
  if (in.bad()) throw IoError(file.string(), "cannot read", errno);
  return hash.hex();
}

const std::string& FileHashes::file(const fs::path& path) {
  const std::string name = path.string();
  const auto found = known_.find(name);
  return found != known_.end() ? found->second : known_[name] = file_sha256(path);
}

const std::string& FileHashes::folder(const fs::path& path) {
  const std::string name = path.string();
  const auto found = known_.find(name);
  if (found != known_.end()) return found->second;
  std::error_code error;
  std::vector<fs::path> files;
  for (fs::recursive_directory_iterator it(path, error), end; !error && it != end;
       it.increment(error)) {
    if (!it->is_regular_file(error)) continue;
    files.push_back(it->path());
    if (files.size() > max_files) {
      throw Error(ErrorCode::usage, name +
                                        ": expected a folder with the tasks' files, found more "
                                        "than " +
                                        std::to_string(max_files) + " files");
    }
  }
  if (error) throw IoError(name, "cannot read the folder", error.value());
  std::sort(files.begin(), files.end());
  Sha256 hash;
  for (const fs::path& f : files) {
    hash.update(f.lexically_relative(path).string() + "\n" + file(f) + "\n");
  }
  return known_[name] = hash.hex();
}

std::string job_key(const std::string& work, const std::string& build, const std::string& parent) {
  Json j;
  j["work"] = work;
  j["build"] = build;
  j["parent"] = parent;
  return sha256_hex(j.dump());
}

StudyCache::StudyCache(fs::path out) : out_(std::move(out)) {
  std::error_code error;
  for (fs::directory_iterator it(out_ / "cache", error), end; !error && it != end;
       it.increment(error)) {
    const fs::path& file = it->path();
    if (!file.filename().string().ends_with(record_end)) continue;
    try {
      JobRecord record = record_from_json(read_json_file(file), file.string());
      if (file.filename().string() == record.key + std::string(record_end)) {
        std::string key = record.key;
        records_.emplace(std::move(key), std::move(record));
      }
    } catch (const Error&) {
      // Not one of ours, or damaged: its job is then computed anew.
    }
  }
}

void StudyCache::create() const {
  for (const char* name : {"cache", "logs"}) {
    std::error_code error;
    fs::create_directories(out_ / name, error);
    if (error) throw IoError((out_ / name).string(), "cannot create the folder", error.value());
  }
}

fs::path StudyCache::report_file(const std::string& key) const {
  return with_end(out_, key, ".json");
}
fs::path StudyCache::model_file(const std::string& key) const { return with_end(out_, key, ".qw"); }
fs::path StudyCache::log_file(const std::string& key) const {
  return out_ / "logs" / (key + ".txt");
}

bool StudyCache::has_report(const std::string& key) const {
  if (!records_.contains(key) || !is_file(report_file(key))) return false;
  try {
    return report(key).is_object();
  } catch (const Error&) {
    return false;
  }
}

Json StudyCache::report(const std::string& key) const { return read_json_file(report_file(key)); }

bool StudyCache::has_model(const std::string& key) const { return is_file(model_file(key)); }

bool StudyCache::has_partial_model(const std::string& key) const {
  return is_file(with_end(out_, key, ".qw.journal"));
}

void StudyCache::remove_model(const std::string& key) const {
  for (const char* end : {".qw", ".qw.partial", ".qw.journal"}) {
    std::error_code ignored;
    fs::remove(with_end(out_, key, end), ignored);
  }
}

std::vector<std::string> StudyCache::same_work(const std::string& work) const {
  std::vector<std::string> keys;
  for (const auto& [key, record] : records_) {
    if (record.work == work && has_report(key)) keys.push_back(key);
  }
  return keys;
}

void StudyCache::store(const JobRecord& record) {
  write_file_atomically(with_end(out_, record.key, record_end.data()),
                        std::string_view(to_json(record).dump(1) + "\n"));
  records_[record.key] = record;
}

std::pair<std::int64_t, std::int64_t> StudyCache::other_models(
    const std::vector<std::string>& keys) const {
  std::pair<std::int64_t, std::int64_t> found{0, 0};
  std::error_code error;
  for (fs::directory_iterator it(out_ / "cache", error), end; !error && it != end;
       it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!name.ends_with(".qw") && !name.ends_with(".qw.partial")) continue;
    const std::string key = name.substr(0, name.find('.'));
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
    std::error_code ignored;
    const std::uintmax_t bytes = fs::file_size(it->path(), ignored);
    ++found.first;
    if (!ignored) found.second += static_cast<std::int64_t>(bytes);
  }
  return found;
}

StudyLock::StudyLock(const fs::path& out) {
  const fs::path file = out / "lock";
  // Without O_CLOEXEC: jobs inherit it.
  fd_ = ::open(file.c_str(), O_RDWR | O_CREAT, 0644);
  if (fd_ < 0) throw IoError(file.string(), "cannot open", errno);
  // A study that was killed takes its job with it, but not in the same instant.
  for (int tries = 0; ::flock(fd_, LOCK_EX | LOCK_NB) != 0; ++tries) {
    const int code = errno;
    if (code == EINTR) continue;
    if (code == EWOULDBLOCK && tries < 20) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      continue;
    }
    ::close(fd_);
    if (code != EWOULDBLOCK) throw IoError(file.string(), "cannot lock", code);
    throw Error(ErrorCode::usage, out.string() +
                                      ": expected no other study at work in this folder, found one "
                                      "(it holds the file \"lock\")");
  }
}

StudyLock::~StudyLock() { ::close(fd_); }

}  // namespace engine
