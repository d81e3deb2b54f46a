#include "engine/weight/transform.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <string_view>
#include <tuple>

#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "engine/core/rng.h"

namespace engine {
namespace {

enum class Construction : std::uint8_t { paley_1, paley_2, williamson, none };

struct Order {
  std::int64_t order;
  Construction how;
};
constexpr std::array<Order, 12> orders = {{{172, Construction::williamson},
                                           {156, Construction::none},
                                           {140, Construction::paley_1},
                                           {124, Construction::paley_2},
                                           {116, Construction::williamson},
                                           {108, Construction::paley_1},
                                           {60, Construction::paley_1},
                                           {52, Construction::williamson},
                                           {36, Construction::paley_2},
                                           {28, Construction::paley_2},
                                           {20, Construction::paley_1},
                                           {12, Construction::paley_1}}};

// First rows a, b, c, d of four symmetric circulants with AA^T + BB^T + CC^T + DD^T = order I.
struct Williamson {
  std::int64_t order;
  std::array<std::string_view, 4> rows;
};
constexpr std::array<Williamson, 3> williamson_rows = {{
    {52, {"++-+-++++-+-+", "++--+-++-+--+", "+---++++++---", "+++-++--++-++"}},
    {116,
     {"+--+---+-+--++++++--+-+---+--", "+-+++-+++--+-++++-+--+++-+++-",
      "+--++----+-++++++++-+----++--", "++--++-+-++++----++++-+-++--+"}},
    {172,
     {"++-+--++-+++----+++-++++-+++----+++-++--+-+", "+--+++--+-+--+-+++++-++-+++++-+--+-+--+++--",
      "+-+-+----++++-++++-++--++-++++-++++----+-+-",
      "+--++----+-+---+--++++++++--+---+-+----++--"}},
}};

// chi(k) of the field of q elements: 0 for 0, 1 for squares, -1 for others.
std::vector<float> quadratic_character(std::int64_t q) {
  std::vector<float> chi(static_cast<std::size_t>(q), -1.0F);
  chi[0] = 0.0F;
  for (std::int64_t i = 1; i < q; ++i) chi[static_cast<std::size_t>(i * i % q)] = 1.0F;
  return chi;
}

// [0, 1 ... 1] above [corner, chi(i - j)] of size q + 1.
std::vector<float> jacobsthal_bordered(std::int64_t q, float above, float left) {
  const std::vector<float> chi = quadratic_character(q);
  const std::int64_t n = q + 1;
  std::vector<float> c(static_cast<std::size_t>(n * n), 0.0F);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      if (i == 0 && j == 0) continue;
      c[static_cast<std::size_t>(i * n + j)] =
          i == 0 ? above : (j == 0 ? left : chi[static_cast<std::size_t>((i - j + q) % q)]);
    }
  }
  return c;
}

std::vector<float> paley_1(std::int64_t order) {
  std::vector<float> h = jacobsthal_bordered(order - 1, -1.0F, 1.0F);
  for (std::int64_t i = 0; i < order; ++i) h[static_cast<std::size_t>(i * order + i)] += 1.0F;
  return h;
}

std::vector<float> paley_2(std::int64_t order) {
  const std::int64_t n = order / 2;
  const std::vector<float> c = jacobsthal_bordered(n - 1, 1.0F, 1.0F);
  std::vector<float> h(static_cast<std::size_t>(order * order));
  for (std::int64_t i = 0; i < order; ++i) {
    for (std::int64_t j = 0; j < order; ++j) {
      const float core = c[static_cast<std::size_t>(i % n * n + j % n)];
      const float unit = i % n == j % n ? 1.0F : 0.0F;
      float value = core + unit;
      if (i < n && j >= n) value = core - unit;
      if (i >= n && j < n) value = core - unit;
      if (i >= n && j >= n) value = -core - unit;
      h[static_cast<std::size_t>(i * order + j)] = value;
    }
  }
  return h;
}

// [ A B C D; -B A -D C; -C D A -B; -D -C B A ].
std::vector<float> williamson(std::int64_t order) {
  constexpr std::array<std::array<int, 4>, 4> block = {
      {{1, 2, 3, 4}, {-2, 1, -4, 3}, {-3, 4, 1, -2}, {-4, -3, 2, 1}}};
  const auto* found = std::find_if(williamson_rows.begin(), williamson_rows.end(),
                                   [&](const Williamson& w) { return w.order == order; });
  const std::int64_t n = order / 4;
  std::vector<float> h(static_cast<std::size_t>(order * order));
  for (std::int64_t i = 0; i < order; ++i) {
    for (std::int64_t j = 0; j < order; ++j) {
      const int which = block[static_cast<std::size_t>(i / n)][static_cast<std::size_t>(j / n)];
      const std::string_view row = found->rows[static_cast<std::size_t>(std::abs(which) - 1)];
      const bool plus = row[static_cast<std::size_t>((j % n - i % n + n) % n)] == '+';
      h[static_cast<std::size_t>(i * order + j)] = plus == (which > 0) ? 1.0F : -1.0F;
    }
  }
  return h;
}

// Words of the counter generator for one purpose of one butterfly.
class Words {
 public:
  enum class Use : std::uint8_t { first, second, perm_in, perm_out };
  Words(const Transform& t, Use use, std::int64_t matrix)
      : seed_(t.seed),
        stream_(t.stream),
        index_((static_cast<std::uint64_t>(use) << 62U) |
               (static_cast<std::uint64_t>(matrix) << 32U)) {}

  std::uint32_t next() {
    if (at_ == 4) {
      four_ = philox(seed_, stream_, index_++);
      at_ = 0;
    }
    return four_.v[at_++];
  }

 private:
  std::uint64_t seed_, stream_, index_;
  Philox4 four_{};
  int at_ = 4;
};

// ln of a positive normal number, by ln m = 2 artanh((m - 1) / (m + 1)). Libraries differ in the
// last bit of theirs.
double plain_log(double x) {
  constexpr double ln_2 = 0x1.62e42fefa39efp-1;
  const auto bits = std::bit_cast<std::uint64_t>(x);
  auto exponent = static_cast<std::int64_t>(bits >> 52U) - 1023;
  double m = std::bit_cast<double>((bits & 0xFFFFFFFFFFFFFU) | 0x3FF0000000000000U);  // [1, 2)
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double z = (m - 1.0) / (m + 1.0);  // at most 0.172
  const double square = z * z;
  double sum = 0.0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return static_cast<double>(exponent) * ln_2 + 2.0 * z * sum;
}

// Normal values by Marsaglia's polar method.
class Normals {
 public:
  explicit Normals(Words words) : words_(words) {}

  double next() {
    if (held_) {
      held_ = false;
      return second_;
    }
    for (;;) {
      const double u = coordinate();
      const double v = coordinate();
      const double s = u * u + v * v;
      if (s >= 1.0) continue;  // never 0: coordinates are odd multiples of 2^-32
      const double factor = std::sqrt(-2.0 * plain_log(s) / s);
      second_ = v * factor;
      held_ = true;
      return u * factor;
    }
  }

 private:
  double coordinate() { return (static_cast<double>(words_.next()) + 0.5) * 0x1p-31 - 1.0; }

  Words words_;
  double second_ = 0.0;
  bool held_ = false;
};

// A reflection H = I - (2 / v.v) v v^T of R^n that takes -s e_1 to a uniform unit vector u, where
// s = +-1 is the sign of u_1.
struct Reflection {
  std::vector<double> v;
  double s = 1.0;
  double factor = 0.0;  // 2 / v.v

  void draw(Normals& normals, std::int64_t n) {
    double square = 0.0;
    v.resize(static_cast<std::size_t>(n));
    for (double& x : v) {
      x = normals.next();
      square += x * x;
    }
    s = v[0] < 0.0 ? -1.0 : 1.0;
    v[0] += s * std::sqrt(square);
    square = 0.0;
    for (const double x : v) square += x * x;
    factor = 2.0 / square;
  }
};

// A rotation of size p into q [p, p] by Stewart's recursion, with a reflection of size n:
//   Q_n = H diag(-s, s, 1, ..., 1) diag(1, Q_(n-1))
// has the first column u and determinant 1, and is uniform if Q_(n-1) is. A step needs v^T M, M
// what stands to the right of H; it is summed up while the step before still walks its rows.
void draw_rotation(const Words& words, std::int64_t p, float* q) {
  Normals normals(words);
  std::vector<double> m(static_cast<std::size_t>(p * p), 0.0);
  std::vector<double> dots, next_dots;
  Reflection now, next;
  // Q_1 = 1, and the step to come.
  m.back() = 1.0;
  if (p > 1) {
    now.draw(normals, 2);
    m[static_cast<std::size_t>((p - 2) * (p + 1))] = -now.s;
    m.back() = now.s;
    dots = {now.v[0] * -now.s, now.v[1] * now.s};
  }
  for (std::int64_t n = 2; n <= p; ++n) {
    const bool last = n == p;
    const std::int64_t first = p - n;  // Q_n lies in rows and columns from here on
    if (!last) {
      next.draw(normals, n + 1);
      next_dots.assign(static_cast<std::size_t>(n + 1), 0.0);
      next_dots[0] = next.v[0] * -next.s;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      double* row = m.data() + (first + i) * p + first;
      const double a = now.factor * now.v[static_cast<std::size_t>(i)];
      const double* dot = dots.data();
      if (last) {
        for (std::int64_t j = 0; j < n; ++j) row[j] -= a * dot[j];
        continue;
      }
      const double b = next.v[static_cast<std::size_t>(i + 1)];
      const double s = i == 0 ? next.s : 1.0;
      double* sum = next_dots.data() + 1;
      for (std::int64_t j = 0; j < n; ++j) {
        row[j] = s * (row[j] - a * dot[j]);
        sum[j] += b * row[j];
      }
    }
    if (!last) m[static_cast<std::size_t>((first - 1) * (p + 1))] = -next.s;
    std::swap(now, next);
    dots.swap(next_dots);
  }
  for (std::size_t i = 0; i < m.size(); ++i) q[i] = static_cast<float>(m[i]);
}

std::vector<std::int32_t> draw_permutation(Words words, std::int64_t d) {
  std::vector<std::int32_t> perm(static_cast<std::size_t>(d));
  std::iota(perm.begin(), perm.end(), 0);
  for (std::int64_t i = d - 1; i > 0; --i) {
    const auto j = static_cast<std::size_t>(
        (static_cast<std::uint64_t>(words.next()) * static_cast<std::uint64_t>(i + 1)) >> 32U);
    std::swap(perm[static_cast<std::size_t>(i)], perm[j]);
  }
  return perm;
}

}  // namespace

std::int64_t hadamard_order(std::int64_t d) {
  REQUIRE(d > 0, "a transform of size " + std::to_string(d));
  const auto power_of_two = [](std::int64_t n) { return (n & (n - 1)) == 0; };
  for (const Order& o : orders) {
    if (d % o.order != 0 || !power_of_two(d / o.order)) continue;
    return o.how == Construction::none ? 0 : o.order;
  }
  return power_of_two(d) ? 1 : 0;
}

std::vector<float> hadamard_matrix(std::int64_t order) {
  if (order == 1) return {1.0F};
  const auto* found =
      std::find_if(orders.begin(), orders.end(), [&](const Order& o) { return o.order == order; });
  REQUIRE(found != orders.end() && found->how != Construction::none,
          "no Hadamard matrix of order " + std::to_string(order));
  switch (found->how) {
    case Construction::paley_1:
      return paley_1(order);
    case Construction::paley_2:
      return paley_2(order);
    default:
      return williamson(order);
  }
}

std::pair<std::int64_t, std::int64_t> butterfly_sides(std::int64_t d) {
  REQUIRE(d > 0, "a transform of size " + std::to_string(d));
  std::int64_t sides[2] = {1, 1};
  int which = 0;
  for (std::int64_t factor = 2; d > 1; ++factor) {
    if (factor * factor > d) factor = d;  // what is left is prime
    for (; d % factor == 0; d /= factor, which ^= 1) sides[which] *= factor;
  }
  return {sides[0], sides[1]};
}

bool has_butterfly(std::int64_t d) {
  const auto [p1, p2] = butterfly_sides(d);
  return d <= max_butterfly_size && std::max(p1, p2) <= max_butterfly_side;
}

Butterfly make_butterfly(const Transform& transform, std::int64_t d, int threads) {
  REQUIRE(transform.kind == TransformKind::butterfly, "not a butterfly");
  Butterfly out;
  std::tie(out.p1, out.p2) = butterfly_sides(d);
  REQUIRE(has_butterfly(d), "no butterfly of size " + std::to_string(d));
  const std::int64_t firsts = transform.shared ? 1 : out.p2;
  const std::int64_t seconds = transform.shared ? 1 : out.p1;
  out.first.resize(static_cast<std::size_t>(firsts * out.p1 * out.p1));
  out.second.resize(static_cast<std::size_t>(seconds * out.p2 * out.p2));
  ThreadPool pool(d < 256 ? 1 : threads);
  pool.run(firsts + seconds, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      if (i < seconds) {
        draw_rotation(Words(transform, Words::Use::second, i), out.p2,
                      out.second.data() + i * out.p2 * out.p2);
      } else {
        draw_rotation(Words(transform, Words::Use::first, i - seconds), out.p1,
                      out.first.data() + (i - seconds) * out.p1 * out.p1);
      }
    }
  });
  if (transform.permuted) {
    out.perm_in = draw_permutation(Words(transform, Words::Use::perm_in, 0), d);
    out.perm_out = draw_permutation(Words(transform, Words::Use::perm_out, 0), d);
  }
  return out;
}

}  // namespace engine
