// Hugging Face safetensors: one file, a checkpoint directory, and the writers of both.
//
// Layout: u64 little-endian N, N bytes of JSON (name -> dtype, shape, [begin, end) relative to the
// byte after the header), then the tensors, row-major and little-endian. Tensors may start at any
// address: copy, or read through memcpy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/mapped_file.h"

namespace engine {

enum class TensorDType : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  f8_e4m3,
  f8_e5m2,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean,
};

// Bytes of one element.
[[nodiscard]] std::size_t dtype_size(TensorDType dtype);
// The name safetensors uses, such as "BF16".
[[nodiscard]] std::string_view dtype_name(TensorDType dtype);
// "[4096, 4096]" or "[]".
[[nodiscard]] std::string shape_text(std::span<const std::int64_t> shape);

struct TensorInfo {
  std::string name;
  TensorDType dtype = TensorDType::f32;
  std::vector<std::int64_t> shape;  // [] is a scalar; a zero makes the tensor empty
  std::uint64_t begin = 0;          // absolute byte range in its file
  std::uint64_t end = 0;
  std::size_t file = 0;  // index of the shard in its Checkpoint, 0 in a single file
};

using TensorMetadata = std::vector<std::pair<std::string, std::string>>;

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of the data
  TensorMetadata metadata;          // "__metadata__"
};

// Parses and checks the header of a file whose complete content is `bytes`; `file` names it in
// errors. FormatError for every violation: header over 100 MB or beyond the file, not JSON,
// duplicate names, unknown dtypes, shapes that overflow, byte ranges that are reversed, out of
// range, overlapping, leave gaps, do not fit the shape or do not cover the data.
[[nodiscard]] SafetensorsHeader parse_safetensors(std::span<const std::byte> bytes,
                                                  const std::string& file);

// One mapped file.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return header_.tensors; }
  [[nodiscard]] const TensorMetadata& metadata() const { return header_.metadata; }
  // nullptr if there is no such tensor.
  [[nodiscard]] const TensorInfo* find(std::string_view name) const;
  [[nodiscard]] std::span<const std::byte> bytes(const TensorInfo& info) const;
  [[nodiscard]] const std::filesystem::path& path() const { return map_.path(); }

 private:
  MappedFile map_;
  SafetensorsHeader header_;
  std::map<std::string_view, std::size_t> by_name_;  // keys point into header_
};

// A read-only checkpoint: a directory with model.safetensors.index.json and its shards, or with
// model.safetensors; or the path of one .safetensors file. If there is an index, it alone decides.
class Checkpoint {
 public:
  // Throws FormatError or IoError naming the directory, the index, the shard and the tensor.
  explicit Checkpoint(const std::filesystem::path& path);

  [[nodiscard]] const TensorInfo* find(std::string_view name) const;
  // Throws Error(mismatch) naming tensor, file, expected and found.
  const TensorInfo& require(std::string_view name, std::span<const std::int64_t> shape,
                            std::initializer_list<TensorDType> dtypes) const;
  const TensorInfo& require(std::string_view name, std::initializer_list<std::int64_t> shape,
                            std::initializer_list<TensorDType> dtypes) const {
    return require(name, std::span(shape.begin(), shape.size()), dtypes);
  }
  [[nodiscard]] std::span<const std::byte> bytes(const TensorInfo& info) const;
  [[nodiscard]] const std::filesystem::path& file_of(const TensorInfo& info) const;

  // In alphabetical order.
  [[nodiscard]] std::vector<std::string> names() const;
  // Of all tensors together, headers not counted.
  [[nodiscard]] std::uint64_t total_bytes() const;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::vector<std::filesystem::path> files() const;

 private:
  void open_single(const std::filesystem::path& file);
  void open_sharded(const std::filesystem::path& index);

  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

// What a writer is told about a tensor before its data.
struct TensorDecl {
  std::string name;
  TensorDType dtype = TensorDType::f32;
  std::vector<std::int64_t> shape;
};

// Bytes of the tensor's data. Throws Error(usage) for negative or overflowing shapes.
[[nodiscard]] std::uint64_t declared_bytes(const TensorDecl& decl);

// Writes one file in a single pass: all tensors are declared first, their bytes follow in exactly
// that order, in any number of pieces. The file appears at commit() or not at all.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorDecl> tensors,
                    const TensorMetadata& metadata = {{"format", "pt"}});

  // The next bytes of `name`, which must be the first tensor that is not complete yet.
  void append(std::string_view name, std::span<const std::byte> bytes);
  // Throws if a tensor is not complete.
  void commit();
  // True if every declared byte has been written.
  [[nodiscard]] bool complete() const { return next_ == tensors_.size(); }

 private:
  void skip_complete();

  AtomicFile file_;
  std::vector<TensorDecl> tensors_;
  std::size_t next_ = 0;       // tensor being written
  std::uint64_t written_ = 0;  // of its bytes
};

// Writes a checkpoint directory: model.safetensors, or, if the tensors exceed `max_shard_bytes`,
// model-0000i-of-0000K.safetensors and the index. Tensors are never split and keep their order.
// Nothing has its final name before commit(), and the index gets its last. Refuses a directory
// that holds a checkpoint already, whose leftover files would mix with the new ones.
class ShardedCheckpointWriter {
 public:
  static constexpr std::uint64_t kMaxShardBytes = 5'000'000'000;

  ShardedCheckpointWriter(std::filesystem::path directory, const std::vector<TensorDecl>& tensors,
                          std::uint64_t max_shard_bytes = kMaxShardBytes);

  // As SafetensorsWriter::append, over all tensors.
  void append(std::string_view name, std::span<const std::byte> bytes);
  void commit();

 private:
  std::filesystem::path directory_;
  std::vector<std::unique_ptr<SafetensorsWriter>> shards_;
  std::size_t next_ = 0;
  std::string index_;  // JSON, empty if there is only one file
};

}  // namespace engine
