#include "engine/weight/bits.h"

#include "engine/weight/plane_read.h"

namespace engine {
namespace {

std::int64_t support_count(const LinearWeight& w, const Support& s) {
  if (s.bitmap != Select::all) {
    REQUIRE(w.plane(s.bitmap_plane).data.data != nullptr, "bit accounting needs the bitmap");
    if (s.columns != Select::all) {
      REQUIRE(w.plane(s.columns_plane).data.data != nullptr, "bit accounting needs the columns");
    }
    return SupportMask(w, s).count();
  }
  if (s.columns == Select::all) return w.rows * w.cols;
  const std::int64_t ids = w.plane(s.columns_plane).cols;
  return w.rows * (s.columns == Select::in ? ids : w.cols - ids);
}

}  // namespace

std::int64_t stored_bytes(const LinearWeight& w) {
  std::int64_t bytes = 0;
  for (const Plane& p : w.planes) bytes += p.raw_bytes();
  return bytes;
}

WeightBits weight_bits(const LinearWeight& w) {
  const auto weights = static_cast<double>(w.rows * w.cols);
  WeightBits out;
  for (const Term& t : w.terms) {
    const double code_bits =
        t.kind == TermKind::dense
            ? 8.0 * static_cast<double>(dtype_bytes(w.plane(t.codes_plane).dtype))
            : static_cast<double>(t.bits);
    out.nominal += code_bits * static_cast<double>(support_count(w, t.support)) / weights;
  }
  out.stored = 8.0 * static_cast<double>(stored_bytes(w)) / weights;
  return out;
}

}  // namespace engine
