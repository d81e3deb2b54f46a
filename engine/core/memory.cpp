#include "engine/core/memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace engine {
namespace {

constexpr std::int64_t alignment = 256;

std::int64_t round_up(std::int64_t bytes) {
  return (bytes + alignment - 1) / alignment * alignment;
}

class HostMemory final : public RawMemory {
 public:
  [[nodiscard]] std::string name() const override { return "cpu"; }
  [[nodiscard]] DeviceKind kind() const override { return DeviceKind::cpu; }
  void* allocate(std::size_t bytes) override {
    // Linux overcommits, so a request beyond all of memory would "succeed" and be killed later.
    const auto physical = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                          static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
    if (bytes > physical) return nullptr;
    return std::aligned_alloc(
        alignment, static_cast<std::size_t>(
                       round_up(static_cast<std::int64_t>(std::max<std::size_t>(bytes, 1)))));
  }
  void release(void* data, std::size_t) noexcept override { std::free(data); }
  void fill(void* data, int byte, std::size_t bytes) override { std::memset(data, byte, bytes); }
};

[[noreturn]] void out_of_memory(const RawMemory& memory, const Ledger& ledger, const char* what,
                                std::int64_t bytes) {
  throw Error(ErrorCode::out_of_memory,
              memory.name() + ": out of memory: asked for " + human_bytes(bytes) + " for " + what +
                  ", " + human_bytes(ledger.entry(memory.name()).reserved) + " already held");
}

}  // namespace

const char* mem_tag_name(MemTag tag) {
  static constexpr const char* names[mem_tag_count] = {"weights",       "kv",      "activations",
                                                       "hidden_stream", "stats",   "solver",
                                                       "optimizer",     "staging", "workspace"};
  return names[static_cast<std::size_t>(tag)];
}

RawMemory& host_memory() {
  static HostMemory memory;
  return memory;
}

void Ledger::add(const std::string& memory, MemTag tag, std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  Entry& e = entries_[memory];
  const auto t = static_cast<std::size_t>(tag);
  e.live[t] += bytes;
  e.live_total += bytes;
  e.peak[t] = std::max(e.peak[t], e.live[t]);
  e.peak_total = std::max(e.peak_total, e.live_total);
}

void Ledger::reserve(const std::string& memory, std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  Entry& e = entries_[memory];
  e.reserved += bytes;
  e.peak_reserved = std::max(e.peak_reserved, e.reserved);
}

Ledger::Entry Ledger::entry(const std::string& memory) const {
  const std::lock_guard lock(mutex_);
  const auto it = entries_.find(memory);
  return it == entries_.end() ? Entry{} : it->second;
}

std::map<std::string, Ledger::Entry> Ledger::entries() const {
  const std::lock_guard lock(mutex_);
  return entries_;
}

Buffer::Buffer(RawMemory& memory, Ledger& ledger, MemTag tag, DType dtype, std::int64_t rows,
               std::int64_t cols)
    : memory_(&memory), ledger_(&ledger), tag_(tag) {
  REQUIRE(rows >= 0 && cols >= 0, "negative shape");
  const auto bytes = round_up(
      std::max<std::int64_t>(rows * cols * static_cast<std::int64_t>(dtype_bytes(dtype)), 1));
  void* data = memory.allocate(static_cast<std::size_t>(bytes));
  if (data == nullptr) out_of_memory(memory, ledger, mem_tag_name(tag), bytes);
  bytes_ = static_cast<std::size_t>(bytes);
  view_ = make_view(data, dtype, memory.kind(), rows, cols);
  ledger.add(memory.name(), tag, bytes);
  ledger.reserve(memory.name(), bytes);
}

Buffer::~Buffer() {
  if (view_.data == nullptr) return;
  memory_->release(view_.data, bytes_);
  ledger_->add(memory_->name(), tag_, -static_cast<std::int64_t>(bytes_));
  ledger_->reserve(memory_->name(), -static_cast<std::int64_t>(bytes_));
}

void Buffer::swap(Buffer& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(ledger_, other.ledger_);
  std::swap(tag_, other.tag_);
  std::swap(bytes_, other.bytes_);
  std::swap(view_, other.view_);
}

Arena Arena::measuring(DeviceKind kind) { return Arena(kind); }

Arena::Arena(RawMemory& memory, Ledger& ledger, std::int64_t capacity, bool poison)
    : memory_(&memory), ledger_(&ledger), kind_(memory.kind()), poison_(poison) {
  const auto bytes = round_up(std::max<std::int64_t>(capacity, 1));
  base_ = static_cast<std::byte*>(memory.allocate(static_cast<std::size_t>(bytes)));
  if (base_ == nullptr) out_of_memory(memory, ledger, "the planned arena", bytes);
  capacity_ = bytes;
  ledger.reserve(memory.name(), bytes);
}

Arena::Arena(Arena&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)),
      ledger_(other.ledger_),
      kind_(other.kind_),
      base_(std::exchange(other.base_, nullptr)),
      capacity_(other.capacity_),
      used_(other.used_),
      peak_(other.peak_),
      tag_live_(other.tag_live_),
      tag_peak_(other.tag_peak_),
      poison_(other.poison_),
      blocks_(std::move(other.blocks_)) {}

Arena::~Arena() {
  if (base_ == nullptr) return;
  rewind(0);
  memory_->release(base_, static_cast<std::size_t>(capacity_));
  ledger_->reserve(memory_->name(), -capacity_);
}

View Arena::make(MemTag tag, DType dtype, std::int64_t rows, std::int64_t cols) {
  REQUIRE(rows >= 0 && cols >= 0, "negative shape");
  const std::int64_t bytes = round_up(rows * cols * static_cast<std::int64_t>(dtype_bytes(dtype)));
  void* data = nullptr;
  if (!is_measuring()) {
    if (used_ + bytes > capacity_) {
      throw Error(ErrorCode::out_of_memory,
                  memory_->name() + ": the arena of " + human_bytes(capacity_) +
                      " is full: " + human_bytes(used_) + " used, " + human_bytes(bytes) +
                      " more asked for " + mem_tag_name(tag));
    }
    data = base_ + used_;
    if (poison_ && bytes > 0) memory_->fill(data, 0xFF, static_cast<std::size_t>(bytes));
    ledger_->add(memory_->name(), tag, bytes);
  }
  const auto t = static_cast<std::size_t>(tag);
  blocks_.push_back({tag, used_, bytes});
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  tag_live_[t] += bytes;
  tag_peak_[t] = std::max(tag_peak_[t], tag_live_[t]);
  return make_view(data, dtype, kind_, rows, cols);
}

void Arena::rewind(std::size_t mark) {
  while (blocks_.size() > mark) {
    const Block& b = blocks_.back();
    if (!is_measuring()) ledger_->add(memory_->name(), b.tag, -b.bytes);
    tag_live_[static_cast<std::size_t>(b.tag)] -= b.bytes;
    used_ = b.begin;
    blocks_.pop_back();
  }
}

std::string human_bytes(std::int64_t bytes) {
  char text[32];
  const auto b = static_cast<double>(bytes);
  if (bytes < 10'000) {
    std::snprintf(text, sizeof text, "%lld B", static_cast<long long>(bytes));
  } else if (b < 1e7) {
    std::snprintf(text, sizeof text, "%.1f kB", b / 1e3);
  } else if (b < 1e10) {
    std::snprintf(text, sizeof text, "%.1f MB", b / 1e6);
  } else {
    std::snprintf(text, sizeof text, "%.2f GB", b / 1e9);
  }
  return text;
}

}  // namespace engine
