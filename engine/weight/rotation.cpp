#include "engine/weight/rotation.h"

#include <utility>

namespace engine {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Each of the [p, p] matrices transposed.
std::vector<float> transposed(const std::vector<float>& all, std::int64_t p) {
  std::vector<float> out(all.size());
  for (std::int64_t m = 0; m < std::ssize(all); m += p * p) {
    for (std::int64_t r = 0; r < p; ++r) {
      for (std::int64_t c = 0; c < p; ++c) out[at(m + c * p + r)] = all[at(m + r * p + c)];
    }
  }
  return out;
}

}  // namespace

std::vector<std::int32_t> inverse_permutation(const std::vector<std::int32_t>& perm) {
  std::vector<std::int32_t> out(perm.size());
  for (std::size_t k = 0; k < perm.size(); ++k) out[at(perm[k])] = static_cast<std::int32_t>(k);
  return out;
}

// Q: X = x by perm_in, A on columns, B on rows, x by perm_out. So Q^T y: X[perm_out[k]] = y[k], B^T
// on rows, A^T on columns, x[perm_in[m]] = X[m]. On the transpose of X rows are columns.
Butterfly inverse_butterfly(const Butterfly& b) {
  const std::int64_t p1 = b.p1, p2 = b.p2, d = p1 * p2;
  Butterfly out;
  out.p1 = p2;
  out.p2 = p1;
  out.first = transposed(b.second, p2);
  out.second = transposed(b.first, p1);
  const std::vector<std::int32_t> out_places = inverse_permutation(b.perm_out);
  // The transpose of X matters even without permutations.
  out.perm_in.resize(at(d));
  out.perm_out.resize(at(d));
  for (std::int64_t i = 0; i < p1; ++i) {
    for (std::int64_t j = 0; j < p2; ++j) {
      const std::int64_t m = i * p2 + j, turned = j * p1 + i;
      out.perm_in[at(turned)] =
          out_places.empty() ? static_cast<std::int32_t>(m) : out_places[at(m)];
      const std::int64_t k = b.perm_in.empty() ? m : b.perm_in[at(m)];
      out.perm_out[at(k)] = static_cast<std::int32_t>(turned);
    }
  }
  return out;
}

}  // namespace engine
