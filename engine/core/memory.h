// Where memory comes from: raw memories, the ledger that counts them, owning buffers, arenas.
//
// Every large allocation of the engine, host or device, is one of `Buffer` and `Arena`, so the
// ledger's peaks are the engine's footprint. An arena built by `Arena::measuring` allocates nothing
// and only counts: running the same layout code on it gives the plan, and the real arena, reserved
// from that plan, must end with the same peak.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "engine/core/view.h"

namespace engine {

enum class MemTag : std::uint8_t {
  weights,
  kv,
  activations,
  hidden_stream,
  stats,
  solver,
  optimizer,
  staging,
  workspace
};
inline constexpr std::size_t mem_tag_count = 9;
[[nodiscard]] const char* mem_tag_name(MemTag tag);

// One pool of bytes: host, pinned host, or a GPU. Implemented per backend.
class RawMemory {
 public:
  virtual ~RawMemory() = default;
  [[nodiscard]] virtual std::string name() const = 0;  // "cpu", "pinned", "cuda:0"
  [[nodiscard]] virtual DeviceKind kind() const = 0;
  // At least 256-byte aligned. Returns null when there is not enough; never throws for that.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* data, std::size_t bytes) noexcept = 0;
  // Sets bytes to a value; used to poison.
  virtual void fill(void* data, int byte, std::size_t bytes) = 0;
};

// The host's memory. Allocation failure includes the case of more than the machine could ever hold.
RawMemory& host_memory();

using TagBytes = std::array<std::int64_t, mem_tag_count>;

// Live and peak bytes per memory and tag. Thread-safe.
class Ledger {
 public:
  struct Entry {
    TagBytes live{};
    TagBytes peak{};  // each tag's own maximum
    std::int64_t live_total = 0;
    std::int64_t peak_total = 0;  // maximum of the sum, at one moment
    std::int64_t reserved = 0;    // bytes taken from the memory (arenas reserve ahead)
    std::int64_t peak_reserved = 0;
  };
  void add(const std::string& memory, MemTag tag, std::int64_t bytes);  // negative: given back
  void reserve(const std::string& memory, std::int64_t bytes);          // negative: given back
  [[nodiscard]] Entry entry(const std::string& memory) const;
  [[nodiscard]] std::map<std::string, Entry> entries() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

// Move-only owner of one matrix.
class Buffer {
 public:
  Buffer() = default;
  // Throws Error(out_of_memory) naming the memory, the tag, the bytes asked and the bytes live.
  Buffer(RawMemory& memory, Ledger& ledger, MemTag tag, DType dtype, std::int64_t rows,
         std::int64_t cols);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  [[nodiscard]] const View& view() const { return view_; }
  [[nodiscard]] bool empty() const { return view_.data == nullptr; }

 private:
  void swap(Buffer& other) noexcept;
  RawMemory* memory_ = nullptr;
  Ledger* ledger_ = nullptr;
  MemTag tag_ = MemTag::workspace;
  std::size_t bytes_ = 0;
  View view_;
};

// A bump allocator over one reservation, with scopes that give back in stack order.
class Arena {
 public:
  // Counts only; views have null data and `kind`.
  static Arena measuring(DeviceKind kind);
  // Reserves `capacity` bytes at once. With `poison`, memory is filled with 0xFF (NaN in every
  // float type) when handed out, so that a read of something never written shows.
  Arena(RawMemory& memory, Ledger& ledger, std::int64_t capacity, bool poison = false);
  Arena(Arena&& other) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Throws Error(out_of_memory) when the reservation is exceeded.
  View make(MemTag tag, DType dtype, std::int64_t rows, std::int64_t cols);

  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), mark_(arena.blocks_.size()) {}
    ~Scope() { arena_.rewind(mark_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    std::size_t mark_;
  };

  [[nodiscard]] bool is_measuring() const { return memory_ == nullptr; }
  [[nodiscard]] std::int64_t capacity() const { return capacity_; }
  [[nodiscard]] std::int64_t peak() const { return peak_; }
  [[nodiscard]] const TagBytes& tag_peaks() const { return tag_peak_; }

 private:
  explicit Arena(DeviceKind kind) : kind_(kind) {}
  void rewind(std::size_t mark);

  struct Block {
    MemTag tag;
    std::int64_t begin;
    std::int64_t bytes;
  };
  RawMemory* memory_ = nullptr;
  Ledger* ledger_ = nullptr;
  DeviceKind kind_ = DeviceKind::cpu;
  std::byte* base_ = nullptr;
  std::int64_t capacity_ = 0;
  std::int64_t used_ = 0;
  std::int64_t peak_ = 0;
  TagBytes tag_live_{};
  TagBytes tag_peak_{};
  bool poison_ = false;
  std::vector<Block> blocks_;
};

// "1.50 GiB"-like text for messages and tables.
[[nodiscard]] std::string human_bytes(std::int64_t bytes);

}  // namespace engine
