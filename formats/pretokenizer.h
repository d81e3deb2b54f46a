// Cuts text into pieces by a regular expression, as Hugging Face's Split("Isolated") does.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace engine {

// LLaMA3's pre-tokenizer expression, as it stands in tokenizer.json and in Meta's tokenizer.py.
extern const char* const llama3_split_regex;

// A compiled expression; safe to share between threads. Unicode tables are PCRE2's (10.42: Unicode
// 14); `\s` is the White_Space property spelled out, because PCRE2's own adds U+180E.
class PreTokenizer {
 public:
  // Only expressions known to behave alike in PCRE2 and in the reference engines are accepted:
  // otherwise FormatError(`file`, ...).
  PreTokenizer(std::string_view regex, const std::string& file);
  ~PreTokenizer();
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;

  // Yields the pieces of one text at a time; they cover it without overlap.
  class Scanner {
   public:
    explicit Scanner(const PreTokenizer& owner);
    ~Scanner();
    Scanner(const Scanner&) = delete;
    Scanner& operator=(const Scanner&) = delete;
    // `text` is valid UTF-8 and outlives the scan.
    void start(std::string_view text);
    // False at the end. Throws Error(internal) when PCRE2 reports a failure.
    bool next(std::string_view& piece);

   private:
    struct State;
    std::unique_ptr<State> state_;
  };

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace engine
