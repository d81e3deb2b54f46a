// The samplers of formats/dataset.h.
#include "formats/dataset.h"
#include "formats/error.h"
#include "formats/mt19937.h"

namespace engine {
namespace {

void check_request(std::int64_t samples, std::int64_t seq) {
  if (samples < 1 || seq < 1) {
    throw Error(ErrorCode::usage, "samples: expected a positive number and length, found " +
                                      std::to_string(samples) + " of " + std::to_string(seq) +
                                      " tokens");
  }
}

// One window at a random place of `stream`, which has more than seq tokens.
void cut(std::span<const std::int32_t> stream, std::int64_t seq, PythonRandom& random,
         SampledWindows& out) {
  const auto size = static_cast<std::int64_t>(stream.size());
  const std::int64_t offset = random.randint(0, size - seq - 1);
  const auto window =
      stream.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(seq));
  out.offsets.push_back(offset);
  out.windows.emplace_back(window.begin(), window.end());
}

}  // namespace

SampledWindows sample_windows(std::span<const std::int32_t> stream, std::int64_t samples,
                              std::int64_t seq, std::int64_t seed) {
  check_request(samples, seq);
  if (static_cast<std::int64_t>(stream.size()) <= seq) {
    throw Error(ErrorCode::usage, "samples: expected a text of more than " + std::to_string(seq) +
                                      " tokens, found " + std::to_string(stream.size()));
  }
  PythonRandom random(seed);
  SampledWindows out;
  for (std::int64_t i = 0; i < samples; ++i) cut(stream, seq, random, out);
  return out;
}

SampledWindows sample_document_windows(
    std::span<const std::string> documents,
    const std::function<std::vector<std::int32_t>(std::string_view)>& tokenize,
    std::int64_t samples, std::int64_t seq, std::int64_t seed) {
  check_request(samples, seq);
  if (documents.empty()) {
    throw Error(ErrorCode::mismatch, "samples: expected documents, found none");
  }
  PythonRandom random(seed);
  SampledWindows out;
  // Documents known to be too short: the draw still consumes randomness, but once all of them
  // are, no draw can ever succeed.
  std::vector<bool> short_document(documents.size(), false);
  std::size_t short_count = 0;
  const auto last = static_cast<std::int64_t>(documents.size()) - 1;
  while (static_cast<std::int64_t>(out.windows.size()) < samples) {
    const std::int64_t drawn = random.randint(0, last);
    const auto number = static_cast<std::size_t>(drawn);
    if (short_document[number]) continue;
    const std::vector<std::int32_t> ids = tokenize(documents[number]);
    const auto size = static_cast<std::int64_t>(ids.size());
    if (size < seq) {
      short_document[number] = true;
      if (++short_count == documents.size()) {
        throw Error(ErrorCode::mismatch, "samples: expected a document of more than " +
                                             std::to_string(seq) + " tokens, found none");
      }
      continue;
    }
    if (size == seq) {
      throw Error(ErrorCode::mismatch, "samples: document " + std::to_string(drawn) +
                                           ": expected more than " + std::to_string(seq) +
                                           " tokens, found exactly as many, which the protocol "
                                           "cannot cut");
    }
    cut(ids, seq, random, out);
    out.documents.push_back(drawn);
  }
  return out;
}

}  // namespace engine
