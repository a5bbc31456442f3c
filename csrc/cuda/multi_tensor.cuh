// A launch's tensors, by value in its arguments: no table to copy to the device, and nothing that a CUDA graph could find changed or freed.
//
// Rows (the tensors of one parameter) are cut into chunks; a block finds its chunk's row by bisection over the numbers of chunks. Chunks
// are numbered in 32 bits, elements in 64.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/work_list.h"

namespace sam::cuda {

// Bytes of a launch's arguments: what every driver takes, and what CUDA 12.1 and its drivers take (compute capability 7.0). A small list
// gets a small launch: all of the arguments are copied, used or not.
constexpr int kSmallArguments = 4096, kLargeArguments = 32764;
constexpr int kOptionBytes = 320;  // of them for an operation's options

struct Location {
  int row;
  uint32_t chunk;  // of the row
  int64_t begin;   // elements of the row
  int count;
};

// Sizes of slices that no chunk cuts, where an operation has them.
template <int kRows, bool kSlices>
struct SliceTable {
  SAM_INLINE int64_t slice_size(int) const { return 0; }
};

template <int kRows>
struct SliceTable<kRows, true> {
  int64_t slice_sizes[kRows];  // 0: of a row that is cut anywhere
  SAM_INLINE int64_t slice_size(int row) const { return slice_sizes[row]; }
};

template <int kRoles, int kArgumentBytes, bool kSlices>
constexpr int capacity() {
  constexpr int kRowBytes = kRoles * static_cast<int>(sizeof(char*) + sizeof(DType)) + 8 + 4 + 4 + (kSlices ? 8 : 0);
  return (kArgumentBytes - kOptionBytes - 16) / kRowBytes;
}

template <int kRoles, int kArgumentBytes, bool kHasSlices = false>
struct Table : SliceTable<capacity<kRoles, kArgumentBytes, kHasSlices>(), kHasSlices> {
  static constexpr int kBytes = kArgumentBytes;
  static constexpr bool kSlices = kHasSlices;
  static constexpr int kCapacity = capacity<kRoles, kArgumentBytes, kHasSlices>();

  char* pointers[kRoles][kCapacity];  // null: the role takes no part
  int64_t numels[kCapacity];
  uint32_t chunk_ends[kCapacity];  // chunks of this row and all before it
  uint32_t tags[kCapacity];        // what an operation knows the row by: its number in the caller's list, or its first partial sum
  DType dtypes[kRoles][kCapacity];
  int32_t rows;
  int32_t chunk_size;
  bool backwards;  // the order of chunks

  SAM_INLINE uint32_t chunks() const { return chunk_ends[rows - 1]; }  // a table has at least one row

  SAM_INLINE Location locate(uint32_t chunk) const {
    int low = 0, high = rows - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (chunk_ends[middle] > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const uint32_t chunk_of_row = chunk - (low == 0 ? 0 : chunk_ends[low - 1]);
    const auto elements = kSlices ? whole_slices(this->slice_size(low), chunk_size) : chunk_size;
    const int64_t begin = static_cast<int64_t>(chunk_of_row) * elements;
    const int64_t left = numels[low] - begin;
    return {low, chunk_of_row, begin, static_cast<int>(left < elements ? left : elements)};
  }
};

// One chunk of one row.
template <int kRoles>
struct Piece {
  Operand operands[kRoles];  // data: its first element
  int64_t begin;             // elements of the row
  uint32_t chunk, tag;
  int count;           // of a chunk that is one long slice, the lower bits of its size
  int64_t slice_size;  // 0: no slices
};

}  // namespace sam::cuda
