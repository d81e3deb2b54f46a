// Decodes any weight of the algebra on the host by slices of rows: the same numbers to the last bit
// as decode_linear (codec.h), which stays the plain reading of the definition, with memory for one
// row and quick enough for whole models.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/weight/linear_weight.h"
#include "engine/weight/plane_read.h"

namespace engine {

class RowDecoder {
 public:
  // `weight` is validated, its planes have their data, and it outlives this.
  explicit RowDecoder(const LinearWeight& weight);

  // out [n, cols], f32, f16 or bf16, host, any stride: rows [first, first + n). May run on several
  // threads at once. Not for weights with transforms, of which a row is more than a row of T.
  void decode(std::int64_t first, View out) const;

  // The sum T of the terms alone, for any weight; out [n, cols] f32.
  void decode_terms(std::int64_t first, View out) const;

 private:
  struct TermPlan {
    const Term* term;
    SupportMask mask;
    std::vector<std::int32_t> unit;    // by group: the group of each column; else empty
    std::vector<float> book;           // codebook only
    std::vector<std::int64_t> starts;  // compact under a bitmap: codes before each row
  };
  struct Scratch;

  void sum_terms(std::int64_t r, Scratch& s) const;
  void add_term(const TermPlan& plan, std::int64_t r, Scratch& s) const;

  const LinearWeight& w_;
  std::vector<TermPlan> terms_;
  std::vector<std::int32_t> permutation_;  // empty: none
  std::vector<float> diagonal_;            // empty: none
};

}  // namespace engine
