// The writers of formats/safetensors.h.
#include <cstdio>
#include <limits>
#include <set>

#include "formats/json.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

constexpr std::uint64_t kMaxFileBytes = std::numeric_limits<std::int64_t>::max();

// The length field and the header, padded with spaces so that the data starts on 8 bytes.
std::string header_text(const std::string& file, const std::vector<TensorDecl>& tensors,
                        const TensorMetadata& metadata) {
  std::set<std::string_view> names;
  Json::object_t header;
  if (!metadata.empty()) {
    Json entries = Json::object();
    for (const auto& [key, text] : metadata) entries[key] = text;
    header.emplace_back("__metadata__", std::move(entries));
  }
  std::uint64_t at = 0;
  for (const TensorDecl& decl : tensors) {
    if (decl.name.empty() || decl.name == "__metadata__" || !names.insert(decl.name).second) {
      throw Error(ErrorCode::usage, file + ": tensor name " + quote_text(decl.name) +
                                        " is empty, reserved or used twice");
    }
    const std::uint64_t bytes = declared_bytes(decl);
    if (bytes > kMaxFileBytes - at) {
      throw Error(ErrorCode::usage, file + ": the tensors exceed the largest possible file");
    }
    header.emplace_back(decl.name, Json{{"dtype", dtype_name(decl.dtype)},
                                        {"shape", decl.shape},
                                        {"data_offsets", {at, at + bytes}}});
    at += bytes;
  }
  std::string json = Json(std::move(header)).dump();
  json.resize((json.size() + 7) / 8 * 8, ' ');
  const std::uint64_t size = json.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + json;
}

std::string shard_name(std::size_t number, std::size_t count) {
  if (count == 1) return "model.safetensors";
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", number + 1, count);
  return name;
}

}  // namespace

std::uint64_t declared_bytes(const TensorDecl& decl) {
  std::uint64_t bytes = dtype_size(decl.dtype);
  for (const std::int64_t dim : decl.shape) {
    const auto extent = static_cast<std::uint64_t>(dim);
    if (dim < 0 || (dim > 0 && bytes > kMaxFileBytes / extent)) {
      throw Error(ErrorCode::usage, "tensor " + quote_text(decl.name) + ": impossible shape " +
                                        shape_text(decl.shape));
    }
    bytes *= extent;
  }
  return bytes;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::vector<TensorDecl> tensors,
                                     const TensorMetadata& metadata)
    : file_(path), tensors_(std::move(tensors)) {
  file_.write(header_text(path.string(), tensors_, metadata));
  skip_complete();
}

void SafetensorsWriter::skip_complete() {
  while (next_ < tensors_.size() && written_ == declared_bytes(tensors_[next_])) {
    ++next_;
    written_ = 0;
  }
}

void SafetensorsWriter::append(std::string_view name, std::span<const std::byte> bytes) {
  // Empty tensors are complete from the start, so nothing is left to say about them.
  if (bytes.empty()) return;
  const std::string expected = complete() ? "no more data" : quote_text(tensors_[next_].name);
  if (complete() || tensors_[next_].name != name) {
    throw Error(ErrorCode::internal, file_.path().string() + ": tensors out of order: expected " +
                                         expected + ", found " + quote_text(name));
  }
  const std::uint64_t room = declared_bytes(tensors_[next_]) - written_;
  if (bytes.size() > room) {
    throw Error(ErrorCode::internal, file_.path().string() + ": tensor " + expected +
                                         ": expected at most " + std::to_string(room) +
                                         " more bytes, found " + std::to_string(bytes.size()));
  }
  file_.write(bytes);
  written_ += bytes.size();
  skip_complete();
}

void SafetensorsWriter::commit() {
  if (!complete()) {
    throw Error(ErrorCode::internal, file_.path().string() + ": tensor " +
                                         quote_text(tensors_[next_].name) + " is incomplete");
  }
  file_.commit();
}

ShardedCheckpointWriter::ShardedCheckpointWriter(std::filesystem::path directory,
                                                 const std::vector<TensorDecl>& tensors,
                                                 std::uint64_t max_shard_bytes)
    : directory_(std::move(directory)) {
  std::error_code problem;
  std::filesystem::create_directories(directory_, problem);
  if (problem) throw IoError(directory_.string(), "cannot create", problem.value());
  for (const char* existing : {"model.safetensors", "model.safetensors.index.json"}) {
    if (std::filesystem::exists(directory_ / existing, problem)) {
      throw Error(ErrorCode::usage, directory_.string() + ": already holds a checkpoint (" +
                                        existing + "); choose an empty directory");
    }
  }

  std::vector<std::vector<TensorDecl>> shards(1);
  std::uint64_t in_shard = 0;
  std::uint64_t total = 0;
  for (const TensorDecl& decl : tensors) {
    const std::uint64_t bytes = declared_bytes(decl);
    if (bytes > kMaxFileBytes - total) {
      throw Error(ErrorCode::usage, directory_.string() + ": the tensors exceed any disk");
    }
    if (!shards.back().empty() && in_shard + bytes > max_shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().push_back(decl);
    in_shard += bytes;
    total += bytes;
  }

  Json::object_t weight_map;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(i, shards.size());
    for (const TensorDecl& decl : shards[i]) weight_map.emplace_back(decl.name, name);
    shards_.push_back(std::make_unique<SafetensorsWriter>(directory_ / name, std::move(shards[i])));
  }
  // A name may not come twice in different shards either; each shard checked only itself.
  std::set<std::string_view> names;
  for (const auto& [name, shard] : weight_map) {
    if (!names.insert(name).second) {
      throw Error(ErrorCode::usage,
                  directory_.string() + ": tensor " + quote_text(name) + " twice");
    }
  }
  if (shards_.size() > 1) {
    index_ =
        Json{{"metadata", {{"total_size", total}}}, {"weight_map", Json(std::move(weight_map))}}
            .dump(2) +
        "\n";
  }
}

void ShardedCheckpointWriter::append(std::string_view name, std::span<const std::byte> bytes) {
  while (next_ + 1 < shards_.size() && shards_[next_]->complete()) ++next_;
  shards_[next_]->append(name, bytes);
}

void ShardedCheckpointWriter::commit() {
  for (const auto& shard : shards_) {
    if (!shard->complete()) shard->commit();  // throws the error that names the missing tensor
  }
  for (const auto& shard : shards_) shard->commit();
  if (!index_.empty()) {
    write_file_atomically(directory_ / "model.safetensors.index.json", index_);
  }
}

}  // namespace engine
