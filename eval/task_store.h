// Log-likelihoods of every choice in a file, to compare models question by question later.
#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "eval/tasks.h"

namespace engine {

// One safetensors file with an f64 tensor [questions, most choices] per task, NaN where a question
// has fewer choices; the metadata holds each task's protocol under its name. `log_likelihood`: one
// vector per task, choices in order.
void save_choices(const std::filesystem::path& file, std::span<const Task> tasks,
                  std::span<const std::vector<double>> log_likelihood);

// The stored log-likelihoods of `task`, choices in order. Throws FormatError for a file of another
// kind, Error(mismatch) unless it was made by the same protocol on as many questions with as many
// choices, naming what differs.
[[nodiscard]] std::vector<double> load_choices(const std::filesystem::path& file, const Task& task);

}  // namespace engine
