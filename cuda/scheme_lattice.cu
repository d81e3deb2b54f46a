// scheme_product for lattice points and for midrise grids, with one scale for the whole matrix.
#include "cuda/scheme_kernel.cuh"

namespace engine {
namespace {

// Of the tables of LatticeCodec, bytes from the patterns.
constexpr int lattice_flips = 256 * 32 * 4;
constexpr int lattice_points = 2 * lattice_flips;

// What both have in common.
template <class T>
struct TensorCodec {
  static constexpr bool kOwnOrder = false;
  static constexpr int kBlocks = 1;
  static constexpr float kUnit = HalfMagic<T>::kUnit;
  float first, second;  // the terms' scales, as often as a product of codes has to be scaled

  __device__ static uint2 look(const SchemeArgs<T>&, const SchemeWeight&, int, int) {
    return {0, 0};
  }
  __device__ static SchemeRecord locate(const SchemeArgs<T>& args, const SchemeWeight& w, int tile,
                                        int unit, uint2) {
    return {w.records + tile * w.tile_bytes + static_cast<std::int64_t>(unit) * args.fixed,
            args.fixed};
  }
  __device__ void finish_tile(const SchemeArgs<T>&, float*, const SchemeLane&) {}
  __device__ void read_scales(const SchemeWeight& w, float factor) {
    const float2 scales = __ldg(reinterpret_cast<const float2*>(w.base));
    first = factor * scales.x;
    second = factor * scales.y;
  }
  // acc += scale * (unit * part - zero * sum).
  __device__ static void add_part(SchemeSums& acc, const SchemeSums& part, float scale, float zero,
                                  float2 sum) {
    acc[0] = fmaf(scale, fmaf(-zero, sum.x, kUnit * part[0]), acc[0]);
    acc[1] = fmaf(scale, fmaf(-zero, sum.y, kUnit * part[1]), acc[1]);
    acc[2] = fmaf(scale, fmaf(-zero, sum.x, kUnit * part[2]), acc[2]);
    acc[3] = fmaf(scale, fmaf(-zero, sum.y, kUnit * part[3]), acc[3]);
  }
};

// scale * (code - (2^bits - 1) / 2).
template <class T, int kBits>
struct MidriseCodec : TensorCodec<T> {
  using Base = TensorCodec<T>;
  static constexpr bool kShare = scheme_shares(PackedKind::midrise, 1);
  __device__ static void prepare(const SchemeArgs<T>&, unsigned char*) {}
  __device__ void begin_tile(const SchemeArgs<T>&, const SchemeWeight& w, int, const SchemeLane&) {
    Base::read_scales(w, 1.0F);
  }
  __device__ void add(SchemeSums& acc, const SchemeArgs<T>&, const SchemeWeight&, int, int unit,
                      const unsigned char* record, const SchemeLane& l) {
    using M = HalfMagic<T>;
    const std::uint32_t x = l.x + 256 * unit;
    const std::uint32_t at = shared_address(record) + 16 * l.lane;
    std::uint32_t words[2 * kBits];
    SchemeSums part = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 v = shared_16(x + 64 * u);
      const std::uint32_t b[4] = {v.x, v.y, v.z, v.w};
      load_code_plane<kBits>(at, l.lane, u, words);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        std::uint32_t a[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          a[q] = half_pair_bits<kBits, 0>(words, (2 * u + s) * 4 + q, M::kLow);
        }
        mma<T>(part, a, b[2 * s], b[2 * s + 1]);
      }
    }
    constexpr float zero = static_cast<float>((1 << kBits) - 1) * 0.5F + M::kLowOffset;
    Base::add_part(acc, part, this->first, zero, block_sums(l, unit));
  }
};

// Points as words of eight nibbles: pair k of neighbouring columns in nibbles k and k + 4, so that
// a word shifted by 4 k and masked is a pair of 16-bit numbers.
//   e8p:     coordinate = (nibble - 7.5) / 2, nibbles = pattern ^ flips (engine/weight/e8.h has the
//            pattern's nibbles odd: negating is exchanging n and 16 - n, that is n ^ 14; the last
//            bit is free to tell +1/4 from -1/4)
//   e8_byte: coordinate = (nibble - 8) / 2
// The tables lie in shared memory in 32 copies, one for each bank (bytes: 8), since lanes look up
// unrelated places: one access per look-up and warp instead of three or four.
// kResidual: 0 none, 1 a byte, 2 another e8p.
template <class T, int kResidual>
struct LatticeCodec : TensorCodec<T> {
  using Base = TensorCodec<T>;

  __device__ static void prepare(const SchemeArgs<T>& args, unsigned char* shared) {
    const auto* table = reinterpret_cast<const std::uint32_t*>(args.part[0].table);
    auto* to = reinterpret_cast<uint4*>(shared + args.table_offset);
    // Eight stores of 16 bytes make the copies of an entry; neighbouring threads, neighbouring
    // ones.
    for (int i = static_cast<int>(threadIdx.x); i < 2 * 256 * 8; i += scheme_threads) {
      const std::uint32_t word = __ldg(table + i / 8);
      to[i] = {word, word, word, word};
    }
    if constexpr (kResidual == 1) {
      to += lattice_points / 16;
      for (int i = static_cast<int>(threadIdx.x); i < 256 * 2; i += scheme_threads) {
        const std::uint32_t word = __ldg(table + 512 + i / 2);
        to[i] = {word, word, word, word};
      }
    }
  }
  __device__ void begin_tile(const SchemeArgs<T>&, const SchemeWeight& w, int, const SchemeLane&) {
    Base::read_scales(w, 0.5F);
  }

  // The codes in the low and the high half of `two`; `tables` is the lane's copy.
  __device__ static void e8p_words(std::uint32_t tables, std::uint32_t two, std::uint32_t& low,
                                   std::uint32_t& high) {
    low = shared_4(tables + (two >> 1 & 0x7f80U)) ^
          shared_4(tables + lattice_flips + (two << 7 & 0x7f80U));
    high = shared_4(tables + (two >> 17 & 0x7f80U)) ^
           shared_4(tables + lattice_flips + (two >> 9 & 0x7f80U));
  }
  // part += nibbles times 32 columns of x; low: row g, high: row g + 8.
  __device__ static void add_words(SchemeSums& part, std::uint32_t low, std::uint32_t high,
                                   const std::uint32_t (&b)[4]) {
    constexpr std::uint32_t mask = 0x000f000fU, magic = HalfMagic<T>::kLow;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const std::uint32_t a[4] = {
          and_or(low >> (8 * s), mask, magic), and_or(high >> (8 * s), mask, magic),
          and_or(low >> (8 * s + 4), mask, magic), and_or(high >> (8 * s + 4), mask, magic)};
      mma<T>(part, a, b[2 * s], b[2 * s + 1]);
    }
  }

  __device__ void add(SchemeSums& acc, const SchemeArgs<T>& args, const SchemeWeight&, int,
                      int unit, const unsigned char* record, const SchemeLane& l) {
    const std::uint32_t x = l.x + 256 * unit;
    const std::uint32_t at = shared_address(record);
    const std::uint32_t tables =
        l.base + static_cast<std::uint32_t>(args.table_offset + 4 * l.lane);
    const uint4 v = shared_16(at + 16 * l.lane);
    const std::uint32_t codes[4] = {v.x, v.y, v.z, v.w};
    std::uint32_t more[4] = {};
    if constexpr (kResidual == 1) {
      const uint2 bytes = shared_8(at + 512 + 8 * l.lane);
      more[0] = bytes.x, more[1] = bytes.x >> 16, more[2] = bytes.y, more[3] = bytes.y >> 16;
    } else if constexpr (kResidual == 2) {
      const uint4 second = shared_16(at + 512 + 16 * l.lane);
      more[0] = second.x, more[1] = second.y, more[2] = second.z, more[3] = second.w;
    }
    SchemeSums part = {0.0F, 0.0F, 0.0F, 0.0F};
    [[maybe_unused]] SchemeSums rest = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 in = shared_16(x + 64 * u);
      const std::uint32_t b[4] = {in.x, in.y, in.z, in.w};
      std::uint32_t low, high;
      e8p_words(tables, codes[u], low, high);
      add_words(part, low, high, b);
      if constexpr (kResidual == 2) {
        e8p_words(tables, more[u], low, high);
        add_words(rest, low, high, b);
      } else if constexpr (kResidual == 1) {
        const std::uint32_t points =
            l.base +
            static_cast<std::uint32_t>(args.table_offset + lattice_points + 4 * (l.lane % 8));
        low = shared_4(points + (more[u] << 5 & 0x1fe0U));
        high = shared_4(points + (more[u] >> 3 & 0x1fe0U));
        add_words(rest, low, high, b);
      }
    }
    constexpr float offset = HalfMagic<T>::kLowOffset;
    const float2 sum = block_sums(l, unit);
    Base::add_part(acc, part, this->first, 7.5F + offset, sum);
    if constexpr (kResidual != 0) {
      Base::add_part(acc, rest, this->second, (kResidual == 1 ? 8.0F : 7.5F) + offset, sum);
    }
  }
};

}  // namespace

template <class T>
SchemeKernel<T> scheme_kernel_midrise(int bits) {
  if (bits == 2) return scheme_product_kernel<T, MidriseCodec<T, 2>>;
  if (bits == 3) return scheme_product_kernel<T, MidriseCodec<T, 3>>;
  return scheme_product_kernel<T, MidriseCodec<T, 4>>;
}
template <class T>
SchemeKernel<T> scheme_kernel_lattice(int bits) {
  if (bits == 2) return scheme_product_kernel<T, LatticeCodec<T, 0>>;
  if (bits == 3) return scheme_product_kernel<T, LatticeCodec<T, 1>>;
  return scheme_product_kernel<T, LatticeCodec<T, 2>>;
}
template SchemeKernel<__half> scheme_kernel_midrise<__half>(int);
template SchemeKernel<__nv_bfloat16> scheme_kernel_midrise<__nv_bfloat16>(int);
template SchemeKernel<__half> scheme_kernel_lattice<__half>(int);
template SchemeKernel<__nv_bfloat16> scheme_kernel_lattice<__nv_bfloat16>(int);

}  // namespace engine
