#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/json.h"
#include "formats/mapped_file.h"
#include "formats/sha256.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::expect_contains;

std::vector<std::string> entries(const fs::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

// FIPS 180-2 examples and the block boundaries of the padding.
TEST(Sha256, KnownDigests) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, PiecesOfAnySizeGiveTheSameDigest) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (std::size_t size = 0; size <= text.size(); size += size < 140 ? 1 : 53) {
    const std::string_view part = std::string_view(text).substr(0, size);
    for (const std::size_t piece : {1U, 3U, 63U, 64U, 65U}) {
      Sha256 hash;
      for (std::size_t at = 0; at < size; at += piece) hash.update(part.substr(at, piece));
      ASSERT_EQ(hash.hex(), sha256_hex(part)) << size << " bytes in pieces of " << piece;
    }
  }
}

TEST(MappedFile, ShowsTheBytesAndMoves) {
  const testing::TempDir dir;
  MappedFile map(dir.file("data", "hello"));
  EXPECT_EQ(map.size(), 5U);
  const std::byte* address = map.bytes().data();
  MappedFile moved(std::move(map));
  EXPECT_EQ(moved.bytes().data(), address);
  EXPECT_EQ(static_cast<char>(moved.bytes()[4]), 'o');
  MappedFile other(dir.file("other", "x"));
  other = std::move(moved);
  EXPECT_EQ(other.size(), 5U);
  EXPECT_EQ(MappedFile(dir.file("empty", "")).bytes().size(), 0U);
}

TEST(MappedFile, NamesThePathInErrors) {
  const testing::TempDir dir;
  expect_contains(error_of([&] { MappedFile map(dir.path() / "none"); }),
                  "none: cannot open: No such file");
  expect_contains(error_of([&] { MappedFile map(dir.path()); }), "not a regular file");
}

TEST(AtomicFile, AppearsOnlyAtCommit) {
  const testing::TempDir dir;
  const fs::path path = dir.file("out", "old");
  {
    AtomicFile file(path);
    file.write("new ");
    file.write("content");
    EXPECT_EQ(file.bytes_written(), 11U);
    EXPECT_EQ(read_text_file(path, 100), "old");
    EXPECT_EQ(entries(dir.path()).size(), 2U);
    file.commit();
    EXPECT_EQ(read_text_file(path, 100), "new content");
    expect_contains(error_of([&] { file.write("x"); }), "write after commit");
    expect_contains(error_of([&] { file.commit(); }), "commit twice");
  }
  EXPECT_EQ(entries(dir.path()), std::vector<std::string>{"out"});
}

TEST(AtomicFile, WithoutCommitNothingChanges) {
  const testing::TempDir dir;
  const fs::path path = dir.file("out", "old");
  {
    AtomicFile one(path);
    AtomicFile two(path);  // a second writer takes another temporary name
    one.write("one");
    two.write("two");
  }
  EXPECT_EQ(read_text_file(path, 100), "old");
  EXPECT_EQ(entries(dir.path()), std::vector<std::string>{"out"});
}

TEST(AtomicFile, NamesTheFinalPathInErrors) {
  const testing::TempDir dir;
  expect_contains(error_of([&] { AtomicFile file(dir.path() / "no" / "out"); }),
                  "out: cannot create: No such file or directory");
  fs::create_directories(dir.path() / "taken" / "inside");
  expect_contains(error_of([&] { write_file_atomically(dir.path() / "taken", "x"); }),
                  "taken: cannot rename into place");
  EXPECT_EQ(entries(dir.path()), std::vector<std::string>{"taken"}) << "the temporary must go";
}

// /dev/full refuses every write as a full disk does; reached through the temporary name.
TEST(AtomicFile, AFullDiskIsAnErrorAndLeavesNothing) {
  const testing::TempDir dir;
  const fs::path path = dir.path() / "out";
  AtomicFile file(path);
  std::string temporary;
  for (const std::string& name : entries(dir.path())) temporary = name;
  ASSERT_NE(temporary.find("out.partial-"), std::string::npos);
  // Point the descriptor that the writer holds at the full device.
  int descriptor = -1;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code ignored;
    if (fs::read_symlink(entry.path(), ignored) == dir.path() / temporary) {
      descriptor = std::stoi(entry.path().filename().string());
    }
  }
  ASSERT_GE(descriptor, 0);
  std::FILE* full = std::fopen("/dev/full", "w");
  ASSERT_NE(full, nullptr);
  ASSERT_GE(::dup2(fileno(full), descriptor), 0);
  std::fclose(full);
  expect_contains(error_of([&] { file.write("data"); }),
                  "out: cannot write: No space left on device");
}

}  // namespace
}  // namespace engine
