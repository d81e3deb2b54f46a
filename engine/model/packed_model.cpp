#include "engine/model/packed_model.h"

#include <utility>

#include "engine/weight/codec.h"
#include "engine/weight/serialize.h"

namespace engine {
namespace {

constexpr std::int64_t max_plane_id = std::int64_t{1} << 31;
// As for the file in a checkpoint directory.
constexpr std::uint64_t max_tokenizer_bytes = std::uint64_t{64} << 20;

void check_plane(const PackedReader& reader, std::uint32_t id, std::int64_t bytes,
                 const std::string& place) {
  if (id >= reader.planes().size()) {
    throw FormatError(reader.name(), place,
                      "a plane below " + std::to_string(reader.planes().size()),
                      std::to_string(id));
  }
  const std::uint64_t found = reader.planes()[id].raw_bytes;
  if (found != static_cast<std::uint64_t>(bytes)) {
    throw FormatError(reader.name(), place,
                      std::to_string(bytes) + " bytes in plane " + std::to_string(id),
                      std::to_string(found));
  }
}

DType dense_dtype(const JsonObject& entry) {
  const std::string name = entry.text("dtype");
  for (const DType d : {DType::f32, DType::f16, DType::bf16}) {
    if (name == dtype_name(d)) return d;
  }
  entry.fail("dtype", "f32, f16 or bf16");
}

}  // namespace

Json linear_entry(const LinearWeight& weight, std::span<const std::uint32_t> planes) {
  Json entry;
  entry["weight"] = describe(weight, planes);
  return entry;
}

PackedLinear parse_linear_entry(const Json& entry, const std::string& file,
                                const std::string& name) {
  const JsonObject object(entry, file, name);
  PackedLinear linear;
  linear.weight =
      linear_from_json(object.object("weight").value(), file, name + ".weight", linear.planes);
  linear.entry = entry;
  return linear;
}

PackedModel read_packed_model(const PackedReader& reader) {
  const std::string& file = reader.name();
  const JsonObject top(reader.directory(), file);
  if (top.text("kind") != "lowbit-model") top.fail("kind", "\"lowbit-model\"");
  if (top.integer("schema", 0, 1 << 20) != 1) top.fail("schema", "1");

  PackedModel model;
  model.directory = reader.directory();
  model.config = config_from_json(top.object("config").value().dump(), file + ": config");
  if (top.has("tokenizer")) {
    const JsonObject t = top.object("tokenizer");
    model.tokenizer_name = t.text("name");
    model.tokenizer_plane = static_cast<std::uint32_t>(t.integer("plane", 0, max_plane_id));
    if (model.tokenizer_plane >= reader.planes().size()) t.fail("plane", "a plane of the file");
    const std::uint64_t bytes = reader.planes()[model.tokenizer_plane].raw_bytes;
    if (model.tokenizer_name.empty() || bytes == 0 || bytes > max_tokenizer_bytes) {
      throw FormatError(file, "tokenizer",
                        "a name and 1 to " + std::to_string(max_tokenizer_bytes) + " bytes",
                        quote_text(model.tokenizer_name) + " of " + std::to_string(bytes));
    }
  }

  const JsonObject dense = top.object("dense");
  for (const std::string& name : dense_names(model.config)) {
    const JsonObject d = dense.object(name);
    PackedDense out;
    out.plane = static_cast<std::uint32_t>(d.integer("plane", 0, max_plane_id));
    out.info.dtype = dense_dtype(d);
    const bool matrix = name == "embed_tokens.weight" || name == "lm_head.weight";
    out.info.rows = matrix ? model.config.vocab : 1;
    out.info.cols = model.config.hidden;
    check_plane(
        reader, out.plane,
        out.info.rows * out.info.cols * static_cast<std::int64_t>(dtype_bytes(out.info.dtype)),
        "dense." + name);
    model.dense.emplace(name, out);
  }

  const JsonObject linears = top.object("linears");
  for (std::int64_t layer = 0; layer < model.config.layers; ++layer) {
    for (const Site s : all_sites) {
      const std::string name = linear_name(layer, s);
      PackedLinear linear =
          parse_linear_entry(linears.object(name).value(), file, "linears." + name);
      const SiteShape shape = site_shape(model.config, s);
      if (linear.weight.rows != shape.rows || linear.weight.cols != shape.cols) {
        throw FormatError(
            file, "linears." + name,
            "[" + std::to_string(shape.rows) + ", " + std::to_string(shape.cols) + "]",
            "[" + std::to_string(linear.weight.rows) + ", " + std::to_string(linear.weight.cols) +
                "]");
      }
      for (std::size_t i = 0; i < linear.planes.size(); ++i) {
        check_plane(reader, linear.planes[i], linear.weight.planes[i].raw_bytes(),
                    "linears." + name);
      }
      model.linears.emplace(name, std::move(linear));
    }
  }
  return model;
}

}  // namespace engine
