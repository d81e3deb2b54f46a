// scheme_product for column blocks with widths of their own.
#include "cuda/scheme_kernel.cuh"

namespace engine {
namespace {

template <class T>
struct MixedCodec {
  static constexpr bool kOwnOrder = false;
  static constexpr int kBlocks = 1;  // column blocks of a unit
  static constexpr bool kShare = scheme_shares(PackedKind::mixed, 1);

  __device__ static std::uint32_t entry(const SchemeWeight& w, int unit) {
    return __ldg(reinterpret_cast<const unsigned*>(w.table) + unit);
  }
  __device__ static uint2 look(const SchemeArgs<T>&, const SchemeWeight& w, int, int unit) {
    return {entry(w, unit), 0};
  }
  __device__ static SchemeRecord locate(const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                                        int, uint2 place) {
    const int width = static_cast<int>(place.x % 16U);
    const int scale = args.scale_kind == 0 ? 64 : 32;
    return {w.records + tile * w.tile_bytes + (place.x & ~15U),
            width == 0 ? 256 + 2 * scale : 256 * width + scale + 16};
  }
  std::uint32_t next = 0;  // the entry of the next record, read one ahead

  __device__ void begin_tile(const SchemeArgs<T>& args, const SchemeWeight& w, int,
                             const SchemeLane&) {
    next = entry(w, args.units * (static_cast<int>(threadIdx.x) / 32) / scheme_warps);
  }
  __device__ void finish_tile(const SchemeArgs<T>&, float*, const SchemeLane&) {}

  // Codes as integers, scaled once; the zero goes with the sum of x.
  template <int kLow, int kHigh>
  __device__ static void add_affine(SchemeSums& acc, const SchemeArgs<T>& args,
                                    const unsigned char* record, std::uint32_t x, float2 sum,
                                    const SchemeLane& l) {
    using M = HalfMagic<T>;
    const std::uint32_t at = shared_address(record) + 16 * l.lane;
    std::uint32_t low[2 * kLow];
    [[maybe_unused]] std::uint32_t high[kHigh > 0 ? 2 * kHigh : 1];
    float part[1][4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 v = shared_16(x + 64 * u);
      const std::uint32_t b[4] = {v.x, v.y, v.z, v.w};
      load_code_plane<kLow>(at, l.lane, u, low);
      if constexpr (kHigh > 0) load_code_plane<kHigh>(at + 256 * kLow, l.lane, u, high);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int p = (2 * u + s) * 4;
        std::uint32_t a[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) a[q] = half_pair_bits<kLow, 0>(low, p + q, M::kLow);
        mma<T>(part[0], a, b[2 * s], b[2 * s + 1]);
        if constexpr (kHigh > 0) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            a[q] = half_pair_bits<kHigh, M::kHighUp>(high, p + q, M::kHigh);
          }
          mma<T>(part[0], a, b[2 * s], b[2 * s + 1]);
        }
      }
    }
    constexpr float offset = kHigh == 0 ? M::kLowOffset : M::kLowOffset + M::kHighOffset;
    const unsigned char* unit = record + 256 * (kLow + kHigh);
    const float2 scale = load_scale_pair(unit, args.scale_kind, 2 * l.g);
    const uchar2 z =
        *reinterpret_cast<const uchar2*>(unit + (args.scale_kind == 0 ? 64 : 32) + 2 * l.g);
    const float2 zero = {static_cast<float>(z.x) + offset, static_cast<float>(z.y) + offset};
    const float sums[1][2] = {{sum.x, sum.y}};
    float all[1][4] = {{acc[0], acc[1], acc[2], acc[3]}};
    add_scaled<1>(all, part, sums, scale, zero, M::kUnit);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[e] = all[0][e];
  }

  __device__ void add(SchemeSums& acc, const SchemeArgs<T>& args, const SchemeWeight& w, int,
                      int unit, const unsigned char* record, const SchemeLane& l) {
    const std::uint32_t x = l.x + 256 * unit;
    const float2 sum = block_sums(l, unit);
    const std::uint32_t width = next % 16U;
    next = entry(w, unit + 1);  // after the last one other bytes, not used
    switch (width) {
      case 0: {
        SchemeSums part = {0.0F, 0.0F, 0.0F, 0.0F};
        add_signs<T>(part, shared_address(record) + 8 * l.lane, x);
        const unsigned char* levels = record + 256;
        add_levels(acc, part, load_scale_pair(levels, args.scale_kind, 2 * l.g),
                   load_scale_pair(levels, args.scale_kind, 16 + 2 * l.g), sum);
        break;
      }
      case 1:
        return add_affine<1, 0>(acc, args, record, x, sum, l);
      case 2:
        return add_affine<2, 0>(acc, args, record, x, sum, l);
      case 3:
        return add_affine<3, 0>(acc, args, record, x, sum, l);
      case 4:
        return add_affine<4, 0>(acc, args, record, x, sum, l);
      case 5:
        return add_affine<4, 1>(acc, args, record, x, sum, l);
      case 6:
        return add_affine<4, 2>(acc, args, record, x, sum, l);
      case 7:
        return add_affine<4, 3>(acc, args, record, x, sum, l);
      default:
        return add_affine<4, 4>(acc, args, record, x, sum, l);
    }
  }
};

}  // namespace

template <class T>
SchemeKernel<T> scheme_kernel_mixed() {
  return scheme_product_kernel<T, MixedCodec<T>>;
}
template SchemeKernel<__half> scheme_kernel_mixed<__half>();
template SchemeKernel<__nv_bfloat16> scheme_kernel_mixed<__nv_bfloat16>();

}  // namespace engine
