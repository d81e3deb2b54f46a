// vector_wide_product: the host side of the streaming kernel of clusters.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/check.h"
#include "cuda/vector_host.cuh"
#include "cuda/vector_wide.cuh"
#include "cuda/vector_wide.h"

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

WidePlan choose_wide(const PackedShape& s, std::int64_t units, const VectorResources& r) {
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
void run_wide(const VectorProblem& p, const VectorResources& r, cudaStream_t stream) {
  const PackedShape& s = p.segment[0].w->packed.shape;
  const std::int64_t units = vector_units(p);
  const WidePlan plan = choose_wide(s, units, r);
  const WideKernel<T> kernel = wide_kernel<T>(s);
  REQUIRE(kernel != nullptr && plan.cluster > 0,
          "wide vector product of " + p.x.shape() + " does not fit the device");
  const int most = most_clusters<T>(kernel, plan);
  REQUIRE(most > 0, "wide vector product: the device runs no clusters of " +
                        std::to_string(plan.cluster) + " blocks");
  WideArgs<T> w{};
  VectorArgs<T>& a = w.v;
  a = problem_args<T>(p);
  a.blocks = static_cast<int>(s.col_blocks());
  a.slices = 1;
  a.stages = plan.stages;
  a.x_row_bytes = static_cast<int>(plan.x_row);
  a.sum_offset = static_cast<int>(plan.sums);
  a.red_offset = static_cast<int>(plan.red);
  a.ring_offset = static_cast<int>(plan.ring);
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
  w.early = 1;  // x would wait behind more
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
  const WidePlan plan = choose_wide(s, vector_units(p), r);
  if (plan.cluster == 0) return false;
  const auto runs = [&](auto kernel) {
    return kernel != nullptr && most_clusters(kernel, plan) > 0;
  };
  if (p.x.dtype == DType::f16) return runs(wide_kernel<__half>(s));
  return p.x.dtype == DType::bf16 && runs(wide_kernel<__nv_bfloat16>(s));
}

bool vector_wide_fits(const PackedShape& shape, std::int64_t rows, const VectorResources& r) {
  return vector_wide_fits(VectorShapeProblem(shape, rows).problem, r);
}

void vector_wide_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream) {
  check_vector_problem(p);
  const Linear& w = *p.segment[0].w;  // the others are like it
  REQUIRE(w.is_packed() && w.packed.permutation.data == nullptr,
          "wide vector product of " + p.x.shape() + ": a dense or permuted weight");
  REQUIRE(r.sm90, "wide vector product: the code that runs has no thread block clusters");
  if (p.x.dtype == DType::f16) {
    run_wide<__half>(p, r, stream);
  } else {
    run_wide<__nv_bfloat16>(p, r, stream);
  }
}

}  // namespace engine
