// The one WikiText2 test file that is not the original but can be turned into it.
#pragma once

#include <string>
#include <string_view>

namespace engine {

// True for the SHA-256 of a redistribution of wiki.test.raw that has \r\n line ends and lacks all
// blank lines. Nothing else is ever repaired: a rule without a known result would be a guess.
[[nodiscard]] bool is_stripped_wikitext_test(std::string_view file_sha256);

// Puts the blank lines back. `text` is that file with \n line ends.
[[nodiscard]] std::string repair_wikitext_test(std::string_view text, const std::string& file);

// Throws FormatError unless `joined` is the joined official test text.
void check_repaired_wikitext_test(std::string_view joined, const std::string& file);

}  // namespace engine
