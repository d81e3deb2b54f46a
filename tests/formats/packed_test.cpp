// The `.qw` container: round trips, every single damaged byte, truncation, resuming, full disks.
// Hand-made malformed files are in packed_malformed_test.cpp.
#include "formats/packed.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <csignal>
#include <fstream>
#include <limits>
#include <random>
#include <thread>

#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::expect_contains;
using Bytes = std::vector<std::byte>;

Bytes read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  Bytes bytes(static_cast<std::size_t>(fs::file_size(path)));
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

void write_all(const fs::path& path, std::span<const std::byte> bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(bytes.data()),
            static_cast<std::streamsize>(bytes.size()));
  if (!out) throw std::runtime_error("cannot write " + path.string());
}

Bytes random_bytes(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(size);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random() & 255U);
  return bytes;
}

Bytes smooth_bytes(std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i % 7);
  return bytes;
}

PackedWriterOptions small_chunks(unsigned threads = 2) {
  return {.compress = {.level = 1, .threads = threads, .chunk_bytes = 128}};
}

std::vector<std::pair<std::string, Bytes>> sample_planes() {
  return {{"layer.0.codes", smooth_bytes(300)},
          {"layer.0.scales", random_bytes(130, 1)},
          {"none", {}},
          {"layer.1.codes", smooth_bytes(64)}};
}

const Json sample_directory = {{"model", {{"dim", 64}, {"name", "tiny"}}}, {"bits", 3.5}};

void write_sample(const fs::path& path, PackedWriterOptions options = small_chunks()) {
  PackedWriter writer(path, std::move(options));
  for (const auto& [name, raw] : sample_planes()) writer.add_plane(name, raw);
  writer.finish(sample_directory);
}

bool unfinished_files_exist(const fs::path& path) {
  return fs::exists(path.string() + ".partial") || fs::exists(path.string() + ".journal");
}

class Packed : public ::testing::Test {
 protected:
  testing::TempDir dir_;
  fs::path path_ = dir_.path() / "a.qw";
};

TEST_F(Packed, RoundTrip) {
  write_sample(path_);
  EXPECT_FALSE(unfinished_files_exist(path_));
  const PackedReader reader(path_);
  EXPECT_EQ(reader.directory(), sample_directory);
  EXPECT_EQ(reader.file_bytes(), fs::file_size(path_));
  EXPECT_EQ(reader.header().chunk_bytes, 128U);
  const auto planes = sample_planes();
  ASSERT_EQ(reader.planes().size(), planes.size());
  for (std::uint32_t i = 0; i < planes.size(); ++i) {
    const PlaneInfo& info = reader.planes()[i];
    EXPECT_EQ(info.name, planes[i].first);
    EXPECT_EQ(info.raw_bytes, planes[i].second.size());
    EXPECT_EQ(info.offset % 64, 0U);
    EXPECT_EQ(reader.find(info.name), i);
    EXPECT_EQ(reader.index_of(info.name), i);
    for (const unsigned threads : {1U, 3U}) {
      Bytes back(info.raw_bytes);
      reader.read_plane(i, back, threads);
      EXPECT_EQ(back, planes[i].second);
    }
  }
  EXPECT_LT(reader.planes()[0].stored_bytes(), 300U);
  EXPECT_EQ(reader.planes()[1].stored_bytes(), 130U);
  EXPECT_EQ(reader.find("layer.2.codes"), std::nullopt);
  PackedReader with_threads(path_, {.threads = 3});
  for (const unsigned threads : {0U, 1U, 2U}) {
    Bytes back(300);
    with_threads.read_plane(0, back);
    EXPECT_EQ(back, planes[0].second);
    with_threads.set_threads(threads);
  }
  expect_contains(error_of([&] { static_cast<void>(reader.index_of("layer.2.codes")); }),
                  "a.qw: planes: expected a plane named");
  Bytes small(10);
  expect_contains(error_of([&] { reader.read_plane(0, small, 1); }),
                  "plane 'layer.0.codes': expected room for 300 bytes, found 10");
  expect_contains(error_of([&] { reader.read_plane(4, small, 1); }),
                  "expected a plane index below 4, found 4");
  EXPECT_TRUE(reader.verify_all(2));
}

TEST_F(Packed, NoPlanesAndEmptyDirectory) {
  PackedWriter(path_).finish(Json::object());
  const PackedReader reader(path_);
  EXPECT_TRUE(reader.planes().empty());
  EXPECT_EQ(reader.file_bytes(), 64U + 24 + 2 + 40);
  EXPECT_TRUE(reader.verify_all(1));
}

TEST_F(Packed, DefaultChunksOfOneMebibyte) {
  const Bytes raw = smooth_bytes((2U << 20U) + 5);
  {
    PackedWriter writer(path_, {.compress = {.threads = 2}});
    writer.add_plane("big", raw);
    writer.finish(Json::object());
  }
  const PackedReader reader(path_);
  ASSERT_EQ(reader.planes()[0].chunks.size(), 3U);
  EXPECT_EQ(reader.planes()[0].chunks[0].raw_bytes, 1U << 20U);
  EXPECT_EQ(reader.planes()[0].chunks[2].raw_bytes, 5U);
  Bytes back(raw.size());
  reader.read_plane(0, back, 2);
  EXPECT_EQ(back, raw);
}

TEST_F(Packed, SeveralThreadsReadAtTheSameTime) {
  write_sample(path_);
  const PackedReader reader(path_, {.threads = 3});
  const auto planes = sample_planes();
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> callers;
    for (int caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&] {
        for (std::uint32_t i = 0; i < 400; ++i) {
          const auto& expected = planes[i % planes.size()].second;
          Bytes back(expected.size());
          reader.read_plane(i % static_cast<std::uint32_t>(planes.size()), back);
          if (back != expected) ++wrong;
        }
      });
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST_F(Packed, ReadsFromMemory) {
  write_sample(path_);
  const Bytes bytes = read_all(path_);
  const PackedReader reader = PackedReader::from_bytes(bytes, "memory");
  EXPECT_EQ(reader.directory(), sample_directory);
  Bytes back(300);
  reader.read_plane(0, back, 1);
  EXPECT_EQ(back, sample_planes()[0].second);
  EXPECT_TRUE(reader.verify_all(1));
}

TEST_F(Packed, SameInputsSameBytes) {
  const fs::path other = dir_.path() / "b.qw";
  write_sample(path_, small_chunks(1));
  write_sample(other, small_chunks(4));
  EXPECT_EQ(read_all(path_), read_all(other));
}

TEST_F(Packed, EveryDamagedByteIsFound) {
  write_sample(path_);
  const Bytes good = read_all(path_);
  ASSERT_LT(good.size(), 4096U);
  ASSERT_TRUE(PackedReader::from_bytes(good, "good").verify_all(1));
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (const unsigned flip : {0x01U, 0x80U, 0xFFU}) {
      Bytes bad = good;
      bad[at] ^= static_cast<std::byte>(flip);
      EXPECT_THROW(PackedReader::from_bytes(bad, "bad").verify_all(1), FormatError)
          << "byte " << at << " of " << good.size() << ", flipped bits " << flip;
    }
  }
}

TEST_F(Packed, EveryTruncationIsFoundAtOpen) {
  write_sample(path_);
  const Bytes good = read_all(path_);
  for (std::size_t size = 0; size < good.size(); ++size) {
    const auto part = std::span(good).first(size);
    EXPECT_THROW(PackedReader::from_bytes(part, "cut"), FormatError) << size;
  }
  Bytes longer = good;
  longer.push_back(std::byte{0});
  EXPECT_THROW(PackedReader::from_bytes(longer, "longer"), FormatError);
}

TEST_F(Packed, FileTruncatedAfterOpeningIsAnError) {
  write_sample(path_);
  const PackedReader reader(path_);
  fs::resize_file(path_, 100);
  expect_contains(error_of([&] { reader.verify_all(1); }), "the end of the file");
}

TEST_F(Packed, VerifyAllReportsProgressAndStops) {
  write_sample(path_);
  const PackedReader reader(path_);
  std::vector<std::size_t> done;
  EXPECT_FALSE(reader.verify_all(1, [&](std::size_t count, std::size_t total) {
    EXPECT_EQ(total, 4U);
    done.push_back(count);
    return count < 2;
  }));
  EXPECT_EQ(done, (std::vector<std::size_t>{1, 2}));
}

TEST_F(Packed, OpeningWhatIsNoFile) {
  EXPECT_THROW(PackedReader{path_}, IoError);
  EXPECT_THROW(PackedReader{dir_.path()}, IoError);
}

TEST_F(Packed, RefusesBadPlanesAndDirectories) {
  PackedWriter writer(path_, small_chunks());
  writer.add_plane("a", smooth_bytes(10));
  expect_contains(error_of([&] { writer.add_plane("a", {}); }),
                  "plane 'a': expected a name not used before");
  for (const std::string& name : {std::string(), std::string("a b"), std::string("\x01"),
                                  std::string("\xC3\xA9"), std::string(256, 'x')}) {
    expect_contains(error_of([&] { writer.add_plane(name, {}); }),
                    "expected 1 to 255 visible ASCII characters");
  }
  expect_contains(error_of([&] { writer.finish(Json::array()); }), "expected a JSON object");
  const Json nan = {{"x", std::numeric_limits<double>::quiet_NaN()}};
  expect_contains(error_of([&] { writer.finish(nan); }), "expected JSON that reads back");
  expect_contains(error_of([&] {
                    writer.finish({{"x", "\xFF"}});
                  }),
                  "expected JSON that reads back");
  expect_contains(error_of([&] { writer.checkpoint(nan); }), "checkpoint state: expected JSON");
  // None of that harmed the file.
  writer.add_plane("b", smooth_bytes(11));
  writer.finish(Json::object());
  EXPECT_TRUE(PackedReader(path_).verify_all(1));
}

TEST_F(Packed, ANewFileReplacesTheOldOneOnlyAtTheEnd) {
  write_all(path_, smooth_bytes(5));
  {
    PackedWriter writer(path_, small_chunks());
    writer.add_plane("a", smooth_bytes(10));
    EXPECT_EQ(read_all(path_), smooth_bytes(5));
  }
  EXPECT_EQ(read_all(path_), smooth_bytes(5));
  EXPECT_FALSE(unfinished_files_exist(path_));
  write_sample(path_);
  EXPECT_TRUE(PackedReader(path_).verify_all(1));
}

TEST_F(Packed, UnfinishedWritersLeaveNothing) {
  {
    PackedWriter writer(path_, small_chunks());
    writer.add_plane("a", smooth_bytes(10));
    writer.checkpoint({{"step", 1}});
    EXPECT_TRUE(fs::exists(path_.string() + ".journal"));
  }
  EXPECT_FALSE(unfinished_files_exist(path_));
  {
    PackedWriter writer(path_, small_chunks());
    writer.keep_for_resume();  // without a checkpoint there is nothing to resume from
    writer.add_plane("a", smooth_bytes(10));
  }
  EXPECT_FALSE(unfinished_files_exist(path_));
  {
    PackedWriter writer(path_, small_chunks());
    writer.keep_for_resume();
    writer.checkpoint(1);
    writer.abandon();
    EXPECT_FALSE(unfinished_files_exist(path_));
    EXPECT_THROW(writer.add_plane("a", {}), Error);
    EXPECT_THROW(writer.checkpoint(1), Error);
    EXPECT_THROW(writer.finish(Json::object()), Error);
  }
  EXPECT_FALSE(fs::exists(path_));
}

TEST_F(Packed, AKeptFileEndsWhereItsCheckpointDoes) {
  std::uintmax_t size = 0;
  {
    PackedWriter writer(path_, small_chunks());
    writer.keep_for_resume();
    writer.add_plane("a", random_bytes(1000, 1));
    writer.checkpoint(1);
    size = fs::file_size(path_.string() + ".partial");
    writer.add_plane("b", random_bytes(1000, 2));
  }
  EXPECT_EQ(fs::file_size(path_.string() + ".partial"), size);
  EXPECT_TRUE(PackedWriter::resume(path_, small_chunks()).has_value());
}

// Nobody knows then whether the new journal, which describes more, is already in place.
TEST_F(Packed, AFailedCheckpointCutsNothing) {
  const fs::path partial = path_.string() + ".partial", journal = path_.string() + ".journal";
  const fs::path aside = path_.string() + ".aside";
  PackedWriter writer(path_, small_chunks());
  writer.keep_for_resume();
  writer.add_plane("a", random_bytes(1000, 1));
  writer.checkpoint(1);
  writer.add_plane("b", random_bytes(1000, 2));
  const std::uintmax_t size = fs::file_size(partial);
  fs::rename(journal, aside);
  fs::create_directory(journal);  // nothing can be renamed to it
  EXPECT_THROW(writer.checkpoint(2), IoError);
  ASSERT_TRUE(fs::exists(partial));
  EXPECT_EQ(fs::file_size(partial), size);
  fs::remove(journal);
  fs::rename(aside, journal);
  const auto resumed = PackedWriter::resume(path_, small_chunks());
  ASSERT_TRUE(resumed.has_value());
  EXPECT_EQ(resumed->state, 1);
  EXPECT_EQ(resumed->writer.planes().size(), 1U);
}

TEST_F(Packed, OneWriterAtATime) {
  PackedWriter writer(path_, small_chunks());
  writer.checkpoint(1);
  auto discard = small_chunks();
  discard.discard_unfinished = true;
  expect_contains(error_of([&] { PackedWriter(path_, discard); }), "is another run writing it");
  expect_contains(error_of([&] { PackedWriter::resume(path_, small_chunks()); }),
                  "is another run writing it");
  writer.add_plane("a", smooth_bytes(1000));
  writer.finish(Json::object());
  EXPECT_TRUE(PackedReader(path_).verify_all(1));
}

// An unfinished run that has written `planes` planes, the last `lost` of them after its checkpoint.
void interrupted_run(const fs::path& path, std::size_t planes, std::size_t lost) {
  PackedWriter writer(path, small_chunks());
  writer.keep_for_resume();
  for (std::size_t i = 0; i < planes; ++i) {
    if (i == planes - lost) writer.checkpoint({{"next", i}});
    writer.add_plane(sample_planes()[i].first, sample_planes()[i].second);
  }
  if (lost == 0) writer.checkpoint({{"next", planes}});
}

TEST_F(Packed, ResumingGivesTheIdenticalFile) {
  const fs::path straight = dir_.path() / "straight.qw";
  write_sample(straight);
  for (std::size_t planes = 0; planes <= 4; ++planes) {
    for (std::size_t lost = 0; lost <= planes; ++lost) {
      interrupted_run(path_, planes, lost);
      EXPECT_FALSE(fs::exists(path_));
      {
        auto resumed = PackedWriter::resume(path_, small_chunks(3));
        ASSERT_TRUE(resumed.has_value());
        const auto next = resumed->state.at("next").get<std::size_t>();
        ASSERT_EQ(next, planes - lost);
        ASSERT_EQ(resumed->writer.planes().size(), next);
        for (std::uint32_t i = 0; i < next; ++i) {
          Bytes back(sample_planes()[i].second.size());
          resumed->writer.read_plane(i, back);
          EXPECT_EQ(back, sample_planes()[i].second);
        }
        for (std::size_t i = next; i < 4; ++i) {
          resumed->writer.add_plane(sample_planes()[i].first, sample_planes()[i].second);
        }
        resumed->writer.finish(sample_directory);
      }
      EXPECT_EQ(read_all(path_), read_all(straight)) << planes << " planes, " << lost << " lost";
      EXPECT_FALSE(unfinished_files_exist(path_));
      fs::remove(path_);
    }
  }
}

TEST_F(Packed, AResumedRunThatStopsCanBeResumedAgain) {
  interrupted_run(path_, 2, 0);
  { auto resumed = PackedWriter::resume(path_, small_chunks()); }
  auto again = PackedWriter::resume(path_, small_chunks());
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->writer.planes().size(), 2U);
  expect_contains(error_of([&] { again->writer.add_plane("layer.0.codes", {}); }),
                  "expected a name not used before");
  again->writer.abandon();
  EXPECT_FALSE(unfinished_files_exist(path_));
}

TEST_F(Packed, NothingToResume) {
  EXPECT_FALSE(PackedWriter::resume(path_, small_chunks()).has_value());
  write_all(path_.string() + ".partial", smooth_bytes(5));
  EXPECT_FALSE(PackedWriter::resume(path_, small_chunks()).has_value());
  expect_contains(error_of([&] { PackedWriter(path_, small_chunks()); }),
                  "an unfinished earlier run left a.qw.partial: resume it or discard it");
  auto discard = small_chunks();
  discard.discard_unfinished = true;
  write_sample(path_, discard);
  EXPECT_TRUE(PackedReader(path_).verify_all(1));
}

TEST_F(Packed, ResumeRefusesOtherParameters) {
  interrupted_run(path_, 2, 0);
  auto options = small_chunks();
  options.compress.level = 2;
  expect_contains(error_of([&] { PackedWriter::resume(path_, options); }),
                  "cannot resume: expected zstd level 1 of the earlier run, found 2");
  options = small_chunks();
  options.compress.chunk_bytes = 256;
  expect_contains(error_of([&] { PackedWriter::resume(path_, options); }),
                  "cannot resume: expected chunk size 128 of the earlier run, found 256");
  EXPECT_TRUE(PackedWriter::resume(path_, small_chunks()).has_value());  // refusing kept the files
}

TEST_F(Packed, EveryDamagedByteOfAJournalIsFound) {
  interrupted_run(path_, 3, 0);
  const fs::path journal = path_.string() + ".journal";
  const Bytes good = read_all(journal);
  for (std::size_t at = 0; at < good.size(); ++at) {
    Bytes bad = good;
    bad[at] ^= std::byte{0x10};
    write_all(journal, bad);
    EXPECT_THROW(PackedWriter::resume(path_, small_chunks()), FormatError) << at;
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    write_all(journal, std::span(good).first(size));
    EXPECT_THROW(PackedWriter::resume(path_, small_chunks()), FormatError) << size;
  }
  write_all(journal, good);
  EXPECT_TRUE(PackedWriter::resume(path_, small_chunks()).has_value());
}

TEST_F(Packed, ResumeFindsADamagedPartialFile) {
  interrupted_run(path_, 3, 0);
  const fs::path partial = path_.string() + ".partial";
  const Bytes good = read_all(partial);
  const auto resume = [&] { return PackedWriter::resume(path_, small_chunks()); };

  write_all(partial, std::span(good).first(good.size() - 1));
  expect_contains(error_of(resume), "a.qw.partial: size: expected at least");
  write_all(partial, std::span(good).first(10));
  expect_contains(error_of(resume), "a.qw.partial: header: expected 64 bytes, found 10");
  Bytes bad = good;
  bad[20] ^= std::byte{1};
  write_all(partial, bad);
  expect_contains(error_of(resume), "header: expected bytes that match the checksum");
  bad = good;
  bad[70] ^= std::byte{1};  // in the first plane
  write_all(partial, bad);
  {
    auto resumed = resume();
    ASSERT_TRUE(resumed.has_value());
    Bytes back(300);
    expect_contains(error_of([&] { resumed->writer.read_plane(0, back); }),
                    "a.qw.partial: plane 'layer.0.codes', chunk 0 at offset 64: expected");
    expect_contains(error_of([&] { resumed->writer.verify_planes(); }),
                    "a.qw.partial: plane 'layer.0.codes', chunk 0 at offset 64: expected");
    resumed->writer.keep_for_resume();
  }
  fs::remove(partial);
  expect_contains(error_of(resume), "a.qw.partial does not (was it finished?");
}

// The kernel refuses to grow any file of this process beyond `bytes`, much like a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    if (getrlimit(RLIMIT_FSIZE, &before_) != 0) throw std::runtime_error("getrlimit");
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) throw std::runtime_error("setrlimit");
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
  void (*handler_)(int);
};

TEST_F(Packed, AFullDiskIsAnErrorThatNamesTheFileAndRemovesThePartialOne) {
  PackedWriter writer(path_, small_chunks());
  writer.add_plane("a", smooth_bytes(10));
  writer.checkpoint(1);
  std::string message;
  ErrorCode code = ErrorCode::internal;
  {
    const FileSizeLimit limit(4096);
    try {
      writer.add_plane("b", random_bytes(10000, 1));
    } catch (const Error& error) {
      message = error.what();
      code = error.code();
    }
  }
  EXPECT_EQ(code, ErrorCode::io);
  expect_contains(message, path_.string() + ": cannot write: File too large");
  EXPECT_FALSE(unfinished_files_exist(path_));
  EXPECT_THROW(writer.add_plane("c", {}), Error);
  EXPECT_FALSE(fs::exists(path_));
}

TEST_F(Packed, AFullDiskWhileFinishing) {
  PackedWriter writer(path_, small_chunks());
  writer.add_plane("a", random_bytes(4000, 2));
  std::string message;
  {
    const FileSizeLimit limit(4096);
    message = error_of([&] { writer.finish({{"text", std::string(2000, 'x')}}); });
  }
  expect_contains(message, path_.string() + ": cannot write: File too large");
  EXPECT_FALSE(unfinished_files_exist(path_));
  EXPECT_FALSE(fs::exists(path_));
}

TEST_F(Packed, AFullDiskKeepsTheCheckpointIfAsked) {
  const fs::path straight = dir_.path() / "straight.qw";
  write_sample(straight);
  {
    PackedWriter writer(path_, small_chunks());
    writer.keep_for_resume();
    writer.add_plane(sample_planes()[0].first, sample_planes()[0].second);
    writer.checkpoint(1);
    const FileSizeLimit limit(4096);
    EXPECT_THROW(writer.add_plane("b", random_bytes(10000, 1)), IoError);
  }
  auto resumed = PackedWriter::resume(path_, small_chunks());
  ASSERT_TRUE(resumed.has_value());
  for (std::size_t i = 1; i < 4; ++i) {
    resumed->writer.add_plane(sample_planes()[i].first, sample_planes()[i].second);
  }
  resumed->writer.finish(sample_directory);
  EXPECT_EQ(read_all(path_), read_all(straight));
}

}  // namespace
}  // namespace engine
