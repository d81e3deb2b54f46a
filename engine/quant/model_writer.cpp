#include "engine/quant/model_writer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "engine/model/install.h"
#include "engine/ops/cpu_kernels.h"
#include "engine/quant/driver.h"
#include "engine/weight/bits.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

PackedWriterOptions writer_options(const QuantizeJob& job) {
  PackedWriterOptions options;
  options.compress.level = job.zstd_level;
  options.compress.threads = job.threads > 0 ? static_cast<unsigned>(job.threads)
                                             : std::max(1U, std::thread::hardware_concurrency());
  options.discard_unfinished = !job.resume;
  return options;
}

std::span<const std::byte> bytes_of(const Plane& plane) {
  return {static_cast<const std::byte*>(plane.data.data),
          static_cast<std::size_t>(plane.raw_bytes())};
}

}  // namespace

ModelWriter::ModelWriter(const QuantizeJob& job) : job_(job), config_(job.source->config()) {
  if (job.blocks > 0) config_.layers = job.blocks;
  identity_["engine"] = engine_version;
  identity_["config"] = Json::parse(config_to_json(config_));
  identity_["source"] = job.source->describe();
  identity_["method"] = job.method->name();
  identity_["options"] = job.method->options();
  identity_["compute_dtype"] = dtype_name(job.dtype);
  identity_["device"] = job.ops->kind() == DeviceKind::cpu ? "cpu" : "cuda";
  identity_["calibration"] = job.calibration_protocol;
  // The order in which the statistics are summed up.
  if (job.method->needs().data()) identity_["batch"] = effective_batch(job);

  processor_ = job.ops->info().model;
  outer_ = {"embed_tokens.weight"};
  if (!config_.tie_embeddings) outer_.emplace_back("lm_head.weight");
  outer_.emplace_back("norm.weight");

  if (!job.resume) {
    std::filesystem::path journal = job.out;
    journal += ".journal";
    if (!job.restart && std::filesystem::exists(journal)) {
      throw Error(ErrorCode::usage,
                  job.out.string() + ": an interrupted run left finished blocks (" +
                      journal.filename().string() +
                      "): expected --resume to continue it or --restart to discard it");
    }
    writer_.emplace(job.out, writer_options(job));
    queue_.emplace(queue_bytes());
    return;
  }
  auto resumed = PackedWriter::resume(job.out, writer_options(job));
  if (!resumed) {
    throw Error(ErrorCode::usage, job.out.string() + ": nothing to resume: there is no " +
                                      job.out.filename().string() + ".journal beside it");
  }
  // From here on a failure must not destroy what the earlier run left.
  resumed->writer.keep_for_resume();
  const JsonObject state(resumed->state, job.out.string() + ".journal");
  const JsonObject identity = state.object("identity");
  for (const auto& [key, value] : identity_.items()) {
    const Json* found = identity.find(key);
    if ((found == nullptr ? Json() : *found) != value) {
      throw Error(ErrorCode::mismatch, job.out.string() + ": --resume: " + key + ": expected " +
                                           describe(found == nullptr ? Json() : *found) +
                                           " as in the unfinished file, found " + describe(value));
    }
  }
  // The last bits of sums differ between processors, and the file would be neither's.
  if (state.text("processor") != processor_) {
    throw Error(ErrorCode::mismatch, job.out.string() + ": --resume: processor: expected " +
                                         state.text("processor") +
                                         " as in the unfinished file, found " + processor_);
  }
  resumed_ = finished_ = state.integer("finished", 1, config_.layers);
  linears_ = state.object("linears").value();
  dense_ = state.object("dense").value();
  if (!state.has("blocks") || !state.find("blocks")->is_array()) state.fail("blocks", "an array");
  blocks_ = *state.find("blocks");
  writer_.emplace(std::move(resumed->writer));
  check_resumed(state);
  // Not every plane is read again, and damage must not get into the finished file.
  writer_->verify_planes();
  std::erase_if(outer_, [&](const std::string& name) { return dense_.contains(name); });
  queue_.emplace(queue_bytes());
}

// The largest outer tensor has to be held anyway; beside it a few blocks' linears.
std::int64_t ModelWriter::queue_bytes() const {
  constexpr std::int64_t linears = std::int64_t{512} << 20U;
  const DenseInfo largest = job_.source->dense_info("embed_tokens.weight");
  return linears +
         largest.rows * largest.cols * static_cast<std::int64_t>(dtype_bytes(largest.dtype));
}

// What the rest of the run and finish() take from the journal's tables.
void ModelWriter::check_resumed(const JsonObject& state) const {
  const auto planes = static_cast<std::int64_t>(writer_->planes().size());
  const JsonObject linears = state.object("linears"), dense = state.object("dense");
  for (std::int64_t layer = 0; layer < finished_; ++layer) {
    for (const Site s : all_sites) {
      const std::string name = linear_name(layer, s);
      const JsonObject entry = linears.object(name);
      const PackedLinear linear =
          parse_linear_entry(entry.value(), state.file(), "linears." + name);
      const SiteShape shape = site_shape(config_, s);
      if (linear.weight.rows != shape.rows || linear.weight.cols != shape.cols) {
        linears.fail(name, "the model's shape");
      }
      for (std::size_t i = 0; i < linear.planes.size(); ++i) {
        if (linear.planes[i] >= writer_->planes().size() ||
            writer_->planes()[linear.planes[i]].raw_bytes !=
                static_cast<std::uint64_t>(linear.weight.planes[i].raw_bytes())) {
          linears.fail(name, "planes of the unfinished file");
        }
      }
      static_cast<void>(entry.text("outcome"));
      for (const char* key :
           {"relative_error", "bits_nominal", "bits_stored", "bytes_stored", "bytes_on_disk"}) {
        static_cast<void>(entry.number(key));
      }
    }
  }
  for (const auto& [name, value] : dense_.items()) {
    const JsonObject entry = dense.object(name);
    static_cast<void>(entry.integer("plane", 0, planes - 1));
    static_cast<void>(entry.number("rows"));
    static_cast<void>(entry.number("cols"));
  }
}

void ModelWriter::install(std::int64_t layer, Loader& loader, const BlockWeights& out) const {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  install_norm(prefix + "input_layernorm.weight", loader, out.attn_norm);
  install_norm(prefix + "post_attention_layernorm.weight", loader, out.mlp_norm);
  for (const Site s : all_sites) install_linear_of(linear_name(layer, s), loader, out[s].dense);
}

void ModelWriter::install_norm(const std::string& name, Loader& loader, View out) const {
  const Json& entry = dense_.at(name);
  if (!entry.contains("replaced")) return;
  const std::int64_t bytes = out.cols * static_cast<std::int64_t>(sizeof(float));
  const auto plane = entry["plane"].get<std::uint32_t>();
  if (writer_->planes()[plane].raw_bytes != static_cast<std::uint64_t>(bytes)) {
    throw FormatError(job_.out.string() + ".journal", "dense." + name,
                      std::to_string(bytes) + " bytes",
                      std::to_string(writer_->planes()[plane].raw_bytes));
  }
  std::vector<float> values(static_cast<std::size_t>(out.cols));
  const auto raw = std::as_writable_bytes(std::span(values));
  writer_->read_plane(plane, raw);
  loader.put(raw, DType::f32, out);
  loader.ops().synchronize();
}

void ModelWriter::install_linear_of(const std::string& name, Loader& loader, View out) const {
  PackedLinear linear = parse_linear_entry(linears_.at(name), job_.out.string(), "linears." + name);
  std::vector<Buffer> storage;
  for (std::size_t i = 0; i < linear.planes.size(); ++i) {
    Plane& plane = linear.weight.planes[i];
    storage.emplace_back(host_memory(), loader.ledger(), MemTag::staging, DType::u8, 1,
                         plane.raw_bytes());
    plane.data = storage.back().view();
    writer_->read_plane(linear.planes[i], {static_cast<std::byte*>(plane.data.data),
                                           static_cast<std::size_t>(plane.raw_bytes())});
  }
  validate(linear.weight, job_.out.string(), "linears." + name);
  install_linear(linear.weight, name, loader, out, job_.threads);
}

void ModelWriter::add_linear(const std::string& name, SiteResult result) {
  // The bytes are there already; what waits is bounded all the same.
  const std::int64_t bytes = stored_bytes(result.weight);
  queue_->wait_for_room(bytes);
  queue_->push(bytes, [this, name, held = std::make_shared<const SiteResult>(std::move(result))] {
    std::vector<std::uint32_t> ids;
    std::uint64_t on_disk = 0;
    for (const Plane& plane : held->weight.planes) {
      ids.push_back(writer_->add_plane(name + "." + plane.role, bytes_of(plane)));
      on_disk += writer_->planes()[ids.back()].stored_bytes();
    }
    const WeightBits bits = weight_bits(held->weight);
    Json entry = linear_entry(held->weight, ids);
    entry["outcome"] = held->outcome;
    for (const auto& [key, value] : held->details.items()) entry[key] = value;
    entry["bits_nominal"] = bits.nominal;
    entry["bits_stored"] = bits.stored;
    entry["bytes_stored"] = stored_bytes(held->weight);
    entry["bytes_on_disk"] = on_disk;
    linears_[name] = std::move(entry);
  });
}

void ModelWriter::note_block(std::int64_t layer, double relative_error) {
  queue_->push(0, [this, layer, relative_error] {
    Json row;
    row["block"] = layer;
    row["output_relative_error"] = relative_error;
    blocks_.push_back(row);
  });
}

void ModelWriter::replace_norms(std::int64_t layer, std::vector<float> attn,
                                std::vector<float> mlp) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  replaced_[prefix + "input_layernorm.weight"] = std::move(attn);
  replaced_[prefix + "post_attention_layernorm.weight"] = std::move(mlp);
}

void ModelWriter::add_dense(const std::string& name, Loader& loader) {
  DenseInfo info = job_.source->dense_info(name);
  const auto replaced = replaced_.extract(name);
  if (!replaced.empty()) info.dtype = DType::f32;
  const std::int64_t bytes =
      info.rows * info.cols * static_cast<std::int64_t>(dtype_bytes(info.dtype));
  queue_->wait_for_room(bytes);
  const auto raw = std::make_shared<const Buffer>(host_memory(), *job_.ledger, MemTag::staging,
                                                  DType::u8, 1, bytes);
  const std::span<std::byte> span(static_cast<std::byte*>(raw->view().data),
                                  static_cast<std::size_t>(bytes));
  if (replaced.empty()) {
    job_.source->read_raw(name, loader, span);
  } else {
    REQUIRE(std::as_bytes(std::span(replaced.mapped())).size() == span.size(), name);
    std::memcpy(span.data(), replaced.mapped().data(), span.size());
  }
  queue_->push(bytes, [this, name, info, raw, span, is_replaced = !replaced.empty()] {
    const std::int64_t bad =
        cpu_kernels(best_isa()).count_nonfinite(info.dtype, span.data(), info.rows * info.cols);
    if (bad != 0) {
      throw Error(ErrorCode::numeric, name + ": expected finite weights, found " +
                                          std::to_string(bad) + " NaN or infinite values");
    }
    Json entry;
    entry["plane"] = writer_->add_plane(name, span);
    entry["dtype"] = dtype_name(info.dtype);
    if (is_replaced) entry["replaced"] = true;
    entry["rows"] = info.rows;
    entry["cols"] = info.cols;
    dense_[name] = entry;
  });
}

void ModelWriter::finish_block(std::int64_t layer, Loader& loader) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  add_dense(prefix + "input_layernorm.weight", loader);
  add_dense(prefix + "post_attention_layernorm.weight", loader);
  ++checkpoints_waiting_;
  queue_->push(0, [this, layer] {
    finished_ = layer + 1;
    const auto now = std::chrono::steady_clock::now();
    if (--checkpoints_waiting_ > 0 && now - last_checkpoint_ < std::chrono::seconds(1)) return;
    last_checkpoint_ = now;
    Json state;
    state["identity"] = identity_;
    state["processor"] = processor_;
    state["finished"] = finished_;
    state["linears"] = linears_;
    state["dense"] = dense_;
    state["blocks"] = blocks_;
    writer_->checkpoint(state);
  });
}

void ModelWriter::add_outer_tensors(std::int64_t layer, Loader& loader) {
  while (!outer_.empty()) {
    add_dense(outer_.front(), loader);
    outer_.erase(outer_.begin());
    if (layer < config_.layers) return;
  }
}

std::int64_t ModelWriter::settle_for_resume() {
  queue_->drain();
  if (finished_ > 0) writer_->keep_for_resume();
  return finished_;
}

// Nominal, stored and on-disk bits per weight, for the quantized linears and for the whole model.
Json ModelWriter::bits() const {
  double weights = 0, nominal = 0;
  std::int64_t stored = 0;
  std::uint64_t on_disk = 0;
  for (const auto& [name, entry] : linears_.items()) {
    const double n = entry["weight"]["rows"].get<double>() * entry["weight"]["cols"].get<double>();
    weights += n;
    nominal += n * entry["bits_nominal"].get<double>();
    stored += entry["bytes_stored"].get<std::int64_t>();
    on_disk += entry["bytes_on_disk"].get<std::uint64_t>();
  }
  double all_weights = weights, all_nominal = nominal;
  std::int64_t all_stored = stored;
  std::uint64_t all_on_disk = on_disk;
  for (const auto& [name, entry] : dense_.items()) {
    const auto plane = entry["plane"].get<std::size_t>();
    const std::uint64_t raw = writer_->planes()[plane].raw_bytes;
    all_weights += entry["rows"].get<double>() * entry["cols"].get<double>();
    all_nominal += static_cast<double>(raw) * 8;
    all_stored += static_cast<std::int64_t>(raw);
    all_on_disk += writer_->planes()[plane].stored_bytes();
  }
  const auto row = [](const char* what, double n, double nominal_bits, double stored_bytes,
                      double disk_bytes) {
    Json j;
    j["what"] = what;
    j["weights"] = static_cast<std::int64_t>(n);
    j["bits_nominal"] = nominal_bits / n;
    j["bits_stored"] = stored_bytes * 8 / n;
    j["bits_on_disk"] = disk_bytes * 8 / n;
    return j;
  };
  Json rows = Json::array();
  rows.push_back(row("quantized linears", weights, nominal, static_cast<double>(stored),
                     static_cast<double>(on_disk)));
  rows.push_back(row("whole model", all_weights, all_nominal, static_cast<double>(all_stored),
                     static_cast<double>(all_on_disk)));
  return rows;
}

void ModelWriter::finish(Report& report) {
  queue_->drain();
  Json directory;
  directory["kind"] = "lowbit-model";
  directory["schema"] = 1;
  for (const auto& [key, value] : identity_.items()) directory[key] = value;
  const std::string tokenizer = job_.source->tokenizer_bytes();
  if (!tokenizer.empty()) {
    Json t;
    t["name"] = job_.source->tokenizer_name();
    t["plane"] = writer_->add_plane("tokenizer", std::as_bytes(std::span(tokenizer)));
    directory["tokenizer"] = t;
  }
  directory["bits"] = bits();
  directory["blocks"] = blocks_;
  directory["dense"] = dense_;
  directory["linears"] = linears_;
  writer_->finish(directory);

  report["bits"] = directory["bits"];
  if (!blocks_.empty()) report["blocks"] = blocks_;
  Json rows = Json::array();
  for (const auto& [name, entry] : linears_.items()) {
    Json row;
    row["linear"] = name;
    row["outcome"] = entry["outcome"];
    row["relative_error"] = entry["relative_error"];
    if (entry.contains("loss")) row["loss"] = entry["loss"];
    row["bits_stored"] = entry["bits_stored"];
    row["bytes_on_disk"] = entry["bytes_on_disk"];
    rows.push_back(row);
  }
  report["linears"] = rows;
}

}  // namespace engine
