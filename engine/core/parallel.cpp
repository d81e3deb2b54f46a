#include "engine/core/parallel.h"

#include <algorithm>
#include <system_error>

#include "engine/core/error.h"

namespace engine {

ThreadPool::ThreadPool(int threads) {
  REQUIRE(threads >= 0, "negative thread count");
  const int wanted =
      threads > 0 ? threads : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  workers_.reserve(static_cast<std::size_t>(wanted));
  try {
    for (int i = 1; i < wanted; ++i) workers_.emplace_back([this] { worker(); });
  } catch (const std::system_error& e) {
    // Those that did start wait for work and must be told to go.
    shut_down();
    throw Error(ErrorCode::usage, "threads: expected a number that this system can start, found " +
                                      std::to_string(wanted) + " (" + e.what() + ")");
  }
}

ThreadPool::~ThreadPool() { shut_down(); }

void ThreadPool::shut_down() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& t : workers_) t.join();
  workers_.clear();
}

void ThreadPool::run(std::int64_t n, std::int64_t grain,
                     const std::function<void(std::int64_t, std::int64_t)>& body) {
  REQUIRE(grain > 0, "empty grain");
  if (n <= 0) return;
  if (workers_.empty() || n <= grain) {
    for (std::int64_t i = 0; i < n; i += grain) body(i, std::min(n, i + grain));
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    REQUIRE(body_ == nullptr, "ThreadPool::run is not reentrant");
    body_ = &body;
    n_ = n;
    grain_ = grain;
    next_ = 0;
    busy_ = size();
    failure_ = nullptr;
    ++generation_;
  }
  start_.notify_all();
  drain();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
  body_ = nullptr;
  if (failure_) std::rethrow_exception(failure_);
}

void ThreadPool::worker() {
  std::uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
    }
    drain();
  }
}

void ThreadPool::drain() {
  for (;;) {
    std::int64_t begin = 0;
    {
      const std::lock_guard lock(mutex_);
      if (next_ >= n_) {
        if (--busy_ == 0) done_.notify_all();
        return;
      }
      begin = next_;
      next_ += grain_;
    }
    try {
      (*body_)(begin, std::min(n_, begin + grain_));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_ = n_;
    }
  }
}

}  // namespace engine
