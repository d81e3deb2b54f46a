#include "bench/kernel_cases.h"

#include <algorithm>

namespace engine {
namespace {

constexpr std::int64_t vector_rows[] = {1, 2, 4, 8, 16};
constexpr std::int64_t matrix_rows[] = {16, 32, 64, 128, 256, 512};
constexpr int all_bits[] = {2, 3, 4, 5, 6, 8};

WeightSpec packed_spec(const LinearShape& shape, int bits, std::int64_t group = 128,
                       bool zeros = true, DType scales = DType::f16) {
  WeightSpec spec;
  spec.shape.rows = shape.rows;
  spec.shape.cols = shape.cols;
  spec.shape.bits = bits;
  spec.shape.group = group;
  spec.shape.zeros = zeros;
  spec.shape.scale_dtype = scales;
  return spec;
}

WeightSpec dense_spec(const LinearShape& shape, DType dtype) {
  WeightSpec spec;
  spec.packed = false;
  spec.shape.rows = shape.rows;
  spec.shape.cols = shape.cols;
  spec.dense = dtype;
  return spec;
}

WeightSpec kind_spec(const LinearShape& shape, PackedKind kind) {
  WeightSpec spec = packed_spec(shape, kind == PackedKind::binary2 ? 2 : 4);
  spec.shape.kind = kind;
  spec.shape.zeros = kind == PackedKind::binary2;
  return spec;
}

std::int64_t workspace_bytes(const Ops& ops, const WeightSpec& spec, std::int64_t m, DType dtype) {
  if (!spec.packed) return 0;
  return ops.packed_workspace_bytes(spec.shape, m, dtype, PackedKernel::automatic);
}

class Cases {
 public:
  Cases(const Ops& ops, std::vector<KernelCase>& out) : dtype_(usual_dtype(ops)), out_(out) {
    types_ = ops.kind() == DeviceKind::cuda ? std::vector<DType>{DType::f16, DType::bf16}
                                            : std::vector<DType>{DType::f32};
  }

  void add_model(const std::string& model) {
    const ModelConfig config = synthetic_config(model);
    const std::vector<LinearShape> shapes = linear_shapes(model, true);
    for (const LinearShape& shape : shapes) {
      const bool head = &shape == &shapes.back();
      if (!head) add_packed(shape);
      add_dense(shape);
    }
    add_formats(shapes[2]);  // gate
    add_fused(config, model);
    add_attention(config, model);
  }

 private:
  void add_linear(const std::string& prefix, const std::string& shape, const WeightSpec& spec,
                  std::int64_t m, DType dtype, PackedKernel kernel) {
    out_.push_back(
        {prefix + "/" + shape + "/" + spec.name() + "/" + dtype_name(dtype) + "/m" +
             std::to_string(m),
         [=](Workbench& bench) { return prepare_linear(bench, spec, m, dtype, kernel); }});
  }

  void add_packed(const LinearShape& shape) {
    for (const int bits : all_bits) {
      const WeightSpec spec = packed_spec(shape, bits);
      for (const std::int64_t m : vector_rows) {
        add_linear("vector", shape.name, spec, m, dtype_, PackedKernel::vector);
      }
      for (const std::int64_t m : matrix_rows) {
        add_linear("matrix", shape.name, spec, m, dtype_, PackedKernel::matrix);
      }
      const DType dtype = dtype_;
      out_.push_back({"expand/" + shape.name + "/" + spec.name() + "/" + dtype_name(dtype),
                      [=](Workbench& bench) {
                        const WeightCopies& w = bench.weights(spec);
                        const View out = bench.make(dtype, spec.shape.rows, spec.shape.cols);
                        Prepared p;
                        p.work.copies = w.copies();
                        p.work.launch = [&ops = bench.ops(), &w, out](std::int64_t i) {
                          ops.expand(w[i].packed, out);
                        };
                        p.bytes = w.bytes() + out.bytes();
                        p.flops = 2 * out.count();
                        return p;
                      }});
    }
  }

  void add_dense(const LinearShape& shape) {
    const WeightSpec spec = dense_spec(shape, dtype_);
    for (const std::int64_t m : vector_rows) {
      add_linear("dense", shape.name, spec, m, dtype_, PackedKernel::automatic);
    }
    for (const std::int64_t m : matrix_rows) {
      if (m > 16) add_linear("dense", shape.name, spec, m, dtype_, PackedKernel::automatic);
    }
  }

  // One shape in every format.
  void add_formats(const LinearShape& shape) {
    for (const DType dtype : types_) {
      const DType scales = dtype == DType::bf16 ? DType::bf16 : DType::f16;
      for (const int bits : all_bits) {
        for (const std::int64_t group : {0, 32, 64, 128}) {
          for (const bool zeros : {true, false}) {
            const WeightSpec spec = packed_spec(shape, bits, group, zeros, scales);
            for (const std::int64_t m : {1, 16}) {
              add_linear("format", shape.name, spec, m, dtype, PackedKernel::vector);
            }
          }
        }
      }
      for (const PackedKind kind : {PackedKind::codebook, PackedKind::binary2}) {
        for (const std::int64_t m : vector_rows) {
          add_linear("vector", shape.name, kind_spec(shape, kind), m, dtype, PackedKernel::vector);
        }
      }
    }
  }

  void add_fused(const ModelConfig& config, const std::string& model);
  void add_attention(const ModelConfig& config, const std::string& model);

  DType dtype_;
  std::vector<DType> types_;
  std::vector<KernelCase>& out_;
};

KvCache make_cache(Workbench& bench, const AttnShape& shape, std::int64_t batch,
                   std::int64_t capacity, DType dtype, bool quantized) {
  KvCache cache;
  cache.batch = batch;
  cache.capacity = capacity;
  const std::int64_t rows = batch * capacity, cols = shape.kv_heads * shape.head_dim;
  if (quantized) {
    cache.k = bench.zeros(DType::u8, rows, cols);
    cache.v = bench.zeros(DType::u8, rows, cols);
    cache.k_scale = bench.random(DType::f32, rows, shape.kv_heads);
    cache.v_scale = bench.random(DType::f32, rows, shape.kv_heads);
  } else {
    cache.k = bench.random(dtype, rows, cols);
    cache.v = bench.random(dtype, rows, cols);
  }
  return cache;
}

std::int64_t cache_bytes(const KvCache& c) {
  return c.k.bytes() + c.v.bytes() + c.k_scale.bytes() + c.v_scale.bytes();
}

AttnShape attn_shape(const ModelConfig& config) {
  return {config.heads, config.kv_heads, config.head_dim};
}

void Cases::add_attention(const ModelConfig& config, const std::string& model) {
  const AttnShape shape = attn_shape(config);
  const DType dtype = dtype_;
  for (const std::int64_t kv_len : {256, 2048, 8192}) {
    for (const bool quantized : {false, true}) {
      for (const std::int64_t batch : {1, 4, 16}) {
        out_.push_back(
            {"attention_step/" + model + "/kv" + (quantized ? "8" : "16") + "/" +
                 dtype_name(dtype) + "/len" + std::to_string(kv_len) + "/m" + std::to_string(batch),
             [=](Workbench& bench) {
               Ops& ops = bench.ops();
               bench.clear_weights();
               std::vector<KvCache> caches = {
                   make_cache(bench, shape, batch, kv_len, dtype, quantized)};
               const std::int64_t copies = copies_beyond_cache(ops, cache_bytes(caches.front()));
               while (static_cast<std::int64_t>(caches.size()) < copies) {
                 caches.push_back(make_cache(bench, shape, batch, kv_len, dtype, quantized));
               }
               const View q = bench.random(dtype, batch, shape.heads * shape.head_dim);
               const View out = bench.make(dtype, q.rows, q.cols);
               const View position = bench.number(static_cast<std::int32_t>(kv_len - 1));
               const View workspace =
                   bench.zeros(DType::u8, 1, ops.attention_step_bytes(shape, batch, kv_len));
               Prepared p;
               p.work.copies = copies;
               p.bytes = cache_bytes(caches.front()) + q.bytes() + out.bytes();
               p.flops = 4 * shape.head_dim * shape.heads * batch * kv_len;
               p.work.launch = [=, &ops](std::int64_t i) {
                 ops.attention_step(q, caches[static_cast<std::size_t>(i)], shape, position, out,
                                    workspace);
               };
               return p;
             }});
      }
    }
  }
}

// The fused steps of a block, 4-bit, and the dense head behind the final norm.
void Cases::add_fused(const ModelConfig& config, const std::string& model) {
  const DType dtype = dtype_;
  const AttnShape shape = attn_shape(config);
  const std::int64_t q_dim = config.heads * config.head_dim;
  const std::int64_t kv_dim = config.kv_heads * config.head_dim;
  const WeightSpec q_spec = packed_spec({"", q_dim, config.hidden}, 4);
  const WeightSpec kv_spec = packed_spec({"", kv_dim, config.hidden}, 4);
  const WeightSpec gate_spec = packed_spec({"", config.intermediate, config.hidden}, 4);
  const WeightSpec o_spec = packed_spec({"", config.hidden, q_dim}, 4);
  const WeightSpec down_spec = packed_spec({"", config.hidden, config.intermediate}, 4);
  const WeightSpec head_spec = dense_spec({"", config.vocab, config.hidden}, dtype);
  const auto norm_and_x = [=](Workbench& bench, std::int64_t m, auto& step) {
    step.x = bench.random(dtype, m, config.hidden);
    step.norm = bench.random(dtype, 1, config.hidden);
    step.eps = static_cast<float>(config.rms_eps);
    step.scratch.h = bench.make(dtype, m, config.hidden);
    return step.x.bytes() + step.norm.bytes();
  };
  const auto tail = [&](const char* format, std::int64_t m) {
    return "/" + model + "/" + format + "/" + dtype_name(dtype) + "/m" + std::to_string(m);
  };
  for (const std::int64_t m : vector_rows) {
    out_.push_back({"qkv_step" + tail("b4g128", m), [=](Workbench& bench) {
                      Ops& ops = bench.ops();
                      const WeightCopies& q = bench.weights(q_spec);
                      const WeightCopies& k = bench.more_weights(kv_spec, q.copies());
                      const WeightCopies& v = bench.more_weights(kv_spec, q.copies());
                      constexpr std::int64_t capacity = 256;
                      QkvStep step;
                      Prepared p;
                      p.bytes = norm_and_x(bench, m, step);
                      step.head_dim = config.head_dim;
                      step.cos = bench.random(DType::f32, capacity, config.head_dim / 2);
                      step.sin = bench.random(DType::f32, capacity, config.head_dim / 2);
                      step.position = bench.number(128);
                      step.cache = make_cache(bench, shape, m, capacity, dtype, false);
                      step.q_out = bench.make(dtype, m, q_dim);
                      step.scratch.k = bench.make(dtype, m, kv_dim);
                      step.scratch.v = bench.make(dtype, m, kv_dim);
                      step.scratch.workspace =
                          bench.make(DType::u8, 1,
                                     std::max(workspace_bytes(ops, q_spec, m, dtype),
                                              workspace_bytes(ops, kv_spec, m, dtype)));
                      p.bytes += q.bytes() + k.bytes() + v.bytes() + step.q_out.bytes() +
                                 step.scratch.k.bytes() + step.scratch.v.bytes();
                      p.flops = 2 * m * config.hidden * (q_dim + 2 * kv_dim);
                      p.work.copies = q.copies();
                      p.work.launch = [=, &ops, &q, &k, &v](std::int64_t i) {
                        QkvStep s = step;
                        s.q = &q[i];
                        s.k = &k[i];
                        s.v = &v[i];
                        ops.qkv_step(s);
                      };
                      return p;
                    }});
  }
  for (const std::int64_t m : vector_rows) {
    out_.push_back({"gate_up" + tail("b4g128", m), [=](Workbench& bench) {
                      Ops& ops = bench.ops();
                      const WeightCopies& gate = bench.weights(gate_spec);
                      const WeightCopies& up = bench.more_weights(gate_spec, gate.copies());
                      GateUp step;
                      Prepared p;
                      p.bytes = norm_and_x(bench, m, step);
                      step.out = bench.make(dtype, m, config.intermediate);
                      step.scratch.u = bench.make(dtype, m, config.intermediate);
                      step.scratch.workspace =
                          bench.make(DType::u8, 1, workspace_bytes(ops, gate_spec, m, dtype));
                      p.bytes += gate.bytes() + up.bytes() + step.out.bytes();
                      p.flops = 4 * m * config.hidden * config.intermediate;
                      p.work.copies = gate.copies();
                      p.work.launch = [=, &ops, &gate, &up](std::int64_t i) {
                        GateUp s = step;
                        s.gate = &gate[i];
                        s.up = &up[i];
                        ops.gate_up(s);
                      };
                      return p;
                    }});
  }
  // Without the next queries: what follows attention in the last layer.
  for (const std::int64_t m : vector_rows) {
    out_.push_back({"block_tail" + tail("b4g128", m), [=](Workbench& bench) {
                      Ops& ops = bench.ops();
                      const WeightCopies& gate = bench.weights(gate_spec);
                      const WeightCopies& up = bench.more_weights(gate_spec, gate.copies());
                      const WeightCopies& o = bench.more_weights(o_spec, gate.copies());
                      const WeightCopies& down = bench.more_weights(down_spec, gate.copies());
                      BlockTail step;
                      Prepared p;
                      p.bytes = norm_and_x(bench, m, step.mlp);
                      step.a = bench.random(dtype, m, q_dim);
                      step.mlp.out = bench.make(dtype, m, config.intermediate);
                      step.mlp.scratch.u = bench.make(dtype, m, config.intermediate);
                      step.mlp.scratch.workspace =
                          bench.make(DType::u8, 1,
                                     std::max({workspace_bytes(ops, gate_spec, m, dtype),
                                               workspace_bytes(ops, o_spec, m, dtype),
                                               workspace_bytes(ops, down_spec, m, dtype)}));
                      p.bytes += gate.bytes() + up.bytes() + o.bytes() + down.bytes() +
                                 step.a.bytes() + step.mlp.out.bytes();
                      p.flops = 2 * m * config.hidden * (q_dim + 3 * config.intermediate);
                      p.work.copies = gate.copies();
                      p.work.launch = [=, &ops, &gate, &up, &o, &down](std::int64_t i) {
                        BlockTail s = step;
                        s.o = &o[i];
                        s.mlp.gate = &gate[i];
                        s.mlp.up = &up[i];
                        s.down = &down[i];
                        ops.block_tail(s);
                      };
                      return p;
                    }});
  }
  for (const WeightSpec& spec : {gate_spec, head_spec}) {
    for (const std::int64_t m : vector_rows) {
      const char* what = spec.packed ? "norm_linear" : "norm_head";
      const DType out_dtype = spec.packed ? dtype : DType::f32;  // logits are f32
      out_.push_back({what + tail(spec.packed ? "b4g128" : "dense", m), [=](Workbench& bench) {
                        Ops& ops = bench.ops();
                        const WeightCopies& w = bench.weights(spec);
                        NormLinear step;
                        Prepared p;
                        p.bytes = norm_and_x(bench, m, step);
                        step.out = bench.make(out_dtype, m, spec.shape.rows);
                        step.scratch.workspace =
                            bench.make(DType::u8, 1, workspace_bytes(ops, spec, m, dtype));
                        p.bytes += w.bytes() + step.out.bytes();
                        p.flops = 2 * m * spec.shape.rows * spec.shape.cols;
                        p.work.copies = w.copies();
                        p.work.launch = [=, &ops, &w](std::int64_t i) {
                          NormLinear s = step;
                          s.w = &w[i];
                          ops.norm_linear(s);
                        };
                        return p;
                      }});
    }
  }
}

}  // namespace

std::vector<LinearShape> linear_shapes(const std::string& model, bool head) {
  const ModelConfig c = synthetic_config(model);
  std::vector<LinearShape> shapes = {{model + "/qo", c.heads * c.head_dim, c.hidden},
                                     {model + "/kv", c.kv_heads * c.head_dim, c.hidden},
                                     {model + "/gate", c.intermediate, c.hidden},
                                     {model + "/down", c.hidden, c.intermediate}};
  if (head) shapes.push_back({model + "/head", c.vocab, c.hidden});
  return shapes;
}

DType usual_dtype(const Ops& ops) {
  return ops.kind() == DeviceKind::cuda ? DType::bf16 : DType::f32;
}

const WeightCopies& Workbench::weights(const WeightSpec& spec) {
  const std::string key = spec.name() + " " + std::to_string(spec.shape.rows) + " " +
                          std::to_string(spec.shape.cols) + " " +
                          dtype_name(spec.packed ? spec.shape.scale_dtype : spec.dense);
  if (!weights_ || key != last_) {
    weights_.reset();
    last_ = key;
    const PackedShape& s = spec.shape;
    const std::int64_t bytes =
        spec.packed ? s.records_bytes() + s.row_unit_bytes()
                    : s.rows * s.cols * static_cast<std::int64_t>(dtype_bytes(spec.dense));
    weights_ =
        std::make_unique<WeightCopies>(ops_, ledger_, spec, copies_beyond_cache(ops_, bytes));
  }
  return *weights_;
}

const WeightCopies& Workbench::more_weights(const WeightSpec& spec, std::int64_t copies) {
  more_.push_back(std::make_unique<WeightCopies>(ops_, ledger_, spec, copies));
  return *more_.back();
}

View Workbench::make(DType dtype, std::int64_t rows, std::int64_t cols) {
  if (rows * cols == 0) return View();
  buffers_.emplace_back(ops_.memory(), ledger_, MemTag::activations, dtype, rows, cols);
  return buffers_.back().view();
}

View Workbench::zeros(DType dtype, std::int64_t rows, std::int64_t cols) {
  const View v = make(dtype, rows, cols);
  if (!v.empty()) ops_.zero(v);
  return v;
}

View Workbench::random(DType dtype, std::int64_t rows, std::int64_t cols) {
  const View v = make(dtype, rows, cols);
  ops_.fill_bell(v, 2, buffers_.size(), 1.0F, 0.0F);
  return v;
}

View Workbench::number(std::int32_t value) {
  const View v = make(DType::i32, 1, 1);
  if (v.device == DeviceKind::cpu) {
    *v.host<std::int32_t>() = value;
    return v;
  }
  ops_.upload(host_view(&value, 1, 1), v);
  ops_.synchronize();
  return v;
}

void Workbench::clear() {
  more_.clear();
  buffers_.clear();
}

void Workbench::clear_weights() {
  weights_.reset();
  last_.clear();
}

Prepared prepare_linear(Workbench& bench, const WeightSpec& spec, std::int64_t m, DType dtype,
                        PackedKernel kernel) {
  Ops& ops = bench.ops();
  const WeightCopies& w = bench.weights(spec);
  const View x = bench.random(dtype, m, spec.shape.cols);
  const View out = bench.make(dtype, m, spec.shape.rows);
  const std::int64_t needed =
      spec.packed ? ops.packed_workspace_bytes(spec.shape, m, dtype, kernel) : 0;
  const View workspace = bench.make(DType::u8, 1, needed);
  Prepared p;
  p.work.copies = w.copies();
  p.work.launch = [=, &ops, &w](std::int64_t i) {
    ops.linear(x, w[i], out, false, workspace, kernel);
  };
  p.bytes = w.bytes() + x.bytes() + out.bytes();
  p.flops = 2 * m * spec.shape.rows * spec.shape.cols;
  return p;
}

std::vector<KernelCase> kernel_cases(const std::vector<std::string>& models, const Ops& ops) {
  std::vector<KernelCase> cases;
  Cases builder(ops, cases);
  for (const std::string& model : models) builder.add_model(model);
  return cases;
}

}  // namespace engine
