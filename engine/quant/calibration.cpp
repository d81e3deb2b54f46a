#include "engine/quant/calibration.h"

#include <cstring>

#include "engine/core/memory.h"
#include "engine/core/rng.h"
#include "formats/safetensors.h"
#include "formats/sha256.h"

namespace engine {
namespace {

constexpr std::uint64_t token_stream = 0x746f6b656e73;  // "tokens"

std::string ids_sha256(std::span<const std::int32_t> ids) { return sha256_hex(std::as_bytes(ids)); }

Calibration from_matrix(const CalibrationRequest& r) {
  TokenMatrix m = load_token_matrix(r.file, "calibration");
  if (m.cols != r.seq || m.rows < r.samples) {
    throw Error(ErrorCode::mismatch, r.file + ": expected at least " + std::to_string(r.samples) +
                                         " rows (--samples) of " + std::to_string(r.seq) +
                                         " tokens (--seq), found [" + std::to_string(m.rows) +
                                         ", " + std::to_string(m.cols) + "]");
  }
  m.ids.resize(static_cast<std::size_t>(r.samples * r.seq));
  Calibration c;
  c.tokens = {std::move(m.ids), r.samples, r.seq};
  c.protocol["source"] = "tensor";
  c.protocol["tensor_sha256"] = m.sha256;
  return c;
}

Calibration from_text(const CalibrationRequest& r, const WeightSource& source) {
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(source);
  if (!tokenizer) {
    throw Error(ErrorCode::usage,
                "--calib: a synthetic model has no tokenizer: expected \"synthetic\" or a "
                "safetensors file of tokens, found " +
                    r.file);
  }
  const TextCorpus corpus = load_corpus(r.file, r.dataset);
  const bool bos = tokenizer->adds_bos();
  const auto encode = [&](std::string_view text) {
    std::vector<std::int32_t> ids = tokenizer->encode(text, SpecialText::parse);
    if (bos) ids.insert(ids.begin(), tokenizer->bos_id());
    return ids;
  };
  SampledWindows sampled;
  if (r.dataset == Dataset::c4_old) {
    sampled = sample_document_windows(corpus.documents, encode, r.samples, r.seq, r.seed);
  } else {
    const std::vector<std::int32_t> stream = encode(corpus.text);
    if (static_cast<std::int64_t>(stream.size()) <= r.seq) {
      throw Error(ErrorCode::usage, r.file + ": expected more than " + std::to_string(r.seq) +
                                        " tokens for --seq " + std::to_string(r.seq) + ", found " +
                                        std::to_string(stream.size()));
    }
    sampled = sample_windows(stream, r.samples, r.seq, r.seed);
  }
  Calibration c;
  c.tokens.windows = r.samples;
  c.tokens.seq = r.seq;
  for (const auto& w : sampled.windows) c.tokens.ids.insert(c.tokens.ids.end(), w.begin(), w.end());
  c.protocol["source"] = "text";
  c.protocol["dataset"] = corpus.protocol;
  c.protocol["file_sha256"] = corpus.file_sha256;
  c.protocol["text_sha256"] = corpus.joined_sha256;
  if (!corpus.note.empty()) c.protocol["note"] = corpus.note;
  c.protocol["tokenizer_sha256"] = tokenizer->source_hash();
  c.protocol["bos"] = bos ? "stream-start" : "none";
  c.protocol["rng"] = "mt19937 as CPython's random, randint per sample";
  c.protocol["seed"] = r.seed;
  return c;
}

}  // namespace

void check_request(const CalibrationRequest& r) {
  if (r.samples < 1 || r.samples > (1 << 20)) {
    throw Error(ErrorCode::usage,
                "--samples: expected 1 to 1048576, found " + std::to_string(r.samples));
  }
  if (r.seq < 2 || r.seq > (1 << 20)) {
    throw Error(ErrorCode::usage, "--seq: expected 2 to 1048576, found " + std::to_string(r.seq));
  }
}

std::unique_ptr<Tokenizer> model_tokenizer(const WeightSource& source) {
  const std::string bytes = source.tokenizer_bytes();
  if (bytes.empty()) return nullptr;
  return tokenizer_from_bytes(bytes, source.tokenizer_name());
}

bool names_token_matrix(const std::string& file) {
  return file.ends_with(".safetensors") || file.find(".safetensors:") != std::string::npos;
}

TokenMatrix load_token_matrix(const std::string& file_and_tensor,
                              const std::string& default_tensor) {
  const std::string suffix = ".safetensors";
  const std::size_t at = file_and_tensor.find(suffix + ":");
  const std::string path =
      at == std::string::npos ? file_and_tensor : file_and_tensor.substr(0, at + suffix.size());
  const std::string name =
      at == std::string::npos ? default_tensor : file_and_tensor.substr(at + suffix.size() + 1);
  const SafetensorsFile file{std::filesystem::path(path)};
  const TensorInfo* info = file.find(name);
  if (info == nullptr) throw FormatError(path, name, "a tensor of token ids", "no such tensor");
  const bool wide = info->dtype == TensorDType::i64;
  if ((info->dtype != TensorDType::i32 && !wide) || info->shape.empty() || info->shape.size() > 2) {
    throw FormatError(path, name, "an I32 or I64 tensor with one or two dimensions",
                      std::string(dtype_name(info->dtype)) + " " + shape_text(info->shape));
  }
  TokenMatrix m;
  m.rows = info->shape.size() == 2 ? info->shape[0] : 1;
  m.cols = info->shape.back();
  const auto bytes = file.bytes(*info);
  m.ids.resize(static_cast<std::size_t>(m.rows * m.cols));
  for (std::size_t i = 0; i < m.ids.size(); ++i) {
    if (wide) {
      std::int64_t v = 0;
      std::memcpy(&v, bytes.data() + 8 * i, sizeof v);
      if (v < 0 || v > INT32_MAX) {
        throw FormatError(path, name + "[" + std::to_string(i) + "]", "a token id",
                          std::to_string(v));
      }
      m.ids[i] = static_cast<std::int32_t>(v);
    } else {
      std::memcpy(&m.ids[i], bytes.data() + 4 * i, sizeof(std::int32_t));
    }
  }
  m.sha256 = ids_sha256(m.ids);
  return m;
}

std::vector<std::int32_t> synthetic_tokens(std::int64_t count, std::int64_t vocab,
                                           std::uint64_t seed) {
  {
    // An impossible count ends in the allocator's refusal, not in memory that is filled until the
    // system gives up.
    Ledger ledger;
    const Buffer fits(host_memory(), ledger, MemTag::staging, DType::i32, 1, count);
  }
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int32_t>(uniform_value(seed, token_stream, i) *
                                       static_cast<double>(vocab));
  }
  return ids;
}

Calibration load_calibration(const CalibrationRequest& r, const WeightSource& source) {
  check_request(r);
  Calibration c;
  if (r.file == "synthetic") {
    c.tokens = {synthetic_tokens(r.samples * r.seq, source.config().vocab,
                                 static_cast<std::uint64_t>(r.seed)),
                r.samples, r.seq};
    c.protocol["source"] = "synthetic tokens (philox)";
    c.protocol["seed"] = r.seed;
  } else if (names_token_matrix(r.file)) {
    c = from_matrix(r);
  } else {
    c = from_text(r, source);
  }
  c.protocol["samples"] = r.samples;
  c.protocol["seq"] = r.seq;
  c.protocol["tokens_sha256"] = ids_sha256(c.tokens.ids);
  check_tokens(c.tokens.ids, source.config(), "calibration");
  return c;
}

}  // namespace engine
