// A one-line progress bar on stderr with the time left; silent when stderr is no terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace engine {

class Progress {
 public:
  Progress(std::string label, std::int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  // `note` is shown behind the bar: what is being done now.
  void advance(std::int64_t steps = 1, const std::string& note = {});

 private:
  void draw(bool last);
  std::string label_;
  std::string note_;
  std::int64_t total_;
  std::int64_t done_ = 0;
  bool visible_;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point drawn_;
};

}  // namespace engine
