// scheme_product for signs with salient weights between them.
#include "cuda/scheme_kernel.cuh"

namespace engine {
namespace {

// Signs everywhere by tensor cores, - where a weight is salient; then each salient weight adds its
// difference to that. Lane 2 r + h has those of row r in column block h of the two of a record.
template <class T, int kRows>
struct SalientCodec {
  static constexpr bool kOwnOrder = false;
  static constexpr int kBlocks = 2;

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

  __device__ void add(SchemeSums& acc, const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                      int unit, const unsigned char* record, const SchemeLane& l) {
    const int levels_bytes = args.scale_kind == 0 ? 128 : 64;
    const int place = l.lane / 2 % 8 * 2 + l.lane / 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int block = 2 * unit + h;
      SchemeSums part = {0.0F, 0.0F, 0.0F, 0.0F};
      add_signs<T>(part, shared_address(record) + 256 * h + 8 * l.lane, l.x + 256 * block);
      if (!args.by_row) {
        const unsigned char* levels = record + 544 + h * levels_bytes;
        alpha = load_scale_pair(levels, args.scale_kind, 2 * l.g);
        mu = load_scale_pair(levels, args.scale_kind, 16 + 2 * l.g);
        if (h == l.lane % 2) {
          level = one(levels, args.scale_kind, 16 + place) - one(levels, args.scale_kind, place);
        }
      }
      add_levels(acc, part, alpha, mu, block_sums(l, block));
    }

    // The entries of all lanes take turns, so that a warp reads neighbours.
    constexpr unsigned all = 0xffffffffU;
    constexpr int batch = 4;
    const int count = record[512 + l.lane];
    const int longest = static_cast<int>(__reduce_max_sync(all, static_cast<unsigned>(count)));
    const unsigned below = (1U << l.lane) - 1U;
    const std::uint32_t near = shared_address(record) + args.fixed;
    const int near_count = (args.stage_bytes - args.fixed) / 2;
    // Those beyond the stage are read where they lie.
    const auto far = reinterpret_cast<const std::uint16_t*>(
        w.records +
        std::int64_t{__ldg(reinterpret_cast<const unsigned*>(w.table) + tile * args.units + unit)} *
            16 +
        args.fixed);
    const std::uint32_t x = l.x - 16 * l.t -
                            static_cast<std::uint32_t>(min(l.g, args.rows - 1) * args.x_row_bytes) +
                            256 * (2 * unit + l.lane % 2);
    int done = 0;  // entries before this turn's
#pragma unroll 1
    for (int i = 0; i < longest; i += batch) {
      std::uint32_t entry[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const bool on = i + k < count;
        const unsigned lanes = __ballot_sync(all, on);
        const int at = done + __popc(lanes & below);
        done += __popc(lanes);
        entry[k] = 0;
        if (on) entry[k] = at < near_count ? shared_2(near + 2 * at) : __ldg(far + at);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (i + k >= count) continue;
        const float steps =
            __uint_as_float(0x4b000000U | entry[k] >> 8) - (8388608.0F + zero);  // exact
        const float v = fmaf(scale, steps, -level);
        const std::uint32_t column = x + 2 * (entry[k] & 0xffU);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const std::uint32_t bits = shared_2(
              column + static_cast<std::uint32_t>(min(n, args.rows - 1) * args.x_row_bytes));
          float value;
          if constexpr (std::is_same_v<T, __half>) {
            value = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
          } else {
            value = __uint_as_float(bits << 16);
          }
          extra[n] = fmaf(v, value, extra[n]);
        }
      }
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
