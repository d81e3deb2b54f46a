// From the planes of a packed linear to the kernel layout on the device ("--exec packed").
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// How the linear is held packed, from its structure alone (planes may be null); nullopt if it is
// dense. Throws Error(usage) naming the linear, its scheme and "--exec decoded" if no packed kernel
// knows the scheme.
[[nodiscard]] std::optional<PackedLayout> packed_layout_of(const LinearWeight& weight,
                                                           const std::string& name);

// A linear on its way: its planes in a loader's stage, followed by what the device needs of them in
// another form. Everything depends on the structure alone.
struct StagedLinear {
  const LinearWeight* described = nullptr;
  std::string name;                 // for errors
  std::vector<std::int64_t> plane;  // offset of each plane
  std::int64_t codes = 0;           // two one-bit planes as one of two bits
  std::int64_t zeros = 0;           // i32 [rows * terms, groups]
  std::int64_t inverse = 0;         // i32 [1, cols]: the inverse of the permutation
  std::int64_t book = 0;            // f32 [1, 16]
  // A scheme of scheme_layout.h is laid out here and uploaded as it is.
  std::optional<PackedShape> scheme;
  std::int64_t records = 0;  // u8 [1, scheme_bytes]
  std::int64_t bytes = 0;    // in all, a multiple of 256
};
// `weight` must be packable and outlive the result.
[[nodiscard]] StagedLinear stage_layout(const LinearWeight& weight, std::string name);
// Its planes with their bytes at `base`.
[[nodiscard]] LinearWeight staged_weight(const StagedLinear& staged, std::byte* base);

// Fills what follows the planes, which are in place at `base`. Checks that scales are finite
// (Error(numeric)), and what the layout cannot hold: zeros outside 0..255, column groups other than
// W's (Error(usage), naming the value and "--exec decoded"). The planes must have been validated.
void prepare_staged(const StagedLinear& staged, std::byte* base);
// Then, for schemes: row tiles [first, last) of build_tiles(); calls may run side by side.
[[nodiscard]] std::int64_t build_tiles(const StagedLinear& staged);  // 0 for other weights
void build_staged(const StagedLinear& staged, std::byte* base, std::int64_t first,
                  std::int64_t last);

// Queues everything from the prepared stage to `out`, made from packed_layout_of(). Device scratch
// lies in a scope of the loader's arena; on a measuring arena it is only counted (base may be null
// then). With loader.verify the result is read back and compared.
void install_packed(const StagedLinear& staged, const std::byte* base, Loader& loader,
                    const PackedWeight& out);

// ops.repack, and with loader.verify the inverse: throws Error(internal) unless codes, scales and
// zeros come back bit for bit. zeros may be empty as in repack.
void repack(Loader& loader, const std::string& name, View codes, View scales, View zeros,
            const PackedWeight& out);

}  // namespace engine
