// vector_wide_product: the host side of the streaming kernel of clusters.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/check.h"
#include "cuda/vector_wide.cuh"
#include "cuda/vector_wide.h"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

constexpr std::int64_t align_up(std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; }

// How a launch divides columns and shared memory; cluster 0: it does not fit.
struct WidePlan {
  int cluster = 0;
  int longest = 0;  // blocks of columns of a block of threads, at most
  bool halves = false, kept = false;
  int rings = 0, stages = 0;
  int red_buffers = 0, part_buffers = 0, delay = 0;
  std::int64_t x_row = 0, red = 0, part = 0, sums = 0, ring = 0, total = 0;  // offsets; the whole
  std::int64_t cost = 0;
};

// Enough to keep the memory busy while warps wait for each other.
constexpr std::int64_t ring_wanted = 80 * 1024;
constexpr std::int64_t ring_limit = 112 * 1024;

WidePlan plan_cluster(const PackedShape& s, std::int64_t units, int cluster,
                      const VectorResources& r) {
  WidePlan p;
  const std::int64_t blocks = s.col_blocks();
  if (blocks < cluster) return p;
  p.longest = static_cast<int>(ceil_div(blocks, cluster));
  p.halves = p.longest <= wide_warps / 2;
  p.kept = p.longest <= wide_warps;
  p.rings = p.halves ? wide_warps : std::min(p.longest, wide_warps);
  // See wide_finish().
  p.part_buffers = cluster == 2 || cluster == 4 ? 3 : 2;
  p.delay = cluster == 1 ? 0 : cluster == 2 ? 1 : 3;
  p.x_row = std::int64_t{p.longest} * 256 + 64;
  p.part = wide_header;
  p.sums = p.part + std::int64_t{p.part_buffers} * cluster * wide_unit_bytes;
  const std::int64_t x = p.sums + std::int64_t{p.longest} * wide_sum_bytes;
  const std::int64_t x_bytes = 16 * p.x_row;
  for (const int buffers : {4, 2, 1}) {
    const std::int64_t parts = std::min<std::int64_t>(p.longest, wide_warps);
    const std::int64_t red_bytes = buffers * parts * wide_unit_bytes;
    // Where fragments of x stay in registers, sums of warps may lie where it was.
    p.red = p.kept ? x : x + x_bytes;
    p.ring = align_up(p.kept ? x + std::max(x_bytes, red_bytes) : p.red + red_bytes, 128);
    const std::int64_t stage = p.rings * s.record_bytes();
    const std::int64_t room = std::min(r.shared_bytes - p.ring, ring_limit);
    const auto stages =
        static_cast<int>(std::clamp<std::int64_t>(room / stage, 0, wide_max_stages));
    if (stages < 2) continue;
    p.red_buffers = buffers;
    p.stages = stages;
    p.total = p.ring + stages * stage;
    if (stages == wide_max_stages || stages * stage >= ring_wanted) break;
  }
  if (p.stages == 0) return p;
  p.cluster = cluster;
  // Steps of the busiest warp, which are dearer where x has to be read again; then staging x.
  const std::int64_t columns = std::max(1, r.multiprocessors / cluster);
  const std::int64_t steps = p.halves ? 1 : 2 * ceil_div(p.longest, wide_warps);
  p.cost = ceil_div(units, columns) * steps * (p.kept ? 8 : 11) + p.longest;
  return p;
}

WidePlan choose_wide(const PackedShape& s, std::int64_t units, int cluster,
                     const VectorResources& r) {
  if (cluster != 0) return plan_cluster(s, units, cluster, r);
  // The fewest blocks that keep their fragments of x in registers: measured (docs/kernels.md).
  for (const int c : {2, 4, 8}) {
    const WidePlan p = plan_cluster(s, units, c, r);
    if (p.cluster != 0 && p.kept) return p;
  }
  WidePlan best;
  for (const int c : {4, 8, 2, 1}) {
    const WidePlan p = plan_cluster(s, units, c, r);
    if (p.cluster != 0 && (best.cluster == 0 || p.cost < best.cost)) best = p;
  }
  return best;
}

// Pairs of row tiles of all segments.
std::int64_t wide_units(const VectorProblem& p) {
  std::int64_t units = 0;
  for (int i = 0; i < p.segments; ++i) {
    const std::int64_t tiles = ceil_div(p.segment[i].w->rows(), 16);
    if (p.epilogue == VectorEpilogue::silu) return tiles;
    units += ceil_div(tiles, 2);
  }
  return units;
}

template <class T>
WideKernel<T> wide_kernel(const PackedShape& s) {
  if (s.kind != PackedKind::affine) return nullptr;
  const bool plain = s.group >= record_cols && s.scale_dtype == DType::f16 && s.zeros;
  const int mode = s.groups_per_record() > 1 ? wide_fine : plain ? wide_plain : wide_coarse;
  switch (s.bits) {
    case 2:
      return wide_kernel_2<T>(mode);
    case 3:
      return wide_kernel_3<T>(mode);
    case 4:
      return wide_kernel_4<T>(mode);
    case 8:
      return wide_kernel_8<T>(mode);
    default:
      return nullptr;
  }
}

// The attributes of a launch in clusters; chained as launch_chained (cuda/chain.h) does it.
struct WideLaunch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  WideLaunch(int clusters, const WidePlan& p, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(p.cluster);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * p.cluster));
    config.blockDim = dim3(wide_threads);
    config.dynamicSmemBytes = static_cast<std::size_t>(p.total);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  WideLaunch(const WideLaunch&) = delete;
  WideLaunch& operator=(const WideLaunch&) = delete;
};

// Clusters of this kernel that the current device runs at once; asked once for each.
template <class T>
int most_clusters(WideKernel<T> kernel, const WidePlan& p) {
  const void* f = reinterpret_cast<const void*>(kernel);
  int device = 0;
  CUDA_TRY(cudaGetDevice(&device));
  static std::mutex guard;
  static std::map<std::tuple<const void*, std::int64_t, int, int>, int> known;
  const std::lock_guard lock(guard);
  const auto key = std::make_tuple(f, p.total, p.cluster, device);
  const auto found = known.find(key);
  CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(p.total)));
  if (found != known.end()) return found->second;
  // One division of the multiprocessor's memory for the whole chain: changing it drains it.
  CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared));
  WideLaunch launch(1, p, nullptr);
  launch.config.numAttrs = 1;
  int clusters = 0;
  CUDA_TRY(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
  known[key] = clusters;
  return clusters;
}

template <class T>
void run_wide(const VectorProblem& p, const VectorResources& r, int cluster, cudaStream_t stream) {
  const PackedWeight& first = p.segment[0].w->packed;
  const PackedShape& s = first.shape;
  const std::int64_t units = wide_units(p);
  const WidePlan plan = choose_wide(s, units, cluster, r);
  const WideKernel<T> kernel = wide_kernel<T>(s);
  REQUIRE(kernel != nullptr && plan.cluster > 0,
          "wide vector product of " + p.x.shape() + " does not fit the device");
  const int most = most_clusters<T>(kernel, plan);
  REQUIRE(most > 0, "wide vector product: the device runs no clusters of " +
                        std::to_string(plan.cluster) + " blocks");
  WideArgs<T> w{};
  VectorArgs<T>& a = w.v;
  a.rows = static_cast<int>(p.x.rows);
  a.cols = static_cast<int>(p.x.cols);
  a.blocks = static_cast<int>(s.col_blocks());
  while ((std::int64_t{32} << a.half_shift) < p.head_dim) ++a.half_shift;
  for (int i = 0; i < p.segments; ++i) {
    const VectorSegment& segment = p.segment[i];
    VectorWeight<T>& out = a.weight[i];
    out.rows = segment.w->rows();
    out.tiles = static_cast<int>(ceil_div(out.rows, 16));
    out.data = static_cast<const unsigned char*>(segment.w->packed.records.data);
    out.row_units = static_cast<const unsigned char*>(segment.w->packed.row_units.data);
    out.out = segment.out;
    out.out_stride = segment.out_stride;
    out.position_stride = segment.position_stride;
    if (i < 2) a.segment_units[i] = static_cast<int>(ceil_div(out.tiles, 2));
  }
  a.units = static_cast<int>(units);
  a.slices = 1;
  a.stages = plan.stages;
  a.x = static_cast<const T*>(p.x.data);
  a.x_stride = p.x.stride;
  a.norm = static_cast<const T*>(p.norm.data);
  a.eps = p.eps;
  a.wide = aligned_rows(p.x, 16, 8) && aligned_rows(p.norm, 16, 1);
  a.book = static_cast<const float*>(first.book.data);
  a.cos = static_cast<const float*>(p.cos.data);
  a.sin = static_cast<const float*>(p.sin.data);
  a.cos_stride = p.cos.stride;
  a.sin_stride = p.sin.stride;
  a.position = static_cast<const std::int32_t*>(p.position.data);
  a.positions = static_cast<int>(std::min<std::int64_t>(p.positions, 0x7fffffff));
  a.record_bytes = static_cast<int>(s.record_bytes());
  a.unit_bytes = static_cast<int>(s.unit_bytes());
  a.units_per_record = static_cast<int>(s.groups_per_record());
  a.scale_kind = s.scale_dtype == DType::f32 ? 0 : s.scale_dtype == DType::f16 ? 1 : 2;
  a.zero_offset =
      s.zeros ? static_cast<int>(16 * static_cast<std::int64_t>(dtype_bytes(s.scale_dtype))) : 0;
  a.constant_zero = static_cast<float>(1 << (s.bits - 1));
  a.x_row_bytes = static_cast<int>(plan.x_row);
  a.sum_offset = static_cast<int>(plan.sums);
  a.red_offset = static_cast<int>(plan.red);
  a.ring_offset = static_cast<int>(plan.ring);
  a.out_f32 = p.out_dtype == DType::f32;
  a.epilogue = p.epilogue;
  w.cluster = plan.cluster;
  w.clusters = static_cast<int>(std::min<std::int64_t>(units, most));
  w.tile_bytes = s.col_blocks() * s.record_bytes();
  w.unit_bytes = (p.epilogue == VectorEpilogue::silu ? 1 : 2) * w.clusters * w.tile_bytes;
  w.red_buffers = plan.red_buffers;
  w.part_buffers = plan.part_buffers;
  w.part_offset = static_cast<int>(plan.part);
  w.x_offset = static_cast<int>(plan.sums + std::int64_t{plan.longest} * wide_sum_bytes);
  w.delay = plan.delay;
  w.rings = plan.rings;
  w.early = std::min(1, plan.stages);  // x would wait behind more
  w.halves = plan.halves;
  w.kept = plan.kept;
  const WideLaunch launch(w.clusters, plan, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, w), "wide vector product", __FILE__,
             __LINE__);
}

}  // namespace

bool vector_wide_fits(const VectorProblem& p, const VectorResources& r) {
  if (p.x.rows < 1 || p.x.rows > vector_max_rows) return false;
  for (int i = 0; i < p.segments; ++i) {
    const Linear& w = *p.segment[i].w;
    if (!w.is_packed() || w.packed.permutation.data != nullptr) return false;
  }
  const PackedShape& s = p.segment[0].w->packed.shape;
  if (!r.sm90) return false;
  const WidePlan plan = choose_wide(s, wide_units(p), 0, r);
  if (plan.cluster == 0) return false;
  const auto runs = [&](auto kernel) {
    return kernel != nullptr && most_clusters(kernel, plan) > 0;
  };
  if (p.x.dtype == DType::f16) return runs(wide_kernel<__half>(s));
  return p.x.dtype == DType::bf16 && runs(wide_kernel<__nv_bfloat16>(s));
}

bool vector_wide_fits(const PackedShape& shape, std::int64_t rows, const VectorResources& r) {
  Linear w;
  w.packed.shape = shape;
  VectorProblem p;
  p.x = make_view(nullptr, DType::bf16, DeviceKind::cuda, rows, shape.cols);
  p.segment[0].w = &w;
  return vector_wide_fits(p, r);
}

void vector_wide_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream,
                         int cluster) {
  REQUIRE(p.x.rows >= 1 && p.x.rows <= vector_max_rows && p.segments >= 1 && p.segments <= 3 &&
              (cluster == 0 || cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8),
          "wide vector product of " + p.x.shape());
  require_cuda("wide vector product", {p.x});
  REQUIRE((p.epilogue != VectorEpilogue::silu && p.epilogue != VectorEpilogue::qkv) ||
              p.out_dtype == p.x.dtype,
          "wide vector product: a fused result has the dtype of x");
  REQUIRE(p.norm.empty() || (p.norm.dtype == p.x.dtype && p.norm.cols == p.x.cols),
          "wide vector product: norm " + p.norm.shape());
  for (int i = 0; i < p.segments; ++i) {
    const Linear& w = *p.segment[i].w;
    REQUIRE(w.is_packed() && w.packed.permutation.data == nullptr && w.cols() == p.x.cols &&
                (i == 0 || vector_compatible(*p.segment[0].w, w)),
            "wide vector product of " + p.x.shape() + ": segment " + std::to_string(i) +
                " does not fit");
    check_packed_weight("wide vector product", w.packed, DeviceKind::cuda);
  }
  REQUIRE(r.sm90, "wide vector product: the code that runs has no thread block clusters");
  if (p.x.dtype == DType::f16) {
    run_wide<__half>(p, r, cluster, stream);
  } else {
    REQUIRE(p.x.dtype == DType::bf16, "wide vector product of " + p.x.shape());
    run_wide<__nv_bfloat16>(p, r, cluster, stream);
  }
}

}  // namespace engine
