// The protobuf of sentencepiece's tokenizer.model (sentencepiece_model.proto), as far as LLaMA1/2
// use it.
#include <bit>
#include <limits>

#include "formats/bytes.h"
#include "formats/error.h"
#include "formats/tokenizer_parts.h"

namespace engine {
namespace {

std::uint64_t read_varint(ByteReader& reader) {
  const std::string place = "offset " + std::to_string(reader.offset());
  std::uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    const auto byte = reader.read<std::uint8_t>("varint");
    value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
    if ((byte & 0x80) == 0) return value;
  }
  throw FormatError(reader.file(), place, "a varint of at most 10 bytes", "more");
}

// One field of a message: the payload is `value` for varints and 32-bit fields, else `body`.
struct Field {
  std::uint64_t number = 0;
  std::uint64_t wire = 0;
  std::uint64_t value = 0;
  std::span<const std::byte> body;
  std::uint64_t offset = 0;       // of the field's tag in the file
  std::uint64_t body_offset = 0;  // of `body` in the file

  void expect(const std::string& file, std::uint64_t want, const char* what) const {
    if (wire == want) return;
    throw FormatError(file, "offset " + std::to_string(offset),
                      std::string(what) + " of wire type " + std::to_string(want),
                      "wire type " + std::to_string(wire));
  }
  [[nodiscard]] std::string_view text() const {
    return {reinterpret_cast<const char*>(body.data()), body.size()};
  }
};

constexpr std::uint64_t varint_wire = 0;
constexpr std::uint64_t bytes_wire = 2;
constexpr std::uint64_t fixed32_wire = 5;

bool next_field(ByteReader& reader, Field& field) {
  if (reader.remaining() == 0) return false;
  field = {};
  field.offset = reader.offset();
  const std::uint64_t tag = read_varint(reader);
  field.number = tag >> 3;
  field.wire = tag & 7;
  if (field.number == 0 || field.wire == 3 || field.wire == 4 || field.wire > 5) {
    throw FormatError(
        reader.file(), "offset " + std::to_string(field.offset), "a protobuf field",
        "number " + std::to_string(field.number) + " of wire type " + std::to_string(field.wire));
  }
  if (field.wire == varint_wire) {
    field.value = read_varint(reader);
  } else if (field.wire == 1) {
    reader.take(8, "64-bit field");
  } else if (field.wire == bytes_wire) {
    const std::uint64_t size = read_varint(reader);
    field.body_offset = reader.offset();
    field.body = reader.take(size, "length-delimited field");
  } else if (field.wire == fixed32_wire) {
    field.value = reader.read<std::uint32_t>("32-bit field");
  }
  return true;
}

struct SpmFile {
  std::vector<SpmPiece> pieces;
  std::uint64_t model_type = 1;  // the proto's defaults: unigram, unk 0, bos 1, eos 2
  bool byte_fallback = false;
  std::int32_t bos = 1;
  std::int32_t eos = 2;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  bool has_charsmap = false;
};

SpmPiece read_piece(ByteReader reader) {
  SpmPiece piece;
  for (Field field; next_field(reader, field);) {
    if (field.number == 1) {
      field.expect(reader.file(), bytes_wire, "piece text");
      piece.text = field.text();
    } else if (field.number == 2) {
      field.expect(reader.file(), fixed32_wire, "piece score");
      piece.score = std::bit_cast<float>(static_cast<std::uint32_t>(field.value));
    } else if (field.number == 3) {
      field.expect(reader.file(), varint_wire, "piece type");
      if (field.value < 1 || field.value > 6) {
        throw FormatError(reader.file(), "offset " + std::to_string(field.offset),
                          "a piece type 1..6", std::to_string(field.value));
      }
      piece.type = static_cast<SpmPiece::Type>(field.value);
    }
  }
  return piece;
}

void read_trainer(ByteReader reader, SpmFile& out) {
  for (Field field; next_field(reader, field);) {
    // Negative numbers are stored as 64-bit two's complement.
    const auto id = static_cast<std::int32_t>(static_cast<std::uint32_t>(field.value));
    if (field.number == 3 || field.number == 35 || field.number == 41 || field.number == 42) {
      field.expect(reader.file(), varint_wire, "trainer_spec field");
    }
    if (field.number == 3) out.model_type = field.value;
    if (field.number == 35) out.byte_fallback = field.value != 0;
    if (field.number == 41) out.bos = id;
    if (field.number == 42) out.eos = id;
  }
}

void read_normalizer(ByteReader reader, SpmFile& out) {
  for (Field field; next_field(reader, field);) {
    if (field.number == 2) {
      field.expect(reader.file(), bytes_wire, "precompiled_charsmap");
      out.has_charsmap = !field.body.empty();
    }
    if (field.number >= 3 && field.number <= 5) {
      field.expect(reader.file(), varint_wire, "normalizer_spec field");
    }
    if (field.number == 3) out.add_dummy_prefix = field.value != 0;
    if (field.number == 4) out.remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) out.escape_whitespaces = field.value != 0;
  }
}

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_from_spm(std::string_view bytes, TokenizerInfo info) {
  ByteReader reader(std::as_bytes(std::span(bytes)), info.file);
  SpmFile file;
  for (Field field; next_field(reader, field);) {
    if (field.number < 1 || field.number > 3) continue;
    field.expect(info.file, bytes_wire, "message");
    const ByteReader body(field.body, info.file, field.body_offset);
    if (field.number == 1) file.pieces.push_back(read_piece(body));
    if (field.number == 2) read_trainer(body, file);
    if (field.number == 3) read_normalizer(body, file);
  }
  const auto require = [&](bool good, const char* place, const char* expected, const char* found) {
    if (!good) throw FormatError(info.file, place, expected, found);
  };
  require(file.model_type == 2, "trainer_spec.model_type", "2 (BPE)", "another model type");
  require(file.byte_fallback, "trainer_spec.byte_fallback", "true", "false");
  require(!file.has_charsmap, "normalizer_spec.precompiled_charsmap", "none (identity)", "a map");
  require(!file.remove_extra_whitespaces, "normalizer_spec.remove_extra_whitespaces", "false",
          "true");
  require(file.escape_whitespaces, "normalizer_spec.escape_whitespaces", "true", "false");
  info.bos_id = file.bos < 0 ? -1 : file.bos;
  info.adds_bos = info.bos_id >= 0;
  if (file.eos >= 0) info.eos_ids = {file.eos};
  return make_spm(std::move(file.pieces), file.add_dummy_prefix, std::move(info));
}

}  // namespace engine
