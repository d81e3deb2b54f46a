// scheme_product for signs with salient weights between them.
#include "cuda/scheme_kernel.cuh"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

// Signs everywhere by tensor cores, - where a weight is salient; then each salient weight adds its
// difference to that. Lane 2 r + h has those of row r in column block h of the two of a record.
template <class T, int kRows>
struct SalientCodec {
  static constexpr bool kOwnOrder = false;
  static constexpr int kBlocks = 2;
  static constexpr bool kShare = scheme_shares(PackedKind::salient, kRows);

  float2 alpha, mu;    // by row: of rows g and g + 8
  float level;         // by row: of row r, what sign - means
  float scale, zero;   // of row r
  float extra[kRows];  // the sums of salient weights, of row r and block h

  __device__ static uint2 look(const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                               int unit) {
    const unsigned* at =
        reinterpret_cast<const unsigned*>(w.table) + std::int64_t{tile} * args.units + unit;
    return {__ldg(at), __ldg(at + 1)};
  }
  __device__ static SchemeRecord locate(const SchemeArgs<T>&, const SchemeWeight& w, int, int,
                                        uint2 place) {
    return {w.records + std::int64_t{place.x} * 16, static_cast<int>((place.y - place.x) * 16)};
  }

  __device__ void load_levels(const unsigned char* at, int kind, int g) {
    if (kind == 0) {
      alpha = *reinterpret_cast<const float2*>(at + 8 * g);
      mu = *reinterpret_cast<const float2*>(at + 64 + 8 * g);
      return;
    }
    const std::uint32_t a = *reinterpret_cast<const std::uint32_t*>(at + 4 * g);
    const std::uint32_t m = *reinterpret_cast<const std::uint32_t*>(at + 32 + 4 * g);
    if (kind == 1) {
      alpha = __half22float2(*reinterpret_cast<const __half2*>(&a));
      mu = __half22float2(*reinterpret_cast<const __half2*>(&m));
    } else {
      alpha = {__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000U)};
      mu = {__uint_as_float(m << 16), __uint_as_float(m & 0xffff0000U)};
    }
  }
  __device__ static float one(const unsigned char* at, int kind, int place) {
    const float2 pair = load_scale_pair(at, kind, place & ~1);
    return place % 2 == 0 ? pair.x : pair.y;
  }

  __device__ void begin_tile(const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                             const SchemeLane& l) {
    const unsigned char* unit = w.base + std::int64_t{tile} * args.row_units;
    const unsigned char* zeros = unit + (args.scale_kind == 0 ? 64 : 32);
    const int place = l.lane / 2 % 8 * 2 + l.lane / 16;
    scale = one(unit, args.scale_kind, place);
    zero = static_cast<float>(zeros[place]);
    if (args.by_row) {
      alpha = load_scale_pair(zeros + 16, args.scale_kind, 2 * l.g);
      mu = load_scale_pair(zeros + 16, args.scale_kind, 16 + 2 * l.g);
      level =
          one(zeros + 16, args.scale_kind, 16 + place) - one(zeros + 16, args.scale_kind, place);
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) extra[n] = 0.0F;
  }

  // Adds a lane's entries, `left` of them; load(i): the i-th word of two. The word after the last
  // turn's is asked for too, not used.
  template <class Load>
  __device__ void add_entries(const SchemeArgs<T>& args, int left, std::uint32_t x, Load&& load) {
    const float none = 8388608.0F + zero;
    // What entry `half` of a word says the weight is; `x` with its low byte as the entry's.
    const auto weight = [&](std::uint32_t word, int half) {
      const std::uint32_t steps = __byte_perm(word, 0x4b000000U, half == 0 ? 0x7441U : 0x7443U);
      return fmaf(scale, __uint_as_float(steps) - none, -level);  // the difference is exact
    };
    const auto column = [&](std::uint32_t word, int half) {
      return __byte_perm(word, x, half == 0 ? 0x7650U : 0x7652U);
    };
    const auto value = [&](std::uint32_t at, int n) {
      const std::uint32_t bits = shared_2(
          n == 0 ? at : at + static_cast<std::uint32_t>(min(n, args.rows - 1) * args.x_row_bytes));
      if constexpr (std::is_same_v<T, __half>) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
      } else {
        return __uint_as_float(bits << 16);
      }
    };
    std::uint32_t one = load(0), two = load(1);
    int i = 2;
#pragma unroll 1
    for (; left >= 4; left -= 4, i += 2) {
      const std::uint32_t words[2] = {one, two};
      one = load(i);
      two = load(i + 1);
      // All four of a row asked for before the first is used.
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = value(column(words[k / 2], k % 2), n);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          extra[n] = fmaf(weight(words[k / 2], k % 2), values[k], extra[n]);
        }
      }
    }
    const std::uint32_t words[2] = {left > 0 ? one : 0U, left > 2 ? two : 0U};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float w = k < left ? weight(words[k / 2], k % 2) : 0.0F;
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        extra[n] = fmaf(w, value(column(words[k / 2], k % 2), n), extra[n]);
      }
    }
  }

  __device__ void add(SchemeSums& acc, const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                      int unit, const unsigned char* record, const SchemeLane& l) {
    const int levels_bytes = args.scale_kind == 0 ? 128 : 64;
    const std::uint32_t at = shared_address(record);
    // Where the lane's entries end, and those of all.
    const std::uint32_t word = shared_2(at + 512 + 2 * l.lane);
    const std::uint32_t end = shared_2(at + 512 + 62);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int block = 2 * unit + h;
      SchemeSums part = {0.0F, 0.0F, 0.0F, 0.0F};
      add_signs<T>(part, at + 256 * h + 8 * l.lane, l.x + 256 * block);
      if (!args.by_row) {
        load_levels(record + salient_head + h * levels_bytes, args.scale_kind, l.g);
        if (l.t % 2 == h) level = l.t < 2 ? mu.x - alpha.x : mu.y - alpha.y;
      }
      add_levels(acc, part, alpha, mu, block_sums(l, block));
    }
    if (!args.by_row) {
      // Lane 4 g + t has it for row g or g + 8 (t / 2) and block t % 2.
      const int row = l.lane / 2;
      level = __shfl_sync(0xffffffffU, level, row % 8 * 4 + row / 8 * 2 + l.lane % 2);
    }
    std::uint32_t first = __shfl_up_sync(0xffffffffU, word, 1) / 2;
    if (l.lane == 0) first = 0;
    const int left = static_cast<int>(word / 2 * 2 - word % 2 - 2 * first);
    const std::uint32_t x = l.base + 256 * (2 * unit + l.lane % 2);  // of row 0
    if (args.fixed + static_cast<int>(end / 2 * 4) <= args.stage_bytes) {
      const std::uint32_t from = at + args.fixed + 4 * first;
      add_entries(args, left, x, [&](int i) { return shared_4(from + 4 * i); });
    } else {  // where they lie
      const unsigned place =
          __ldg(reinterpret_cast<const unsigned*>(w.table) + tile * args.units + unit);
      const auto* from =
          reinterpret_cast<const unsigned*>(w.records + std::int64_t{place} * 16 + args.fixed) +
          first;
      add_entries(args, left, x, [&](int i) { return 2 * i < left ? __ldg(from + i) : 0U; });
    }
  }

  __device__ void finish_tile(const SchemeArgs<T>& args, float* mine, const SchemeLane& l) {
    if (args.units * (static_cast<int>(threadIdx.x) / 32) / scheme_warps ==
        args.units * (static_cast<int>(threadIdx.x) / 32 + 1) / scheme_warps) {
      return;  // no columns, nothing begun
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const float both = extra[n] + __shfl_xor_sync(0xffffffffU, extra[n], 1);
      if (n < args.rows && l.lane % 2 == 0) mine[n * 16 + l.lane / 2] += both;
    }
  }
};

}  // namespace

template <class T>
SchemeKernel<T> scheme_kernel_salient(int rows) {
  if (rows <= 1) return scheme_product_kernel<T, SalientCodec<T, 1>>;
  if (rows <= 2) return scheme_product_kernel<T, SalientCodec<T, 2>>;
  if (rows <= 4) return scheme_product_kernel<T, SalientCodec<T, 4>>;
  return scheme_product_kernel<T, SalientCodec<T, 8>>;
}
template SchemeKernel<__half> scheme_kernel_salient<__half>(int);
template SchemeKernel<__nv_bfloat16> scheme_kernel_salient<__nv_bfloat16>(int);

}  // namespace engine
