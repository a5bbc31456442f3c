#include "cuda/config.h"
#include "cuda/device.h"

namespace sam::cuda {

Cut& cut() {
  static Cut instance;
  return instance;
}

int usual_chunk_size(const std::vector<int64_t>& numels) {
  int64_t total = 0, size = kChunkSize;
  for (const int64_t numel : numels) total += numel;
  while (size > kLeastChunkSize && total < size * kWantedChunks) size /= 2;
  return static_cast<int>(size);
}

int chunk_size_of(const std::vector<int64_t>& numels) { return cut().chunk_size > 0 ? cut().chunk_size : usual_chunk_size(numels); }

}  // namespace sam::cuda

#if !defined(SAM_CUDA_ON_HOST)

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace sam::cuda {
namespace {

constexpr uint32_t kCounters = 8192;      // streams and recorded launches of a process, on each device
__device__ uint32_t counters[kCounters];  // zeros when the module is loaded

// The first toolkit and driver with arguments of more than 4 KB.
constexpr int kLargeArgumentsVersion = 12010;

}  // namespace

void check(int code, const Place& place, const char* doing) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call of anybody would be told about it again
  const bool no_device = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  std::string words = std::string("sam_kernels: ") + place.op + " on cuda:" + std::to_string(place.device) + ": " +
                      (no_device ? "no CUDA device" : doing + std::string(" failed")) + ": " + cudaGetErrorString(error) + " (" +
                      cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion) {
    words += "; this binary was built for other devices: reinstall with TORCH_CUDA_ARCH_LIST set to this one's compute capability";
  }
  throw std::runtime_error(words);
}

DeviceGuard::DeviceGuard(const Place& place) {
  check(cudaGetDevice(&previous_), place, "asking for the current device");
  changed_ = previous_ != place.device;
  if (changed_) check(cudaSetDevice(place.device), place, "choosing the device");
}

DeviceGuard::~DeviceGuard() {
  if (changed_) (void)cudaSetDevice(previous_);  // a destructor has nobody to tell; it was the current device a moment ago
}

unsigned resident_blocks(const void* kernel, const Place& place) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, unsigned> known;
  const int wanted = cut().blocks_per_processor;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned& blocks = known[{kernel, place.device, wanted}];
  if (blocks == 0) {
    int processors = 0, fitting = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, place.device), place, "looking at the device");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kernel, kThreads, 0), place, "looking for the kernel");
    blocks = static_cast<unsigned>(processors * (wanted > 0 ? wanted : fitting));
  }
  return blocks;
}

uint32_t* counter_of(const Place& place) {
  static std::mutex mutex;
  static std::map<int, std::pair<uint32_t*, uint32_t>> taken;  // by device: the first, and how many are
  static std::map<std::pair<int, void*>, uint32_t*> of_stream;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(place.stream), &status) != cudaSuccess) {
    (void)cudaGetLastError();  // the launch will say what is wrong
    return nullptr;
  }
  const bool is_recording = status != cudaStreamCaptureStatusNone;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = of_stream.find({place.device, place.stream});
  if (!is_recording && known != of_stream.end()) return known->second;
  auto& [first, count] = taken[place.device];
  if (first == nullptr) {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counters), place, "looking for the counters");
    first = static_cast<uint32_t*>(address);
  }
  if (count == kCounters) return nullptr;
  uint32_t* counter = first + count++;
  if (!is_recording) of_stream[{place.device, place.stream}] = counter;
  return counter;
}

bool takes_large_arguments() {
  static const bool takes = [] {
    int driver = 0;
    return CUDART_VERSION >= kLargeArgumentsVersion && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kLargeArgumentsVersion;
  }();
  return takes;
}

void launch_kernel(const void* kernel, unsigned blocks, unsigned threads, void** arguments, const Place& place) {
  const auto stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, stream), place, "launching");
}

std::string reason_missing() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  (void)cudaGetLastError();
  return std::string("no CUDA device: ") + cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error);
}

int capability(int device) {
  const Place place{"capability", device, nullptr};
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), place, "looking at the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), place, "looking at the device");
  return 10 * major + minor;
}

}  // namespace sam::cuda

#else

namespace sam::cuda {

OnHost& on_host() {
  static OnHost instance;
  return instance;
}

uint32_t* counter_of(const Place&) {
  static thread_local uint32_t counter = 0;
  return &counter;
}

DeviceGuard::DeviceGuard(const Place&) : previous_(0), changed_(false) {}
DeviceGuard::~DeviceGuard() = default;

std::string reason_missing() { return ""; }

int capability(int) { return 0; }

}  // namespace sam::cuda

#endif
