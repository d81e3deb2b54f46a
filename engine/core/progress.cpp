#include "engine/core/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace engine {
namespace {

std::string clock_text(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  char text[32];
  if (s >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", s / 60, s % 60);
  }
  return text;
}

}  // namespace

Progress::Progress(std::string label, std::int64_t total)
    : label_(std::move(label)),
      total_(std::max<std::int64_t>(total, 1)),
      visible_(isatty(STDERR_FILENO) != 0),
      start_(std::chrono::steady_clock::now()),
      drawn_(start_) {
  draw(false);
}

Progress::~Progress() {
  if (visible_) {
    draw(true);
    std::fputc('\n', stderr);
  }
}

void Progress::advance(std::int64_t steps, const std::string& note) {
  done_ = std::min(total_, done_ + steps);
  note_ = note;
  const auto now = std::chrono::steady_clock::now();
  if (now - drawn_ > std::chrono::milliseconds(100) || done_ == total_) {
    drawn_ = now;
    draw(false);
  }
}

void Progress::draw(bool last) {
  if (!visible_) return;
  constexpr int width = 30;
  const double share = static_cast<double>(done_) / static_cast<double>(total_);
  const double spent =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const int filled = static_cast<int>(share * width);
  std::string bar(static_cast<std::size_t>(filled), '#');
  bar.resize(width, '.');
  std::string time = clock_text(spent) + " spent";
  if (!last && done_ > 0 && done_ < total_)
    time += ", " + clock_text(spent / share - spent) + " left";
  std::fprintf(stderr, "\r\033[K%s [%s] %3d%%  %s  %s", label_.c_str(), bar.c_str(),
               static_cast<int>(share * 100), time.c_str(), last ? "" : note_.c_str());
  std::fflush(stderr);
}

}  // namespace engine
