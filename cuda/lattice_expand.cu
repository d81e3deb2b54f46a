// Midrise grids and lattice points in the layout of scheme_layout.h as dense matrices.
#include "cuda/check.h"
#include "cuda/scheme.h"
#include "cuda/types.cuh"
#include "cuda/unpack.cuh"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

constexpr int threads = 128;

struct LatticeArgs {
  const unsigned char* base;
  const unsigned char* table;
  const unsigned char* records;
  std::int64_t rows, cols, units, fixed, items;
  bool vectors;
};

// The eight coordinates of a word of nibbles less `zero`, halved.
__device__ inline void coordinates(std::uint32_t word, float zero, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = i / 2 + i % 2 * 4;
    v[i] = (static_cast<float>(word >> (4 * place) & 15U) - zero) * 0.5F;
  }
}

// Eight codes of a row: lane 4 g + t, u, upper as in scheme_layout.h. kBits of midrise.
template <int kBits>
struct MidriseEight {
  __device__ static void decode(const LatticeArgs& p, const unsigned char* record, int lane, int u,
                                int upper, float (&v)[8]) {
    const float scale = *reinterpret_cast<const float*>(p.base);
    constexpr float zero = static_cast<float>((1 << kBits) - 1) * 0.5F;
    LaneCodes<kBits, 0> codes;
    codes.load(record, lane);
#pragma unroll
    for (int all = 0; all < 4; ++all) {  // registers need places known in advance
#pragma unroll
      for (int e = 0; e < 8; ++e) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t code =
              codes.code(8 * all + 4 * (e / 4) + 2 * (e % 4 / 2) + half, e % 2);
          if (all == u && half == upper) v[e] = __fmul_rn(scale, static_cast<float>(code) - zero);
        }
      }
    }
  }
};

template <int kBits>
struct LatticeEight {
  __device__ static std::uint32_t e8p(const LatticeArgs& p, const unsigned char* at) {
    const auto* table = reinterpret_cast<const std::uint32_t*>(p.table);
    const unsigned code = *reinterpret_cast<const std::uint16_t*>(at);
    return __ldg(table + (code >> 8)) ^ __ldg(table + 256 + (code & 255U));
  }
  __device__ static void decode(const LatticeArgs& p, const unsigned char* record, int lane, int u,
                                int upper, float (&v)[8]) {
    const auto* scales = reinterpret_cast<const float*>(p.base);
    const int place = 16 * lane + 4 * u + 2 * upper;
    coordinates(e8p(p, record + place), 7.5F, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(scales[0], v[i]);
    if constexpr (kBits > 2) {
      float more[8];
      if constexpr (kBits == 4) {
        coordinates(e8p(p, record + 512 + place), 7.5F, more);
      } else {
        const auto* table = reinterpret_cast<const std::uint32_t*>(p.table);
        coordinates(__ldg(table + 512 + record[512 + 8 * lane + 2 * u + upper]), 8.0F, more);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __fadd_rn(v[i], __fmul_rn(scales[1], more[i]));
    }
  }
};

// A thread for each eight columns of a row; neighbouring threads, neighbouring columns.
template <class T, class Eight>
__global__ void __launch_bounds__(threads)
    lattice_expand_kernel(LatticeArgs p, T* out, std::int64_t stride) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= p.items) return;
  const std::int64_t row = item / (16 * p.units);
  const std::int64_t k = item % (16 * p.units);
  const std::int64_t col = 8 * k;
  if (col >= p.cols) return;
  const int r = static_cast<int>(row % 16), in_record = static_cast<int>(k % 16);
  const unsigned char* record = p.records + (row / 16 * p.units + k / 16) * p.fixed;
  float v[8];
  Eight::decode(p, record, 4 * (r % 8) + in_record % 4, in_record / 4, r / 8, v);
  Pack<T, 8> values;
#pragma unroll
  for (int i = 0; i < 8; ++i) values.v[i] = from_f32<T>(v[i]);
  T* to = out + row * stride + col;
  if (p.vectors && col + 8 <= p.cols) {
    *reinterpret_cast<Pack<T, 8>*>(to) = values;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (col + i < p.cols) to[i] = values.v[i];
    }
  }
}

template <class T, class Eight>
void expand_as(const LatticeArgs& p, const View& out, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(p.items, threads);
  REQUIRE(blocks <= INT32_MAX, "expand: a weight of " + out.shape());
  launch("lattice_expand", lattice_expand_kernel<T, Eight>, dim3(static_cast<unsigned>(blocks)),
         dim3(threads), 0, stream, p, static_cast<T*>(out.data), out.stride);
}

}  // namespace

void lattice_expand(const PackedWeight& w, View out, cudaStream_t stream) {
  const PackedShape& s = w.shape;
  const SchemePlaces places = scheme_places(s);
  const auto* base = static_cast<const unsigned char*>(w.records.data);
  const LatticeArgs p{base,
                      base + places.table,
                      base + places.records,
                      s.rows,
                      s.cols,
                      places.units,
                      places.fixed,
                      s.rows * places.units * 16,
                      aligned_rows(out, 16, 1)};
  dispatch_float(out.dtype, "expand", [&](auto type) {
    using T = decltype(type);
    if (s.kind == PackedKind::midrise) {
      if (s.bits == 2) return expand_as<T, MidriseEight<2>>(p, out, stream);
      if (s.bits == 3) return expand_as<T, MidriseEight<3>>(p, out, stream);
      return expand_as<T, MidriseEight<4>>(p, out, stream);
    }
    if (s.bits == 2) return expand_as<T, LatticeEight<2>>(p, out, stream);
    if (s.bits == 3) return expand_as<T, LatticeEight<3>>(p, out, stream);
    return expand_as<T, LatticeEight<4>>(p, out, stream);
  });
}

}  // namespace engine
