// CpuOps: PB-LLM's compact codes, there and back (engine/ops/pbllm_ops.h).
#include <algorithm>
#include <bit>
#include <string>

#include "engine/ops/cpu_ops.h"

namespace engine {

namespace {

constexpr std::int64_t split_rows = 16;  // rows that one task splits

std::int64_t split_tasks(std::int64_t rows) { return (rows + split_rows - 1) / split_rows; }

// counts[i] = the sum of those before i; returns the sum of all.
std::int64_t sum_up(std::int64_t* counts, std::int64_t n) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t count = counts[i];
    counts[i] = sum;
    sum += count;
  }
  return sum;
}

// `bits` bits (1 to 8) from bit `at` on. Reads no byte behind the last of them.
unsigned read_bits(const std::uint8_t* bytes, std::int64_t at, int bits) {
  const auto shift = static_cast<int>(at % 8);
  unsigned window = bytes[at / 8];
  if (shift + bits > 8) window |= static_cast<unsigned>(bytes[at / 8 + 1]) << 8U;
  return (window >> shift) & ((1U << bits) - 1U);
}

bool shaped(const View& v, DType dtype, std::int64_t rows, std::int64_t cols) {
  return v.dtype == dtype && v.rows == rows && v.cols == cols;
}

template <class T>
void decode_row(const PbllmDecode& p, std::int64_t row, std::int64_t rank, T* out) {
  const std::int64_t d = p.out.cols, group = d / p.scales.cols;
  const std::uint8_t* bitmap = p.bitmap.host<std::uint8_t>() + row * p.bitmap.stride;
  const auto* signs = p.signs.host<std::uint8_t>();
  const auto* high = p.high.host<std::uint8_t>();
  const float* scales = p.scales.host<float>() + row * p.scales.stride;
  const float* means = p.means.empty() ? nullptr : p.means.host<float>() + row * p.means.stride;
  const float high_scale = p.high_scales.host<float>()[row * p.high_scales.stride];
  const std::int32_t high_zero = p.high_zeros.host<std::int32_t>()[row * p.high_zeros.stride];
  std::int64_t low = row * d - rank;  // the place of the next sign; rank: that of the next code
  for (std::int64_t unit = 0; unit < p.scales.cols; ++unit) {
    for (std::int64_t j = unit * group; j < (unit + 1) * group; ++j) {
      float value = 0.0F;
      if ((bitmap[j / 8] >> (j % 8) & 1) != 0) {
        const std::int64_t code = read_bits(high, rank++ * p.high_bits, p.high_bits);
        value = high_scale * static_cast<float>(code - high_zero);
      } else {
        value = read_bits(signs, low++, 1) != 0 ? scales[unit] : -scales[unit];
        if (means != nullptr) value = means[unit] + value;
      }
      store(out[j], value);
    }
  }
}

}  // namespace

std::int64_t CpuOps::pbllm_split_bytes(std::int64_t rows, std::int64_t /*d*/) {
  return split_tasks(rows) * static_cast<std::int64_t>(sizeof(std::int64_t));
}

void CpuOps::pbllm_split(View mask, View codes, View out, View ones, View workspace) {
  const std::int64_t rows = mask.rows, d = mask.cols, n = rows * d;
  REQUIRE(n > 0 && n < (std::int64_t{1} << 31), "mask " + mask.shape());
  REQUIRE(shaped(mask, DType::u8, rows, d), "mask " + mask.shape());
  REQUIRE(shaped(codes, DType::u8, rows, d), "codes " + codes.shape());
  REQUIRE(shaped(out, DType::u8, 1, n), "out " + out.shape());
  REQUIRE(shaped(ones, DType::i32, 1, 1), "ones " + ones.shape());
  REQUIRE(workspace.bytes() >= pbllm_split_bytes(rows, d),
          "split workspace, found " + workspace.shape());
  const auto* flags = mask.host<std::uint8_t>();
  const auto* values = codes.host<std::uint8_t>();
  auto* before = reinterpret_cast<std::int64_t*>(workspace.host<std::uint8_t>());
  pool_.run(rows, split_rows, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t count = 0;
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t j = 0; j < d; ++j) count += flags[row * mask.stride + j] != 0 ? 1 : 0;
    }
    before[begin / split_rows] = count;
  });
  const std::int64_t total = sum_up(before, split_tasks(rows));
  *ones.host<std::int32_t>() = static_cast<std::int32_t>(total);
  pool_.run(rows, split_rows, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t salient = before[begin / split_rows];
    std::uint8_t* low = out.host<std::uint8_t>() + begin * d - salient;
    std::uint8_t* high = out.host<std::uint8_t>() + n - total + salient;
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t j = 0; j < d; ++j) {
        const std::uint8_t code = values[row * codes.stride + j];
        if (flags[row * mask.stride + j] != 0) {
          *high++ = code;
        } else {
          *low++ = code;
        }
      }
    }
  });
}

void CpuOps::pbllm_decode(const PbllmDecode& p) {
  const std::int64_t rows = p.out.rows, d = p.out.cols, groups = p.scales.cols;
  REQUIRE(rows > 0 && d > 0, "out " + p.out.shape());
  REQUIRE(p.high_bits >= 1 && p.high_bits <= 8, std::to_string(p.high_bits) + " bits");
  REQUIRE(groups > 0 && d % groups == 0 && shaped(p.scales, DType::f32, rows, groups),
          "scales " + p.scales.shape());
  REQUIRE(p.means.empty() || shaped(p.means, DType::f32, rows, groups), "means " + p.means.shape());
  REQUIRE(shaped(p.bitmap, DType::u8, rows, (d + 7) / 8), "bitmap " + p.bitmap.shape());
  REQUIRE(shaped(p.signs, DType::u8, 1, p.signs.cols), "signs " + p.signs.shape());
  REQUIRE(shaped(p.high, DType::u8, 1, p.high.cols), "codes " + p.high.shape());
  REQUIRE(shaped(p.high_scales, DType::f32, rows, 1), "scales " + p.high_scales.shape());
  REQUIRE(shaped(p.high_zeros, DType::i32, rows, 1), "zeros " + p.high_zeros.shape());
  REQUIRE(p.out.dtype == DType::f32 || p.out.dtype == DType::f16 || p.out.dtype == DType::bf16,
          "out " + p.out.shape());
  REQUIRE(p.workspace.bytes() >= pbllm_decode_bytes(rows),
          "decode workspace, found " + p.workspace.shape());
  auto* before = reinterpret_cast<std::int64_t*>(p.workspace.host<std::uint8_t>());
  const auto* bitmap = p.bitmap.host<std::uint8_t>();
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::uint8_t* bytes = bitmap + row * p.bitmap.stride;
    before[row] = 0;
    for (std::int64_t i = 0; i < p.bitmap.cols; ++i) before[row] += std::popcount(bytes[i]);
  }
  sum_up(before, rows);
  pool_.run(rows, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = row * p.out.stride;
      if (p.out.dtype == DType::f32) {
        decode_row(p, row, before[row], p.out.host<float>() + at);
      } else if (p.out.dtype == DType::f16) {
        decode_row(p, row, before[row], p.out.host<f16>() + at);
      } else {
        decode_row(p, row, before[row], p.out.host<bf16>() + at);
      }
    }
  });
}

}  // namespace engine
