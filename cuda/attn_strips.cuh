// How a warp of the one-query attention kernel takes 16 keys and values at a time: through shared
// memory into the B fragments of mma.m16n8k16 (lane = 4 g + t). Two kinds of cache, one interface:
//   stages, stage_bytes   shared memory per warp; a strip lies in one stage
//   request               starts the asynchronous copies of one strip
//   q_column              the columns of q that go with the key fragments: the order of the
//                         products of a dot product is free, so each kind takes the one it can load
//   Keys, Values          fragments of a strip that has arrived
//   out_column            which column of the output an accumulator belongs to
#pragma once

#include "cuda/attn_mma.cuh"
#include "cuda/types.cuh"

namespace engine {

constexpr int strip = 16;

// One kv head of one sequence: rows of HD elements, and their scales for codes.
template <class E>
struct StripSource {
  const E* k;
  const E* v;
  const float* k_scale;
  const float* v_scale;
  std::int64_t k_stride, v_stride, k_scale_stride, v_scale_stride;
};

// Keys and values of the compute dtype, in swizzled tiles read by ldmatrix.
template <class T, int HD>
struct PlainStrips {
  using Element = T;
  static constexpr int stages = 3;
  static constexpr int tile_bytes = strip * HD * 2;
  static constexpr int stage_bytes = 2 * tile_bytes;

  __device__ static int q_column(int step, int half, int t) { return step * 16 + half * 8 + t * 2; }
  __device__ static int out_column(int n, int e, int t) { return n * 8 + t * 2 + e; }

  // Keys key .. key + valid - 1; the others of the strip become zeros and are not read.
  __device__ static void request(unsigned char* stage, const StripSource<T>& from, int key,
                                 int valid, int lane) {
    constexpr int chunks = HD / 8;
    const std::uint32_t tile = shared_address(stage);
#pragma unroll
    for (int i = 0; i < strip * chunks / 32; ++i) {
      const int row = (i * 32 + lane) / chunks;
      const int chunk = (i * 32 + lane) % chunks;
      const std::uint32_t at = tile + swizzled<HD>(row, chunk);
      const bool there = row < valid;
      const std::int64_t r = std::int64_t{key} + row;
      copy_async(at, from.k + r * from.k_stride + chunk * 8, there);
      copy_async(at + tile_bytes, from.v + r * from.v_stride + chunk * 8, there);
    }
  }

  class Keys {
   public:
    __device__ Keys(const unsigned char* stage, int lane)
        : tile_(shared_address(stage)), lane_(lane) {}
    // b[0], b[1]: keys 0 to 7; b[2], b[3]: keys 8 to 15.
    __device__ void get(int step, std::uint32_t (&b)[4]) const {
      ldmatrix(b, tile_ + swizzled<HD>(lane_ % 8 + lane_ / 16 * 8, step * 2 + lane_ / 8 % 2));
    }

   private:
    std::uint32_t tile_;
    int lane_;
  };

  class Values {
   public:
    __device__ Values(const unsigned char* stage, int lane)
        : tile_(shared_address(stage) + tile_bytes), lane_(lane) {}
    // b[0], b[1]: accumulator n; b[2], b[3]: accumulator n + 1. n is even.
    __device__ void get(int n, std::uint32_t (&b)[4]) const {
      ldmatrix_transposed(b, tile_ + swizzled<HD>(lane_ % 16, n + lane_ / 16));
    }

   private:
    std::uint32_t tile_;
    int lane_;
  };
};

// 4 bytes from global to shared memory; zeros instead, without reading, if !valid.
__device__ inline void copy_async_word(std::uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// Byte `byte` of `word`, a code, times its scale. The byte becomes the low end of the float 2^23 +
// code, so that one subtraction gives code - 128 exactly.
__device__ inline float scaled_code(std::uint32_t word, unsigned byte, float scale) {
  const float biased = __uint_as_float(__byte_perm(word, 0x4B000000U, 0x7440U | byte));
  return __fmul_rn(scale, __fsub_rn(biased, 8388736.0F));
}

// N words of 32 bits from shared memory at `from`, which is aligned for them.
template <int N>
__device__ void load_words(std::uint32_t (&out)[N], const unsigned char* from) {
  const auto pack = *reinterpret_cast<const Pack<std::uint32_t, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = pack.v[i];
}

// 8-bit codes. The raw bytes go to shared memory; a lane reads whole words of them and converts
// what it needs, so that no converted tile is ever stored:
//   keys: columns HD/4 t .. of keys g and g + 8; k-step j takes bytes 4 j .. 4 j + 3 of them
//   values: columns HD/8 g .. of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; accumulator n takes byte n
// A stage is the codes of the keys, of the values (rows of HD bytes, 16-byte chunks permuted within
// a row against bank conflicts), 16 scales of keys and 16 of values.
template <class T, int HD>
struct CodeStrips {
  using Element = std::uint8_t;
  static constexpr int stages = 4;
  static constexpr int tile_bytes = strip * HD;
  static constexpr int stage_bytes = 2 * tile_bytes + 2 * strip * 4;
  static constexpr int chunks = HD / 16;

  __device__ static int q_column(int step, int half, int t) {
    return t * (HD / 4) + step * 4 + half * 2;
  }
  __device__ static int out_column(int n, int e, int t) { return (t * 2 + e) * (HD / 8) + n; }

  // Offset of byte `column` of row `row` of a tile.
  __device__ static int place(int row, int column) {
    return row * HD + ((column / 16) ^ (row % chunks)) * 16 + column % 16;
  }

  __device__ static void request(unsigned char* stage, const StripSource<std::uint8_t>& from,
                                 int key, int valid, int lane) {
    const std::uint32_t tile = shared_address(stage);
#pragma unroll
    for (int i = 0; i < strip * chunks / 32; ++i) {
      const int row = (i * 32 + lane) / chunks;
      const int column = (i * 32 + lane) % chunks * 16;
      const std::uint32_t at = tile + static_cast<std::uint32_t>(place(row, column));
      const bool there = row < valid;
      const std::int64_t r = std::int64_t{key} + row;
      copy_async(at, from.k + r * from.k_stride + column, there);
      copy_async(at + tile_bytes, from.v + r * from.v_stride + column, there);
    }
    const int row = lane % strip;
    const std::int64_t r = std::int64_t{key} + row;
    const float* scale = lane < strip ? from.k_scale + r * from.k_scale_stride
                                      : from.v_scale + r * from.v_scale_stride;
    copy_async_word(tile + static_cast<std::uint32_t>(2 * tile_bytes + lane * 4), scale,
                    row < valid);
  }

  class Keys {
   public:
    __device__ Keys(const unsigned char* stage, int lane) {
      const auto* scale = reinterpret_cast<const float*>(stage + 2 * tile_bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i;
        scale_[i] = scale[row];
#pragma unroll
        for (int w = 0; w < words; w += piece) {
          std::uint32_t part[piece];
          load_words(part, stage + place(row, (lane % 4 * words + w) * 4));
#pragma unroll
          for (int e = 0; e < piece; ++e) raw_[i][w + e] = part[e];
        }
      }
    }
    __device__ void get(int step, std::uint32_t (&b)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t word = raw_[i / 2][step];
        const auto byte = static_cast<unsigned>(i % 2 * 2);
        b[i] = pack2<T>(scaled_code(word, byte, scale_[i / 2]),
                        scaled_code(word, byte + 1, scale_[i / 2]));
      }
    }

   private:
    static constexpr int words = HD / 16;
    static constexpr int piece = words < 4 ? words : 4;
    std::uint32_t raw_[2][words];
    float scale_[2];
  };

  class Values {
   public:
    __device__ Values(const unsigned char* stage, int lane) {
      const auto* scale = reinterpret_cast<const float*>(stage + 2 * tile_bytes) + strip;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane % 4 * 2 + i % 2 + i / 2 * 8;
        scale_[i] = scale[row];
        load_words(raw_[i], stage + tile_bytes + place(row, lane / 4 * (HD / 8)));
      }
    }
    __device__ void get(int n, std::uint32_t (&b)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n + i / 2;
        const int low = i % 2 * 2;  // keys 2 t, 2 t + 1, or those 8 further
        const auto byte = static_cast<unsigned>(column % 4);
        b[i] = pack2<T>(scaled_code(raw_[low][column / 4], byte, scale_[low]),
                        scaled_code(raw_[low + 1][column / 4], byte, scale_[low + 1]));
      }
    }

   private:
    static constexpr int words = HD / 32;
    std::uint32_t raw_[4][words];
    float scale_[4];
  };
};

}  // namespace engine
