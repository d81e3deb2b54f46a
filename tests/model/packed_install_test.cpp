// From planes to the kernel layout and back: what a packed linear decodes to is what the reference
// codec reads from the same planes, and what the layout cannot hold is refused.
#include "engine/model/packed_install.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "engine/model/scheme.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "engine/weight/codec.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

// Code and message of the Error that `action` throws.
struct Failure {
  ErrorCode code = ErrorCode::internal;
  std::string message;
};
template <class Action>
std::optional<Failure> failure_of(const Action& action) {
  try {
    action();
  } catch (const Error& e) {
    return Failure{e.code(), e.what()};
  }
  return std::nullopt;
}

void expect_failure(const std::optional<Failure>& failure, ErrorCode code,
                    const std::vector<std::string>& parts) {
  ASSERT_TRUE(failure.has_value());
  EXPECT_EQ(failure->code, code) << failure->message;
  for (const std::string& part : parts) {
    EXPECT_NE(failure->message.find(part), std::string::npos) << part << ": " << failure->message;
  }
}

// An arena of the planned size; `layout` runs once to plan and once for real.
template <class Layout>
void planned_and_run(const ModelConfig& config, bool verify, std::int64_t* unpacked,
                     const Layout& layout) {
  Ledger ledger;
  const auto cpu = make_cpu_ops(ledger, 2);
  TraceOps ops(*cpu);
  Arena plan = Arena::measuring(ops.kind());
  const auto once = [&](Arena& arena) {
    Loader loader(ops, ledger, arena, config);
    loader.verify = verify;
    layout(loader);
  };
  once(plan);
  Arena arena(ops.memory(), ledger, plan.peak(), true);
  once(arena);
  EXPECT_EQ(arena.peak(), plan.peak());
  EXPECT_EQ(arena.tag_peaks(), plan.tag_peaks());
  if (unpacked != nullptr) *unpacked = ops.stats().at("unpack").calls;
}

// All linears of a block as f32, loaded packed and then expanded by the device.
std::vector<std::vector<float>> expanded_block(WeightSource& source, std::int64_t layer,
                                               std::int64_t* unpacked = nullptr) {
  std::vector<std::vector<float>> all;
  planned_and_run(source.config(), unpacked != nullptr, unpacked, [&](Loader& loader) {
    Arena& arena = loader.arena();
    const BlockWeights w = make_block_weights(arena, source, layer, DType::f32);
    load_block(source, layer, loader, w);
    for (const Site s : all_sites) {
      EXPECT_TRUE(w[s].is_packed()) << site_name(s);
      const Arena::Scope scope(arena);
      const View out = arena.make(MemTag::weights, DType::f32, w[s].rows(), w[s].cols());
      if (arena.is_measuring()) continue;
      loader.ops().expand(w[s].packed, out);
      std::vector<float>& host = all.emplace_back(index(out.count()));
      loader.ops().download(out, host_view(host.data(), out.rows, out.cols));
    }
  });
  return all;
}

TEST(PackedInstall, EveryLinearOfAFileIsWhatTheReferenceReads) {
  const TempDir dir;
  TinyCheckpoint options;
  options.tokenizer = data / "tokenizer.json";
  write_tiny_checkpoint(dir.path() / "m", options);
  const auto source = open_checkpoint(dir.path() / "m");
  const TokenWindows tokens{synthetic_tokens(8 * 64, options.config.vocab, 3), 8, 64};
  const std::pair<const char*, const char*> schemes[] = {
      {"rtn", "--bits 4 --group 128 --scale-dtype f16"},
      {"rtn", "--bits 3 --group 64 --sym"},
      {"rtn", "--bits 2 --group 0 --scale-dtype f16"},
      {"rtn", "--bits 8 --group 0 --scale-dtype bf16"},
      {"rtn", "--bits 1 --group 32"},
      {"rtn", "--bits 5 --group 64"},
      {"rtn", "--bits 6 --group 128 --rule awq"},
      {"rtn", "--bits 7 --group 32 --scale-dtype bf16"},
      {"gptq", "--bits 3 --group 64 --act-order"},
      {"gptq", "--bits 4 --group 0 --sym --scale-dtype f16"},
      {"gptq", "--bits 4 --group 64 --act-order --static-groups"},
  };
  for (const auto& [method, text] : schemes) {
    SCOPED_TRACE(std::string(method) + " " + text);
    const std::filesystem::path file = dir.path() / "a.qw";
    run_quantize(*source, {.method = method, .options = text, .calibration = tokens}, file);
    const auto packed = open_packed(file);
    const PackedFileView view(file);
    for (std::int64_t layer = 0; layer < options.config.layers; ++layer) {
      std::int64_t unpacked = 0;
      const auto found = expanded_block(*packed, layer, &unpacked);
      EXPECT_EQ(unpacked, 7);  // each one was read back
      for (const Site s : all_sites) {
        // scale * (code - zero) in f32 on both sides: one rounding, so the same bits.
        EXPECT_TRUE(found[static_cast<std::size_t>(s)] == view.decode(linear_name(layer, s)))
            << linear_name(layer, s);
      }
    }
  }
}

TEST(PackedInstall, NothingIsReadBackUnlessAsked) {
  const auto source = open_synthetic("tiny-test");
  const auto quantized = quantize_on_load(*source, {.bits = 4, .group = 64});
  std::int64_t unpacked = -1;
  planned_and_run(source->config(), false, &unpacked, [&](Loader& loader) {
    load_block(*quantized, 0, loader,
               make_block_weights(loader.arena(), *quantized, 0, DType::f32));
  });
  EXPECT_EQ(unpacked, 0);
}

TEST(PackedInstall, QuantizedOnLoadPackedOrDecodedIsTheSame) {
  const auto source = open_synthetic("tiny-test");
  for (const SchemeOptions scheme :
       {SchemeOptions{4, 128, false, DType::f16}, SchemeOptions{3, 64, true, DType::f32},
        SchemeOptions{8, 0, false, DType::bf16}}) {
    const auto quantized = quantize_on_load(*source, scheme);
    std::int64_t unpacked = 0;
    const auto found = expanded_block(*quantized, 1, &unpacked);
    EXPECT_EQ(unpacked, 7);
    for (const Site s : all_sites) {
      EXPECT_TRUE(found[static_cast<std::size_t>(s)] == load_weight(*quantized, 1, s))
          << scheme.bits << " " << site_name(s);
      EXPECT_FALSE(found[static_cast<std::size_t>(s)] == load_weight(*source, 1, s));
    }
  }
}

TEST(PackedInstall, ImpossibleSchemesAreRefused) {
  const auto source = open_synthetic("tiny-test");
  const auto refused = [&](const SchemeOptions& o) {
    return failure_of([&] { static_cast<void>(quantize_on_load(*source, o)); });
  };
  expect_failure(refused({.bits = 9}), ErrorCode::usage, {"bits", "9"});
  expect_failure(refused({.bits = 4, .group = 48}), ErrorCode::usage, {"group", "48"});
  expect_failure(refused({.bits = 4, .group = 1 << 20}), ErrorCode::usage, {"group", "divisor"});
  EXPECT_THROW(require_packed(*source), Error);
}

// ---- weights made by hand ----

constexpr std::int64_t rows = 24, cols = 256, group = 64, groups = cols / group;

struct HandMade {
  std::vector<std::uint8_t> codes[2];
  std::vector<float> scales[2];
  std::vector<std::int32_t> zeros[2];
  std::vector<std::int32_t> permutation, column_groups;
  OwnedLinear linear;
};

std::vector<std::uint8_t> some_codes(int bits, std::uint64_t seed) {
  std::vector<std::uint8_t> codes(index(rows * cols));
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>(uniform_value(seed, 1, i) * (1 << bits));
  }
  return codes;
}

std::vector<float> some_scales(std::uint64_t seed) {
  std::vector<float> scales(index(rows * groups));
  for (std::size_t i = 0; i < scales.size(); ++i) {
    scales[i] = static_cast<float>(0.5 + uniform_value(seed, 2, i));
  }
  return scales;
}

// Adds one term with `bits`-bit codes by groups; zeros as i32.
void add_affine(HandMade& h, std::size_t t, int bits, const std::vector<std::int32_t>& zeros) {
  h.codes[t] = some_codes(bits, 10 + t);
  h.scales[t] = some_scales(20 + t);
  h.zeros[t] = zeros;
  Term term;
  term.bits = bits;
  term.codes_plane = h.linear.add(pack_codes_plane(host_view(h.codes[t].data(), rows, cols), bits));
  term.grid.kind = GridKind::group;
  term.grid.group = group;
  term.grid.scale_plane =
      h.linear.add(scales_plane(host_view(h.scales[t].data(), rows, groups), DType::f32));
  term.grid.zero_plane =
      h.linear.add(zeros_plane(host_view(h.zeros[t].data(), rows, groups), DType::i32));
  h.linear.weight.rows = rows;
  h.linear.weight.cols = cols;
  h.linear.weight.terms.push_back(term);
}

std::vector<std::int32_t> zeros_of(std::int32_t value) {
  return std::vector<std::int32_t>(index(rows * groups), value);
}

// Act-order with groups of W's columns: `shift` turns the columns round.
void permute(HandMade& h, std::int64_t shift) {
  for (std::int64_t j = 0; j < cols; ++j) {
    const std::int64_t c = (j * 5 + shift) % cols;  // 5 and 256 have no common divisor
    h.permutation.push_back(static_cast<std::int32_t>(c));
    h.column_groups.push_back(static_cast<std::int32_t>(c / group));
  }
  h.linear.weight.permutation_plane = h.linear.add(indices_plane(h.permutation, "permutation"));
}

// The weight as the reference decodes it, and through stage, repack and expand.
void expect_installed(const HandMade& h, bool permuted, double tolerance) {
  const LinearWeight& w = h.linear.weight;
  std::vector<float> expected(index(rows * cols)), found(index(rows * cols));
  decode_linear(w, host_view(expected.data(), rows, cols));
  const auto layout = packed_layout_of(w, "w");
  ASSERT_TRUE(layout.has_value());
  EXPECT_EQ(layout->permuted, permuted);
  planned_and_run(small_config(), true, nullptr, [&](Loader& loader) {
    Arena& arena = loader.arena();
    const PackedWeight out = make_packed_weight(arena, *layout);
    const StagedLinear staged = stage_layout(w, "w");
    if (arena.is_measuring()) {
      install_packed(staged, nullptr, loader, out);
      static_cast<void>(arena.make(MemTag::weights, DType::f32, rows, cols));
      return;
    }
    std::byte* base = loader.stage(staged.bytes);
    for (std::size_t i = 0; i < w.planes.size(); ++i) {
      std::memcpy(base + staged.plane[i], w.planes[i].data.data, index(w.planes[i].raw_bytes()));
    }
    prepare_staged(staged, base);
    install_packed(staged, base, loader, out);
    loader.staged();
    const View decoded = arena.make(MemTag::weights, DType::f32, rows, cols);
    loader.ops().expand(out, decoded);
    loader.ops().download(decoded, host_view(found.data(), rows, cols));
  });
  const Comparison same = compare_close(found, expected, {.relative = tolerance});
  EXPECT_TRUE(same) << same.message;
}

std::optional<Failure> staging_error(const HandMade& h) {
  return failure_of([&] {
    const LinearWeight& w = h.linear.weight;
    const StagedLinear staged = stage_layout(w, "layers.0.w");
    std::vector<std::byte> memory(index(staged.bytes));
    for (std::size_t i = 0; i < w.planes.size(); ++i) {
      std::memcpy(memory.data() + staged.plane[i], w.planes[i].data.data,
                  index(w.planes[i].raw_bytes()));
    }
    prepare_staged(staged, memory.data());
  });
}

TEST(PackedInstall, ZerosMayLieOutsideTheCodes) {
  for (const std::int32_t zero : {0, 9, 255}) {
    HandMade h;
    add_affine(h, 0, 3, zeros_of(zero));
    expect_installed(h, false, 0.0);
  }
  for (const std::int32_t zero : {-1, 256, -70000}) {
    HandMade h;
    std::vector<std::int32_t> zeros = zeros_of(7);
    zeros[17] = zero;
    add_affine(h, 0, 3, zeros);
    expect_failure(staging_error(h), ErrorCode::usage,
                   {"layers.0.w", std::to_string(zero), "--exec decoded"});
  }
}

TEST(PackedInstall, GroupsOfOriginalColumnsNeedNoPermutation) {
  for (const int bits : {2, 5}) {
    HandMade h;
    add_affine(h, 0, bits, zeros_of(2));
    permute(h, 3);
    expect_installed(h, true, 0.0);  // groups of the codes' own columns
    h.linear.weight.terms[0].grid.column_group_plane =
        h.linear.add(indices_plane(h.column_groups, "column groups"));
    expect_installed(h, false, 0.0);
  }
  // Groups of no consecutive columns have no place in the layout.
  HandMade h;
  add_affine(h, 0, 4, zeros_of(2));
  permute(h, 3);
  std::swap(h.column_groups[0], h.column_groups[30]);
  ASSERT_NE(h.column_groups[0], h.column_groups[30]);
  h.linear.weight.terms[0].grid.column_group_plane =
      h.linear.add(indices_plane(h.column_groups, "column groups"));
  expect_failure(staging_error(h), ErrorCode::usage, {"layers.0.w", "group", "--exec decoded"});
}

TEST(PackedInstall, TwoBinaryTermsBecomeOne) {
  HandMade h;
  add_affine(h, 0, 1, zeros_of(1));
  std::vector<std::int32_t> zeros = zeros_of(0);
  for (std::size_t i = 0; i < zeros.size(); i += 3) zeros[i] = 1;
  add_affine(h, 1, 1, zeros);
  // A sum of two values, each rounded: one more rounding may be saved by a fused product.
  expect_installed(h, false, 4.0 * roundoff(DType::f32));
}

TEST(PackedInstall, CodebooksTakeTheirEntries) {
  HandMade h;
  h.codes[0] = some_codes(4, 1);
  h.scales[0] = some_scales(2);
  std::vector<float> book(16);
  for (std::size_t i = 0; i < book.size(); ++i) book[i] = std::sin(1.0F + static_cast<float>(i));
  Term term;
  term.kind = TermKind::codebook;
  term.bits = 4;
  term.codes_plane = h.linear.add(pack_codes_plane(host_view(h.codes[0].data(), rows, cols), 4));
  term.grid.kind = GridKind::group;
  term.grid.group = group;
  term.grid.scale_plane =
      h.linear.add(scales_plane(host_view(h.scales[0].data(), rows, groups), DType::f32));
  term.codebook_plane =
      h.linear.add(floats_plane(host_view(book.data(), 1, 16), DType::f32, "book"));
  h.linear.weight.rows = rows;
  h.linear.weight.cols = cols;
  h.linear.weight.terms.push_back(term);
  expect_installed(h, false, 0.0);
}

TEST(PackedInstall, SchemesWithoutAKernelAreRefused) {
  HandMade h;
  add_affine(h, 0, 3, zeros_of(4));
  std::vector<float> diagonal(index(cols), 2.0F);
  h.linear.weight.diagonal_plane =
      h.linear.add(floats_plane(host_view(diagonal.data(), 1, cols), DType::f32, "diagonal"));
  expect_failure(failure_of([&] { static_cast<void>(packed_layout_of(h.linear.weight, "w.q")); }),
                 ErrorCode::usage, {"w.q", "affine3 g64", "diagonal", "--exec decoded"});
}

TEST(PackedInstall, ScalesMustBeFinite) {
  HandMade h;
  add_affine(h, 0, 3, zeros_of(4));
  ASSERT_FALSE(staging_error(h).has_value());
  const int plane = h.linear.weight.terms[0].grid.scale_plane;
  const float bad = std::numeric_limits<float>::infinity();
  std::memcpy(static_cast<char*>(h.linear.weight.planes[index(plane)].data.data) + 40, &bad, 4);
  expect_failure(staging_error(h), ErrorCode::numeric, {"layers.0.w", "finite", "1 NaN"});
}

}  // namespace
}  // namespace engine::test
