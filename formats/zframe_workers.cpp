#include "formats/zframe_workers.h"

#include <string>
#include <system_error>

#include "formats/error.h"

namespace engine {

Workers::~Workers() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::run(unsigned count, const std::function<void(unsigned)>& body) {
  if (count <= 1) {
    if (count == 1) body(0);
    return;
  }
  try {
    threads_.reserve(count - 1);
    while (threads_.size() < count - 1) {
      const auto worker = static_cast<unsigned>(threads_.size() + 1);
      threads_.emplace_back([this, worker, seen = runs_] { serve(worker, seen); });
    }
  } catch (const std::system_error& e) {
    throw Error(ErrorCode::usage, "threads: expected a number that this system can start, found " +
                                      std::to_string(count) + " (" + e.what() + ")");
  }
  {
    const std::lock_guard lock(mutex_);
    body_ = &body;
    count_ = count;
    busy_ = count - 1;
    ++runs_;
  }
  start_.notify_all();
  body(0);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
}

void Workers::serve(unsigned worker, std::uint64_t seen) {
  std::unique_lock lock(mutex_);
  while (true) {
    start_.wait(lock, [&] { return stop_ || runs_ != seen; });
    if (stop_) return;
    seen = runs_;
    if (worker >= count_) continue;
    const auto* body = body_;
    lock.unlock();
    (*body)(worker);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace engine
