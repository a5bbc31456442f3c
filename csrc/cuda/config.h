// How the work is cut.
#pragma once

#include <cstdint>

#include "common/work_list.h"

namespace sam::cuda {

constexpr int kThreads = 512;  // of a block

// Blocks that a processor has threads for. (On the host's side of a compilation the number is of no interest.)
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 1536 / kThreads;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 1024 / kThreads;
#else
constexpr int kMostBlocks = 2048 / kThreads;
#endif

// What a sweep on a device varies. The bits of a norm depend on chunk_size.
struct Cut {
  int chunk_size = static_cast<int>(kChunkSize);
  int blocks_per_processor = 0;  // resident at a time; 0: as many as there is room for
  bool backwards = true;         // passes that follow a read of the same gradients begin where that one ended, in the second-level cache
};

Cut& cut();

#if defined(SAM_CUDA_ON_HOST)

// Whether launches run. Where they do not, what is left is the host's work, up to the call of CUDA's runtime.
inline bool& runs_launches() {
  static bool runs = true;
  return runs;
}

#endif

}  // namespace sam::cuda
