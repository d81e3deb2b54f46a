// Work that a thread of its own does in order while the caller goes on, with a bound on the bytes
// that wait.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace engine {

// After a task has thrown, the tasks behind it are dropped and every member rethrows its exception.
class WriteQueue {
 public:
  // `capacity`: bytes that may be held by tasks that are not done.
  explicit WriteQueue(std::int64_t capacity);
  // Drops the tasks that have not begun and waits for the one that has.
  ~WriteQueue();
  WriteQueue(const WriteQueue&) = delete;
  WriteQueue& operator=(const WriteQueue&) = delete;

  // Waits until `bytes` more fit; for more than the capacity, until nothing is left. Call it before
  // taking the memory.
  void wait_for_room(std::int64_t bytes);
  // Appends a task that holds `bytes`, which have room.
  void push(std::int64_t bytes, std::function<void()> task);
  // Waits until every task is done.
  void drain();

 private:
  struct Task {
    std::int64_t bytes = 0;
    std::function<void()> work;
  };
  void serve();
  void rethrow_failure() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  const std::int64_t capacity_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::int64_t held_ = 0;  // bytes of the waiting and the running tasks
  bool running_ = false;
  bool stop_ = false;
  std::exception_ptr failure_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace engine
