#include "formats/zframe.h"

#include <xxhash.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>

#include "formats/error.h"

namespace engine {
namespace {

struct FreeCompressor {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
};
struct FreeDecompressor {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

void require_threads(unsigned threads) {
  if (threads == 0) {
    throw Error(ErrorCode::usage, "packed planes: expected at least 1 thread, found 0");
  }
}

// Runs work(worker, index) for every index below `count`, each once. Of several exceptions the
// one with the lowest index is rethrown, so that an error does not depend on timing.
template <class Work>
void for_each_index(std::size_t count, unsigned threads, Work&& work) {
  const std::size_t workers = std::min<std::size_t>(threads, count);
  if (workers <= 1) {
    for (std::size_t i = 0; i < count; ++i) work(std::size_t{0}, i);
    return;
  }
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  std::vector<std::exception_ptr> errors(count);
  const auto run = [&](std::size_t worker) {
    // Indices are handed out in order: every index below a failing one has been started and
    // completes, hence the lowest failure is always seen.
    while (!failed) {
      const std::size_t i = next.fetch_add(1);
      if (i >= count) return;
      try {
        work(worker, i);
      } catch (...) {
        errors[i] = std::current_exception();
        failed = true;
      }
    }
  };
  {
    std::vector<std::jthread> pool;
    pool.reserve(workers - 1);
    for (std::size_t worker = 1; worker < workers; ++worker) pool.emplace_back(run, worker);
    run(0);
  }
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

void check_zstd(std::size_t code, const char* action) {
  if (ZSTD_isError(code) == 0) return;
  throw Error(ErrorCode::internal,
              std::string("zstd cannot ") + action + ": " + ZSTD_getErrorName(code));
}

// One chunk as it goes to the file: `frame` is empty if the raw bytes are stored.
struct Compressed {
  std::vector<std::byte> frame;
  ChunkRecord record;
};

void compress_one(std::span<const std::byte> raw, int level, Compressed& out) {
  // A new context per chunk: the frame is then a function of these bytes and the parameters only,
  // whatever the thread compressed before.
  const std::unique_ptr<ZSTD_CCtx, FreeCompressor> context(ZSTD_createCCtx());
  if (!context) throw std::bad_alloc();
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, level), "set a level");
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_contentSizeFlag, 1), "set a flag");
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 0), "set a flag");

  out.frame.resize(ZSTD_compressBound(raw.size()));
  const std::size_t bytes =
      ZSTD_compress2(context.get(), out.frame.data(), out.frame.size(), raw.data(), raw.size());
  check_zstd(bytes, "compress a chunk");
  out.frame.resize(bytes < raw.size() ? bytes : 0);

  ChunkRecord& record = out.record;
  record.raw_bytes = static_cast<std::uint32_t>(raw.size());
  record.raw_xxh3 = xxh3(raw);
  if (out.frame.empty()) {
    record.flags = chunk_is_raw;
    record.stored_bytes = record.raw_bytes;
    record.stored_xxh3 = record.raw_xxh3;
  } else {
    record.flags = 0;
    record.stored_bytes = static_cast<std::uint32_t>(bytes);
    record.stored_xxh3 = xxh3(out.frame);
  }
}

std::string hex(std::uint64_t value) {
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4U) text[i] = "0123456789abcdef"[value & 15U];
  return text;
}

// Decodes single chunks; one per thread, with its buffers.
class ChunkDecoder {
 public:
  ChunkDecoder(const PayloadName& name, const FetchBytes& fetch) : name_(&name), fetch_(&fetch) {}

  // `dst` has record.raw_bytes bytes.
  void decode(std::size_t index, const ChunkRecord& record, std::span<std::byte> dst) {
    if (record.flags == chunk_is_raw) {
      (*fetch_)(record.offset, dst);
      expect_hash(index, record, "raw bytes", record.raw_xxh3, xxh3(dst));
      return;
    }
    stored_.resize(record.stored_bytes);
    (*fetch_)(record.offset, stored_);
    expect_hash(index, record, "stored bytes", record.stored_xxh3, xxh3(stored_));
    expect_frame(index, record);
    if (!context_) context_.reset(ZSTD_createDCtx());
    if (!context_) throw std::bad_alloc();
    const std::size_t bytes =
        ZSTD_decompressDCtx(context_.get(), dst.data(), dst.size(), stored_.data(), stored_.size());
    if (ZSTD_isError(bytes) != 0) fail(index, record, "a zstd frame", ZSTD_getErrorName(bytes));
    if (bytes != dst.size()) {
      fail(index, record, std::to_string(dst.size()) + " decoded bytes", std::to_string(bytes));
    }
    expect_hash(index, record, "raw bytes", record.raw_xxh3, xxh3(dst));
  }

  // The same into a buffer of its own.
  void verify(std::size_t index, const ChunkRecord& record) {
    raw_.resize(record.raw_bytes);
    decode(index, record, raw_);
  }

 private:
  [[noreturn]] void fail(std::size_t index, const ChunkRecord& record, const std::string& expected,
                         const std::string& found) const {
    throw FormatError(name_->file,
                      "plane '" + name_->plane + "', chunk " + std::to_string(index) +
                          " at offset " + std::to_string(record.offset),
                      expected, found);
  }

  void expect_hash(std::size_t index, const ChunkRecord& record, const char* what,
                   std::uint64_t expected, std::uint64_t found) const {
    if (expected != found) {
      fail(index, record, std::string(what) + " with XXH3 " + hex(expected), hex(found));
    }
  }

  // The stored bytes must be one zstd frame that states the raw size: ZSTD_decompress alone would
  // also accept several frames, skippable frames and formats of old versions.
  void expect_frame(std::size_t index, const ChunkRecord& record) const {
    std::uint32_t magic = 0;
    if (stored_.size() >= sizeof magic) std::memcpy(&magic, stored_.data(), sizeof magic);
    if (magic != ZSTD_MAGICNUMBER) fail(index, record, "a zstd frame", "other bytes");
    const unsigned long long content = ZSTD_getFrameContentSize(stored_.data(), stored_.size());
    if (content == ZSTD_CONTENTSIZE_UNKNOWN || content == ZSTD_CONTENTSIZE_ERROR) {
      fail(index, record, "a zstd frame that states its content size", "none");
    }
    if (content != record.raw_bytes) {
      fail(index, record, "a zstd frame of " + std::to_string(record.raw_bytes) + " bytes",
           std::to_string(content));
    }
    const std::size_t length = ZSTD_findFrameCompressedSize(stored_.data(), stored_.size());
    if (ZSTD_isError(length) != 0) fail(index, record, "a zstd frame", ZSTD_getErrorName(length));
    if (length != stored_.size()) {
      fail(index, record, "one zstd frame of " + std::to_string(stored_.size()) + " stored bytes",
           std::to_string(length));
    }
  }

  const PayloadName* name_;
  const FetchBytes* fetch_;
  std::unique_ptr<ZSTD_DCtx, FreeDecompressor> context_;
  std::vector<std::byte> stored_;
  std::vector<std::byte> raw_;
};

std::vector<ChunkDecoder> decoders(const PayloadName& name, const FetchBytes& fetch,
                                   std::size_t chunks, unsigned threads) {
  std::vector<ChunkDecoder> all;
  const std::size_t count = std::min<std::size_t>(threads, chunks);
  all.reserve(count);
  for (std::size_t i = 0; i < count; ++i) all.emplace_back(name, fetch);
  return all;
}

}  // namespace

void check_compress_options(const CompressOptions& options) {
  if (options.level < 1 || options.level > ZSTD_maxCLevel()) {
    throw Error(ErrorCode::usage, "packed planes: expected a zstd level of 1 to " +
                                      std::to_string(ZSTD_maxCLevel()) + ", found " +
                                      std::to_string(options.level));
  }
  require_threads(options.threads);
  if (options.chunk_bytes < min_chunk_bytes || options.chunk_bytes > max_chunk_bytes ||
      options.chunk_bytes % 64 != 0) {
    throw Error(ErrorCode::usage,
                "packed planes: expected a chunk size of " + std::to_string(min_chunk_bytes) +
                    " to " + std::to_string(max_chunk_bytes) + " bytes, a multiple of 64, found " +
                    std::to_string(options.chunk_bytes));
  }
}

std::uint64_t xxh3(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::vector<ChunkRecord> compress_chunks(std::span<const std::byte> raw,
                                         const CompressOptions& options, std::uint64_t file_offset,
                                         const StoreBytes& store) {
  check_compress_options(options);
  const std::size_t chunk_bytes = options.chunk_bytes;
  const std::size_t count = raw.size() / chunk_bytes + (raw.size() % chunk_bytes != 0 ? 1 : 0);
  const auto chunk = [&](std::size_t i) {
    return raw.subspan(i * chunk_bytes, std::min(chunk_bytes, raw.size() - i * chunk_bytes));
  };

  std::vector<ChunkRecord> records;
  records.reserve(count);
  // A few chunks per thread and batch: bounded memory, and little waiting at the end of a batch.
  std::vector<Compressed> batch(std::min<std::size_t>(count, std::size_t{4} * options.threads));
  for (std::size_t first = 0; first < count; first += batch.size()) {
    const std::size_t now = std::min(batch.size(), count - first);
    for_each_index(now, options.threads, [&](std::size_t, std::size_t i) {
      compress_one(chunk(first + i), options.level, batch[i]);
    });
    for (std::size_t i = 0; i < now; ++i) {
      ChunkRecord& record = batch[i].record;
      record.offset = file_offset;
      file_offset += record.stored_bytes;
      store(record.flags == chunk_is_raw ? chunk(first + i)
                                         : std::span<const std::byte>(batch[i].frame));
      records.push_back(record);
    }
  }
  return records;
}

void decode_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, std::span<std::byte> dst, unsigned threads) {
  require_threads(threads);
  std::vector<std::size_t> starts;
  starts.reserve(chunks.size());
  std::size_t total = 0;
  for (const ChunkRecord& record : chunks) {
    starts.push_back(total);
    total += record.raw_bytes;
  }
  if (total != dst.size()) {
    throw Error(ErrorCode::mismatch, name.file + ": plane '" + name.plane +
                                         "': expected room for " + std::to_string(total) +
                                         " bytes, found " + std::to_string(dst.size()));
  }
  auto workers = decoders(name, fetch, chunks.size(), threads);
  for_each_index(chunks.size(), threads, [&](std::size_t worker, std::size_t i) {
    workers[worker].decode(i, chunks[i], dst.subspan(starts[i], chunks[i].raw_bytes));
  });
}

void verify_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, unsigned threads) {
  require_threads(threads);
  auto workers = decoders(name, fetch, chunks.size(), threads);
  for_each_index(chunks.size(), threads,
                 [&](std::size_t worker, std::size_t i) { workers[worker].verify(i, chunks[i]); });
}

}  // namespace engine
