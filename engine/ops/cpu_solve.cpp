// CpuOps: second moments, damping and the triangular factor of GPTQ (docs/methods/gptq.md).
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"

namespace engine {

namespace {

constexpr std::int64_t factor_block = 64;
constexpr std::int64_t factor_tile = 512;  // columns of the update whose panel stays in the cache

// A square matrix in row-major memory.
template <class T>
struct Square {
  T* data;
  std::int64_t stride;
  std::int64_t d;

  [[nodiscard]] T* row(std::int64_t i) const { return data + i * stride; }
};

// a[i, j] <-> a[d-1-i, d-1-j].
template <class T>
void reverse_both(ThreadPool& pool, const Square<T>& a) {
  pool.run((a.d + 1) / 2, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t mirror = a.d - 1 - i;
      if (i == mirror) {
        std::reverse(a.row(i), a.row(i) + a.d);
      } else {
        for (std::int64_t j = 0; j < a.d; ++j) std::swap(a.row(i)[j], a.row(mirror)[a.d - 1 - j]);
      }
    }
  });
}

// The lower Cholesky factor of the block [k0, k1) x [k0, k1), in place. False at a pivot that is
// not positive (a NaN is not).
template <class T>
bool factor_diagonal_block(const Square<T>& a, std::int64_t k0, std::int64_t k1) {
  for (std::int64_t j = k0; j < k1; ++j) {
    T pivot = a.row(j)[j];
    for (std::int64_t p = k0; p < j; ++p) pivot -= a.row(j)[p] * a.row(j)[p];
    if (!(pivot > T(0)) || !std::isfinite(pivot)) return false;
    const T root = std::sqrt(pivot);
    a.row(j)[j] = root;
    for (std::int64_t i = j + 1; i < k1; ++i) {
      T sum = a.row(i)[j];
      for (std::int64_t p = k0; p < j; ++p) sum -= a.row(i)[p] * a.row(j)[p];
      a.row(i)[j] = sum / root;
    }
  }
  return true;
}

// Rows below the block: L[i, k0..k1) = A[i, k0..k1) L[k0..k1, k0..k1)^-T, kept once more transposed
// in `panel` [k1-k0, d] so that the update below reads rows.
template <class T>
void solve_panel(ThreadPool& pool, const Square<T>& a, std::int64_t k0, std::int64_t k1, T* panel) {
  pool.run(a.d - k1, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = k1 + begin; i < k1 + end; ++i) {
      for (std::int64_t j = k0; j < k1; ++j) {
        T sum = a.row(i)[j];
        for (std::int64_t p = k0; p < j; ++p) sum -= a.row(i)[p] * a.row(j)[p];
        a.row(i)[j] = sum / a.row(j)[j];
        panel[(j - k0) * a.d + i] = a.row(i)[j];
      }
    }
  });
}

// A[i, j] -= sum over p in [k0, k1) of L[i, p] L[j, p], for k1 <= j <= i.
template <class T>
void update_trailing(ThreadPool& pool, const Square<T>& a, std::int64_t k0, std::int64_t k1,
                     const T* panel) {
  pool.run(a.d - k1, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j0 = k1; j0 < k1 + end; j0 += factor_tile) {
      for (std::int64_t i = std::max(k1 + begin, j0); i < k1 + end; ++i) {
        T* out = a.row(i);
        const std::int64_t j1 = std::min(j0 + factor_tile, i + 1);
        std::int64_t p = k0;
        for (; p + 4 <= k1; p += 4) {
          const T *l = out + p, *u0 = panel + (p - k0) * a.d, *u1 = u0 + a.d, *u2 = u1 + a.d,
                  *u3 = u2 + a.d;
          const T l0 = l[0], l1 = l[1], l2 = l[2], l3 = l[3];
          for (std::int64_t j = j0; j < j1; ++j) {
            out[j] -= (l0 * u0[j] + l1 * u1[j]) + (l2 * u2[j] + l3 * u3[j]);
          }
        }
        for (; p < k1; ++p) {
          const T l = out[p];
          const T* u = panel + (p - k0) * a.d;
          for (std::int64_t j = j0; j < j1; ++j) out[j] -= l * u[j];
        }
      }
    }
  });
}

template <class T>
bool factor_lower(ThreadPool& pool, const Square<T>& a, T* panel) {
  for (std::int64_t k0 = 0; k0 < a.d; k0 += factor_block) {
    const std::int64_t k1 = std::min(k0 + factor_block, a.d);
    if (!factor_diagonal_block(a, k0, k1)) return false;
    solve_panel(pool, a, k0, k1, panel);
    update_trailing(pool, a, k0, k1, panel);
  }
  return true;
}

// With J the reversal, J a J = L L^T gives a = (J L J)(J L J)^T, and J L J is upper triangular.
template <class T>
bool factor_reversed(ThreadPool& pool, const Square<T>& a, T* panel) {
  reverse_both(pool, a);
  if (!factor_lower(pool, a, panel)) return false;
  for (std::int64_t i = 0; i < a.d; ++i) std::fill(a.row(i) + i + 1, a.row(i) + a.d, T(0));
  reverse_both(pool, a);
  return true;
}

// The damped matrix of damp_hessian; returns the value added to the diagonal.
template <class T>
double damp_into(ThreadPool& pool, const Square<const float>& h, const std::int32_t* perm,
                 double scale, double damp, const Square<T>& a, std::uint8_t* dead) {
  const std::int64_t d = a.d;
  const auto source = [perm](std::int64_t i) { return perm != nullptr ? perm[i] : i; };
  std::vector<double> diagonal(static_cast<std::size_t>(d));
  double sum = 0.0;
  for (std::int64_t i = 0; i < d; ++i) {
    const float value = h.row(source(i))[source(i)];
    dead[i] = value == 0.0F ? 1 : 0;
    diagonal[static_cast<std::size_t>(i)] = dead[i] != 0 ? 1.0 : scale * static_cast<double>(value);
    sum += diagonal[static_cast<std::size_t>(i)];
  }
  const double damping = damp * (sum / static_cast<double>(d));
  pool.run(d, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t j = 0; j < d; ++j) {
        const std::int64_t r = std::max<std::int64_t>(source(i), source(j));
        const std::int64_t c = std::min<std::int64_t>(source(i), source(j));
        a.row(i)[j] = static_cast<T>(scale * static_cast<double>(h.row(r)[c]));
      }
      a.row(i)[i] = static_cast<T>(diagonal[static_cast<std::size_t>(i)] + damping);
    }
  });
  return damping;
}

void require_square(const View& a, const char* what) {
  REQUIRE(a.rows == a.cols && a.rows > 0,
          std::string(what) + " expected a square matrix, found " + a.shape());
}

}  // namespace

void CpuOps::gram(View x, View h) {
  REQUIRE(h.rows == x.cols && h.cols == x.cols,
          "second moment of " + x.shape() + ", found " + h.shape());
  REQUIRE(x.device == DeviceKind::cpu, "host access to a device view");
  GemmProblem p;  // h += x^T x
  p.m = p.n = x.cols;
  p.k = x.rows;
  p.a = {x.data, x.dtype, x.stride, true};
  p.b = {x.data, x.dtype, x.stride, false};
  p.c = {h.host<float>(), DType::f32, h.stride};
  p.accumulate = true;
  p.lower_only = true;
  gemm(&pool_, p);
}

void CpuOps::damp_hessian(View h, View perm, double scale, double damp, View a, View dead,
                          View damping) {
  require_square(h, "second moment");
  REQUIRE(a.rows == h.rows && a.cols == h.cols, "damped " + h.shape() + ", found " + a.shape());
  REQUIRE(dead.rows == 1 && dead.cols == h.cols, "dead inputs, found " + dead.shape());
  REQUIRE(damping.count() == 1, "damping, found " + damping.shape());
  const std::int32_t* order = perm.empty() ? nullptr : checked_permutation(perm, h.cols);
  const Square<const float> in{h.host<float>(), h.stride, h.rows};
  auto* dead_flags = dead.host<std::uint8_t>();
  *damping.host<double>() =
      a.dtype == DType::f64 ? damp_into<double>(pool_, in, order, scale, damp,
                                                {a.host<double>(), a.stride, a.rows}, dead_flags)
                            : damp_into<float>(pool_, in, order, scale, damp,
                                               {a.host<float>(), a.stride, a.rows}, dead_flags);
}

std::int64_t CpuOps::factor_workspace_bytes(std::int64_t d, DType dtype) {
  return factor_block * d * static_cast<std::int64_t>(dtype_bytes(dtype));
}

bool CpuOps::factor_upper(View a, View workspace) {
  require_square(a, "factor");
  REQUIRE(workspace.bytes() >= factor_workspace_bytes(a.rows, a.dtype),
          "factor workspace, found " + workspace.shape());
  void* panel = workspace.host<std::uint8_t>();
  return a.dtype == DType::f64
             ? factor_reversed<double>(pool_, {a.host<double>(), a.stride, a.rows},
                                       static_cast<double*>(panel))
             : factor_reversed<float>(pool_, {a.host<float>(), a.stride, a.rows},
                                      static_cast<float*>(panel));
}

}  // namespace engine
