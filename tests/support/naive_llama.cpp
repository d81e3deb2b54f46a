#include "tests/support/naive_llama.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace engine::test {

namespace {

using Rows = std::vector<std::vector<double>>;  // one vector per token

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Rows linear(const Rows& x, const std::vector<float>& w, std::int64_t out) {
  Rows y(x.size(), std::vector<double>(at(out)));
  for (std::size_t t = 0; t < x.size(); ++t) {
    const std::size_t in = x[t].size();
    for (std::size_t r = 0; r < at(out); ++r) {
      for (std::size_t c = 0; c < in; ++c) y[t][r] += x[t][c] * static_cast<double>(w[r * in + c]);
    }
  }
  return y;
}

Rows normed(const Rows& x, const std::vector<float>& weight, double eps) {
  Rows y = x;
  for (std::vector<double>& row : y) {
    double squares = 0;
    for (const double v : row) squares += v * v;
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(row.size()) + eps);
    for (std::size_t c = 0; c < row.size(); ++c) row[c] *= scale * static_cast<double>(weight[c]);
  }
  return y;
}

// Angle per position of pair j.
double frequency(const ModelConfig& c, std::int64_t j) {
  const double plain =
      std::pow(c.rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(c.head_dim));
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeType::none) return plain;
  if (s.type == RopeType::linear) return plain / s.factor;
  // How often the pair turns within the original context decides how much it is slowed down.
  const double turns =
      static_cast<double>(s.original_max_positions) * plain / (2.0 * std::numbers::pi);
  if (turns > s.high_freq_factor) return plain;
  if (turns < s.low_freq_factor) return plain / s.factor;
  const double share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1.0 - share) * plain / s.factor + share * plain;
}

void rotate(Rows& x, const ModelConfig& c) {
  const std::int64_t half = c.head_dim / 2;
  for (std::size_t t = 0; t < x.size(); ++t) {
    const auto heads = static_cast<std::int64_t>(x[t].size()) / c.head_dim;
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t j = 0; j < half; ++j) {
        const double angle = static_cast<double>(t) * frequency(c, j);
        double& a = x[t][at(h * c.head_dim + j)];
        double& b = x[t][at(h * c.head_dim + j + half)];
        const double first = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = first;
      }
    }
  }
}

Rows attention(const Rows& q, const Rows& k, const Rows& v, const ModelConfig& c) {
  Rows out(q.size(), std::vector<double>(q.front().size(), 0.0));
  for (std::size_t t = 0; t < q.size(); ++t) {
    for (std::int64_t h = 0; h < c.heads; ++h) {
      const std::int64_t from = h / (c.heads / c.kv_heads) * c.head_dim;
      std::vector<double> p(t + 1, 0.0);
      for (std::size_t s = 0; s <= t; ++s) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          p[s] += q[t][at(h * c.head_dim + d)] * k[s][at(from + d)];
        }
        p[s] /= std::sqrt(static_cast<double>(c.head_dim));
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& e : p) sum += e = std::exp(e - top);
      for (std::size_t s = 0; s <= t; ++s) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          out[t][at(h * c.head_dim + d)] += p[s] / sum * v[s][at(from + d)];
        }
      }
    }
  }
  return out;
}

void add(Rows& x, const Rows& y) {
  for (std::size_t t = 0; t < x.size(); ++t) {
    for (std::size_t c = 0; c < x[t].size(); ++c) x[t][c] += y[t][c];
  }
}

}  // namespace

std::vector<double> naive_logits(const ModelConfig& c, const NamedTensors& tensors,
                                 std::span<const std::int32_t> ids) {
  const std::vector<float>& table = tensors.at("model.embed_tokens.weight");
  Rows x;
  for (const std::int32_t id : ids) {
    const auto row = table.begin() + id * c.hidden;
    x.emplace_back(row, row + c.hidden);
  }
  for (std::int64_t layer = 0; layer < c.layers; ++layer) {
    const auto w = [&](const char* name) -> const std::vector<float>& {
      return tensors.at("model.layers." + std::to_string(layer) + "." + name + ".weight");
    };
    const Rows n = normed(x, w("input_layernorm"), c.rms_eps);
    Rows q = linear(n, w("self_attn.q_proj"), c.heads * c.head_dim);
    Rows k = linear(n, w("self_attn.k_proj"), c.kv_heads * c.head_dim);
    const Rows v = linear(n, w("self_attn.v_proj"), c.kv_heads * c.head_dim);
    rotate(q, c);
    rotate(k, c);
    add(x, linear(attention(q, k, v, c), w("self_attn.o_proj"), c.hidden));

    const Rows m = normed(x, w("post_attention_layernorm"), c.rms_eps);
    Rows gate = linear(m, w("mlp.gate_proj"), c.intermediate);
    const Rows up = linear(m, w("mlp.up_proj"), c.intermediate);
    for (std::size_t t = 0; t < gate.size(); ++t) {
      for (std::size_t i = 0; i < gate[t].size(); ++i) {
        gate[t][i] = gate[t][i] / (1.0 + std::exp(-gate[t][i])) * up[t][i];
      }
    }
    add(x, linear(gate, w("mlp.down_proj"), c.hidden));
  }
  const std::vector<float>& head = c.tie_embeddings ? table : tensors.at("lm_head.weight");
  std::vector<double> out;
  for (const auto& row :
       linear(normed(x, tensors.at("model.norm.weight"), c.rms_eps), head, c.vocab)) {
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

}  // namespace engine::test
