// scheme_product for signs in regions.
#include "cuda/scheme_kernel.cuh"

namespace engine {
namespace {

// A row's eight coefficients, in shared memory.
__device__ inline void load_eight(const unsigned char* at, int kind, float (&c)[8]) {
  if (kind == 0) {
    const float4 a = *reinterpret_cast<const float4*>(at);
    const float4 b = *reinterpret_cast<const float4*>(at + 16);
    c[0] = a.x, c[1] = a.y, c[2] = a.z, c[3] = a.w;
    c[4] = b.x, c[5] = b.y, c[6] = b.z, c[7] = b.w;
    return;
  }
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = {__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000U)};
    if (kind == 1) pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    c[2 * i] = pair.x;
    c[2 * i + 1] = pair.y;
  }
}

// A row's four values by code, as T, for the salient columns and for the others. Two bytes each:
// a byte permutation then turns two codes into two values.
template <class T>
struct RegionValues {
  std::uint32_t salient[2], other[2];

  __device__ void load(const unsigned char* at, int kind) {
    float c[8];
    load_eight(at, kind, c);
    other[0] = pack2<T>(c[0] - c[1], c[0] + c[1]);
    other[1] = pack2<T>(c[2] - c[3], c[2] + c[3]);
    const float low = c[4] - c[5], high = c[4] + c[5];
    const float minus = c[6] - c[7], plus = c[6] + c[7];
    salient[0] = pack2<T>(low + minus, high + minus);
    salient[1] = pack2<T>(low + plus, high + plus);
  }
};

template <class T>
struct RegionsCodec {
  static constexpr bool kOwnOrder = true;
  static constexpr int kBlocks = 1;
  static constexpr bool kEven = true;
  static constexpr bool kShare = scheme_shares(PackedKind::regions, 1);

  __device__ static uint2 look(const SchemeArgs<T>&, const SchemeWeight&, int, int) {
    return {0, 0};
  }
  __device__ static SchemeRecord locate(const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                                        int unit, uint2) {
    return {w.records + tile * w.tile_bytes + std::int64_t{unit} * args.fixed, args.fixed};
  }
  int next = 0;  // salient columns of the next block, read one ahead

  __device__ void begin_tile(const SchemeArgs<T>& args, const SchemeWeight& w, int,
                             const SchemeLane&) {
    next = count(w, args.units * (static_cast<int>(threadIdx.x) / 32) / scheme_warps);
  }
  __device__ static int count(const SchemeWeight& w, int unit) {
    return __ldg(reinterpret_cast<const int*>(w.table) + unit);
  }
  __device__ void finish_tile(const SchemeArgs<T>&, float*, const SchemeLane&) {}

  __device__ void add(SchemeSums& acc, const SchemeArgs<T>& args, const SchemeWeight& w, int,
                      int unit, const unsigned char* record, const SchemeLane& l) {
    const std::uint32_t x = l.x + 256 * unit;
    const int salient = next;
    next = count(w, unit + 1);  // after the last one other bytes, not used
    const int row_bytes = args.scale_kind == 0 ? 32 : 16;
    RegionValues<T> values[2];  // rows g and g + 8
    values[0].load(record + 512 + l.g * row_bytes, args.scale_kind);
    values[1].load(record + 512 + (l.g + 8) * row_bytes, args.scale_kind);
    const uint4 v = shared_16(shared_address(record) + 16 * l.lane);
    const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 b = shared_16(x + 64 * u);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * u + s;
        std::uint32_t select[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          // The codes at bits 1 and 9; then nibbles 2 c and 2 c + 1 of either.
          const int down = 16 * s + 2 * q - 1;
          const std::uint32_t e = (down < 0 ? words[u] << 1 : words[u] >> down) & 0x0606U;
          select[q] = e * 0x11U + 0x1010U;
        }
        std::uint32_t a[4];
        if (16 * step >= salient) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            a[q] = __byte_perm(values[q % 2].other[0], values[q % 2].other[1], select[q]);
          }
        } else {
          // Salient columns come first, so only columns 16 step .. can be of both sorts.
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int rank = 16 * step + 4 * l.t + q / 2 * 2;
            const std::uint32_t mask =
                (rank < salient ? 0xffffU : 0U) | (rank + 1 < salient ? 0xffff0000U : 0U);
            const RegionValues<T>& own = values[q % 2];
            a[q] = (__byte_perm(own.salient[0], own.salient[1], select[q]) & mask) |
                   (__byte_perm(own.other[0], own.other[1], select[q]) & ~mask);
          }
        }
        mma<T>(acc, a, s == 0 ? b.x : b.z, s == 0 ? b.y : b.w);
      }
    }
  }
};

}  // namespace

template <class T>
SchemeKernel<T> scheme_kernel_regions() {
  return scheme_product_kernel<T, RegionsCodec<T>>;
}
template SchemeKernel<__half> scheme_kernel_regions<__half>();
template SchemeKernel<__nv_bfloat16> scheme_kernel_regions<__nv_bfloat16>();

}  // namespace engine
