// A LinearWeight as JSON, for the directory of a packed file: everything but the planes' bytes.
// docs/weights.md has the table of fields.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/weight/linear_weight.h"
#include "formats/json.h"

namespace engine {

// plane_ids[i] is the file's id of weight.planes[i]. Defaults are left out, so one weight has one
// description.
[[nodiscard]] Json describe(const LinearWeight& weight, std::span<const std::uint32_t> plane_ids);

// The inverse: planes come without data, their ids in `plane_ids` (replaced). Checks everything
// that validate_structure does; the caller attaches data and calls validate. Throws FormatError
// for anything else than what `describe` writes, unknown keys included: a key we do not know may
// change what the weight means.
[[nodiscard]] LinearWeight linear_from_json(const Json& json, const std::string& file,
                                            const std::string& place,
                                            std::vector<std::uint32_t>& plane_ids);

}  // namespace engine
