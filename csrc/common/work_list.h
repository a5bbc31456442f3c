// Lists of tensors, and how they are cut into pieces of work. That depends on the sizes alone, never on the number of threads: it is what
// makes the bits of a norm independent of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/operand.h"

namespace sam {

struct TensorList {
  std::vector<Operand> operands;  // (n,)
  std::vector<int64_t> numels;    // (n,)
};

// Elements a chunk: 256 KiB of float32, several of which fit a core's L2 cache, and a few thousand chunks for a model of 10^8 parameters.
constexpr int64_t kChunkSize = 65536;

struct Chunk {
  int64_t tensor;      // index into the list
  int64_t begin, end;  // elements of that tensor, end - begin <= chunk size
};

// Chunks of every tensor, in order; empty tensors have none. numels: (n,)
inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& numels, int64_t chunk_size = kChunkSize) {
  std::size_t count = 0;
  for (const int64_t numel : numels) count += static_cast<std::size_t>((numel + chunk_size - 1) / chunk_size);
  std::vector<Chunk> chunks;
  chunks.reserve(count);
  for (std::size_t tensor = 0; tensor < numels.size(); ++tensor) {
    for (int64_t begin = 0; begin < numels[tensor]; begin += chunk_size) {
      const int64_t left = numels[tensor] - begin;
      chunks.push_back({static_cast<int64_t>(tensor), begin, begin + (left < chunk_size ? left : chunk_size)});
    }
  }
  return chunks;
}

}  // namespace sam
