// The parts everything stands on: float conversions, memory accounting, random numbers, reports
// and option parsing.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "engine/core/args.h"
#include "engine/core/dtype.h"
#include "engine/core/memory.h"
#include "engine/core/report.h"
#include "engine/core/rng.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;

constexpr float infinity = std::numeric_limits<float>::infinity();

// The value of a 16-bit float from its definition. `exponent_bits` 5 (f16) or 8 (bf16).
double by_definition(std::uint32_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int top = (1 << exponent_bits) - 1, bias = top / 2;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & top;
  const double fraction = std::ldexp(double(bits & ((1U << mantissa_bits) - 1)), -mantissa_bits);
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  if (exponent == top) return fraction == 0 ? sign * HUGE_VAL : std::nan("");
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

template <class Half>
float widen(std::uint32_t bits) {
  return to_float(Half{static_cast<std::uint16_t>(bits)});
}
std::uint32_t narrow(f16, float v) { return to_f16(v).bits; }
std::uint32_t narrow(bf16, float v) { return to_bf16(v).bits; }

// All 65536 values, and around each gap between neighbours: the middle goes to the even one, what
// is a little above or below to the nearer one.
template <class Half>
void check_half(int exponent_bits) {
  const auto smallest = std::numeric_limits<float>::denorm_min();
  int failures = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const double expected = by_definition(bits, exponent_bits);
    const float value = widen<Half>(bits);
    if (std::isnan(expected)) {
      failures += std::isnan(value) && std::isnan(widen<Half>(narrow(Half{}, value))) ? 0 : 1;
      continue;
    }
    if (static_cast<double>(value) != expected || std::signbit(value) != std::signbit(expected)) {
      ++failures;
    }
    if (narrow(Half{}, value) != bits) ++failures;
    const std::uint32_t magnitude = bits & 0x7fffU;
    const double next = by_definition(magnitude + 1, exponent_bits);
    if (std::isinf(expected) || std::isnan(next)) continue;
    // Beyond the largest value the next one counts as if the exponent range went on.
    const double step = std::isinf(next)
                            ? std::abs(expected) - by_definition(magnitude - 1, exponent_bits)
                            : next - std::abs(expected);
    const double half = std::abs(expected) + 0.5 * step;
    const auto middle = static_cast<float>(half);
    if (static_cast<double>(middle) != half) continue;  // below f32's own subnormals: no middle
    const std::uint32_t sign = bits & 0x8000U;
    const auto rounded = [&](float v) { return narrow(Half{}, sign != 0 ? -v : v); };
    const std::uint32_t even = sign | (magnitude + (magnitude & 1U));
    if (rounded(middle) != even) ++failures;
    if (rounded(std::nextafter(middle, 0.0F)) != bits) ++failures;
    if (rounded(std::nextafter(middle, infinity)) != (sign | (magnitude + 1))) ++failures;
    if (middle <= smallest) ++failures;  // the cases above would not be three different ones
  }
  EXPECT_EQ(failures, 0);
}

TEST(DTypes, EveryF16RoundsAndReturns) { check_half<f16>(5); }

TEST(DTypes, EveryBf16RoundsAndReturns) { check_half<bf16>(8); }

TEST(DTypes, ExtremesAndNames) {
  EXPECT_EQ(to_f16(65519.99F).bits, 0x7bffU);
  EXPECT_EQ(to_f16(65520.0F).bits, 0x7c00U);
  EXPECT_EQ(to_f16(-1e30F).bits, 0xfc00U);
  EXPECT_EQ(to_f16(0x1p-25F).bits, 0U);
  EXPECT_EQ(to_f16(0x1.000002p-25F).bits, 1U);
  EXPECT_EQ(to_f16(-0.0F).bits, 0x8000U);
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()).bits, 0x7f80U);
  EXPECT_EQ(to_bf16(-infinity).bits, 0xff80U);
  // A NaN whose upper half alone would be an infinity.
  EXPECT_TRUE(std::isnan(to_float(to_bf16(std::bit_cast<float>(0x7f800001U)))));
  EXPECT_TRUE(std::isnan(to_float(to_f16(std::bit_cast<float>(0xff800001U)))));
  EXPECT_EQ(round_to(DType::f32, 1.2345678F), 1.2345678F);
  EXPECT_EQ(round_to(DType::f16, 1.0F + 0x1p-11F), 1.0F);
  EXPECT_EQ(round_to(DType::bf16, 1.0F + 0x1.8p-8F), 1.0F + 0x1p-7F);
  EXPECT_THROW((void)round_to(DType::i32, 1.0F), Error);
  for (const DType d :
       {DType::f32, DType::f16, DType::bf16, DType::f64, DType::i32, DType::i16, DType::u8}) {
    EXPECT_EQ(parse_dtype(dtype_name(d)), d);
    EXPECT_GE(dtype_bytes(d), 1U);
  }
  EXPECT_EQ(dtype_bytes(DType::f64) + dtype_bytes(DType::bf16) + dtype_bytes(DType::u8), 11U);
  expect_contains(error_of([] { (void)parse_dtype("fp16"); }), "fp16");
}

TEST(Views, WindowsStayInside) {
  std::vector<float> m(60);
  const View v = host_view(m.data(), 6, 10);
  const View w = v.row_range(2, 3).col_range(4, 5);
  EXPECT_EQ(w.host<float>(), m.data() + 24);
  EXPECT_EQ(w.stride, 10);
  EXPECT_FALSE(w.contiguous());
  EXPECT_TRUE(v.row_range(1, 2).contiguous());
  EXPECT_TRUE(w.row_range(0, 1).contiguous());
  EXPECT_EQ(v.reshape(4, 15).stride, 15);
  EXPECT_THROW((void)w.reshape(5, 3), Error);
  EXPECT_THROW((void)v.reshape(7, 9), Error);
  EXPECT_THROW((void)v.row_range(5, 2), Error);
  EXPECT_THROW((void)v.col_range(-1, 2), Error);
  EXPECT_THROW((void)v.as<double>(), Error);
  View device = v;
  device.device = DeviceKind::cuda;
  EXPECT_THROW((void)device.host<float>(), Error);
  EXPECT_EQ(device.as<float>(), m.data());
  EXPECT_TRUE(View{}.empty());
}

// A memory of limited size that fills what it hands out with 7 and counts what is out.
class SmallMemory final : public RawMemory {
 public:
  explicit SmallMemory(std::size_t limit) : limit_(limit) {}
  [[nodiscard]] std::string name() const override { return "small"; }
  [[nodiscard]] DeviceKind kind() const override { return DeviceKind::cpu; }
  void* allocate(std::size_t bytes) override {
    if (used + bytes > limit_) return nullptr;
    void* data = host_memory().allocate(bytes);
    used += bytes;
    host_memory().fill(data, 7, bytes);
    return data;
  }
  void release(void* data, std::size_t bytes) noexcept override {
    used -= bytes;
    host_memory().release(data, bytes);
  }
  void fill(void* data, int byte, std::size_t bytes) override {
    host_memory().fill(data, byte, bytes);
  }
  std::size_t used = 0;

 private:
  std::size_t limit_;
};

TEST(Memory, BuffersAreCountedWhileTheyLive) {
  SmallMemory memory(4096);
  Ledger ledger;
  {
    Buffer a(memory, ledger, MemTag::stats, DType::f32, 10, 10);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.view().data) % 256, 0U);
    EXPECT_EQ(a.view().shape(), "f32 [10, 10]");
    const std::int64_t one = ledger.entry("small").live_total;
    EXPECT_GE(one, 400);
    {
      const Buffer b(memory, ledger, MemTag::kv, DType::u8, 1, 1000);
      EXPECT_GE(ledger.entry("small").live_total, one + 1000);
    }
    Buffer moved = std::move(a);
    EXPECT_TRUE(a.empty());  // NOLINT: a moved-from buffer is documented to be empty
    EXPECT_EQ(ledger.entry("small").live_total, one);
    const std::string message =
        error_of([&] { const Buffer c(memory, ledger, MemTag::solver, DType::f64, 100, 100); });
    expect_contains(message, "small: out of memory");
    expect_contains(message, "solver");
    EXPECT_EQ(ledger.entry("small").live_total, one);
  }
  const Ledger::Entry e = ledger.entry("small");
  EXPECT_EQ(memory.used, 0U);
  EXPECT_EQ(e.live_total, 0);
  EXPECT_EQ(e.reserved, 0);
  EXPECT_EQ(e.peak_reserved, e.peak_total);
  EXPECT_EQ(e.peak_total, e.peak[static_cast<std::size_t>(MemTag::stats)] +
                              e.peak[static_cast<std::size_t>(MemTag::kv)]);
  EXPECT_EQ(ledger.entry("elsewhere").peak_total, 0);
  EXPECT_EQ(ledger.entries().size(), 1U);
}

// The same layout on a measuring and on a real arena. Returns the arena's peaks.
void lay_out(Arena& arena) {
  arena.make(MemTag::weights, DType::bf16, 3, 100);
  for (int i = 0; i < 3; ++i) {
    const Arena::Scope scope(arena);
    arena.make(MemTag::solver, DType::f64, 10 * (i + 1), 10);
    {
      const Arena::Scope inner(arena);
      arena.make(MemTag::workspace, DType::u8, 1, 5000 - 1000 * i);
    }
    arena.make(MemTag::solver, DType::u8, 1, 1);
  }
  arena.make(MemTag::kv, DType::f32, 0, 10);
}

TEST(Memory, MeasuringAnArenaPredictsIt) {
  Arena plan = Arena::measuring(DeviceKind::cpu);
  EXPECT_TRUE(plan.is_measuring());
  lay_out(plan);
  SmallMemory memory(1 << 20);
  Ledger ledger;
  {
    Arena arena(memory, ledger, plan.peak());
    EXPECT_FALSE(arena.is_measuring());
    EXPECT_EQ(arena.capacity(), plan.peak());
    lay_out(arena);
    EXPECT_EQ(arena.peak(), plan.peak());
    EXPECT_EQ(arena.tag_peaks(), plan.tag_peaks());
    const Ledger::Entry e = ledger.entry("small");
    EXPECT_EQ(e.peak, plan.tag_peaks());
    EXPECT_EQ(e.peak_total, plan.peak());
    EXPECT_EQ(e.reserved, plan.peak());
    EXPECT_LT(e.live_total, e.peak_total);
    const std::string message =
        error_of([&] { arena.make(MemTag::optimizer, DType::u8, 1, plan.peak()); });
    expect_contains(message, "optimizer");
  }
  EXPECT_EQ(memory.used, 0U);
  EXPECT_EQ(ledger.entry("small").live_total, 0);
  expect_contains(error_of([&] { const Arena arena(memory, ledger, 1 << 21); }), "small");
}

TEST(Memory, ScopesGiveBackInStackOrder) {
  SmallMemory memory(1 << 16);
  Ledger ledger;
  Arena arena(memory, ledger, 1 << 12);
  const View a = arena.make(MemTag::kv, DType::f32, 4, 4);
  View b, c;
  {
    const Arena::Scope scope(arena);
    b = arena.make(MemTag::kv, DType::f32, 4, 4);
  }
  {
    const Arena::Scope scope(arena);
    c = arena.make(MemTag::stats, DType::f32, 4, 4);
  }
  EXPECT_NE(a.data, b.data);
  EXPECT_EQ(b.data, c.data);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data) % 256, 0U);
  Arena moved = std::move(arena);
  EXPECT_NE(moved.make(MemTag::kv, DType::f32, 4, 4).data, a.data);
}

TEST(Memory, PoisonIsNotANumber) {
  SmallMemory memory(1 << 16);
  Ledger ledger;
  Arena plain(memory, ledger, 1 << 12), poisoned(memory, ledger, 1 << 12, true);
  EXPECT_EQ(plain.make(MemTag::kv, DType::u8, 1, 9).host<std::uint8_t>()[8], 7);
  EXPECT_TRUE(std::isnan(poisoned.make(MemTag::kv, DType::f32, 1, 9).host<float>()[8]));
  EXPECT_TRUE(std::isnan(to_float(poisoned.make(MemTag::kv, DType::f16, 1, 9).host<f16>()[8])));
  EXPECT_TRUE(std::isnan(to_float(poisoned.make(MemTag::kv, DType::bf16, 1, 9).host<bf16>()[8])));
}

TEST(Memory, HugeRequestsFailWithoutHarm) {
  Ledger ledger;
  expect_contains(error_of([&] {
                    const Buffer b(host_memory(), ledger, MemTag::kv, DType::u8, 1,
                                   std::int64_t{1} << 60);
                  }),
                  "out of memory");
  EXPECT_EQ(ledger.entry(host_memory().name()).reserved, 0);
}

// Known answers of the Random123 distribution, philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  const auto check = [](std::uint64_t seed, std::uint64_t stream, std::uint64_t at,
                        std::vector<std::uint32_t> expected) {
    const Philox4 r = philox(seed, stream, at);
    EXPECT_EQ(std::vector<std::uint32_t>(r.v, r.v + 4), expected);
  };
  check(0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check(~0ULL, ~0ULL, ~0ULL, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  // Counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  check(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88,
        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(Philox, DerivedValuesHaveTheirMoments) {
  constexpr int n = 200'000;
  double mean = 0, square = 0, fourth = 0, uniform = 0, uniform_square = 0;
  for (std::uint64_t i = 0; i < n; ++i) {
    const double b = bell_value(3, 9, i), u = uniform_value(3, 9, i);
    mean += b / n;
    square += b * b / n;
    fourth += b * b * b * b / n;
    uniform += u / n;
    uniform_square += u * u / n;
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
  }
  // Five standard errors each.
  EXPECT_NEAR(mean, 0.0, 5.0 / std::sqrt(n));
  EXPECT_NEAR(square, 1.0, 5.0 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth, 3.0 - 1.2 / 8.0, 0.05);  // the excess of a sum of eight uniforms
  EXPECT_NEAR(uniform, 0.5, 5.0 * std::sqrt(1.0 / 12.0 / n));
  EXPECT_NEAR(uniform_square, 1.0 / 3.0, 0.005);
  EXPECT_NE(bell_value(3, 9, 0), bell_value(4, 9, 0));
  EXPECT_NE(bell_value(3, 9, 0), bell_value(3, 10, 0));
}

TEST(Reports, TextShowsEveryValueOnce) {
  Json d;
  d["name"] = "x";
  d["count"] = 12;
  d["share"] = 0.25;
  d["tiny"] = 1.5e-9;
  d["flag"] = true;
  d["none"] = Json::object();
  d["list"] = Json::array({1, 2, 3});
  d["inner"]["deep"]["value"] = -7;
  Json a, b;
  a["row"] = "first";
  a["value"] = 1.0;
  b["row"] = "second";
  b["other"] = 5;
  d["table"] = Json::array({a, b});
  EXPECT_EQ(json_to_text(d),
            "name: x\n"
            "count: 12\n"
            "share: 0.2500\n"
            "tiny: 1.5e-09\n"
            "flag: true\n"
            "none: none\n"
            "list: [1,2,3]\n"
            "inner:\n"
            "  deep:\n"
            "    value: -7\n"
            "table:\n"
            "  row     value   other\n"
            "  first   1.0000\n"
            "  second          5\n");
}

TEST(Reports, TimesAddUpAndTheFileHoldsTheDocument) {
  const testing::TempDir dir;
  Report report("engine test");
  report.add_time("load", 1.5);
  report.add_time("load", 0.25);
  { const PhaseTimer timer(report, "solve"); }
  Ledger ledger;
  ledger.add("cpu", MemTag::kv, 100);
  ledger.add("cpu", MemTag::kv, -60);
  ledger.add("cpu", MemTag::stats, 30);
  report.add_ledger(ledger);
  report["extra"]["x"] = 1;
  EXPECT_EQ(report.document()["time_s"]["load"].get<double>(), 1.75);
  EXPECT_GE(report.document()["time_s"]["solve"].get<double>(), 0.0);
  EXPECT_EQ(report.document()["memory"][0]["peak_bytes"].get<int>(), 100);
  EXPECT_EQ(report.document()["memory"][0]["kv"].get<int>(), 100);
  EXPECT_EQ(report.document()["memory"][0]["stats"].get<int>(), 30);
  report.write_json(dir.path() / "r.json");
  EXPECT_EQ(read_json_file(dir.path() / "r.json"), report.document());
  expect_contains(report.to_text(), "command: engine test");
}

TEST(Args, ChoicesAreNamesWithADefault) {
  DType dtype = DType::f16;
  CLI::App app;
  add_choice<DType>(app, "--dtype", dtype, {{"f32", DType::f32}, {"f16", DType::f16}}, "The dtype");
  expect_contains(app.help(), "f32|f16");
  EXPECT_EQ(app.get_option("--dtype")->get_default_str(), "f16");
  app.parse("");
  EXPECT_EQ(dtype, DType::f16);
  app.parse("--dtype f32");
  EXPECT_EQ(dtype, DType::f32);
  const std::string message = error_of([&] { app.parse("--dtype F32"); });
  expect_contains(message, "--dtype: expected f32|f16, found \"F32\"");
}

}  // namespace
}  // namespace engine
