// Text <-> token ids for LLaMA-family checkpoints.
//
// Three kinds of files are understood: Hugging Face's tokenizer.json (byte-level BPE of LLaMA3, and
// the byte-fallback BPE exported for LLaMA1/2), LLaMA3's rank file, and LLaMA1/2's sentencepiece
// model. References: openai/tiktoken, huggingface/tokenizers, google/sentencepiece (bpe_model.cc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace engine {

// What the strings of added tokens mean inside a text.
enum class SpecialText : std::uint8_t {
  parse,  // they become their ids, as in Hugging Face's tokenizers (data sets, trusted templates)
  plain,  // they are ordinary text (prompts of strangers)
};

struct AddedToken {
  std::int32_t id = 0;
  std::string text;
  bool special = true;      // decode() leaves it out
  bool normalized = false;  // matched in the normalized text (sentencepiece kinds only)
};

// Everything about a tokenizer besides its vocabulary and merges.
struct TokenizerInfo {
  std::string file = "tokenizer";  // names the source in errors
  std::string kind;                // set by the factory functions
  std::string source_hash;         // SHA-256 of the file's bytes in hex; empty if there is no file
  std::int32_t bos_id = -1;        // -1: none
  std::vector<std::int32_t> eos_ids;
  bool adds_bos = false;
  std::vector<AddedToken> added;
};

// Immutable after construction; every const member may be called from several threads.
class Tokenizer {
 public:
  virtual ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Ids of `text`, never with BOS. Throws FormatError naming the byte offset when `text` is not
  // valid UTF-8.
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, SpecialText special) const;

  // The bytes that `ids` stand for; not always valid UTF-8. Sentencepiece kinds drop the one space
  // that encoding puts in front. Throws Error(usage) for an id outside the vocabulary.
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids,
                                   bool keep_special = false) const;

  // The bytes of one token, special or not (a special token's are its name).
  [[nodiscard]] const std::string& token_bytes(std::int32_t id) const;

  [[nodiscard]] bool contains(std::int32_t id) const;
  [[nodiscard]] bool is_special(std::int32_t id) const;
  // The id of an added token by its exact text.
  [[nodiscard]] std::optional<std::int32_t> added_id(std::string_view text) const;

  // -1 if the tokenizer has none.
  [[nodiscard]] std::int32_t bos_id() const { return info_.bos_id; }
  // Every token that ends a text or a chat turn.
  [[nodiscard]] const std::vector<std::int32_t>& eos_ids() const { return info_.eos_ids; }
  // Whether evaluation puts BOS in front of a stream. From tokenizer.json: whether its
  // post-processor does. A rank file and a sentencepiece model do not say; true, because the
  // reference evaluations of those models do.
  [[nodiscard]] bool adds_bos() const { return info_.adds_bos; }
  // Highest id + 1. A checkpoint's embedding may have more rows.
  [[nodiscard]] std::int64_t vocab_size() const { return static_cast<std::int64_t>(bytes_.size()); }
  // "byte_bpe.json", "byte_bpe.ranks", "sentencepiece.json" or "sentencepiece.model".
  [[nodiscard]] const std::string& kind() const { return info_.kind; }
  [[nodiscard]] const std::string& source_hash() const { return info_.source_hash; }
  // Whether encoding puts a space in front of a text, which decode() removes.
  [[nodiscard]] virtual bool has_leading_space() const { return false; }

 protected:
  // A run of ordinary text, or an added token that was found in the text (id >= 0).
  struct Segment {
    std::string_view text;
    std::int32_t id = -1;
  };
  // Finds given strings in a text: at every position, from the left, the longest that is there.
  class Matcher {
   public:
    void add(std::string text, std::int32_t id);
    [[nodiscard]] std::vector<Segment> split(std::string_view text) const;

   private:
    std::unordered_map<std::string_view, std::int32_t> ids_;
    std::vector<std::unique_ptr<const std::string>> texts_;
    std::vector<std::size_t> lengths_[256];  // by first byte, descending
  };

  // bytes[id] is the text of an ordinary token, empty if there is no such id. Throws FormatError
  // when ids, names or BOS contradict each other.
  Tokenizer(TokenizerInfo info, std::vector<std::string> bytes);

  // Appends the ids of all segments.
  virtual void encode_segments(std::span<const Segment> segments, SpecialText special,
                               std::vector<std::int32_t>& out) const = 0;
  // False for tokens that are matched by the derived class itself.
  [[nodiscard]] virtual bool matches_raw_text(const AddedToken&) const { return true; }
  [[nodiscard]] const TokenizerInfo& info() const { return info_; }
  // To be called once by the derived constructor.
  void index_added_tokens();

 private:
  enum class Kind : std::uint8_t { absent, ordinary, added, special };

  TokenizerInfo info_;
  std::vector<std::string> bytes_;
  std::vector<Kind> kinds_;
  std::unordered_map<std::string, std::int32_t> added_ids_;
  Matcher raw_added_;
};

// Turns a stream of ids into text that is valid UTF-8 after every step: bytes of an unfinished
// character are held back, malformed ones become U+FFFD.
class StreamDecoder {
 public:
  // `continuation`: the ids go on after other text, so a leading space is kept; otherwise the
  // output equals decode() for well-formed text. The tokenizer must outlive the decoder.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool continuation = true)
      : tokenizer_(&tokenizer), drop_space_(!continuation && tokenizer.has_leading_space()) {}

  // The text that became complete with `id`. Special tokens give nothing.
  std::string push(std::int32_t id);
  // U+FFFD if an unfinished character was held back; the decoder is then as new for a continuation.
  std::string flush();

 private:
  const Tokenizer* tokenizer_;
  std::string held_;
  bool drop_space_;
};

// From tokenizer.json, else tokenizer.model, in a directory; or from the file itself. What a file
// is follows from its content. Throws IoError, or FormatError.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& directory_or_file);

// The same from bytes in memory; `name` stands for the file in errors.
std::unique_ptr<Tokenizer> tokenizer_from_bytes(std::string_view bytes, std::string_view name);

// LLaMA3's scheme with tokens[id] the bytes of token id, which is also its merge rank. All 256
// single bytes must be there.
std::unique_ptr<Tokenizer> make_bpe_from_ranks(std::vector<std::string> tokens, TokenizerInfo info);

// The 256 special tokens of the first LLaMA3 release, from id `first`.
std::vector<AddedToken> llama3_added_tokens(std::int32_t first);

// LLaMA1/2's scheme. A piece's index is its id.
struct SpmPiece {
  // The numbers of sentencepiece_model.proto; user_defined and unused pieces are refused.
  enum class Type : std::uint8_t {
    normal = 1,
    unknown = 2,
    control = 3,
    user_defined = 4,
    unused = 5,
    byte = 6,
  };
  std::string text;  // U+2581 stands for a space; a byte piece is spelled "<0x0A>"
  float score = 0.0F;
  Type type = Type::normal;
};

// Control pieces and the unknown piece become special added tokens besides those of `info`. All 256
// byte pieces must be there.
std::unique_ptr<Tokenizer> make_spm(std::vector<SpmPiece> pieces, bool add_dummy_prefix,
                                    TokenizerInfo info);

}  // namespace engine
