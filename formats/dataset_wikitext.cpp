#include "formats/dataset_wikitext.h"

#include <array>
#include <cstddef>

#include "formats/error.h"
#include "formats/sha256.h"

namespace engine {
namespace {

constexpr std::string_view kStripped =
    "4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c";
constexpr std::string_view kOfficialJoined =
    "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83";

// Lines of a formula that only look like headings.
constexpr std::array<std::string_view, 2> kNotHeadings = {" = 1 rad / s and a nominal impedance ",
                                                          " = 1 henry and capacitance C = "};
// The official file lacks the blank line that ends an article before this one.
constexpr std::string_view kNoEndBefore = " = The Hustler ( film ) = ";

bool is_heading(std::string_view line) {
  if (!line.starts_with(" = ") || !line.ends_with(" = ")) return false;
  for (const std::string_view formula : kNotHeadings) {
    if (line.starts_with(formula)) return false;
  }
  return true;
}

}  // namespace

bool is_stripped_wikitext_test(std::string_view file_sha256) { return file_sha256 == kStripped; }

// In WikiText a heading stands between two blank lines, and an article ends with one of its own.
std::string repair_wikitext_test(std::string_view text, const std::string& file) {
  constexpr std::string_view kBlank = " \n";
  std::string out;
  std::size_t articles = 0;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    if (end == std::string_view::npos) {
      throw FormatError(file, "last line", "a newline at the end", "none");
    }
    const std::string_view line = text.substr(0, end);
    const bool heading = is_heading(line);
    if (heading && !line.starts_with(" = = ")) {
      if (articles > 0 && line != kNoEndBefore) out += kBlank;
      ++articles;
    }
    if (heading) out += kBlank;
    out += text.substr(0, end + 1);
    if (heading) out += kBlank;
    text = text.substr(end + 1);
  }
  out += kBlank;
  return out;
}

void check_repaired_wikitext_test(std::string_view joined, const std::string& file) {
  const std::string found = sha256_hex(joined);
  if (found != kOfficialJoined) {
    throw FormatError(file, "repaired text", "SHA-256 " + std::string(kOfficialJoined), found);
  }
}

}  // namespace engine
