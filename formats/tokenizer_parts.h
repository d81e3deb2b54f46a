// What the files of the tokenizer share among themselves; not for other users.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "formats/bpe_merge.h"
#include "formats/tokenizer.h"

namespace engine {

// Longer tokens are refused where every split of a token is tried. LLaMA3's longest has 128 bytes.
inline constexpr std::size_t longest_token = 256;
// Ids may leave gaps, but a table indexed by id must stay in proportion to the file.
inline constexpr std::size_t widest_id_gap = 65536;
inline constexpr std::string_view spm_space = "\xE2\x96\x81";  // U+2581

// Byte-level BPE. tokens[id] is empty where no ordinary token has the id.
struct ByteBpeModel {
  std::vector<std::string> tokens;
  MergeTable merges;
  bool whole_piece_first = true;  // a piece that is a token is never merged ("ignore_merges")
  std::string split_regex;
};
std::unique_ptr<Tokenizer> make_byte_bpe(ByteBpeModel model, TokenizerInfo info);

// Character BPE with byte fallback; pieces[id].text is empty where no piece has the id.
struct SpmModel {
  std::vector<SpmPiece> pieces;
  MergeTable merges;  // over piece ids, and over -1 - code point for characters without a piece
  bool add_dummy_prefix = true;
};
std::unique_ptr<Tokenizer> make_spm_from_merges(SpmModel model, TokenizerInfo info);

// "<0x0A>" -> 10, or -1.
int byte_piece_value(std::string_view text);

// Readers of the three formats. `info` brings file and source_hash.
std::unique_ptr<Tokenizer> tokenizer_from_json(std::string_view bytes, TokenizerInfo info);
std::unique_ptr<Tokenizer> tokenizer_from_ranks(std::string_view bytes, TokenizerInfo info);
std::unique_ptr<Tokenizer> tokenizer_from_spm(std::string_view bytes, TokenizerInfo info);

}  // namespace engine
