// A payload as a sequence of independently compressed and checksummed chunks.
//
// The payload is cut every `chunk_bytes`; each chunk becomes one zstd frame (RFC 8878), or is
// stored as it is where compression saves less than 2 %. Chunks are independent, so they compress
// and decode in parallel and the result does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace engine {

inline constexpr std::uint32_t default_chunk_bytes = 1U << 20U;
inline constexpr std::uint32_t min_chunk_bytes = 64;
inline constexpr std::uint32_t max_chunk_bytes = 64U << 20U;

// ChunkRecord::flags: the stored bytes are the raw bytes.
inline constexpr std::uint32_t chunk_is_raw = 1;

// A compressed zstd block holds at most 128 KiB and takes at least 4 bytes, so no frame expands
// beyond this factor (RFC 8878, section 3.1.1.2).
inline constexpr std::uint64_t max_expansion = 32768;

struct ChunkRecord {
  std::uint64_t offset = 0;  // of the first stored byte, in the file
  std::uint32_t stored_bytes = 0;
  std::uint32_t raw_bytes = 0;
  std::uint32_t flags = 0;        // chunk_is_raw or 0
  std::uint64_t raw_xxh3 = 0;     // XXH3-64 (seed 0) of the raw bytes
  std::uint64_t stored_xxh3 = 0;  // and of the stored bytes: a frame has bits that decoding ignores

  bool operator==(const ChunkRecord&) const = default;
};

struct CompressOptions {
  int level = 1;         // zstd's, 1 to ZSTD_maxCLevel()
  unsigned threads = 1;  // at least 1
  std::uint32_t chunk_bytes = default_chunk_bytes;
};

// Names of a payload for error messages.
struct PayloadName {
  std::string file;
  std::string plane;
};

// Receives stored bytes in file order, on the calling thread.
using StoreBytes = std::function<void(std::span<const std::byte>)>;

// Fills `dst` with the file's bytes from `offset` on, or throws. Called from several threads.
using FetchBytes = std::function<void(std::uint64_t offset, std::span<std::byte> dst)>;

// Error(usage) unless level, threads and chunk_bytes (a multiple of 64 between min_chunk_bytes and
// max_chunk_bytes) are in range.
void check_compress_options(const CompressOptions& options);

// XXH3-64 of bytes, seed 0.
std::uint64_t xxh3(std::span<const std::byte> bytes);

// Compresses and decodes chunks with threads and buffers that it keeps from call to call: one per
// file. The buffers are at most 2 * threads frames and, per thread, two chunks.
class ChunkCodec {
 public:
  ChunkCodec();
  ~ChunkCodec();
  ChunkCodec(ChunkCodec&&) noexcept;
  ChunkCodec& operator=(ChunkCodec&&) noexcept;
  ChunkCodec(const ChunkCodec&) = delete;
  ChunkCodec& operator=(const ChunkCodec&) = delete;

  // Compresses `raw` and hands the stored bytes to `store`, chunk by chunk, while later chunks are
  // being compressed; the first byte stands at `file_offset`. Whatever `store` throws passes
  // through.
  std::vector<ChunkRecord> compress(std::span<const std::byte> raw, const CompressOptions& options,
                                    std::uint64_t file_offset, const StoreBytes& store);

  // Decodes all chunks into `dst` (size = the sum of their raw sizes, else Error(mismatch)) with up
  // to `threads` threads. Verifies the hash of the stored bytes before, size and hash of the raw
  // bytes after decompression; FormatError names file, plane, chunk and offset. On an error `dst`
  // holds unspecified bytes. decode() and verify() may be called from several threads; of calls at
  // the same time only one uses more than its own thread.
  void decode(const PayloadName& name, std::span<const ChunkRecord> chunks, const FetchBytes& fetch,
              std::span<std::byte> dst, unsigned threads) const;

  // The checks of decode() without keeping the result.
  void verify(const PayloadName& name, std::span<const ChunkRecord> chunks, const FetchBytes& fetch,
              unsigned threads) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The members of the same names of a codec made for one call.
std::vector<ChunkRecord> compress_chunks(std::span<const std::byte> raw,
                                         const CompressOptions& options, std::uint64_t file_offset,
                                         const StoreBytes& store);
void decode_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, std::span<std::byte> dst, unsigned threads);
void verify_chunks(const PayloadName& name, std::span<const ChunkRecord> chunks,
                   const FetchBytes& fetch, unsigned threads);

}  // namespace engine
