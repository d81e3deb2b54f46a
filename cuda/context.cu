#include <algorithm>
#include <string>

#include "cuda/chain.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm_lt.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr std::int64_t lt_workspace_bytes = std::int64_t{64} << 20;
constexpr std::int64_t small_bytes = 64 << 10;
constexpr std::int64_t vector_partial_count = std::int64_t{4} << 20;
constexpr std::int64_t vector_counter_count = 8192;
// Marks older than this many are forgotten.
constexpr std::int64_t max_marks = 16384;

__global__ void probe_kernel() {}

// Device memory. Filling is queued on the stream, in order with the kernels around it.
class DeviceMemory final : public RawMemory {
 public:
  DeviceMemory(std::string name, cudaStream_t stream) : name_(std::move(name)), stream_(stream) {}
  [[nodiscard]] std::string name() const override { return name_; }
  [[nodiscard]] DeviceKind kind() const override { return DeviceKind::cuda; }
  void* allocate(std::size_t bytes) override {
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) == cudaSuccess) return data;
    (void)cudaGetLastError();  // the caller reports it; it must not surface at the next launch
    return nullptr;
  }
  void release(void* data, std::size_t /*bytes*/) noexcept override {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaFree(data);
  }
  void fill(void* data, int byte, std::size_t bytes) override {
    CUDA_TRY(cudaMemsetAsync(data, byte, bytes, stream_));
  }

 private:
  std::string name_;
  cudaStream_t stream_;
};

// Page-locked host memory. Waits for the stream before it is given back or filled, because copies
// may still be reading it.
class PinnedMemory final : public RawMemory {
 public:
  explicit PinnedMemory(cudaStream_t stream) : stream_(stream) {}
  [[nodiscard]] std::string name() const override { return "pinned"; }
  [[nodiscard]] DeviceKind kind() const override { return DeviceKind::cpu; }
  void* allocate(std::size_t bytes) override {
    void* data = nullptr;
    if (cudaMallocHost(&data, bytes) == cudaSuccess) return data;
    (void)cudaGetLastError();
    return nullptr;
  }
  void release(void* data, std::size_t /*bytes*/) noexcept override {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaFreeHost(data);
  }
  void fill(void* data, int byte, std::size_t bytes) override {
    CUDA_TRY(cudaStreamSynchronize(stream_));
    std::fill_n(static_cast<unsigned char*>(data), bytes, static_cast<unsigned char>(byte));
  }

 private:
  cudaStream_t stream_;
};

void copy_views(const View& from, const View& to, cudaMemcpyKind kind, cudaStream_t stream) {
  REQUIRE(from.dtype == to.dtype && from.rows == to.rows && from.cols == to.cols,
          "copy of " + from.shape() + " to " + to.shape());
  if (from.empty()) return;
  const auto size = dtype_bytes(from.dtype);
  if (from.contiguous() && to.contiguous()) {
    CUDA_TRY(
        cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(from.bytes()), kind, stream));
    return;
  }
  CUDA_TRY(cudaMemcpy2DAsync(to.data, static_cast<std::size_t>(to.stride) * size, from.data,
                             static_cast<std::size_t>(from.stride) * size,
                             static_cast<std::size_t>(from.cols) * size,
                             static_cast<std::size_t>(from.rows), kind, stream));
}

std::string device_name(int index) { return "cuda:" + std::to_string(index); }

}  // namespace

void seal(cudaStream_t stream) { launch("seal", probe_kernel, 1, 1, 0, stream); }

CudaOps::CudaOps(int device_index) : device_index_(device_index) {}

// The delegated constructor has completed when this body starts, so a throw here runs the
// destructor, which gives back what was made so far.
CudaOps::CudaOps(Ledger& ledger, int device_index) : CudaOps(device_index) {
  CUDA_TRY(cudaSetDevice(device_index));
  CUDA_TRY(cudaGetDeviceProperties(&properties_, device_index));
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::device, device_name(device_index) + " (" + properties_.name +
                                       "): this build has no code for sm_" +
                                       std::to_string(properties_.major) +
                                       std::to_string(properties_.minor));
  }
  sm90_code_ = attributes.ptxVersion >= 90;
  CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  memory_ = std::make_unique<DeviceMemory>(device_name(device_index), stream_);
  pinned_ = std::make_unique<PinnedMemory>(stream_);
  lt_workspace_ = Buffer(*memory_, ledger, MemTag::workspace, DType::u8, 1, lt_workspace_bytes);
  small_device_ = Buffer(*memory_, ledger, MemTag::workspace, DType::u8, 1, small_bytes);
  small_host_ = Buffer(*pinned_, ledger, MemTag::workspace, DType::u8, 1, small_bytes);
  vector_partials_ =
      Buffer(*memory_, ledger, MemTag::workspace, DType::f32, 1, vector_partial_count);
  vector_counters_ =
      Buffer(*memory_, ledger, MemTag::workspace, DType::i32, 1, vector_counter_count);
  vector_arrivals_ = Buffer(*memory_, ledger, MemTag::workspace, DType::i32, 1, vector_max_phases);
  zero(vector_counters_.view());
  zero(vector_arrivals_.view());
  LIBRARY_TRY(cublasLtCreate(&cublas_lt_));
  LIBRARY_TRY(cublasCreate(&cublas_));
  LIBRARY_TRY(cublasSetStream(cublas_, stream_));  // before the workspace: it resets that
  LIBRARY_TRY(cublasSetWorkspace(cublas_, lt_workspace_.view().data, lt_workspace_bytes));
  LIBRARY_TRY(cublasSetMathMode(
      cublas_, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                         CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  LIBRARY_TRY(cusolverDnCreate(&cusolver_));
  LIBRARY_TRY(cusolverDnSetStream(cusolver_, stream_));
  plans_ = std::make_unique<GemmPlans>();
  std::size_t free = 0;
  std::size_t total = 0;
  CUDA_TRY(cudaMemGetInfo(&free, &total));
  context_bytes_ = static_cast<std::int64_t>(total) - static_cast<std::int64_t>(free) -
                   lt_workspace_bytes - small_bytes - vector_partials_.view().bytes() -
                   vector_counters_.view().bytes() - vector_arrivals_.view().bytes();
}

CudaOps::~CudaOps() {
  // Buffers wait for the stream when they give memory back, so they go before it.
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
  plans_.reset();
  for (cudaEvent_t event : events_) (void)cudaEventDestroy(event);
  if (cusolver_ != nullptr) (void)cusolverDnDestroy(cusolver_);
  if (cublas_ != nullptr) (void)cublasDestroy(cublas_);
  if (cublas_lt_ != nullptr) (void)cublasLtDestroy(cublas_lt_);
  vector_arrivals_ = Buffer();
  vector_counters_ = Buffer();
  vector_partials_ = Buffer();
  small_host_ = Buffer();
  small_device_ = Buffer();
  lt_workspace_ = Buffer();
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

DeviceInfo CudaOps::info() {
  std::size_t free = 0;
  std::size_t total = 0;
  CUDA_TRY(cudaMemGetInfo(&free, &total));
  int driver = 0;
  CUDA_TRY(cudaDriverGetVersion(&driver));
  DeviceInfo out;
  out.name = device_name(device_index_);
  out.model = properties_.name;
  out.features = "sm_" + std::to_string(properties_.major) + std::to_string(properties_.minor) +
                 ", driver " + std::to_string(driver / 1000) + "." +
                 std::to_string(driver % 1000 / 10) + ", " +
                 std::to_string(properties_.multiProcessorCount) + " multiprocessors";
  out.total_bytes = static_cast<std::int64_t>(total);
  out.free_bytes = static_cast<std::int64_t>(free);
  out.context_bytes = context_bytes_;
  return out;
}

RawMemory& CudaOps::memory() { return *memory_; }
RawMemory& CudaOps::staging_memory() { return *pinned_; }

void CudaOps::upload(View host, View device) {
  REQUIRE(host.device == DeviceKind::cpu && device.device == DeviceKind::cuda,
          "upload goes from host to device");
  copy_views(host, device, cudaMemcpyHostToDevice, stream_);
}

void CudaOps::download(View device, View host) {
  REQUIRE(host.device == DeviceKind::cpu && device.device == DeviceKind::cuda,
          "download goes from device to host");
  copy_views(device, host, cudaMemcpyDeviceToHost, stream_);
  synchronize();
}

void CudaOps::copy(View from, View to) {
  REQUIRE(from.device == DeviceKind::cuda && to.device == DeviceKind::cuda,
          "copy stays on the device");
  copy_views(from, to, cudaMemcpyDeviceToDevice, stream_);
}

void CudaOps::synchronize() { CUDA_TRY(cudaStreamSynchronize(stream_)); }

namespace {

class Graph final : public Recording {
 public:
  explicit Graph(cudaGraphExec_t exec) : exec_(exec) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() override { (void)cudaGraphExecDestroy(exec_); }
  [[nodiscard]] cudaGraphExec_t exec() const { return exec_; }

 private:
  cudaGraphExec_t exec_;
};

}  // namespace

std::unique_ptr<Recording> CudaOps::record(const std::function<void()>& body) {
  CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    (void)cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t exec = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
  (void)cudaGraphDestroy(graph);
  CUDA_TRY(status);
  auto recording = std::make_unique<Graph>(exec);
  CUDA_TRY(cudaGraphUpload(exec, stream_));
  return recording;
}

void CudaOps::replay(Recording& recording) {
  auto* graph = dynamic_cast<Graph*>(&recording);
  REQUIRE(graph != nullptr, "a recording of another backend");
  CUDA_TRY(cudaGraphLaunch(graph->exec(), stream_));
}

std::int64_t CudaOps::mark() {
  const auto slot = static_cast<std::size_t>(marks_ % max_marks);
  if (slot == events_.size()) {
    cudaEvent_t event = nullptr;
    CUDA_TRY(cudaEventCreate(&event));
    events_.push_back(event);
  }
  CUDA_TRY(cudaEventRecord(events_[slot], stream_));
  return marks_++;
}

double CudaOps::elapsed_ms(std::int64_t from, std::int64_t to) {
  // To wait for a mark alone, it need not be kept: its slot then holds a later one.
  const std::int64_t oldest = from == to ? 0 : std::max<std::int64_t>(0, marks_ - max_marks);
  for (const std::int64_t m : {from, to}) {
    REQUIRE(m >= oldest && m < marks_,
            "mark " + std::to_string(m) + " is unknown or no longer kept");
  }
  cudaEvent_t first = events_[static_cast<std::size_t>(from % max_marks)];
  cudaEvent_t last = events_[static_cast<std::size_t>(to % max_marks)];
  CUDA_TRY(cudaEventSynchronize(last));
  if (from == to) return 0.0;
  CUDA_TRY(cudaEventSynchronize(first));
  float ms = 0;
  CUDA_TRY(cudaEventElapsedTime(&ms, first, last));
  return static_cast<double>(ms);
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

std::unique_ptr<Ops> make_cuda_ops(Ledger& ledger, int device_index) {
  const int count = cuda_device_count();
  if (device_index < 0 || device_index >= count) {
    std::string found;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      CUDA_TRY(cudaGetDeviceProperties(&properties, i));
      found += (i == 0 ? "" : ", ") + device_name(i) + " (" + properties.name + ")";
    }
    if (count == 0) found = "no CUDA device that the driver can use";
    throw Error(ErrorCode::device,
                device_name(device_index) + ": no such device; this machine has " + found);
  }
  return std::make_unique<CudaOps>(ledger, device_index);
}

}  // namespace engine
