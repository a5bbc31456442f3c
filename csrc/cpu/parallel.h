// Runs a function over chunks on the OpenMP pool. When torch is imported first, that pool is torch's own: both ask for libgomp.so.1.
#pragma once

#include <cstdint>
#include <vector>

#include "common/work_list.h"

namespace sam::cpu {

// Elements below which waking the other threads costs more than it saves (a wake-up is ~5 us, in which one core does ~20,000 elements).
constexpr int64_t kSerialElements = 32768;

// The same in floating-point operations of the products per sample, and what a thread takes at a time.
constexpr int64_t kSerialFlops = 1000000, kFlopsAtOnce = 200000;

inline int64_t count_elements(const std::vector<Chunk>& chunks) {
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.end - chunk.begin;
  return elements;
}

// body(i) for each chunk i. Dynamic: a core that another tenant slows down takes fewer chunks. Which thread takes which chunk never shows
// in the result. body must not throw.
template <class Body>
void for_each_chunk(const std::vector<Chunk>& chunks, int threads, Body body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  if (threads < 2 || count_elements(chunks) < kSerialElements) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

// As above, for tasks that are much alike. A task that a thread takes is worth at least a microsecond or two.
template <class Body>
void for_each_task(int64_t count, int64_t flops, int threads, Body body) {
  if (threads < 2 || count < 2 || flops < kSerialFlops) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const int64_t several = kFlopsAtOnce / (flops / count + 1) + 1;
  const int64_t share = (count + threads - 1) / threads;
  const int at_once = static_cast<int>(several < share ? several : share);
#pragma omp parallel for schedule(dynamic, at_once) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace sam::cpu
