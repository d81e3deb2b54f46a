// Orthogonal transforms with their numbers in a backend's memory: one (TransformView), and what
// stands around the terms of a packed weight (Rotation).
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/transform.h"

namespace engine {

// A transform of size d with its numbers in the backend's memory.
struct TransformView {
  TransformKind kind = TransformKind::none;  // none: the identity
  std::int64_t d = 0;
  // hadamard
  View signs;              // f32 [1, d], +1 or -1
  std::int64_t order = 1;  // K
  View small;              // f32 [K, K], H_K; empty if K is 1
  // butterfly
  std::int64_t p1 = 1, p2 = 1;
  bool shared = false;
  View first;   // f32 or f16 [p2 * p1, p1]: A_0, A_1, ... below each other; shared: [p1, p1]
  View second;  // f32 or f16 [p1 * p2, p2]; shared: [p2, p2]
  View perm_in, perm_out;  // i32 [1, d] or empty

  [[nodiscard]] std::int64_t bytes() const {
    return signs.bytes() + small.bytes() + first.bytes() + second.bytes() + perm_in.bytes() +
           perm_out.bytes();
  }
};

// What a shape says about one side's transform.
struct RotationSide {
  TransformKind kind = TransformKind::none;
  bool shared = false;  // butterfly, as the next
  bool permuted = false;
  [[nodiscard]] bool operator==(const RotationSide&) const = default;
};

// W x = L^T (T (R (D x))): what stands around T. Rotations of butterflies are held in f16: each
// element is off by at most 2^-12 of 1, independently, so that a turned vector is off by about
// 2^-13 of its length.
struct Rotation {
  View diagonal;     // f32 [1, cols], D; empty: the identity
  TransformView in;  // R
  // hadamard: L, to be applied inversely. butterfly: L^T itself, which is a butterfly of its own
  // (with p1 and p2 exchanged).
  TransformView out;
  // i32 [1, d]: the inverses of perm_out of both; empty where that is.
  View in_places, out_places;

  [[nodiscard]] bool out_inverse() const { return out.kind == TransformKind::hadamard; }
  [[nodiscard]] bool empty() const {
    return in.kind == TransformKind::none && out.kind == TransformKind::none && diagonal.empty();
  }
  [[nodiscard]] std::int64_t bytes() const {
    return diagonal.bytes() + in.bytes() + out.bytes() + in_places.bytes() + out_places.bytes();
  }
};

// inverse[perm[k]] = k.
[[nodiscard]] std::vector<std::int32_t> inverse_permutation(const std::vector<std::int32_t>& perm);
// The butterfly that does Q^T where b does Q.
[[nodiscard]] Butterfly inverse_butterfly(const Butterfly& b);

}  // namespace engine
