#include "formats/bpe_merge.h"

#include <algorithm>
#include <limits>

#include "formats/error.h"

namespace engine {
namespace {

constexpr std::size_t linear_limit = 64;  // symbols; above, the heap is faster
constexpr std::uint32_t never = std::numeric_limits<std::uint32_t>::max();

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

// A bijective mix (xor-shift and multiply), so that consecutive ids spread over the table.
std::size_t mix(std::uint64_t key) {
  key ^= key >> 31;
  key *= 0x9E3779B97F4A7C15U;
  key ^= key >> 29;
  key *= 0xD6E8FEB86659FD93U;
  key ^= key >> 32;
  return static_cast<std::size_t>(key);
}

void merge_linear(const MergeTable& table, std::vector<std::int32_t>& symbols) {
  // pairs[i] is what symbols[i] and symbols[i + 1] would become.
  Merge pairs[linear_limit];
  std::size_t count = symbols.size();
  const auto look = [&](std::size_t i) {
    const Merge* found = table.find(symbols[i], symbols[i + 1]);
    pairs[i] = found != nullptr ? *found : Merge{never, 0};
  };
  for (std::size_t i = 0; i + 1 < count; ++i) look(i);
  while (count > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < count; ++i) {
      if (pairs[i].priority < pairs[best].priority) best = i;
    }
    if (pairs[best].priority == never) break;
    symbols[best] = pairs[best].id;
    for (std::size_t i = best + 1; i + 1 < count; ++i) {
      symbols[i] = symbols[i + 1];
      pairs[i] = pairs[i + 1];
    }
    --count;
    if (best > 0) look(best - 1);
    if (best + 1 < count) look(best);
  }
  symbols.resize(count);
}

void merge_heap(const MergeTable& table, std::vector<std::int32_t>& symbols) {
  constexpr std::uint32_t none = never;
  struct Link {
    std::uint32_t previous;
    std::uint32_t next;
    bool alive;
  };
  struct Candidate {
    Merge merge;
    std::uint32_t at;
    std::int32_t left;
    std::int32_t right;
  };
  const auto later = [](const Candidate& a, const Candidate& b) {
    return a.merge.priority != b.merge.priority ? a.merge.priority > b.merge.priority : a.at > b.at;
  };
  const auto count = static_cast<std::uint32_t>(symbols.size());
  std::vector<Link> links(count);
  std::vector<Candidate> heap;
  const auto consider = [&](std::uint32_t at) {
    const std::uint32_t right = links[at].next;
    if (right == none) return false;
    const Merge* found = table.find(symbols[at], symbols[right]);
    if (found == nullptr) return false;
    heap.push_back({*found, at, symbols[at], symbols[right]});
    return true;
  };
  for (std::uint32_t i = 0; i < count; ++i) {
    links[i] = {i == 0 ? none : i - 1, i + 1 < count ? i + 1 : none, true};
  }
  for (std::uint32_t i = 0; i < count; ++i) consider(i);
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Candidate top = heap.back();
    heap.pop_back();
    // An entry is stale once either side has merged: a merge always changes the symbol's id.
    const std::uint32_t right = links[top.at].next;
    if (!links[top.at].alive || right == none) continue;
    if (symbols[top.at] != top.left || symbols[right] != top.right) continue;
    symbols[top.at] = top.merge.id;
    links[right].alive = false;
    links[top.at].next = links[right].next;
    if (links[right].next != none) links[links[right].next].previous = top.at;
    if (consider(top.at)) std::push_heap(heap.begin(), heap.end(), later);
    if (links[top.at].previous != none && consider(links[top.at].previous)) {
      std::push_heap(heap.begin(), heap.end(), later);
    }
  }
  std::size_t out = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    if (links[i].alive) symbols[out++] = symbols[i];
  }
  symbols.resize(out);
}

}  // namespace

void MergeTable::rehash(std::size_t slots) {
  std::vector<Slot> old(slots);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (!slot.used) continue;
    std::size_t at = mix(slot.key) & (slots_.size() - 1);
    while (slots_[at].used) at = (at + 1) & (slots_.size() - 1);
    slots_[at] = slot;
  }
}

void MergeTable::reserve(std::size_t pairs) {
  std::size_t slots = 16;
  while (slots < 2 * pairs) slots *= 2;
  if (slots > slots_.size()) rehash(slots);
}

bool MergeTable::insert(std::int32_t left, std::int32_t right, Merge merge) {
  if (merge.priority == never) {
    throw Error(ErrorCode::internal, "merge table: a priority equals the reserved value");
  }
  if (2 * (used_ + 1) > slots_.size()) rehash(std::max<std::size_t>(16, 2 * slots_.size()));
  const std::uint64_t key = pair_key(left, right);
  std::size_t at = mix(key) & (slots_.size() - 1);
  for (; slots_[at].used; at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].key == key) return false;
  }
  slots_[at] = {key, merge, true};
  ++used_;
  return true;
}

const Merge* MergeTable::find(std::int32_t left, std::int32_t right) const {
  if (slots_.empty()) return nullptr;
  const std::uint64_t key = pair_key(left, right);
  for (std::size_t at = mix(key) & (slots_.size() - 1); slots_[at].used;
       at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].key == key) return &slots_[at].merge;
  }
  return nullptr;
}

void merge_symbols(const MergeTable& table, std::vector<std::int32_t>& symbols) {
  if (symbols.size() >= never) {
    throw Error(ErrorCode::usage, "tokenizer: one piece of text has more than 2^32 - 2 symbols");
  }
  if (symbols.size() < 2) return;
  symbols.size() <= linear_limit ? merge_linear(table, symbols) : merge_heap(table, symbols);
}

bool PieceCache::append(std::string_view piece, std::vector<std::int32_t>& out) const {
  if (piece.size() > longest_piece) return false;
  const auto found = ids_.find(piece);
  if (found == ids_.end()) return false;
  out.insert(out.end(), found->second.begin(), found->second.end());
  return true;
}

void PieceCache::remember(std::string_view piece, std::span<const std::int32_t> ids) {
  if (piece.size() > longest_piece) return;
  ids_.emplace(std::string(piece), std::vector<std::int32_t>(ids.begin(), ids.end()));
}

}  // namespace engine
