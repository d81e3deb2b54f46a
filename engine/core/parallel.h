// A small thread pool that runs ranges. The partition of a range depends on the range and the grain
// only, never on the number of threads, so reductions built on it are reproducible.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace engine {

class ThreadPool {
 public:
  // threads 0: as many as the machine has. The caller's thread is one of them.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end) for consecutive pieces of [0, n) of `grain` items (the last may be
  // shorter), in any order and on any thread; returns when all are done. The first exception is
  // rethrown here. Not reentrant: a body must not call run.
  void run(std::int64_t n, std::int64_t grain,
           const std::function<void(std::int64_t, std::int64_t)>& body);

 private:
  void worker();
  void drain();
  void shut_down();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(std::int64_t, std::int64_t)>* body_ = nullptr;
  std::int64_t n_ = 0;
  std::int64_t grain_ = 1;
  std::int64_t next_ = 0;
  std::int64_t busy_ = 0;
  std::uint64_t generation_ = 0;
  bool stop_ = false;
  std::exception_ptr failure_;
};

}  // namespace engine
