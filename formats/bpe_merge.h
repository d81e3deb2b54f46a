// The byte-pair merge loop, shared by the byte-level and the sentencepiece tokenizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace engine {

// The result of joining two adjacent symbols. A lower priority value is merged earlier.
struct Merge {
  std::uint32_t priority = 0;
  std::int32_t id = 0;
};

// (left symbol, right symbol) -> Merge, by open addressing.
class MergeTable {
 public:
  void reserve(std::size_t pairs);
  // False, changing nothing, if the pair is already there.
  bool insert(std::int32_t left, std::int32_t right, Merge merge);
  // nullptr if the pair does not merge.
  [[nodiscard]] const Merge* find(std::int32_t left, std::int32_t right) const;
  [[nodiscard]] std::size_t size() const { return used_; }

 private:
  struct Slot {
    std::uint64_t key = 0;
    Merge merge;
    bool used = false;
  };
  void rehash(std::size_t slots);

  std::vector<Slot> slots_;
  std::size_t used_ = 0;
};

// Repeatedly joins the adjacent pair of lowest priority, the leftmost on ties, until none merges.
// Requires that distinct merge results have distinct ids. Linear scans for short inputs, a heap for
// long ones, so that a run of n equal symbols costs O(n log n).
void merge_symbols(const MergeTable& table, std::vector<std::int32_t>& symbols);

// Ids of pieces met before in the same text. Only short pieces are worth remembering.
class PieceCache {
 public:
  static constexpr std::size_t longest_piece = 64;  // bytes

  // The remembered ids; false if the piece is new.
  bool append(std::string_view piece, std::vector<std::int32_t>& out) const;
  void remember(std::string_view piece, std::span<const std::int32_t> ids);

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>{}(text);
    }
  };
  std::unordered_map<std::string, std::vector<std::int32_t>, Hash, std::equal_to<>> ids_;
};

}  // namespace engine
