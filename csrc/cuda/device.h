// What the launchers ask of CUDA's runtime. Every return code is looked at, and raised with the operation, the device and CUDA's words.
#pragma once

#include <cstdint>
#include <string>

namespace sam::cuda {

// Where an operation runs, and what it is called in an error.
struct Place {
  const char* op;
  int device;
  void* stream;  // cudaStream_t
};

// Throws std::runtime_error unless code is cudaSuccess. doing: "launching", "looking at the device".
void check(int code, const Place& place, const char* doing);

// Makes a device the current one for a while: processes with several of them have any of these as the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Place& place);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  bool changed_;
};

// Blocks of a kernel that are resident on the whole current device at a time; cut().blocks_per_processor where that is set. Asked once for
// each kernel and device.
unsigned resident_blocks(const void* kernel, const Place& place);

// A number on the current device that is 0 between launches, for their blocks to count themselves; null where there is none left.
//
// Launches of one stream share one: they run one after another. Other streams have others. A launch that is recorded into a CUDA graph has
// one of its own for ever, as replays may run on any stream, beside eager launches and beside other branches of the graph; a graph does
// not run beside itself.
uint32_t* counter_of(const Place& place);

// Whether the driver takes arguments of kLargeArguments bytes.
bool takes_large_arguments();

void launch_kernel(const void* kernel, unsigned blocks, unsigned threads, void** arguments, const Place& place);

// Why no kernel can run: no device, no driver, or one too old. Empty where there is one.
std::string reason_missing();

// Compute capability of a device, 90 for 9.0.
int capability(int device);

}  // namespace sam::cuda
