// From codes and grids on the device to the planes of a LinearWeight on the host, and back.
#pragma once

#include "engine/quant/method.h"
#include "engine/weight/grid_spec.h"

namespace engine {

struct AffineCodes {
  GridSpec spec;
  View codes;        // u8 [rows, cols] on the device, one code per byte
  View scales;       // f32 [rows, groups] on the device, values that spec.scale_dtype represents
  View zeros;        // i32 [rows, groups] on the device
  View permutation;  // i32 [1, cols] on the host, or empty: column j of the codes is column
                     // permutation[j] of the weight
  // One scale for all of it, scales [1, 1], and Grid::midrise instead of zeros.
  bool midrise = false;
};

// One affine term over full support. Packs on the device, takes scratch from pass.arena.
SiteResult encode_affine(GroupPass& pass, const AffineCodes& codes);

}  // namespace engine
