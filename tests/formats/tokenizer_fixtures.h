// Hand-made vocabularies for the tokenizer tests.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/tokenizer.h"

namespace engine::testing {

using Ids = std::vector<std::int32_t>;

inline const std::string space = "\xE2\x96\x81";  // U+2581

inline std::vector<std::string> byte_tokens(const std::vector<std::string>& more = {}) {
  std::vector<std::string> out;
  for (int byte = 0; byte < 256; ++byte) out.emplace_back(1, static_cast<char>(byte));
  out.insert(out.end(), more.begin(), more.end());
  return out;
}

inline std::string byte_name(int byte) {
  const char* digits = "0123456789ABCDEF";
  return std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">";
}

inline constexpr std::int32_t first_piece = 259;  // after unk, bos, eos and the bytes

inline std::vector<SpmPiece> tiny_pieces() {
  std::vector<SpmPiece> out = {{"<unk>", 0, SpmPiece::Type::unknown},
                               {"<s>", 0, SpmPiece::Type::control},
                               {"</s>", 0, SpmPiece::Type::control}};
  for (int byte = 0; byte < 256; ++byte) {
    out.push_back({byte_name(byte), 0, SpmPiece::Type::byte});
  }
  // As in LLaMA: runs of spaces have the worst score, the rest the order of their merges.
  const std::vector<std::string> merged = {space + "a", "bc", "ab", space + "ab"};
  float score = 0;
  out.push_back({space + space, -1e9F, SpmPiece::Type::normal});  // 259
  for (const auto& text : merged) out.push_back({text, score -= 1, SpmPiece::Type::normal});
  for (const auto& text : {space, std::string("a"), std::string("b"), std::string("c")}) {
    out.push_back({text, score -= 1, SpmPiece::Type::normal});  // 264..267
  }
  return out;
}

inline std::unique_ptr<Tokenizer> tiny_spm() {
  TokenizerInfo info;
  info.bos_id = 1;
  info.eos_ids = {2};
  info.adds_bos = true;
  return make_spm(tiny_pieces(), true, info);
}

inline void expect_error(const std::function<void()>& action, const std::string& part) {
  try {
    action();
    ADD_FAILURE() << "no error; expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::format) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

}  // namespace engine::testing
