// The CPU's inner loops over a vector type `Vec` of `Vec::lanes` floats. Included by one source
// file per instruction set, which defines before it, in an anonymous namespace of `engine`:
//   ENGINE_TARGET     the attribute that lets a function use the instructions (or nothing),
//   Vec               load/store (of float, f16, bf16), set, add, ..., see cpu_kernels_portable.cpp
//   gemm_rows, attention_rows, tile_vecs   the shape of the register tiles.
// No include guard: it is meant to be compiled once per including file, all of it private to that.

#if defined(__clang__)
#define ENGINE_UNROLL _Pragma("unroll")
#else
#define ENGINE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace engine {
namespace {

using V = Vec::Type;
constexpr int L = Vec::lanes;
constexpr int tile_cols = tile_vecs * L;
constexpr int run_length = 8;  // additions in f32 before a sum moves to f64

// The first `n` (at most L) elements; the other lanes are 0.
template <class T>
ENGINE_TARGET inline V load_some(const T* p, std::int64_t n) {
  if (n >= L) return Vec::load(p);
  T some[L] = {};
  for (std::int64_t i = 0; i < n; ++i) some[i] = p[i];
  return Vec::load(some);
}

template <class T>
ENGINE_TARGET inline void store_some(T* p, V v, std::int64_t n) {
  if (n >= L) {
    Vec::store(p, v);
    return;
  }
  T some[L];
  Vec::store(some, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = some[i];
}

template <class T>
ENGINE_TARGET inline V rounded(V v) {
  T all[L];
  Vec::store(all, v);
  return Vec::load(all);
}
// `pin` keeps a compiler from fusing a rounded product into a following addition.
template <>
ENGINE_TARGET inline V rounded<float>(V v) {
  return Vec::pin(v);
}

// 2^n * e^r with |r| <= ln(2)/2: ln 2 in two parts so that the reduction is exact enough, then the
// Taylor polynomial of degree 7 (its remainder is below 6e-9).
ENGINE_TARGET inline V exp_of(V x) {
  // A NaN passes both: min and max return their second argument when either is NaN.
  x = Vec::min(Vec::set(89.0F), Vec::max(Vec::set(-104.0F), x));
  const V n = Vec::round(Vec::mul(x, Vec::set(1.44269504F)));
  V r = Vec::fma(n, Vec::set(-0.693359375F), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4F), r);
  V p = Vec::set(1.0F / 5040.0F);
  p = Vec::fma(p, r, Vec::set(1.0F / 720.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 120.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 24.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 6.0F));
  p = Vec::fma(p, r, Vec::set(0.5F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  return Vec::scale_by_power(p, n);
}

template <int rows>
ENGINE_TARGET void tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc,
                        bool add) {
  V sum[rows][tile_vecs];
  ENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    ENGINE_UNROLL
    for (int j = 0; j < tile_vecs; ++j) sum[r][j] = Vec::set(0.0F);
  }
  for (std::int64_t p = 0; p < k; ++p) {
    V bv[tile_vecs];
    ENGINE_UNROLL
    for (int j = 0; j < tile_vecs; ++j) bv[j] = Vec::load(b + j * L);
    ENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const V av = Vec::set(a[r]);
      ENGINE_UNROLL
      for (int j = 0; j < tile_vecs; ++j) sum[r][j] = Vec::fma(av, bv[j], sum[r][j]);
    }
    a += rows;
    b += tile_cols;
  }
  ENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    ENGINE_UNROLL
    for (int j = 0; j < tile_vecs; ++j) {
      float* to = c + r * ldc + j * L;
      Vec::store(to, add ? Vec::add(Vec::load(to), sum[r][j]) : sum[r][j]);
    }
  }
}

template <class T>
ENGINE_TARGET void widen(const T* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += L) store_some(out + i, load_some(in + i, n - i), n - i);
}
template <class T>
ENGINE_TARGET void narrow(const float* in, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += L) store_some(out + i, load_some(in + i, n - i), n - i);
}

// A few rows of b against a few rows of a; several partial sums hide the latency of the additions.
template <int rows, int cols, class T>
ENGINE_TARGET void dots_of(std::int64_t k, const float* a, std::int64_t lda, const T* b,
                           std::int64_t ldb, float* out, std::int64_t ldo) {
  V sum[rows][cols];
  ENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    ENGINE_UNROLL
    for (int j = 0; j < cols; ++j) sum[r][j] = Vec::set(0.0F);
  }
  const std::int64_t whole = k / L * L;
  for (std::int64_t p = 0; p < whole; p += L) {
    V bv[cols];
    ENGINE_UNROLL
    for (int j = 0; j < cols; ++j) bv[j] = Vec::load(b + j * ldb + p);
    ENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const V av = Vec::load(a + r * lda + p);
      ENGINE_UNROLL
      for (int j = 0; j < cols; ++j) sum[r][j] = Vec::fma(av, bv[j], sum[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < cols; ++j) {
      V s = sum[r][j];
      if (whole < k) {
        const V bv = load_some(b + j * ldb + whole, k - whole);
        s = Vec::fma(load_some(a + r * lda + whole, k - whole), bv, s);
      }
      out[r * ldo + j] = Vec::sum(s);
    }
  }
}

// One row against one row: memory bound, best read as one stream.
template <class T>
ENGINE_TARGET float dot_of(std::int64_t k, const float* a, const T* b) {
  V sum[4];
  for (V& s : sum) s = Vec::set(0.0F);
  std::int64_t p = 0;
  for (; p + 4 * L <= k; p += 4 * L) {
    ENGINE_UNROLL
    for (int j = 0; j < 4; ++j) {
      sum[j] = Vec::fma(Vec::load(a + p + j * L), Vec::load(b + p + j * L), sum[j]);
    }
  }
  for (; p < k; p += L) {
    sum[0] = Vec::fma(load_some(a + p, k - p), load_some(b + p, k - p), sum[0]);
  }
  return Vec::sum(Vec::add(Vec::add(sum[0], sum[1]), Vec::add(sum[2], sum[3])));
}

template <int rows, class T>
ENGINE_TARGET void dots_rows(std::int64_t n, std::int64_t k, const float* a, std::int64_t lda,
                             const T* b, std::int64_t ldb, float* out, std::int64_t ldo) {
  std::int64_t j = 0;
  for (; j + 4 <= n; j += 4) dots_of<rows, 4>(k, a, lda, b + j * ldb, ldb, out + j, ldo);
  for (; j < n; ++j) dots_of<rows, 1>(k, a, lda, b + j * ldb, ldb, out + j, ldo);
}

template <class T>
ENGINE_TARGET void dots_all(std::int64_t m, std::int64_t n, std::int64_t k, const float* a,
                            std::int64_t lda, const T* b, std::int64_t ldb, float* out,
                            std::int64_t ldo) {
  while (m > 0) {
    const int rows = m >= 4 ? 4 : m >= 2 ? 2 : 1;
    if (rows == 4) dots_rows<4>(n, k, a, lda, b, ldb, out, ldo);
    if (rows == 2) dots_rows<2>(n, k, a, lda, b, ldb, out, ldo);
    if (rows == 1) {
      for (std::int64_t j = 0; j < n; ++j) out[j] = dot_of(k, a, b + j * ldb);
    }
    m -= rows;
    a += rows * lda;
    out += rows * ldo;
  }
}

// A sum that collects vectors: a few in f32, then on to f64.
struct WideSum {
  double wide[L] = {};

  ENGINE_TARGET void add(V v) { Vec::add_widened(wide, v); }
  [[nodiscard]] double total() const {
    double s = 0.0;
    for (const double w : wide) s += w;
    return s;
  }
};

template <class T>
ENGINE_TARGET double sum_squares_of(const T* x, std::int64_t n) {
  WideSum sum;
  for (std::int64_t i = 0; i < n; i += run_length * L) {
    V run = Vec::set(0.0F);
    const std::int64_t end = n < i + run_length * L ? n : i + run_length * L;
    for (std::int64_t j = i; j < end; j += L) {
      const V v = load_some(x + j, end - j);
      run = Vec::fma(v, v, run);
    }
    sum.add(run);
  }
  return sum.total();
}

template <class T>
ENGINE_TARGET void scale_and_weigh_of(const T* x, float scale, const T* weight, T* out,
                                      std::int64_t n) {
  const V s = Vec::set(scale);
  for (std::int64_t i = 0; i < n; i += L) {
    const V inner = rounded<T>(Vec::mul(load_some(x + i, n - i), s));
    store_some(out + i, Vec::mul(inner, load_some(weight + i, n - i)), n - i);
  }
}

template <class T>
ENGINE_TARGET void silu_mul_of(const T* gate, const T* up, T* out, std::int64_t n) {
  const V one = Vec::set(1.0F);
  for (std::int64_t i = 0; i < n; i += L) {
    const V g = load_some(gate + i, n - i);
    const V e = exp_of(Vec::sub(Vec::set(0.0F), g));
    const V silu = rounded<T>(Vec::div(g, Vec::add(one, e)));
    store_some(out + i, Vec::mul(silu, load_some(up + i, n - i)), n - i);
  }
}

template <class T>
ENGINE_TARGET void rotate_of(T* lo, T* hi, const float* cos, const float* sin, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += L) {
    const std::int64_t left = n - i;
    const V c = rounded<T>(load_some(cos + i, left));
    const V s = rounded<T>(load_some(sin + i, left));
    const V x = load_some(lo + i, left);
    const V y = load_some(hi + i, left);
    const V xc = rounded<T>(Vec::mul(x, c));
    const V xs = rounded<T>(Vec::mul(x, s));
    const V yc = rounded<T>(Vec::mul(y, c));
    const V ys = rounded<T>(Vec::mul(y, s));
    store_some(lo + i, Vec::sub(xc, ys), left);
    store_some(hi + i, Vec::add(yc, xs), left);
  }
}

template <class T>
ENGINE_TARGET std::int64_t count_nonfinite_of(const T* x, std::int64_t n) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; i += L) {
    const V v = load_some(x + i, n - i);
    count += Vec::count_nonzero_or_nan(Vec::sub(v, v));  // x - x is 0 exactly for finite x
  }
  return count;
}

ENGINE_TARGET float row_max(const float* x, std::int64_t n) {
  V best = Vec::set(-std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + L <= n; i += L) best = Vec::max(Vec::load(x + i), best);
  float lanes[L];
  Vec::store(lanes, best);
  float m = lanes[0];
  for (const float v : lanes) m = v > m ? v : m;
  for (; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

ENGINE_TARGET double sum_exp(const float* x, float shift, std::int64_t n) {
  const V s = Vec::set(shift);
  WideSum sum;
  std::int64_t i = 0;
  for (; i + run_length * L <= n; i += run_length * L) {
    V run[2] = {Vec::set(0.0F), Vec::set(0.0F)};
    for (int j = 0; j < run_length; j += 2) {
      run[0] = Vec::add(run[0], exp_of(Vec::sub(Vec::load(x + i + j * L), s)));
      run[1] = Vec::add(run[1], exp_of(Vec::sub(Vec::load(x + i + (j + 1) * L), s)));
    }
    sum.add(Vec::add(run[0], run[1]));
  }
  double tail = 0.0;
  for (; i < n; i += L) {
    float lanes[L];
    Vec::store(lanes, exp_of(Vec::sub(load_some(x + i, n - i), s)));
    for (std::int64_t j = 0; j < L && i + j < n; ++j) tail += static_cast<double>(lanes[j]);
  }
  return sum.total() + tail;
}

ENGINE_TARGET void exp_row(const float* x, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += L) {
    store_some(out + i, exp_of(load_some(x + i, n - i)), n - i);
  }
}

ENGINE_TARGET void softmax_step(float* scores, std::int64_t keys, std::int64_t first_key,
                                const std::int32_t* position, float* peak, float* total,
                                float* rescale) {
  const V low = Vec::set(-std::numeric_limits<float>::infinity());
  std::int32_t first_position = position[0];
  for (int j = 1; j < tile_cols; ++j) {
    if (position[j] < first_position) first_position = position[j];
  }
  // Keys before this one are seen by every lane.
  const std::int64_t open = first_position + 1 - first_key;
  for (std::int64_t key = open > 0 ? open : 0; key < keys; ++key) {
    for (int j = 0; j < tile_cols; ++j) {
      if (first_key + key > position[j]) {
        scores[key * tile_cols + j] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  for (int j = 0; j < tile_vecs; ++j) {
    float* column = scores + j * L;
    const V old_peak = Vec::load(peak + j * L);
    V best[2] = {old_peak, low};
    std::int64_t key = 0;
    for (; key + 2 <= keys; key += 2) {
      best[0] = Vec::max(Vec::load(column + key * tile_cols), best[0]);
      best[1] = Vec::max(Vec::load(column + (key + 1) * tile_cols), best[1]);
    }
    if (key < keys) best[0] = Vec::max(Vec::load(column + key * tile_cols), best[0]);
    const V new_peak = Vec::max(best[1], best[0]);
    // A lane that has seen no key yet: anything finite avoids (-inf) - (-inf).
    const V base = Vec::max(Vec::set(-std::numeric_limits<float>::max()), new_peak);
    V sum[2] = {Vec::set(0.0F), Vec::set(0.0F)};
    key = 0;
    for (; key + 2 <= keys; key += 2) {
      float* at = column + key * tile_cols;
      const V e0 = exp_of(Vec::sub(Vec::load(at), base));
      const V e1 = exp_of(Vec::sub(Vec::load(at + tile_cols), base));
      Vec::store(at, e0);
      Vec::store(at + tile_cols, e1);
      sum[0] = Vec::add(sum[0], e0);
      sum[1] = Vec::add(sum[1], e1);
    }
    if (key < keys) {
      float* at = column + key * tile_cols;
      const V e = exp_of(Vec::sub(Vec::load(at), base));
      Vec::store(at, e);
      sum[0] = Vec::add(sum[0], e);
    }
    const V factor = exp_of(Vec::sub(old_peak, base));
    Vec::store(rescale + j * L, factor);
    Vec::store(total + j * L, Vec::fma(Vec::load(total + j * L), factor, Vec::add(sum[0], sum[1])));
    Vec::store(peak + j * L, new_peak);
  }
}

ENGINE_TARGET void scale_lanes(float* rows, std::int64_t n, const float* factor) {
  V f[tile_vecs];
  for (int j = 0; j < tile_vecs; ++j) f[j] = Vec::load(factor + j * L);
  for (std::int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < tile_vecs; ++j) {
      float* at = rows + i * tile_cols + j * L;
      Vec::store(at, Vec::mul(Vec::load(at), f[j]));
    }
  }
}

// The typed entry points. `at` gives a pointer its type.
template <class T>
const T* at(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* at(void* p) {
  return static_cast<T*>(p);
}
[[noreturn]] void bad_dtype(DType dtype) {
  throw Error(ErrorCode::internal, std::string("cpu kernel on dtype ") + dtype_name(dtype));
}

#define ENGINE_BY_DTYPE(dtype, call) \
  switch (dtype) {                   \
    case DType::f32: {               \
      using T = float;               \
      return call;                   \
    }                                \
    case DType::f16: {               \
      using T = f16;                 \
      return call;                   \
    }                                \
    case DType::bf16: {              \
      using T = bf16;                \
      return call;                   \
    }                                \
    default:                         \
      bad_dtype(dtype);              \
  }

void to_f32(DType dtype, const void* in, float* out, std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, widen(at<T>(in), out, n))
}
void from_f32(DType dtype, const float* in, void* out, std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, narrow(in, at<T>(out), n))
}
void dots(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda,
          DType dtype, const void* b, std::int64_t ldb, float* out, std::int64_t ldo) {
  ENGINE_BY_DTYPE(dtype, dots_all(m, n, k, a, lda, at<T>(b), ldb, out, ldo))
}
double sum_squares(DType dtype, const void* x, std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, sum_squares_of(at<T>(x), n))
}
void scale_and_weigh(DType dtype, const void* x, float scale, const void* weight, void* out,
                     std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, scale_and_weigh_of(at<T>(x), scale, at<T>(weight), at<T>(out), n))
}
void silu_mul(DType dtype, const void* gate, const void* up, void* out, std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, silu_mul_of(at<T>(gate), at<T>(up), at<T>(out), n))
}
void rotate(DType dtype, void* lo, void* hi, const float* cos, const float* sin, std::int64_t n){
    ENGINE_BY_DTYPE(dtype, rotate_of(at<T>(lo), at<T>(hi), cos, sin, n))} std::int64_t
    count_nonfinite(DType dtype, const void* x, std::int64_t n) {
  ENGINE_BY_DTYPE(dtype, count_nonfinite_of(at<T>(x), n))
}
#undef ENGINE_BY_DTYPE

constexpr CpuKernels table = {
    .gemm = {gemm_rows, tile_cols, tile<gemm_rows>},
    .attention = {attention_rows, tile_cols, tile<attention_rows>},
    .to_f32 = to_f32,
    .from_f32 = from_f32,
    .dots = dots,
    .sum_squares = sum_squares,
    .scale_and_weigh = scale_and_weigh,
    .silu_mul = silu_mul,
    .rotate = rotate,
    .row_max = row_max,
    .sum_exp = sum_exp,
    .exp = exp_row,
    .count_nonfinite = count_nonfinite,
    .softmax_step = softmax_step,
    .scale_lanes = scale_lanes,
};
static_assert(gemm_rows <= max_tile_rows && attention_rows <= max_tile_rows &&
              tile_cols <= max_tile_cols);

}  // namespace
}  // namespace engine
