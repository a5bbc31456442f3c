// Where an update's blocks of weights come from and go to: backups or masters, streams, stochastic rounding. Included only by files
// compiled once per instruction set.
#pragma once

#include "cpu/stochastic.h"

namespace sam::cpu {
inline namespace SAM_ISA {

// Calls step(begin, count, param, result) for each block: it makes the new weights of old_param (without one: of param). They go to param;
// with to_old to old_param first, in place. What is only written is streamed if streams. index: of the row in the caller's list.
template <class T, class Step>
static inline void update_blocks(const Row& row, Span span, const UpdateOptions<double>& options, bool streams, uint32_t index, Step step) {
  const int from = row[kOldParam].data != nullptr ? kOldParam : kParam, to = options.to_old ? kOldParam : kParam;
  if (!is_variant(options)) {
    for_each_block(span, [&](int64_t begin, int count) {
      rewrite<T>(row, kParam, from, begin, count, streams, [&](const T* param, T* result) { step(begin, count, param, result); });
    });
    stream_fence();
    return;
  }
  const bool is_stochastic = options.is_stochastic && row[kParam].dtype == DType::kBFloat16;
  const bool streaming = streams && from != kParam;
  Tile tile;
  const auto start = [&](int64_t begin, int lanes) {
    if (is_stochastic) fill(tile, begin, lanes, options.seed, kRoundingStream, index);
  };
  const int elements = step_of(row);
  for_each_tile(span, start, [&](int64_t first, int size, int word) {
    for_each_step({first, first + size}, elements, [&](int64_t begin, int count) {
      Buffer<T> param_buffer, result_buffer;
      const T* param = load(row[from], begin, count, param_buffer);
      T* result = from == to ? target(row[to], begin, result_buffer) : result_buffer.data;
      step(begin, count, param, result);
      if (to == kOldParam) store(row[kOldParam], begin, count, result);
      if (is_stochastic) {
        store_stochastic(row[kParam], begin, count, result, tile.word[word] + (begin - first), streaming);
      } else {
        store(row[kParam], begin, count, result, streaming);
      }
    });
  });
  stream_fence();
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
