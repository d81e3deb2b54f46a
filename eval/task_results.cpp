// Log-likelihoods as accuracies.
#include <cmath>
#include <limits>

#include "engine/core/error.h"
#include "eval/tasks.h"

namespace engine {
namespace {

// Which questions were answered right, by both measures.
struct Right {
  std::vector<bool> acc, acc_norm;
};

Right judge(const Task& task, std::span<const double> log_likelihood) {
  Right right;
  std::size_t at = 0;
  for (std::size_t q = 0; q < task.questions.size(); ++q) {
    const Question& question = task.questions[q];
    const std::size_t count = question.choices.size();
    REQUIRE(log_likelihood.size() - at >= count, "fewer log-likelihoods than choices");
    std::size_t best = 0, best_norm = 0;
    double most = 0, most_norm = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const double score = log_likelihood[at + i];
      if (!std::isfinite(score)) {
        throw Error(ErrorCode::numeric, task.name + ": question " + std::to_string(q + 1) +
                                            ", choice " + std::to_string(i + 1) +
                                            ": expected a finite log-likelihood, found " +
                                            std::to_string(score));
      }
      // A choice of no characters cannot win.
      const std::int64_t length = question.choices[i].code_points;
      const double norm = length > 0 ? score / static_cast<double>(length)
                                     : -std::numeric_limits<double>::infinity();
      if (i == 0 || score > most) {
        most = score;
        best = i;
      }
      if (i == 0 || norm > most_norm) {
        most_norm = norm;
        best_norm = i;
      }
    }
    right.acc.push_back(best == static_cast<std::size_t>(question.gold));
    right.acc_norm.push_back(best_norm == static_cast<std::size_t>(question.gold));
    at += count;
  }
  REQUIRE(at == log_likelihood.size(), "more log-likelihoods than choices");
  return right;
}

struct Tally {
  std::int64_t right = 0;
  std::int64_t n = 0;

  void add(bool answer) {
    right += answer ? 1 : 0;
    ++n;
  }
  [[nodiscard]] double mean() const { return static_cast<double>(right) / static_cast<double>(n); }
};

void put(Json& out, const std::string& name, const Tally& tally) {
  out[name] = tally.mean();
  if (tally.n < 2) return;
  const double p = tally.mean();
  out[name + "_stderr"] = std::sqrt(p * (1 - p) / static_cast<double>(tally.n - 1));
}

Tally tally_of(const std::vector<bool>& answers) {
  Tally tally;
  for (const bool answer : answers) tally.add(answer);
  return tally;
}

void put_subjects(Json& out, const Task& task, const std::vector<bool>& answers) {
  std::vector<Tally> subjects(task.subjects.size());
  for (std::size_t q = 0; q < answers.size(); ++q) {
    subjects.at(static_cast<std::size_t>(task.questions[q].subject)).add(answers[q]);
  }
  Json categories = Json::object();
  Json list = Json::array();
  double sum = 0;
  for (const std::string name : {"humanities", "stem", "social", "other"}) {
    Tally pooled;
    for (std::size_t s = 0; s < subjects.size(); ++s) {
      const char* category = mmlu_category(task.subjects[s]);
      REQUIRE(category != nullptr, "no category for " + task.subjects[s]);
      if (name != category) continue;
      pooled.right += subjects[s].right;
      pooled.n += subjects[s].n;
    }
    if (pooled.n == 0) continue;
    categories[name]["n"] = pooled.n;
    put(categories[name], "acc", pooled);
  }
  for (std::size_t s = 0; s < subjects.size(); ++s) {
    if (subjects[s].n == 0) continue;
    sum += subjects[s].mean();
    list.push_back(
        {{"subject", task.subjects[s]}, {"n", subjects[s].n}, {"acc", subjects[s].mean()}});
  }
  out["macro"] = sum / static_cast<double>(list.size());
  out["categories"] = std::move(categories);
  out["subjects"] = std::move(list);
}

void put_difference(Json& out, const std::string& ending, const std::vector<bool>& answers,
                    const std::vector<bool>& reference) {
  const auto n = static_cast<double>(answers.size());
  const auto difference = [&](std::size_t q) {
    return (answers[q] ? 1.0 : 0.0) - (reference[q] ? 1.0 : 0.0);
  };
  double sum = 0;
  for (std::size_t q = 0; q < answers.size(); ++q) sum += difference(q);
  const double mean = sum / n;
  out["difference" + ending] = mean;
  if (answers.size() < 2) return;
  double squares = 0;
  for (std::size_t q = 0; q < answers.size(); ++q) {
    squares += (difference(q) - mean) * (difference(q) - mean);
  }
  out["stderr" + ending] = std::sqrt(squares / (n - 1) / n);
}

}  // namespace

Json task_results(const Task& task, std::span<const double> log_likelihood) {
  REQUIRE(!task.questions.empty(), "a task without questions");
  const Right right = judge(task, log_likelihood);
  Json out;
  out["task"] = task.name;
  out["n"] = task.questions.size();
  put(out, "acc", tally_of(right.acc));
  if (task.has_acc_norm) put(out, "acc_norm", tally_of(right.acc_norm));
  if (!task.subjects.empty()) put_subjects(out, task, right.acc);
  return out;
}

Json paired_results(const Task& task, std::span<const double> log_likelihood,
                    std::span<const double> reference) {
  REQUIRE(!task.questions.empty(), "a task without questions");
  const Right model = judge(task, log_likelihood);
  const Right other = judge(task, reference);
  Json out;
  out["task"] = task.name;
  put_difference(out, "", model.acc, other.acc);
  if (task.has_acc_norm) put_difference(out, "_norm", model.acc_norm, other.acc_norm);
  return out;
}

}  // namespace engine
