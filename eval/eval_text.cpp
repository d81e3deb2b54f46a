#include <algorithm>

#include "engine/quant/calibration.h"
#include "eval/ppl.h"
#include "formats/sha256.h"

namespace engine {
namespace {

constexpr std::string_view synthetic = "synthetic:";

std::int64_t synthetic_count(const std::string& file) {
  const std::string digits = file.substr(synthetic.size());
  if (digits.empty() || digits.size() > 12 ||
      !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    throw Error(ErrorCode::usage, "--text: expected synthetic:COUNT, found \"" + file + "\"");
  }
  return std::stoll(digits);
}

// Cuts a stream into disjoint windows, dropping the tail.
TokenWindows cut(std::span<const std::int32_t> stream, std::int64_t seq, std::int64_t limit,
                 std::int32_t bos_per_window, const std::string& file) {
  const bool with_bos = bos_per_window >= 0;
  const std::int64_t step = with_bos ? seq - 1 : seq;
  std::int64_t windows = static_cast<std::int64_t>(stream.size()) / step;
  if (windows == 0) {
    throw Error(ErrorCode::usage, file + ": expected at least one window of " +
                                      std::to_string(seq) + " tokens, found " +
                                      std::to_string(stream.size()) + " tokens");
  }
  if (limit > 0) windows = std::min(windows, limit);
  TokenWindows out;
  out.windows = windows;
  out.seq = seq;
  for (std::int64_t w = 0; w < windows; ++w) {
    if (with_bos) out.ids.push_back(bos_per_window);
    const auto piece =
        stream.subspan(static_cast<std::size_t>(w * step), static_cast<std::size_t>(step));
    out.ids.insert(out.ids.end(), piece.begin(), piece.end());
  }
  return out;
}

}  // namespace

const char* bos_policy_name(BosPolicy policy) {
  switch (policy) {
    case BosPolicy::model:
      return "model";
    case BosPolicy::stream_start:
      return "stream-start";
    case BosPolicy::per_window:
      return "per-window";
    case BosPolicy::none:
      return "none";
  }
  throw Error(ErrorCode::internal, "unknown BOS policy");
}

EvalWindows load_eval_windows(const EvalText& text, const WeightSource& source,
                              const Tokenizer* tokenizer, std::int64_t seq, BosPolicy bos,
                              std::int64_t limit) {
  EvalWindows out;
  Json& p = out.protocol;
  std::vector<std::int32_t> stream;
  std::int32_t bos_per_window = -1;
  if (text.file.starts_with(synthetic) || names_token_matrix(text.file)) {
    if (bos != BosPolicy::model) {
      throw Error(ErrorCode::usage,
                  "--bos: token input is used as it is; expected no --bos, found " +
                      std::string(bos_policy_name(bos)));
    }
    p["id"] = "tokens-" + std::to_string(seq);
    if (names_token_matrix(text.file)) {
      TokenMatrix m = load_token_matrix(text.file, "tokens");
      stream = std::move(m.ids);
    } else {
      stream = synthetic_tokens(synthetic_count(text.file), source.config().vocab, 0);
    }
  } else {
    if (tokenizer == nullptr) {
      throw Error(ErrorCode::usage,
                  "--text: a synthetic model has no tokenizer: expected "
                  "synthetic:COUNT or a safetensors file of tokens, found " +
                      text.file);
    }
    if (bos == BosPolicy::model)
      bos = tokenizer->adds_bos() ? BosPolicy::stream_start : BosPolicy::none;
    if (bos != BosPolicy::none && tokenizer->bos_id() < 0) {
      throw Error(ErrorCode::usage, "--bos: the tokenizer has no BOS token");
    }
    const TextCorpus corpus = load_corpus(text.file, text.dataset);
    p["id"] = corpus.protocol + "-" + std::to_string(seq);
    p["file_sha256"] = corpus.file_sha256;
    p["text_sha256"] = corpus.joined_sha256;
    if (!corpus.note.empty()) p["note"] = corpus.note;
    p["tokenizer_sha256"] = tokenizer->source_hash();
    p["bos"] = bos_policy_name(bos);
    const auto encode = [&](std::string_view t) {
      std::vector<std::int32_t> ids = tokenizer->encode(t, SpecialText::parse);
      if (bos == BosPolicy::stream_start) ids.insert(ids.begin(), tokenizer->bos_id());
      return ids;
    };
    // Tokens of text in a window.
    const std::int64_t step = bos == BosPolicy::per_window ? seq - 1 : seq;
    if (text.dataset == Dataset::c4_old) {
      // 256 random cuts of single documents; the seed is part of the protocol.
      const SampledWindows s = sample_document_windows(corpus.documents, encode, 256, step, 0);
      for (const auto& w : s.windows) stream.insert(stream.end(), w.begin(), w.end());
    } else {
      stream = encode(corpus.text);
      if (text.dataset == Dataset::c4_new) {
        stream.resize(std::min(stream.size(), static_cast<std::size_t>(256 * step)));
      }
    }
    if (bos == BosPolicy::per_window) bos_per_window = tokenizer->bos_id();
  }
  out.tokens = cut(stream, seq, limit, bos_per_window, text.file);
  check_tokens(out.tokens.ids, source.config(), text.file);
  p["tokens"] = stream.size();
  p["tokens_sha256"] = sha256_hex(std::as_bytes(std::span(stream)));
  p["seq"] = seq;
  p["windows"] = out.tokens.windows;
  return out;
}

}  // namespace engine
