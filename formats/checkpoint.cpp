// Checkpoint of formats/safetensors.h: finding and joining the files of a directory.
#include <algorithm>

#include "formats/json.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSingle = "model.safetensors";
constexpr std::string_view kIndex = "model.safetensors.index.json";
constexpr std::size_t kMaxShards = 10'000;  // each one is an open mapping

// The error for a directory without safetensors: says what was found instead, if we know it.
[[noreturn]] void refuse_directory(const fs::path& directory) {
  std::string found = "neither";
  const auto consider = [&](const fs::path& folder) {
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
      const std::string name = entry.path().filename().string();
      const std::string extension = entry.path().extension().string();
      if (extension == ".pth" || extension == ".pt" || extension == ".bin") {
        found = entry.path().string() +
                ", a PyTorch pickle that is not read here; convert it to safetensors or download "
                "the safetensors files of the same model";
      } else if (extension == ".gguf") {
        found = entry.path().string() + ", a GGUF file; use the original safetensors checkpoint";
      }
    }
  };
  consider(directory / "original");
  consider(directory);
  throw FormatError(directory.string(), "checkpoint",
                    std::string(kSingle) + " or " + std::string(kIndex), found);
}

std::string dtype_list(std::initializer_list<TensorDType> dtypes) {
  std::string text;
  for (const TensorDType dtype : dtypes) {
    if (!text.empty()) text += " or ";
    text += dtype_name(dtype);
  }
  return text;
}

}  // namespace

Checkpoint::Checkpoint(const fs::path& path) : path_(path) {
  std::error_code problem;
  const fs::file_status status = fs::status(path, problem);
  if (status.type() == fs::file_type::not_found) throw IoError(path.string(), "not found", 0);
  if (problem) throw IoError(path.string(), "cannot open", problem.value());
  if (!fs::is_directory(status)) {
    open_single(path);
  } else if (fs::exists(path / kIndex, problem)) {
    open_sharded(path / kIndex);
  } else if (fs::exists(path / kSingle, problem)) {
    open_single(path / kSingle);
  } else {
    refuse_directory(path);
  }
}

void Checkpoint::open_single(const fs::path& file) {
  files_.emplace_back(file);
  for (const TensorInfo& info : files_[0].tensors()) tensors_.emplace(info.name, info);
}

void Checkpoint::open_sharded(const fs::path& index) {
  const Json root = read_json_file(index);
  const JsonObject map = JsonObject(root, index.string()).object("weight_map");
  std::map<std::string, std::size_t> shard_number;
  for (const auto& [name, value] : map.value().get_ref<const Json::object_t&>()) {
    const std::string place = "weight_map." + quote_text(name);
    const std::string shard = value.is_string() ? value.get<std::string>() : std::string();
    // Only a bare file name: an index must not reach outside its own directory.
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      throw FormatError(index.string(), place, "the name of a file in the same directory",
                        describe(value));
    }
    auto number = shard_number.find(shard);
    if (number == shard_number.end()) {
      if (files_.size() == kMaxShards) {
        throw FormatError(index.string(), "weight_map",
                          "at most " + std::to_string(kMaxShards) + " shards", "more");
      }
      std::error_code ignored;
      if (!fs::exists(path_ / shard, ignored)) {
        throw FormatError(index.string(), place, "the shard " + quote_text(shard) + " beside it",
                          "no such file");
      }
      files_.emplace_back(path_ / shard);
      number = shard_number.emplace(shard, files_.size() - 1).first;
    }
    const TensorInfo* info = files_[number->second].find(name);
    if (info == nullptr) {
      throw FormatError(index.string(), place,
                        "the tensor in " + files_[number->second].path().string(),
                        "no such tensor there");
    }
    TensorInfo& own = tensors_.emplace(name, *info).first->second;
    own.file = number->second;
  }
  if (tensors_.empty()) {
    throw FormatError(index.string(), "weight_map", "at least one tensor", "none");
  }
}

const TensorInfo* Checkpoint::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const TensorInfo& Checkpoint::require(std::string_view name, std::span<const std::int64_t> shape,
                                      std::initializer_list<TensorDType> dtypes) const {
  const std::string expected = shape_text(shape) + " of " + dtype_list(dtypes);
  const TensorInfo* info = find(name);
  if (info == nullptr) {
    throw Error(ErrorCode::mismatch, path_.string() + ": tensor " + quote_text(name) +
                                         ": expected " + expected + ", found no such tensor");
  }
  if (!std::equal(shape.begin(), shape.end(), info->shape.begin(), info->shape.end()) ||
      std::find(dtypes.begin(), dtypes.end(), info->dtype) == dtypes.end()) {
    throw Error(ErrorCode::mismatch, file_of(*info).string() + ": tensor " + quote_text(name) +
                                         ": expected " + expected + ", found " +
                                         shape_text(info->shape) + " of " +
                                         std::string(dtype_name(info->dtype)));
  }
  return *info;
}

std::span<const std::byte> Checkpoint::bytes(const TensorInfo& info) const {
  return files_.at(info.file).bytes(info);
}

const fs::path& Checkpoint::file_of(const TensorInfo& info) const {
  return files_.at(info.file).path();
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, info] : tensors_) names.push_back(name);
  return names;
}

std::uint64_t Checkpoint::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& [name, info] : tensors_) total += info.end - info.begin;
  return total;
}

std::vector<fs::path> Checkpoint::files() const {
  std::vector<fs::path> paths;
  for (const SafetensorsFile& file : files_) paths.push_back(file.path());
  return paths;
}

}  // namespace engine
