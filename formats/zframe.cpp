#include "formats/zframe.h"

#include <xxhash.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "formats/error.h"
#include "formats/zframe_workers.h"

namespace engine {
namespace {

// A chunk is compressed if that saves at least the 50th part of it.
constexpr std::size_t least_saving = 50;

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

// The failure of the lowest index, so that an error does not depend on timing.
class FirstFailure {
 public:
  // In a catch block.
  void note(std::size_t index) {
    const std::lock_guard lock(mutex_);
    if (!error_ || index < index_) {
      index_ = index;
      error_ = std::current_exception();
    }
    failed_ = true;
  }
  [[nodiscard]] bool failed() const { return failed_; }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> failed_{false};
  std::size_t index_ = 0;
  std::exception_ptr error_;
};

// Runs work(worker, index) for every index below `count`, each once; rethrows the first failure.
template <class Work>
void for_each_index(Workers& pool, std::size_t count, unsigned threads, Work&& work) {
  const auto workers = static_cast<unsigned>(std::min<std::size_t>(threads, count));
  std::atomic<std::size_t> next{0};
  FirstFailure failure;
  pool.run(workers, [&](unsigned worker) {
    // Indices are handed out in order: every index below a failing one has been started and
    // completes, hence the lowest failure is always seen.
    while (!failure.failed()) {
      const std::size_t i = next.fetch_add(1);
      if (i >= count) return;
      try {
        work(worker, i);
      } catch (...) {
        failure.note(i);
      }
    }
  });
  failure.rethrow();
}

// Bytes that keep their memory from one use to the next; not initialized.
class Scratch {
 public:
  std::span<std::byte> take(std::size_t size) {
    if (size > capacity_) {
      bytes_.reset();
      bytes_ = std::make_unique_for_overwrite<std::byte[]>(size);
      capacity_ = size;
    }
    return {bytes_.get(), size};
  }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t capacity_ = 0;
};

void check_zstd(std::size_t code, const char* action) {
  if (ZSTD_isError(code) == 0) return;
  throw Error(ErrorCode::internal,
              std::string("zstd cannot ") + action + ": " + ZSTD_getErrorName(code));
}

// One chunk on its way to the file.
struct Compressed {
  Scratch frame;
  ChunkRecord record;
  bool ready = false;
};

void compress_one(std::span<const std::byte> raw, int level, Compressed& out) {
  // A new context per chunk: the frame is then a function of these bytes and the parameters only,
  // whatever the thread compressed before.
  const std::unique_ptr<ZSTD_CCtx, FreeCompressor> context(ZSTD_createCCtx());
  if (!context) throw std::bad_alloc();
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, level), "set a level");
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_contentSizeFlag, 1), "set a flag");
  check_zstd(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 0), "set a flag");

  const std::span<std::byte> frame = out.frame.take(ZSTD_compressBound(raw.size()));
  const std::size_t bytes =
      ZSTD_compress2(context.get(), frame.data(), frame.size(), raw.data(), raw.size());
  check_zstd(bytes, "compress a chunk");

  ChunkRecord& record = out.record;
  record.raw_bytes = static_cast<std::uint32_t>(raw.size());
  record.raw_xxh3 = xxh3(raw);
  // Decoding costs time each time the file is read, so a frame has to be worth it.
  if (bytes < raw.size() - raw.size() / least_saving) {
    record.flags = 0;
    record.stored_bytes = static_cast<std::uint32_t>(bytes);
    record.stored_xxh3 = xxh3(frame.first(bytes));
  } else {
    record.flags = chunk_is_raw;
    record.stored_bytes = record.raw_bytes;
    record.stored_xxh3 = record.raw_xxh3;
  }
}

std::string hex(std::uint64_t value) {
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4U) text[i] = "0123456789abcdef"[value & 15U];
  return text;
}

// What a thread keeps from one chunk to the next.
struct DecodeScratch {
  std::unique_ptr<ZSTD_DCtx, FreeDecompressor> context;
  Scratch stored;
  Scratch raw;
};

// Decodes single chunks of one plane.
class ChunkDecoder {
 public:
  ChunkDecoder(const PayloadName& name, const FetchBytes& fetch, DecodeScratch& scratch)
      : name_(name), fetch_(fetch), scratch_(scratch) {}

  // `dst` has record.raw_bytes bytes.
  void decode(std::size_t index, const ChunkRecord& record, std::span<std::byte> dst) {
    if (record.flags == chunk_is_raw) {
      fetch_(record.offset, dst);
      expect_hash(index, record, "raw bytes", record.raw_xxh3, xxh3(dst));
      return;
    }
    const std::span<std::byte> stored = scratch_.stored.take(record.stored_bytes);
    fetch_(record.offset, stored);
    expect_hash(index, record, "stored bytes", record.stored_xxh3, xxh3(stored));
    expect_frame(index, record, stored);
    auto& context = scratch_.context;
    if (!context) context.reset(ZSTD_createDCtx());
    if (!context) throw std::bad_alloc();
    const std::size_t bytes =
        ZSTD_decompressDCtx(context.get(), dst.data(), dst.size(), stored.data(), stored.size());
    if (ZSTD_isError(bytes) != 0) fail(index, record, "a zstd frame", ZSTD_getErrorName(bytes));
    if (bytes != dst.size()) {
      fail(index, record, std::to_string(dst.size()) + " decoded bytes", std::to_string(bytes));
    }
    expect_hash(index, record, "raw bytes", record.raw_xxh3, xxh3(dst));
  }

  // The same into a buffer of its own.
  void verify(std::size_t index, const ChunkRecord& record) {
    decode(index, record, scratch_.raw.take(record.raw_bytes));
  }

 private:
  [[noreturn]] void fail(std::size_t index, const ChunkRecord& record, const std::string& expected,
                         const std::string& found) const {
    throw FormatError(name_.file,
                      "plane '" + name_.plane + "', chunk " + std::to_string(index) +
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
  void expect_frame(std::size_t index, const ChunkRecord& record,
                    std::span<const std::byte> stored) const {
    std::uint32_t magic = 0;
    if (stored.size() >= sizeof magic) std::memcpy(&magic, stored.data(), sizeof magic);
    if (magic != ZSTD_MAGICNUMBER) fail(index, record, "a zstd frame", "other bytes");
    const unsigned long long content = ZSTD_getFrameContentSize(stored.data(), stored.size());
    if (content == ZSTD_CONTENTSIZE_UNKNOWN || content == ZSTD_CONTENTSIZE_ERROR) {
      fail(index, record, "a zstd frame that states its content size", "none");
    }
    if (content != record.raw_bytes) {
      fail(index, record, "a zstd frame of " + std::to_string(record.raw_bytes) + " bytes",
           std::to_string(content));
    }
    const std::size_t length = ZSTD_findFrameCompressedSize(stored.data(), stored.size());
    if (ZSTD_isError(length) != 0) fail(index, record, "a zstd frame", ZSTD_getErrorName(length));
    if (length != stored.size()) {
      fail(index, record, "one zstd frame of " + std::to_string(stored.size()) + " stored bytes",
           std::to_string(length));
    }
  }

  const PayloadName& name_;
  const FetchBytes& fetch_;
  DecodeScratch& scratch_;
};

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

struct ChunkCodec::State {
  std::mutex turn;  // whoever holds it may use the rest
  Workers workers;
  std::vector<DecodeScratch> decoders;
  std::vector<Compressed> frames;

  // Calls work(decoder, index) for every chunk.
  template <class Work>
  void decode_each(const PayloadName& name, std::size_t chunks, const FetchBytes& fetch,
                   unsigned threads, Work&& work) {
    require_threads(threads);
    const std::unique_lock mine(turn, std::try_to_lock);
    if (!mine) {  // another call has the threads: this one does without
      DecodeScratch scratch;
      ChunkDecoder decoder(name, fetch, scratch);
      for (std::size_t i = 0; i < chunks; ++i) work(decoder, i);
      return;
    }
    decoders.resize(std::max(decoders.size(), std::min<std::size_t>(threads, chunks)));
    for_each_index(workers, chunks, threads, [&](unsigned worker, std::size_t i) {
      ChunkDecoder decoder(name, fetch, decoders[worker]);
      work(decoder, i);
    });
  }
};

ChunkCodec::ChunkCodec() : state_(std::make_unique<State>()) {}
ChunkCodec::~ChunkCodec() = default;
ChunkCodec::ChunkCodec(ChunkCodec&&) noexcept = default;
ChunkCodec& ChunkCodec::operator=(ChunkCodec&&) noexcept = default;

std::vector<ChunkRecord> ChunkCodec::compress(std::span<const std::byte> raw,
                                              const CompressOptions& options,
                                              std::uint64_t file_offset, const StoreBytes& store) {
  check_compress_options(options);
  const std::size_t chunk_bytes = options.chunk_bytes;
  const std::size_t count = raw.size() / chunk_bytes + (raw.size() % chunk_bytes != 0 ? 1 : 0);
  const auto chunk = [&](std::size_t i) {
    return raw.subspan(i * chunk_bytes, std::min(chunk_bytes, raw.size() - i * chunk_bytes));
  };
  const std::lock_guard mine(state_->turn);

  // Chunks are compressed by all threads, a bounded number of them ahead of the one that this
  // thread stores next. It compresses, too, while that one is not ready.
  const std::size_t window = std::min<std::size_t>(count, std::size_t{2} * options.threads);
  auto& slots = state_->frames;
  if (slots.size() < window) slots.resize(window);
  for (Compressed& slot : slots) slot.ready = false;
  std::vector<ChunkRecord> records;
  records.reserve(count);
  std::mutex mutex;  // guards what follows and the slots' `ready`
  std::condition_variable changed;
  std::size_t next = 0, stored = 0;
  bool stop = false;
  FirstFailure failure;

  const auto may_start = [&] { return next < count && next < stored + window; };
  const auto compress_next = [&](std::unique_lock<std::mutex>& lock) {
    const std::size_t i = next++;
    Compressed& slot = slots[i % window];
    lock.unlock();
    try {
      compress_one(chunk(i), options.level, slot);
    } catch (...) {
      failure.note(i);
    }
    lock.lock();
    slot.ready = true;
    if (failure.failed()) stop = true;
    changed.notify_all();
  };
  const auto store_in_order = [&](std::unique_lock<std::mutex>& lock) {
    while (stored < count && !stop) {
      Compressed& slot = slots[stored % window];
      if (!slot.ready) {
        if (may_start()) {
          compress_next(lock);
        } else {
          changed.wait(lock);
        }
        continue;
      }
      lock.unlock();
      slot.record.offset = file_offset;
      file_offset += slot.record.stored_bytes;
      store(slot.record.flags == chunk_is_raw ? chunk(records.size())
                                              : slot.frame.take(slot.record.stored_bytes));
      records.push_back(slot.record);
      lock.lock();
      slot.ready = false;
      ++stored;
      changed.notify_all();
    }
  };
  const auto threads = static_cast<unsigned>(std::min<std::size_t>(options.threads, count));
  state_->workers.run(threads, [&](unsigned worker) {
    std::unique_lock lock(mutex);
    if (worker == 0) {
      try {
        store_in_order(lock);
      } catch (...) {
        failure.note(records.size());
      }
      if (!lock.owns_lock()) lock.lock();
      stop = true;
      changed.notify_all();
      return;
    }
    while (true) {
      changed.wait(lock, [&] { return stop || next == count || may_start(); });
      if (stop || next == count) return;
      compress_next(lock);
    }
  });
  failure.rethrow();
  return records;
}

void ChunkCodec::decode(const PayloadName& name, std::span<const ChunkRecord> chunks,
                        const FetchBytes& fetch, std::span<std::byte> dst, unsigned threads) const {
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
  state_->decode_each(name, chunks.size(), fetch, threads,
                      [&](ChunkDecoder& decoder, std::size_t i) {
                        decoder.decode(i, chunks[i], dst.subspan(starts[i], chunks[i].raw_bytes));
                      });
}

void ChunkCodec::verify(const PayloadName& name, std::span<const ChunkRecord> chunks,
                        const FetchBytes& fetch, unsigned threads) const {
  state_->decode_each(name, chunks.size(), fetch, threads,
                      [&](ChunkDecoder& decoder, std::size_t i) { decoder.verify(i, chunks[i]); });
}

std::vector<ChunkRecord> compress_chunks(std::span<const std::byte> raw,
                                         const CompressOptions& options, std::uint64_t file_offset,
                                         const StoreBytes& store) {
  return ChunkCodec().compress(raw, options, file_offset, store);
}

void decode_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, std::span<std::byte> dst, unsigned threads) {
  ChunkCodec().decode(name, chunks, fetch, dst, threads);
}

void verify_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, unsigned threads) {
  ChunkCodec().verify(name, chunks, fetch, threads);
}

}  // namespace engine
