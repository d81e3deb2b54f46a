// Chunked frames: round trips, independence of thread counts, refusal of damaged chunks.
#include "formats/zframe.h"

#include <gtest/gtest.h>
#include <zstd.h>

#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "formats/error.h"

namespace engine {
namespace {

using Bytes = std::vector<std::byte>;

// A payload whose stretches alternate between constant, patterned and random.
Bytes mixed_payload(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t kind = i / 300 % 3;
    const auto value = kind == 0 ? 7U : kind == 1 ? static_cast<unsigned>(i % 11) : random() & 255U;
    bytes[i] = static_cast<std::byte>(value);
  }
  return bytes;
}

struct Stored {
  Bytes file;  // `before` filler bytes, then the stored bytes
  std::vector<ChunkRecord> chunks;

  void fetch(std::uint64_t offset, std::span<std::byte> dst) const {
    if (offset > file.size() || dst.size() > file.size() - offset) {
      throw FormatError("f", "end", "more bytes", "none");
    }
    if (!dst.empty()) std::memcpy(dst.data(), file.data() + offset, dst.size());
  }
  [[nodiscard]] FetchBytes fetcher() const {
    return [this](std::uint64_t offset, std::span<std::byte> dst) { fetch(offset, dst); };
  }
};

Stored compress(const Bytes& raw, const CompressOptions& options, std::size_t before = 64) {
  Stored stored;
  stored.file.resize(before);
  stored.chunks =
      compress_chunks(raw, options, before, [&stored](std::span<const std::byte> bytes) {
        stored.file.insert(stored.file.end(), bytes.begin(), bytes.end());
      });
  return stored;
}

const PayloadName name{"file.qw", "codes"};

std::string decode_error(const Stored& stored, std::size_t raw_bytes) {
  Bytes back(raw_bytes);
  try {
    decode_chunks(name, stored.chunks, stored.fetcher(), back, 2);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(ZFrame, RoundTripsOddLengths) {
  for (const std::size_t size : {0U, 1U, 63U, 64U, 65U, 127U, 128U, 1000U, 4096U, 10001U}) {
    const Bytes raw = mixed_payload(size, static_cast<unsigned>(size));
    for (const std::uint32_t chunk_bytes : {64U, 128U, 4096U}) {
      const Stored stored = compress(raw, {.level = 1, .threads = 2, .chunk_bytes = chunk_bytes});
      ASSERT_EQ(stored.chunks.size(), (size + chunk_bytes - 1) / chunk_bytes);
      for (const unsigned threads : {1U, 3U}) {
        Bytes back(size, std::byte{0xEE});
        decode_chunks(name, stored.chunks, stored.fetcher(), back, threads);
        ASSERT_EQ(back, raw) << size << " bytes in chunks of " << chunk_bytes;
      }
      EXPECT_NO_THROW(verify_chunks(name, stored.chunks, stored.fetcher(), 2));
    }
  }
}

TEST(ZFrame, BytesDoNotDependOnThreads) {
  const Bytes raw = mixed_payload(100000, 1);
  const Stored one = compress(raw, {.level = 3, .threads = 1, .chunk_bytes = 4096});
  for (const unsigned threads : {2U, 5U, 64U}) {
    const Stored many = compress(raw, {.level = 3, .threads = threads, .chunk_bytes = 4096});
    EXPECT_EQ(many.file, one.file) << threads;
    EXPECT_EQ(many.chunks, one.chunks) << threads;
  }
}

TEST(ZFrame, StoresWhatDoesNotShrink) {
  std::mt19937 random(3);
  Bytes raw(512);
  for (std::size_t i = 0; i < 256; ++i) raw[i] = static_cast<std::byte>(random() & 255U);
  const Stored stored = compress(raw, {.level = 1, .threads = 1, .chunk_bytes = 256});
  ASSERT_EQ(stored.chunks.size(), 2U);
  EXPECT_EQ(stored.chunks[0].flags, chunk_is_raw);
  EXPECT_EQ(stored.chunks[0].stored_bytes, 256U);
  EXPECT_EQ(stored.chunks[0].raw_xxh3, stored.chunks[0].stored_xxh3);
  EXPECT_EQ(stored.chunks[1].flags, 0U);
  EXPECT_LT(stored.chunks[1].stored_bytes, 64U);
  EXPECT_EQ(stored.chunks[1].offset, 64U + 256U);
}

TEST(ZFrame, AFrameSavesTwoPercentOrIsNotMade) {
  // Random but for a constant tail: what a frame saves is about the tail.
  const auto payload = [](std::size_t constant) {
    std::mt19937 random(4);
    Bytes raw(64000);
    for (std::size_t i = 0; i + constant < raw.size(); ++i) {
      raw[i] = static_cast<std::byte>(random() & 255U);
    }
    return raw;
  };
  const CompressOptions options{.chunk_bytes = 64000};
  EXPECT_EQ(compress(payload(1000), options).chunks.at(0).flags, chunk_is_raw);
  const Stored worth_it = compress(payload(2000), options);
  EXPECT_EQ(worth_it.chunks.at(0).flags, 0U);
  EXPECT_LT(worth_it.chunks.at(0).stored_bytes, 62720U);
}

TEST(ZFrame, ACodecKeepsNothingOfEarlierPayloads) {
  ChunkCodec codec;
  for (const std::size_t size : {100000U, 0U, 700U, 64U, 50000U, 100001U}) {
    for (const unsigned threads : {4U, 1U, 9U}) {
      const CompressOptions options{.level = 1, .threads = threads, .chunk_bytes = 1024};
      const Bytes raw = mixed_payload(size, static_cast<unsigned>(size));
      const Stored fresh = compress(raw, options);
      Stored stored;
      stored.file.resize(64);
      stored.chunks = codec.compress(raw, options, 64, [&](std::span<const std::byte> bytes) {
        stored.file.insert(stored.file.end(), bytes.begin(), bytes.end());
      });
      EXPECT_EQ(stored.file, fresh.file);
      EXPECT_EQ(stored.chunks, fresh.chunks);
      Bytes back(size, std::byte{0xEE});
      codec.decode(name, stored.chunks, stored.fetcher(), back, threads);
      EXPECT_EQ(back, raw);
      EXPECT_NO_THROW(codec.verify(name, stored.chunks, stored.fetcher(), threads));
    }
  }
}

TEST(ZFrame, FramesStateTheirContentSize) {
  const Bytes raw(5000);
  const Stored stored = compress(raw, {.level = 1, .threads = 1, .chunk_bytes = 4096});
  ASSERT_EQ(stored.chunks.size(), 2U);
  for (const ChunkRecord& chunk : stored.chunks) {
    EXPECT_EQ(ZSTD_getFrameContentSize(stored.file.data() + chunk.offset, chunk.stored_bytes),
              chunk.raw_bytes);
  }
}

TEST(ZFrame, EveryFlippedBitOfStoredBytesIsAnError) {
  const Bytes raw = mixed_payload(1500, 9);
  const Stored good = compress(raw, {.level = 1, .threads = 1, .chunk_bytes = 512}, 0);
  for (std::size_t bit = 0; bit < good.file.size() * 8; ++bit) {
    Stored bad = good;
    bad.file[bit / 8] ^= std::byte{1} << (bit % 8);
    Bytes back(raw.size());
    ASSERT_THROW(decode_chunks(name, bad.chunks, bad.fetcher(), back, 1), FormatError) << bit;
    ASSERT_THROW(verify_chunks(name, bad.chunks, bad.fetcher(), 1), FormatError) << bit;
  }
}

TEST(ZFrame, ErrorsNameFilePlaneChunkAndOffset) {
  const Bytes raw = mixed_payload(1500, 9);
  Stored bad = compress(raw, {.level = 1, .threads = 1, .chunk_bytes = 512});
  const ChunkRecord& last = bad.chunks.at(2);
  bad.file.at(last.offset + 3) ^= std::byte{4};
  const std::string message = decode_error(bad, raw.size());
  const std::string place =
      "file.qw: plane 'codes', chunk 2 at offset " + std::to_string(last.offset) + ": expected ";
  EXPECT_EQ(message.rfind(place, 0), 0U) << message;
}

TEST(ZFrame, ReportsTheFirstOfSeveralErrors) {
  const Bytes raw = mixed_payload(64 * 200, 2);
  Stored bad = compress(raw, {.level = 1, .threads = 1, .chunk_bytes = 64});
  for (std::size_t i = 20; i < 200; ++i) bad.chunks[i].raw_xxh3 ^= 1U;
  for (int repeat = 0; repeat < 20; ++repeat) {
    Bytes back(raw.size());
    try {
      decode_chunks(name, bad.chunks, bad.fetcher(), back, 4);
      FAIL() << "decoded damaged chunks";
    } catch (const FormatError& error) {
      EXPECT_NE(std::string(error.what()).find("chunk 20 at"), std::string::npos) << error.what();
    }
  }
}

// A chunk whose stored bytes match their hash but are not the frame the record promises.
struct ForgedChunk {
  const char* what;
  std::function<Bytes(const Bytes& raw)> forge;
  const char* message;
};

Bytes frame_of(std::span<const std::byte> raw, bool content_size = true) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, content_size ? 1 : 0);
  Bytes out(ZSTD_compressBound(raw.size()));
  out.resize(ZSTD_compress2(context, out.data(), out.size(), raw.data(), raw.size()));
  ZSTD_freeCCtx(context);
  return out;
}

TEST(ZFrame, RefusesForgedChunks) {
  const Bytes raw(4096, std::byte{5});
  const ForgedChunk cases[] = {
      {"no frame", [](const Bytes&) { return Bytes(20, std::byte{1}); },
       "expected a zstd frame, found other bytes"},
      {"too short for a frame", [](const Bytes&) { return Bytes(2); },
       "expected a zstd frame, found other bytes"},
      {"a frame of fewer bytes", [](const Bytes& r) { return frame_of(std::span(r).first(4000)); },
       "expected a zstd frame of 4096 bytes, found 4000"},
      {"a frame without content size", [](const Bytes& r) { return frame_of(r, false); },
       "expected a zstd frame that states its content size, found none"},
      {"two frames",
       [](const Bytes& r) {
         Bytes two = frame_of(r);
         const Bytes more = frame_of({});
         two.insert(two.end(), more.begin(), more.end());
         return two;
       },
       "expected one zstd frame of"},
      {"a frame cut short",
       [](const Bytes& r) {
         Bytes cut = frame_of(r);
         cut.resize(cut.size() - 2);
         return cut;
       },
       "expected a zstd frame, found "},
      {"a frame of other bytes", [](const Bytes& r) { return frame_of(Bytes(r.size())); },
       "expected raw bytes with XXH3"},
  };
  for (const ForgedChunk& test : cases) {
    Stored bad;
    bad.file = test.forge(raw);
    ChunkRecord record;
    record.stored_bytes = static_cast<std::uint32_t>(bad.file.size());
    record.raw_bytes = 4096;
    record.raw_xxh3 = xxh3(raw);
    record.stored_xxh3 = xxh3(bad.file);
    bad.chunks = {record};
    const std::string message = decode_error(bad, raw.size());
    EXPECT_NE(message.find(test.message), std::string::npos) << test.what << ": " << message;
  }
}

TEST(ZFrame, RefusesOptionsOutOfRange) {
  const Bytes raw(10);
  const CompressOptions bad[] = {
      {.level = 0},        {.level = 1000},      {.threads = 0},
      {.chunk_bytes = 0},  {.chunk_bytes = 100}, {.chunk_bytes = max_chunk_bytes + 64},
      {.chunk_bytes = 32},
  };
  for (const CompressOptions& options : bad) EXPECT_THROW(compress(raw, options), Error);
  const Stored good = compress(raw, {});
  Bytes small(9);
  EXPECT_THROW(decode_chunks(name, good.chunks, good.fetcher(), small, 1), Error);
  Bytes back(10);
  EXPECT_THROW(decode_chunks(name, good.chunks, good.fetcher(), back, 0), Error);
  EXPECT_NO_THROW(decode_chunks(name, good.chunks, good.fetcher(), back, 1));
}

TEST(ZFrame, PassesOnWhatTheStoreThrows) {
  const Bytes raw = mixed_payload(1000, 4);
  const auto store = [](std::span<const std::byte>) { throw IoError("x.qw", "cannot write", 28); };
  for (const unsigned threads : {1U, 4U}) {
    EXPECT_THROW(compress_chunks(raw, {.threads = threads, .chunk_bytes = 64}, 0, store), IoError);
  }
  // Also in the middle, with chunks behind it under way; the codec can be used again.
  ChunkCodec codec;
  const CompressOptions options{.threads = 4, .chunk_bytes = 64};
  std::size_t stored = 0;
  const auto fails_once = [&](std::span<const std::byte>) {
    if (++stored == 7) throw IoError("x.qw", "cannot write", 28);
  };
  EXPECT_THROW(codec.compress(raw, options, 0, fails_once), IoError);
  EXPECT_EQ(codec.compress(raw, options, 0, fails_once).size(), 16U);
}

}  // namespace
}  // namespace engine
