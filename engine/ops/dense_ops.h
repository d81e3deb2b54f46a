// Contract: dense tensor operations. Float views are f32, f16 or bf16 unless a line says otherwise;
// arithmetic is f32 inside and the result is rounded once on store.
#pragma once

#include <cstdint>

#include "engine/core/view.h"

namespace engine {

class DenseOps {
 public:
  virtual ~DenseOps() = default;

  // out[r, :] = table[ids[r], :]. ids i32 [rows, 1], each within the table (checked:
  // Error(mismatch) on cpu before reading; on cuda the caller guarantees it). table and out share a
  // dtype.
  virtual void embed(View ids, View table, View out) = 0;

  // out = round(x / sqrt(mean(x^2) + eps)) * weight, the inner value rounded to x's dtype before
  // the product, as Hugging Face does. x, out [rows, dim], weight [1, dim], one dtype. out may be
  // x.
  virtual void rmsnorm(View x, View weight, float eps, View out) = 0;

  // out = x * w^T, or out += x * w^T. x [m, k], w [n, k], out [m, n]; any strides >= cols.
  // x and w share a dtype (cpu also takes f32 x with 16-bit w); out is that dtype or f32.
  // f32 inputs never use TF32. Adding to a 16-bit output may round the product first (as Hugging
  // Face's separate addition does; cuBLASLt does so for a few rows). 2*m*n*k flops.
  virtual void matmul(View x, View w, View out, bool accumulate) = 0;

  // out = silu(gate) * up, silu rounded to the dtype before the product. One shape and dtype.
  // out may be gate or up.
  virtual void silu_mul(View gate, View up, View out) = 0;

  // Elementwise dtype conversion (round to nearest even) or plain copy; same device, any strides.
  // f32/f16/bf16 among each other, f32 <-> f64, or equal dtypes of any kind.
  virtual void convert(View in, View out) = 0;

  // nll[r] = log(sum_j exp(logits[r, j])) - logits[r, target[r]], f64. logits f32 [rows, vocab],
  // target i32 [rows, 1] (negative: the row is skipped and gets 0; below vocab: checked as in
  // embed), nll f64 [rows, 1].
  virtual void row_nll(View logits, View target, View nll) = 0;

  // The index of each row's maximum (the lowest one on ties). NaN are passed over; 0 for a row with
  // nothing above -infinity. logits f32, out i32 [rows, 1].
  virtual void row_argmax(View logits, View out) = 0;

  // Number of NaN and infinite elements. Synchronises.
  virtual std::int64_t count_nonfinite(View x) = 0;

  // out = {sum (a - b)^2, sum a^2}, f64 [1, 2], in a fixed order. a, b one shape, float dtypes.
  virtual void square_sums(View a, View b, View out) = 0;

  // out[i] = bell_value(seed, stream, i) * scale + shift, rounded to out's dtype; i counts
  // elements row-major. Bit-identical on every device.
  virtual void fill_bell(View out, std::uint64_t seed, std::uint64_t stream, float scale,
                         float shift) = 0;

  // Every byte of the elements becomes 0.
  virtual void zero(View out) = 0;
};

}  // namespace engine
