// From codes whose width differs between groups of columns to the planes of a LinearWeight.
#pragma once

#include <cstdint>
#include <span>

#include "engine/quant/method.h"

namespace engine {

struct MixedCodes {
  std::int64_t group = 128;            // columns per group; divides the columns
  DType scale_dtype = DType::f32;      // the values below are values of it
  std::span<const std::uint8_t> bits;  // of each group, 1 to 8
  View codes;                          // u8 [rows, cols] on the device, one code per byte
  View scales;                         // f32 [rows, groups] on the device; alpha in groups of 1 bit
  View zeros;  // i32 [rows, groups] on the device; groups of 2 bits and more
  View means;  // f32 [rows, groups] on the device; groups of 1 bit
};

// One affine term per width of 2 to 8 bits, on the columns of its groups, all with one plane of
// scales and one of zeros; a sign term with planes of its own for the groups of 1 bit. Weights of
// one affine width come out as encode_affine's. Packs on the device, takes scratch from pass.arena,
// the same whatever the widths.
SiteResult encode_mixed(GroupPass& pass, const MixedCodes& codes);

}  // namespace engine
