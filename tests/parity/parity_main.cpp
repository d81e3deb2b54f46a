// Compares a backend with the CPU reference, op by op.
//
//   parity_tests [--device cpu|cuda:N] [--list] [GoogleTest options]
//
// Without --device the first GPU is taken if there is one, else the CPU. With cpu, one thread is
// compared with several, which must give the same bits. Seeds follow from the names of the cases.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <vector>

#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

// Registered last: every op of the contract ran on both sides. What needs recordings is demanded
// only of a side that can record.
class Coverage : public ::testing::Test {
 public:
  void TestBody() override {
    expect_all_ran(*sides().reference, "the reference");
    expect_all_ran(*sides().subject, "the backend under test");
  }

 private:
  static void expect_all_ran(TraceOps& side, const char* where) {
    const auto stats = side.stats();
    for (const std::string& name : TraceOps::op_names()) {
      if (!side.can_record() && (name == "record" || name == "replay")) continue;
      EXPECT_GT(stats.at(name).calls, 0) << name << " never ran on " << where;
    }
  }
};

struct Arguments {
  std::string device;
  bool list = false;
  bool usage_error = false;
};

// What GoogleTest left over.
Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--list") {
      a.list = true;
    } else if (arg == "--device" && i + 1 < argc) {
      a.device = argv[++i];
    } else {
      std::fprintf(stderr, "unknown argument \"%s\"; usage: %s [--device cpu|cuda:N] [--list]\n",
                   arg.c_str(), argv[0]);
      a.usage_error = true;
    }
  }
  return a;
}

int run(int argc, char** argv) {
  // --list is known before GoogleTest parses, because listing is one of its own flags.
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--list") GTEST_FLAG_SET(list_tests, true);
  }
  ::testing::InitGoogleTest(&argc, argv);
  const Arguments arguments = parse(argc, argv);
  if (arguments.usage_error) return 2;
  ::testing::RegisterTest("Coverage", "EveryOpRanOnBothSides", nullptr, nullptr, __FILE__, __LINE__,
                          []() -> ::testing::Test* { return new Coverage; });
  if (arguments.list) return RUN_ALL_TESTS();

  std::string device = arguments.device;
  if (device.empty()) device = cuda_device_count() > 0 ? "cuda:0" : "cpu";
  try {
    open_sides(device);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  for (Ops* ops : {sides().reference_ops.get(), sides().subject_ops.get()}) {
    const DeviceInfo info = ops->info();
    std::printf("%s: %s: %s (%s)\n", ops == sides().reference_ops.get() ? "reference" : "subject  ",
                info.name.c_str(), info.model.c_str(), info.features.c_str());
  }
  const int result = RUN_ALL_TESTS();
  std::printf("%-28s %8s %14s %16s\n", "op", "calls", "bytes", "flops");
  for (const auto& [name, s] : sides().subject->stats()) {
    std::printf("%-28s %8lld %14lld %16lld\n", name.c_str(), static_cast<long long>(s.calls),
                static_cast<long long>(s.bytes), static_cast<long long>(s.flops));
  }
  close_sides();
  return result;
}

}  // namespace
}  // namespace engine::test

int main(int argc, char** argv) { return engine::test::run(argc, argv); }
