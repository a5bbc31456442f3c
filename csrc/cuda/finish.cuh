// The second stage of a sum over a list: the sums of its chunks are added up in a fixed order, and the result is stored. The last block of
// the last launch does it.
//
// Each block takes a ticket when its chunks are done. The block that gets the last one of its launch finds what all others have stored:
//
// * A block's sums are stored by its thread 0, which takes the ticket after a fence of the whole device (release), and another fence lies
//   between the ticket and the reading (acquire). Tickets are one atomic counter's, so every other block's release comes before the last
//   block's acquire; the barrier after it carries that to the block's other threads.
// * Sums are read from the second-level cache (ld.cg): a first-level cache is not kept up to date with what other processors write.
// * Earlier launches of the same call (of other kinds of rows) are complete when this one begins, by the order of the stream.
//
// Which block is the last decides nothing but who adds: the order is that of the sums, so the bits are the same every time. atomicInc wraps
// to 0 at the last ticket, so the counter is ready for the next launch of its stream. What shares it: see counter_of.
#pragma once

#include "cuda/operations.h"
#include "cuda/reduce.cuh"

namespace sam::cuda {

SAM_INLINE double read_sum(const double* sum) {
#if defined(__CUDA_ARCH__)
  return __ldcg(sum);
#else
  return *sum;
#endif
}

SAM_INLINE Dots read_sum(const Dots* sum) { return {read_sum(&sum->left), read_sum(&sum->product), read_sum(&sum->right)}; }

// A thread's part of sums [begin, end).
template <class Sum>
SAM_INLINE Sum sum_of(const Sum* sums, uint32_t begin, uint32_t end, int thread) {
  Sum sum{};
  SAM_NO_UNROLL
  for (uint32_t i = begin + static_cast<uint32_t>(thread); i < end; i += kThreads) sum += read_sum(sums + i);
  return sum;
}

// The norm whose square is given, in its place. And the step's beginning: what the last one's found_inf was is counted.
SAM_INLINE void store_result(const FinishOptions& o, double sum, int norm) {
  const double root = std::sqrt(sum);
  bool finite;
  if (o.is_double) {
    static_cast<double*>(o.norms)[norm] = root;
    finite = is_finite(root);
  } else {
    const float rounded = static_cast<float>(root);
    static_cast<float*>(o.norms)[norm] = rounded;
    finite = is_finite(rounded);
  }
  if (o.found_inf == nullptr) return;
  if (o.skipped != nullptr) {
    *o.skipped += *o.found_inf;
    *o.found_inf = finite ? 0.0f : 1.0f;
  } else if (!finite) {
    *o.found_inf = 1.0f;
  }
}

SAM_INLINE void store_result(const FinishDotsOptions& o, const Dots& sum, int) {
  *o.dots = sum;
  const bool finite = is_finite(sum.left) && is_finite(sum.product) && is_finite(sum.right);
  if (o.found_inf != nullptr && !finite) *o.found_inf = 1.0f;
}

// Adds up sums [begin, end). All threads of a block call it, as what follows.
template <class Finish>
SAM_BLOCK void finish_sums(const Finish& finish, uint32_t begin, uint32_t end, int result) {
  const auto sum = sum_of_threads([&](int thread) { return sum_of(finish.sums, begin, end, thread); });
  if (is_first_thread()) store_result(finish, sum, result);
}

// Whether this is the last block of its launch to take a ticket.
SAM_BLOCK bool takes_last_ticket(uint32_t* counter, uint32_t blocks) {
#if defined(__CUDACC__)
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
#else
  const uint32_t ticket = *counter;
  *counter = ticket >= blocks - 1 ? 0 : ticket + 1;
  return ticket == blocks - 1;
#endif
}

// Called when the block's sums are stored.
template <class Finish>
SAM_BLOCK void finish_in_last_block(const Finish& finish, uint32_t blocks) {
  if (finish.counter == nullptr) return;  // a launch that is not the call's last, or one whose sums are added up by another
  if (takes_last_ticket(finish.counter, blocks)) finish_sums(finish, 0, finish.count, 0);
}

}  // namespace sam::cuda
