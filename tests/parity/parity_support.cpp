#include "tests/parity/parity_support.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

namespace engine::test {

namespace {

constexpr std::int64_t guard_bytes = 256;  // keeps the first element aligned as an arena would
constexpr std::byte poison{0xFF};

std::unique_ptr<Sides>& instance() {
  static std::unique_ptr<Sides> sides;
  return sides;
}

// Bell values from a table: drawing each one anew would dominate the run time of the suite. Its
// length is prime, so rows of usual lengths do not repeat each other.
const std::vector<float>& bell_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65521);
    for (std::size_t i = 0; i < t.size(); ++i) t[i] = bell_value(0x5eed, 0, i);
    return t;
  }();
  return table;
}

// One side's copy of the operands.
class SideCopy {
 public:
  SideCopy(Ops& ops, const std::vector<const Operand*>& operands) : ops_(ops) {
    for (const Operand* operand : operands) {
      if (operand->rows() == 0 || operand->cols() == 0) {
        buffers_.emplace_back();
        views_.emplace_back();
        continue;
      }
      const auto n = static_cast<std::int64_t>(operand->bytes().size());
      buffers_.emplace_back(ops.memory(), sides().ledger, MemTag::workspace, DType::u8, 1, n);
      const View& whole = buffers_.back().view();
      ops.upload(host_bytes(*operand), whole);
      views_.push_back(operand->view_in(whole.data, ops.kind()));
    }
    ops.synchronize();
  }

  [[nodiscard]] const std::vector<View>& views() const { return views_; }

  std::vector<Operand> fetch(const std::vector<const Operand*>& operands) {
    std::vector<Operand> out;
    for (std::size_t i = 0; i < operands.size(); ++i) {
      out.push_back(*operands[i]);
      if (buffers_[i].empty()) continue;
      ops_.download(buffers_[i].view(), host_bytes(out.back()));
    }
    return out;
  }

 private:
  static View host_bytes(const Operand& operand) {
    auto* data = const_cast<std::byte*>(operand.bytes().data());
    return make_view(data, DType::u8, DeviceKind::cpu, 1,
                     static_cast<std::int64_t>(operand.bytes().size()));
  }

  Ops& ops_;
  std::vector<Buffer> buffers_;
  std::vector<View> views_;
};

void expect_unharmed(const std::vector<const Operand*>& before, const std::vector<Operand>& after,
                     const char* side) {
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(after[i].broken_guard(), -1)
        << side << ": operand " << i << ": written outside its rows and columns";
    if (before[i]->role() != Role::input) continue;
    const Comparison c = compare_bytes(after[i].bytes(), before[i]->bytes());
    EXPECT_TRUE(c.ok) << side << ": input operand " << i << " changed: " << c.message;
  }
}

}  // namespace

void open_sides(const std::string& device) {
  instance() = std::make_unique<Sides>();
  Sides& s = *instance();
  const int threads = std::max(2, static_cast<int>(std::thread::hardware_concurrency()));
  s.reference_ops = make_cpu_ops(s.ledger, device == "cpu" ? 1 : threads);
  s.subject_ops = make_ops(device, s.ledger, threads);
  s.reference = std::make_unique<TraceOps>(*s.reference_ops);
  s.subject = std::make_unique<TraceOps>(*s.subject_ops);
  s.same_backend = device == "cpu";
}

void close_sides() { instance().reset(); }

Sides& sides() {
  REQUIRE(instance() != nullptr, "the parity suite needs its own main");
  return *instance();
}

const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::tight:
      return "tight";
    case Layout::wide:
      return "wide";
    case Layout::odd:
      return "odd";
  }
  return "?";
}

Operand::Operand(Role role, DType dtype, std::int64_t rows, std::int64_t cols, Layout layout)
    : role_(role), dtype_(dtype), rows_(rows), cols_(cols), stride_(cols), first_byte_(0) {
  const auto size = static_cast<std::int64_t>(dtype_bytes(dtype));
  if (layout == Layout::wide) stride_ = (cols + 31) / 16 * 16;
  if (layout == Layout::odd) stride_ = cols + (cols % 2 == 0 ? 3 : 2);
  first_byte_ = guard_bytes + (layout == Layout::odd ? size : 0);
  const std::int64_t last = first_byte_ + rows * stride_ * size;
  // One whole row and more behind the last: an op that runs one row too far hits it.
  bytes_.assign(static_cast<std::size_t>(last + stride_ * size + guard_bytes), poison);
}

View Operand::view_in(void* buffer, DeviceKind device) const {
  if (rows_ == 0 || cols_ == 0) return {};
  View v = make_view(static_cast<char*>(buffer) + first_byte_, dtype_, device, rows_, cols_);
  v.stride = stride_;
  return v;
}

std::size_t Operand::place(std::int64_t r, std::int64_t c) const {
  return static_cast<std::size_t>(first_byte_) +
         static_cast<std::size_t>(r * stride_ + c) * dtype_bytes(dtype_);
}

double Operand::get(std::int64_t r, std::int64_t c) const {
  const std::byte* at = bytes_.data() + place(r, c);
  const auto read = [at](auto v) {
    std::memcpy(&v, at, sizeof v);
    return v;
  };
  switch (dtype_) {
    case DType::f32:
      return static_cast<double>(read(float{}));
    case DType::f16:
      return static_cast<double>(to_float(read(f16{})));
    case DType::bf16:
      return static_cast<double>(to_float(read(bf16{})));
    case DType::f64:
      return read(double{});
    case DType::i32:
      return static_cast<double>(read(std::int32_t{}));
    case DType::i16:
      return static_cast<double>(read(std::int16_t{}));
    case DType::u8:
      return static_cast<double>(read(std::uint8_t{}));
  }
  return 0.0;
}

void Operand::put(std::int64_t r, std::int64_t c, double v) {
  std::byte* at = bytes_.data() + place(r, c);
  const auto write = [at](auto x) { std::memcpy(at, &x, sizeof x); };
  switch (dtype_) {
    case DType::f32:
      return write(static_cast<float>(v));
    case DType::f16:
      return write(to_f16(static_cast<float>(v)));
    case DType::bf16:
      return write(to_bf16(static_cast<float>(v)));
    case DType::f64:
      return write(v);
    case DType::i32:
      return write(static_cast<std::int32_t>(v));
    case DType::i16:
      return write(static_cast<std::int16_t>(v));
    case DType::u8:
      return write(static_cast<std::uint8_t>(v));
  }
}

Operand& Operand::fill(const std::function<double(std::int64_t, std::int64_t)>& value) {
  for (std::int64_t r = 0; r < rows_; ++r) {
    for (std::int64_t c = 0; c < cols_; ++c) put(r, c, value(r, c));
  }
  return *this;
}

Operand& Operand::bell(std::uint64_t seed, double scale) {
  const std::vector<float>& table = bell_table();
  std::size_t at = seed % table.size();
  for (std::int64_t r = 0; r < rows_; ++r) {
    for (std::int64_t c = 0; c < cols_; ++c) {
      put(r, c, static_cast<double>(table[at]) * scale);
      if (++at == table.size()) at = 0;
    }
  }
  return *this;
}

Operand& Operand::uniform(std::uint64_t seed, std::int64_t limit) {
  return fill([&](std::int64_t r, std::int64_t c) {
    const double u = uniform_value(seed, 1, static_cast<std::uint64_t>(r * cols_ + c));
    return std::floor(u * static_cast<double>(limit));
  });
}

std::vector<double> Operand::values() const {
  std::vector<double> out;
  out.reserve(static_cast<std::size_t>(rows_ * cols_));
  for (std::int64_t r = 0; r < rows_; ++r) {
    for (std::int64_t c = 0; c < cols_; ++c) out.push_back(get(r, c));
  }
  return out;
}

std::vector<std::int64_t> Operand::integers() const {
  REQUIRE(!is_float(dtype_), "integers of floats");
  std::vector<std::int64_t> out;
  for (const double v : values()) out.push_back(static_cast<std::int64_t>(v));
  return out;
}

std::vector<std::byte> Operand::element_bytes() const {
  std::vector<std::byte> out;
  const std::size_t row = static_cast<std::size_t>(cols_) * dtype_bytes(dtype_);
  out.reserve(static_cast<std::size_t>(rows_) * row);
  for (std::int64_t r = 0; r < rows_; ++r) {
    const auto* from = bytes_.data() + place(r, 0);
    out.insert(out.end(), from, from + row);
  }
  return out;
}

std::int64_t Operand::broken_guard() const {
  const std::size_t row = static_cast<std::size_t>(cols_) * dtype_bytes(dtype_);
  std::size_t guard = 0;
  const auto first_bad = [&](std::size_t end) -> std::int64_t {
    for (; guard < end; ++guard) {
      if (bytes_[guard] != poison) return static_cast<std::int64_t>(guard);
    }
    return -1;
  };
  for (std::int64_t r = 0; r < rows_ && cols_ > 0; ++r) {
    const std::int64_t bad = first_bad(place(r, 0));
    if (bad >= 0) return bad;
    guard = place(r, 0) + row;
  }
  return first_bad(bytes_.size());
}

Outcome run_both(const std::vector<const Operand*>& operands, const Body& body) {
  Outcome outcome;
  const auto run = [&](Ops& ops, const char* side) {
    SideCopy copy(ops, operands);
    body(ops, copy.views());
    std::vector<Operand> after = copy.fetch(operands);
    expect_unharmed(operands, after, side);
    return after;
  };
  outcome.expected = run(*sides().reference, "reference");
  outcome.actual = run(*sides().subject, "subject");
  return outcome;
}

Scratch::Scratch(Ops& ops, std::int64_t bytes) {
  if (bytes == 0) return;
  buffer_ = Buffer(ops.memory(), sides().ledger, MemTag::workspace, DType::u8, 1, bytes);
  ops.memory().fill(buffer_.view().data, 0xFF, static_cast<std::size_t>(bytes));
}

void expect_exact(const Outcome& outcome, std::size_t i) {
  const Operand& expected = outcome.expected.at(i);
  const Comparison c = compare_bytes(outcome.actual.at(i).element_bytes(), expected.element_bytes(),
                                     dtype_bytes(expected.dtype()));
  EXPECT_TRUE(c.ok) << "operand " << i << " (" << dtype_name(expected.dtype()) << ", "
                    << expected.cols() << " columns): " << c.message;
}

void expect_close(const Outcome& outcome, std::size_t i, const Tolerance& tolerance) {
  const Operand& expected = outcome.expected.at(i);
  const Comparison c = compare_close(outcome.actual.at(i).values(), expected.values(), tolerance);
  EXPECT_TRUE(c.ok) << "operand " << i << " (" << dtype_name(expected.dtype()) << ", "
                    << expected.cols() << " columns): " << c.message;
  if (sides().same_backend) expect_exact(outcome, i);
}

std::uint64_t seed_of(const std::string& name) {
  std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return hash >> 1;
}

std::string test_name(const std::string& text) {
  std::string out = text;
  for (char& c : out) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return out;
}

std::vector<double> row_norms(const Operand& x) {
  std::vector<double> out;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    double sum = 0.0;
    for (std::int64_t c = 0; c < x.cols(); ++c) sum += x.get(r, c) * x.get(r, c);
    out.push_back(std::sqrt(sum));
  }
  return out;
}

std::vector<std::int32_t> random_order(std::int64_t n, std::uint64_t seed) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (std::int64_t i = n - 1; i > 0; --i) {
    const double u = uniform_value(seed, 2, static_cast<std::uint64_t>(i));
    const auto j = static_cast<std::size_t>(u * static_cast<double>(i + 1));
    std::swap(order[static_cast<std::size_t>(i)], order[j]);
  }
  return order;
}

}  // namespace engine::test
