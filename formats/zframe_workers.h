// Threads that stay between calls, for work that is cut into chunks.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace engine {

// Threads start when a call first needs them and end with the object. One run() at a time.
class Workers {
 public:
  Workers() = default;
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Calls body(0) on this thread and body(1) to body(count - 1) on others, at the same time;
  // returns when all have returned. `body` must not throw. Error(usage) if the system cannot start
  // so many threads; nothing was called then.
  void run(unsigned count, const std::function<void(unsigned)>& body);

 private:
  void serve(unsigned worker, std::uint64_t seen);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(unsigned)>* body_ = nullptr;
  unsigned count_ = 0;
  unsigned busy_ = 0;
  std::uint64_t runs_ = 0;
  bool stop_ = false;
};

}  // namespace engine
