// How the work is cut.
#pragma once

#include <cstdint>

#include "common/work_list.h"

namespace sam::cuda {

constexpr int kThreads = 512;  // of a block

// What a sweep on a device varies. The bits of a norm depend on chunk_size.
struct Cut {
  int chunk_size = static_cast<int>(kChunkSize);
  int blocks_per_processor = 0;  // resident at a time; 0: as many as there is room for
};

Cut& cut();

}  // namespace sam::cuda
