#include "engine/quant/encode.h"

#include <cstring>
#include <utility>
#include <vector>

#include "engine/weight/codec.h"

namespace engine {
namespace {

int describe_plane(SiteResult& r, const char* role, DType dtype, int bits, std::int64_t rows,
                   std::int64_t cols) {
  r.weight.planes.push_back(
      {.role = role, .dtype = dtype, .bits = bits, .rows = rows, .cols = cols, .data = {}});
  return static_cast<int>(r.weight.planes.size()) - 1;
}

int add_plane(SiteResult& r, OwnedPlane owned) {
  r.small.push_back(std::move(owned.bytes));
  r.weight.planes.push_back(std::move(owned.plane));
  return static_cast<int>(r.weight.planes.size()) - 1;
}

// A device matrix as a host vector.
template <class T>
std::vector<T> to_host(Ops& ops, const View& device) {
  std::vector<T> host(static_cast<std::size_t>(device.count()));
  ops.download(device, host_view(host.data(), device.rows, device.cols));
  return host;
}

int encode_codes(GroupPass& pass, SiteResult& r, const AffineCodes& c) {
  const int index = describe_plane(r, "codes", DType::u8, c.spec.bits, c.codes.rows, c.codes.cols);
  Plane& p = r.weight.planes.back();
  const Arena::Scope scope(pass.arena);
  const View packed = pass.arena.make(MemTag::solver, DType::u8, p.rows, p.row_bytes());
  if (!pass.dry()) {
    r.codes = Buffer(host_memory(), pass.ledger, MemTag::staging, DType::u8, 1, p.raw_bytes());
    p.data = r.codes.view();
    pass.ops.pack_codes(c.codes, c.spec.bits, packed);
    pass.ops.download(packed, p.data.reshape(packed.rows, packed.cols));
  }
  return index;
}

int encode_scales(GroupPass& pass, SiteResult& r, const AffineCodes& c) {
  if (pass.dry()) {
    return describe_plane(r, "scales", c.spec.scale_dtype, 0, c.scales.rows, c.scales.cols);
  }
  std::vector<float> scales = to_host<float>(pass.ops, c.scales);
  return add_plane(
      r, scales_plane(host_view(scales.data(), c.scales.rows, c.scales.cols), c.spec.scale_dtype));
}

// The gptq and awq rules keep zeros within the codes; the other two do not.
int encode_zeros(GroupPass& pass, SiteResult& r, const AffineCodes& c) {
  const bool within_codes = c.spec.rule == GridRule::gptq || c.spec.rule == GridRule::awq;
  if (pass.dry()) {
    return describe_plane(r, "zeros", within_codes ? DType::u8 : DType::i32,
                          within_codes ? c.spec.bits : 0, c.zeros.rows, c.zeros.cols);
  }
  std::vector<std::int32_t> zeros = to_host<std::int32_t>(pass.ops, c.zeros);
  const View host = host_view(zeros.data(), c.zeros.rows, c.zeros.cols);
  return add_plane(r, within_codes ? pack_zeros(host, c.spec.bits) : zeros_plane(host, DType::i32));
}

}  // namespace

SiteResult encode_affine(GroupPass& pass, const AffineCodes& c) {
  SiteResult r;
  r.weight.rows = c.codes.rows;
  r.weight.cols = c.codes.cols;
  Term term;
  term.kind = TermKind::affine;
  term.bits = c.spec.bits;
  term.codes_plane = encode_codes(pass, r, c);
  term.grid.kind = c.spec.group == 0 ? GridKind::row : GridKind::group;
  if (c.midrise) term.grid.kind = GridKind::tensor;
  term.grid.midrise = c.midrise;
  term.grid.group = c.spec.group;
  term.grid.product = c.spec.arithmetic;
  term.grid.scale_plane = encode_scales(pass, r, c);
  if (!c.spec.symmetric && !c.midrise) term.grid.zero_plane = encode_zeros(pass, r, c);
  if (!c.permutation.empty()) {
    r.weight.permutation_plane =
        pass.dry() ? describe_plane(r, "permutation", DType::i32, 0, 1, c.codes.cols)
                   : add_plane(r, indices_plane({c.permutation.host<std::int32_t>(),
                                                 static_cast<std::size_t>(c.codes.cols)},
                                                "permutation"));
  }
  r.weight.terms.push_back(term);
  return r;
}

}  // namespace engine
