// Orthogonal transforms of the inputs and outputs of a weight (QuIP, QuIP#).
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace engine {

enum class TransformKind : std::uint8_t { none, hadamard, butterfly };

// What a file says about an orthogonal matrix Q of size d.
//   hadamard:  Q = H_d^T diag(sign). H_d = (H_K kron Sylvester) / sqrt(d), hadamard_order() below.
//   butterfly: two stages of small rotations, drawn from (seed, stream); make_butterfly() below.
struct Transform {
  TransformKind kind = TransformKind::none;
  int signs_plane = -1;      // hadamard: packed, 1 bit, [1, d]: 1 = -1
  std::uint64_t seed = 0;    // butterfly, as the following; below 2^63
  std::uint64_t stream = 0;  // of the counter generator, another one for each use; below 2^63
  bool shared = false;       // all rotations of a stage are one: a Kronecker product
  bool permuted = true;      // random permutations before and after
};

// d = order * 2^t: order is the first of 172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12 that
// divides d with a power of two as quotient, else 1. Returns 0 if d / order is no power of two, or
// if there is no matrix of this order here (156).
[[nodiscard]] std::int64_t hadamard_order(std::int64_t d);
// H_K of one of these orders or 1: +1 and -1, [K, K], row-major, H_K H_K^T = K I. 12, 20, 60, 108
// and 140 by Paley's first construction (not symmetric), 28, 36 and 124 by his second (symmetric),
// 52, 116 and 172 by Williamson's (not symmetric).
[[nodiscard]] std::vector<float> hadamard_matrix(std::int64_t order);

// d = p1 * p2: the prime factors of d in ascending order, alternately to p1 and to p2.
//   x -> X[i, j] = x[perm_in[i p2 + j]], p1 x p2;  X[:, j] <- A_j X[:, j];  X[i, :] <- B_i X[i, :];
//   out[k] = X[perm_out[k]], X read row by row.
// A_j, B_i: uniform (Haar) on the rotations SO(p1), SO(p2).
struct Butterfly {
  std::int64_t p1 = 1, p2 = 1;
  std::vector<float> first;            // A: [p2, p1, p1], or [p1, p1] if shared
  std::vector<float> second;           // B: [p1, p2, p2], or [p2, p2] if shared
  std::vector<std::int32_t> perm_in;   // [d]; empty: none
  std::vector<std::int32_t> perm_out;  // [d]; empty: none
};
// A butterfly holds d (p1 + p2) numbers, so that a small file could ask for very much memory: there
// is none for a larger d, or with a larger side.
inline constexpr std::int64_t max_butterfly_size = 65536;
inline constexpr std::int64_t max_butterfly_side = 1024;
// p1 and p2 of d >= 1.
[[nodiscard]] std::pair<std::int64_t, std::int64_t> butterfly_sides(std::int64_t d);
[[nodiscard]] bool has_butterfly(std::int64_t d);
// The same numbers on every machine: nothing but +, -, *, / and sqrt in f64, rounded once to f32.
// has_butterfly(d). threads 0: all.
[[nodiscard]] Butterfly make_butterfly(const Transform& transform, std::int64_t d, int threads);

// A transform ready for use on the host, one vector at a time and in f64: what kernels are tested
// against and what a file's weight is decoded by (codec.h).
class HostTransform {
 public:
  // signs [d], +1 or -1, for hadamard only. d as hadamard_order and make_butterfly demand.
  HostTransform(const Transform& transform, std::vector<float> signs, std::int64_t d, int threads);
  // x [d] <- Q x, with `inverse` Q^T x. May run on several threads at once.
  void apply(std::span<double> x, bool inverse) const;

 private:
  TransformKind kind_;
  bool shared_;
  std::int64_t d_;
  std::vector<float> signs_;
  std::int64_t order_ = 1;
  std::vector<float> small_;
  Butterfly butterfly_;
};

}  // namespace engine
