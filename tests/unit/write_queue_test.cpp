// The queue behind the driver: order, bound, errors.
#include "engine/quant/write_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "engine/core/error.h"

namespace engine {
namespace {

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(WriteQueue, RunsTasksInOrderOnOneThread) {
  WriteQueue queue(100);
  std::vector<int> seen;
  std::vector<std::thread::id> threads;
  for (int i = 0; i < 200; ++i) {
    queue.wait_for_room(30);
    queue.push(30, [&, i] {
      seen.push_back(i);
      threads.push_back(std::this_thread::get_id());
    });
  }
  queue.drain();
  std::vector<int> expected(200);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(seen, expected);
  EXPECT_NE(threads.front(), std::this_thread::get_id());
  EXPECT_EQ(std::vector<std::thread::id>(200, threads.front()), threads);
}

TEST(WriteQueue, HoldsNoMoreThanItsCapacity) {
  WriteQueue queue(100);
  std::atomic<int> held{0}, most{0};
  for (int i = 0; i < 300; ++i) {
    const int bytes = i % 7 == 0 ? 250 : 40;  // 250 alone, 40 two at a time
    queue.wait_for_room(bytes);
    const int now = held += bytes;
    most = std::max(most.load(), now);
    EXPECT_LE(now, bytes == 250 ? 250 : 100);
    queue.push(bytes, [&, bytes] { held -= bytes; });
  }
  queue.drain();
  EXPECT_EQ(held, 0);
  EXPECT_EQ(most, 250);
}

TEST(WriteQueue, AFailureComesOutOfEveryLaterCallAndDropsWhatWaits) {
  WriteQueue queue(1000);
  std::promise<void> go;
  bool ran = false;
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watched = held;
  queue.push(1, [&] {
    go.get_future().wait();
    throw Error(ErrorCode::io, "disk full");
  });
  queue.push(900, [&ran, held = std::move(held)] { ran = true; });
  go.set_value();
  EXPECT_EQ(error_of([&] { queue.wait_for_room(900); }), "disk full");
  EXPECT_EQ(error_of([&] { queue.drain(); }), "disk full");
  EXPECT_EQ(error_of([&] { queue.push(0, [&ran] { ran = true; }); }), "disk full");
  EXPECT_EQ(error_of([&] { queue.wait_for_room(0); }), "disk full");
  EXPECT_TRUE(watched.expired());
  EXPECT_FALSE(ran);
}

TEST(WriteQueue, DestructionDropsWhatHasNotBegun) {
  std::promise<void> begun, go;
  std::atomic<int> done{0};
  std::thread release;
  {
    WriteQueue queue(1000);
    queue.push(1, [&] {
      begun.set_value();
      go.get_future().wait();
      ++done;
    });
    for (int i = 0; i < 10; ++i) queue.push(1, [&] { done += 100; });
    begun.get_future().wait();
    release = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      go.set_value();
    });
  }
  release.join();
  EXPECT_EQ(done, 1);
}

}  // namespace
}  // namespace engine
