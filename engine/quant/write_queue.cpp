#include "engine/quant/write_queue.h"

#include <string>
#include <system_error>
#include <utility>

#include "engine/core/error.h"

namespace engine {

WriteQueue::WriteQueue(std::int64_t capacity) : capacity_(capacity) {
  try {
    thread_ = std::thread([this] { serve(); });
  } catch (const std::system_error& e) {
    throw Error(ErrorCode::usage,
                std::string("threads: expected that this system can start one more for writing, "
                            "found ") +
                    e.what());
  }
}

WriteQueue::~WriteQueue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    tasks_.clear();
  }
  changed_.notify_all();
  thread_.join();
}

void WriteQueue::wait_for_room(std::int64_t bytes) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return failure_ || held_ == 0 || held_ + bytes <= capacity_; });
  rethrow_failure();
}

void WriteQueue::push(std::int64_t bytes, std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    rethrow_failure();
    tasks_.push_back({bytes, std::move(task)});
    held_ += bytes;
  }
  changed_.notify_all();
}

void WriteQueue::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return failure_ || (tasks_.empty() && !running_); });
  rethrow_failure();
}

void WriteQueue::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || !tasks_.empty(); });
    if (stop_) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = true;
    lock.unlock();
    std::exception_ptr failure;
    try {
      task.work();
    } catch (...) {
      failure = std::current_exception();
    }
    task.work = nullptr;  // its memory is free before its bytes are counted as such
    lock.lock();
    running_ = false;
    held_ -= task.bytes;
    if (failure) {
      failure_ = failure;
      tasks_.clear();
    }
    changed_.notify_all();
    if (failure) return;
  }
}

}  // namespace engine
