#define PCRE2_CODE_UNIT_WIDTH 8
#include "formats/pretokenizer.h"

#include <pcre2.h>

#include <cstddef>
#include <cstdint>

#include "formats/error.h"

namespace engine {

const char* const llama3_split_regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

// Bounds backtracking per match. The accepted expressions need at most a few steps per character of
// a white-space run, so this only stops texts with runs of a hundred million spaces.
constexpr std::uint32_t match_limit = 400'000'000;
constexpr std::size_t jit_stack_start = 32 * 1024;
constexpr std::size_t jit_stack_most = 1024 * 1024;

// The 25 code points with the White_Space property, as the inside of a character class.
constexpr const char* white_space =
    R"(\x09-\x0D\x20\x85\xA0\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

std::string spell_out_white_space(std::string_view regex) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < regex.size(); ++i) {
    const char c = regex[i];
    if (c == '\\' && i + 1 < regex.size()) {
      const char escaped = regex[++i];
      if (escaped == 's' && in_class) {
        out += white_space;
      } else if (escaped == 's' || (escaped == 'S' && !in_class)) {
        out += std::string(escaped == 's' ? "[" : "[^") + white_space + "]";
      } else {
        out += c;
        out += escaped;
      }
      continue;
    }
    if (c == '[') in_class = true;
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

std::string pcre2_message(int code) {
  PCRE2_UCHAR text[256] = {};
  pcre2_get_error_message(code, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct PreTokenizer::Code {
  pcre2_code* compiled = nullptr;
  Code() = default;
  ~Code() { pcre2_code_free(compiled); }
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
};

PreTokenizer::PreTokenizer(std::string_view regex, const std::string& file)
    : code_(std::make_unique<Code>()) {
  if (regex != llama3_split_regex) {
    throw FormatError(file, "pre_tokenizer", "the LLaMA3 split expression",
                      "the unsupported expression " + std::string(regex.substr(0, 200)));
  }
  const std::string pattern = spell_out_white_space(regex);
  int error = 0;
  PCRE2_SIZE where = 0;
  code_->compiled =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_DOLLAR_ENDONLY, &error, &where, nullptr);
  if (code_->compiled == nullptr) {
    throw FormatError(file, "pre_tokenizer, offset " + std::to_string(where),
                      "a regular expression", pcre2_message(error));
  }
  // A PCRE2 built without JIT answers BADOPTION and matches the same pieces, only slower.
  const int jit = pcre2_jit_compile(code_->compiled, PCRE2_JIT_COMPLETE);
  if (jit != 0 && jit != PCRE2_ERROR_JIT_BADOPTION) {
    throw Error(ErrorCode::internal, "PCRE2 JIT: " + pcre2_message(jit));
  }
}

PreTokenizer::~PreTokenizer() = default;

struct PreTokenizer::Scanner::State {
  const pcre2_code* code = nullptr;
  pcre2_match_data* data = nullptr;
  pcre2_match_context* context = nullptr;
  pcre2_jit_stack* stack = nullptr;
  std::string_view text;
  std::size_t at = 0;
  std::size_t match_begin = 0;  // a match found beyond `at`, after an unmatched gap
  std::size_t match_end = 0;

  State() = default;
  ~State() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack != nullptr) pcre2_jit_stack_free(stack);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
};

PreTokenizer::Scanner::Scanner(const PreTokenizer& owner) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.code = owner.code_->compiled;
  s.data = pcre2_match_data_create_from_pattern(s.code, nullptr);
  s.context = pcre2_match_context_create(nullptr);
  s.stack = pcre2_jit_stack_create(jit_stack_start, jit_stack_most, nullptr);
  if (s.data == nullptr || s.context == nullptr) {
    throw Error(ErrorCode::out_of_memory, "PCRE2: no memory for a match");
  }
  pcre2_set_match_limit(s.context, match_limit);
  if (s.stack != nullptr) pcre2_jit_stack_assign(s.context, nullptr, s.stack);
}

PreTokenizer::Scanner::~Scanner() = default;

void PreTokenizer::Scanner::start(std::string_view text) {
  state_->text = text;
  state_->at = state_->match_begin = state_->match_end = 0;
}

bool PreTokenizer::Scanner::next(std::string_view& piece) {
  State& s = *state_;
  if (s.at >= s.text.size()) return false;
  if (s.match_end <= s.at) {
    const int found = pcre2_match(s.code, reinterpret_cast<PCRE2_SPTR>(s.text.data()),
                                  s.text.size(), s.at, PCRE2_NO_UTF_CHECK, s.data, s.context);
    if (found == PCRE2_ERROR_NOMATCH) {
      s.match_begin = s.match_end = s.text.size();
    } else if (found < 0) {
      throw Error(ErrorCode::internal, "pre-tokenizer, byte offset " + std::to_string(s.at) +
                                           " of the text: " + pcre2_message(found));
    } else {
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(s.data);
      s.match_begin = range[0];
      s.match_end = range[1];
      if (s.match_end <= s.at || s.match_begin < s.at) {
        throw Error(ErrorCode::internal, "pre-tokenizer: an empty match");
      }
    }
  }
  const std::size_t end = s.match_begin > s.at ? s.match_begin : s.match_end;
  piece = s.text.substr(s.at, end - s.at);
  s.at = end;
  return true;
}

}  // namespace engine
