// How the work is cut.
#pragma once

#include <cstdint>
#include <vector>

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

// What a sweep on a device varies. The bits of a norm depend on the size of chunks.
struct Cut {
  int chunk_size = 0;            // elements; 0: as many as usual_chunk_size says
  int blocks_per_processor = 0;  // resident at a time; 0: as many as there is room for
  bool backwards = true;         // passes that follow a read of the same gradients begin where that one ended, in the second-level cache
};

Cut& cut();

#if defined(SAM_CUDA_ON_HOST)
// Of launches on the host: how many blocks one has at most, which of them runs first, how many launches there were, and whether their
// kernels run: where they do not, what is left is the host's work, up to the call of CUDA's runtime.
struct OnHost {
  uint32_t blocks = 3, first = 0;
  uint64_t launches = 0;
  bool runs = true;
};

OnHost& on_host();
#endif

// Chunks that all rows of a call are to make together: about four for each of the 528 blocks that are resident on 132 processors, so that
// little is left for the last round.
constexpr int64_t kWantedChunks = 2048;
// Elements of the smallest chunk: four packs of float32 a thread. Of a smaller one the bisection for its row would take as long as the
// rest.
constexpr int64_t kLeastChunkSize = 8192;

// Elements a chunk, of tensors of these sizes: kChunkSize, halved while there would be too few chunks to keep a device busy. By the sum of
// the sizes alone, whatever the device: the bits of a norm depend on it.
int usual_chunk_size(const std::vector<int64_t>& numels);

// The same, unless a sweep has set another.
int chunk_size_of(const std::vector<int64_t>& numels);

}  // namespace sam::cuda
