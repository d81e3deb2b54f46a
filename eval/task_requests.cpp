// Questions as token sequences.
#include <algorithm>

#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "eval/tasks.h"
#include "eval/tasks_parts.h"

namespace engine {
namespace {

constexpr std::int64_t kQuestionsAtOnce = 8;

using Ids = std::vector<std::int32_t>;

// A question's choices with a given number of shots.
struct Encoded {
  std::vector<std::string> contexts;  // as text; without the spaces that move to the continuation
  std::vector<std::string> moved;     // those spaces
  std::vector<Ids> ids;               // of the contexts, without BOS
  std::size_t longest = 0;            // of ids
};

class Encoder {
 public:
  Encoder(const Task& task, const Tokenizer& tokenizer, Encoding encoding, std::int64_t max_inputs)
      : task_(task), tokenizer_(tokenizer), encoding_(encoding), max_inputs_(max_inputs) {}

  struct Counts {
    bool lost_shots = false;
    std::int64_t truncated = 0;
    std::size_t longest = 0;  // tokens of a request before any were cut
  };

  // `out` has room for the question's requests.
  Counts encode(std::size_t index, ScoreRequest* out) const {
    const Question& question = task_.questions[index];
    const std::size_t shots =
        task_.preambles.at(static_cast<std::size_t>(question.preamble)).shots.size();
    const std::size_t bos = encoding_ == Encoding::joint_bos ? 1 : 0;
    const auto allowed = static_cast<std::size_t>(task_.max_prompt_tokens);
    std::size_t kept = shots;
    Encoded encoded = contexts(question, kept);
    while (allowed > 0 && kept > 0 && encoded.longest + bos > allowed) {
      encoded = contexts(question, --kept);
    }
    Counts counts;
    counts.lost_shots = kept < shots;
    for (std::size_t i = 0; i < question.choices.size(); ++i) {
      out[i] = request(question.choices[i], encoded, i);
      ScoreRequest& made = out[i];
      check(made, index, i);
      counts.longest = std::max(counts.longest, made.tokens.size());
      const std::size_t most = static_cast<std::size_t>(max_inputs_) + 1;
      if (max_inputs_ > 0 && made.tokens.size() > most) {
        made.tokens.erase(made.tokens.begin(),
                          made.tokens.end() - static_cast<std::ptrdiff_t>(most));
        ++counts.truncated;
        check(made, index, i);
      }
    }
    return counts;
  }

 private:
  [[nodiscard]] Ids ids_of(std::string_view text) const {
    return tokenizer_.encode(text, SpecialText::parse);
  }

  [[nodiscard]] Encoded contexts(const Question& question, std::size_t shots) const {
    Encoded out;
    for (const Choice& choice : question.choices) {
      std::string text = full_context(task_, question, choice, shots);
      std::string moved;
      if (encoding_ != Encoding::separate && !choice.bare) {
        const std::size_t end = tasks::stripped_right(text).size();
        moved = text.substr(end);
        text.resize(end);
      }
      // Choices mostly share their context.
      const bool same = !out.contexts.empty() && out.contexts.back() == text;
      out.ids.push_back(same ? out.ids.back() : ids_of(text));
      out.longest = std::max(out.longest, out.ids.back().size());
      out.contexts.push_back(std::move(text));
      out.moved.push_back(std::move(moved));
    }
    return out;
  }

  [[nodiscard]] ScoreRequest request(const Choice& choice, const Encoded& encoded,
                                     std::size_t i) const {
    const Ids& context = encoded.ids[i];
    ScoreRequest out;
    Ids whole;
    if (choice.bare) {
      whole = context;
      const Ids alone = ids_of(choice.continuation);
      if (!alone.empty()) whole.push_back(alone.back());
    } else if (encoding_ == Encoding::separate) {
      whole = context;
      const Ids continuation = ids_of(choice.continuation);
      whole.insert(whole.end(), continuation.begin(), continuation.end());
    } else {
      // Not put together from parts: a token may reach from the context into the continuation.
      whole = ids_of(encoded.contexts[i] + encoded.moved[i] + choice.continuation);
    }
    out.scored =
        static_cast<std::int64_t>(whole.size()) - static_cast<std::int64_t>(context.size());
    if (encoding_ == Encoding::joint_bos &&
        (whole.empty() || whole.front() != tokenizer_.bos_id())) {
      out.tokens.reserve(whole.size() + 1);
      out.tokens.push_back(tokenizer_.bos_id());
    }
    if (out.tokens.empty()) {
      out.tokens = std::move(whole);
      out.tokens.shrink_to_fit();
    } else {
      out.tokens.insert(out.tokens.end(), whole.begin(), whole.end());
    }
    return out;
  }

  void check(const ScoreRequest& made, std::size_t question, std::size_t choice) const {
    const auto tokens = static_cast<std::int64_t>(made.tokens.size());
    if (made.scored >= 1 && tokens > made.scored) return;
    throw Error(
        ErrorCode::usage,
        task_.name + ": question " + std::to_string(question + 1) + ", choice " +
            std::to_string(choice + 1) +
            ": expected at least one token of context and one to score" +
            (max_inputs_ > 0 ? " with " + std::to_string(max_inputs_) + " inputs" : std::string()) +
            ", found " + std::to_string(std::max<std::int64_t>(tokens - made.scored, 0)) + " and " +
            std::to_string(std::max<std::int64_t>(made.scored, 0)));
  }

  const Task& task_;
  const Tokenizer& tokenizer_;
  Encoding encoding_;
  std::int64_t max_inputs_;
};

}  // namespace

std::vector<ScoreRequest> make_requests(const Task& task, const Tokenizer& tokenizer,
                                        Encoding encoding, std::int64_t max_inputs,
                                        Json& protocol) {
  REQUIRE(max_inputs >= 0, "negative limit of inputs");
  if (encoding == Encoding::joint_bos && tokenizer.bos_id() < 0) {
    throw Error(ErrorCode::usage, std::string(encoding_name(encoding)) +
                                      ": expected a tokenizer with a BOS token, found one without");
  }
  std::vector<std::size_t> first(task.questions.size() + 1, 0);
  for (std::size_t q = 0; q < task.questions.size(); ++q) {
    first[q + 1] = first[q] + task.questions[q].choices.size();
  }
  std::vector<ScoreRequest> requests(first.back());
  std::vector<Encoder::Counts> counts(task.questions.size());
  const Encoder encoder(task, tokenizer, encoding, max_inputs);
  ThreadPool pool(0);
  pool.run(static_cast<std::int64_t>(task.questions.size()), kQuestionsAtOnce,
           [&](std::int64_t begin, std::int64_t end) {
             for (auto q = static_cast<std::size_t>(begin); q < static_cast<std::size_t>(end);
                  ++q) {
               counts[q] = encoder.encode(q, requests.data() + first[q]);
             }
           });
  Encoder::Counts total;
  std::int64_t lost_shots = 0;
  for (const Encoder::Counts& c : counts) {
    lost_shots += c.lost_shots ? 1 : 0;
    total.truncated += c.truncated;
    total.longest = std::max(total.longest, c.longest);
  }
  protocol["encoding"] = encoding_name(encoding);
  protocol["bos"] = encoding == Encoding::joint_bos;
  protocol["tokenizer_sha256"] = tokenizer.source_hash();
  protocol["longest_request"] = total.longest;
  protocol["truncated_requests"] = total.truncated;
  if (task.max_prompt_tokens > 0) protocol["prompts_that_lost_shots"] = lost_shots;
  return requests;
}

}  // namespace engine
