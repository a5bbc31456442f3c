// Gibbs weights of norms and draws from them. Every block reads all norms for itself, which are few (a batch's samples) and in the
// second-level cache: nothing has to travel from block to block, and one launch does it.
#include "common/sampling.h"
#include "cuda/block.cuh"
#include "cuda/sharpness.h"

namespace sam::cuda {
namespace {

// Without replacement several threads compare one item with all others: sums one after the other would wait for each addition.
constexpr int kParts = 4, kItems = kThreads / kParts;

struct Shared {
  Values keys, terms, sums, scratch;
  int64_t counts[kThreads];
};

SAM_INLINE double norm_at(const GibbsOptions& o, int64_t i) {
  return o.is_double ? static_cast<const double*>(o.norms)[i] : static_cast<double>(static_cast<const float*>(o.norms)[i]);
}

SAM_INLINE void store_weight(const GibbsOptions& o, int64_t i, double weight) {
  if (o.is_double) {
    static_cast<double*>(o.weights)[i] = weight;
  } else {
    static_cast<float*>(o.weights)[i] = static_cast<float>(weight);
  }
}

SAM_INLINE double largest_of(const GibbsOptions& o, Shared& s) {
  all_threads([&](int thread) {
    double largest = -HUGE_VAL;
    for (int64_t i = thread; i < o.count; i += kThreads) {
      const double norm = norm_at(o, i);
      if (norm > largest) largest = norm;
    }
    s.sums[thread] = largest;
  });
  return reduce(s.sums, [](double a, double b) { return a > b ? a : b; });
}

struct Gibbs {
  const GibbsOptions& options;
  double beta, largest;

  SAM_INLINE Gibbs(const GibbsOptions& o, Shared& s) : options(o), beta(read(o.beta)), largest(largest_of(o, s)) {}

  SAM_INLINE double exponent(int64_t i) const { return gibbs_exponent(norm_at(options, i), largest, beta); }
  SAM_INLINE double term(int64_t i) const { return gibbs_term(norm_at(options, i), exponent(i)); }

  SAM_INLINE double total(Shared& s) const {
    all_threads([&](int thread) {
      double sum = 0.0;
      for (int64_t i = thread; i < options.count; i += kThreads) sum += term(i);
      s.sums[thread] = sum;
    });
    return reduce(s.sums, [](double a, double b) { return a + b; });
  }
};

SAM_INLINE void weigh(const GibbsOptions& o, Shared& s) {
  const Gibbs gibbs(o, s);
  const double total = gibbs.total(s);
  all_threads([&](int thread) {
    for (int64_t i = thread; i < o.count; i += kThreads) store_weight(o, i, gibbs.term(i) / total);
  });
}

// The draws of one block, one a thread: the first sum above u total, of an item that has a weight at all (sums of a tile are rounded
// in an order of their own).
SAM_INLINE void draw(const DrawOptions& o, int64_t block, Shared& s) {
  const Gibbs gibbs(o, s);
  const double total = gibbs.total(s);
  all_threads([&](int thread) {
    s.keys[thread] = sampling_uniform(block * kThreads + thread, o.seed) * total;
    s.counts[thread] = -1;
  });
  double before = 0.0;
  for (int64_t tile = 0; tile < o.count; tile += kThreads) {
    all_threads([&](int thread) { s.sums[thread] = s.terms[thread] = tile + thread < o.count ? gibbs.term(tile + thread) : 0.0; });
    scan(s.sums, s.scratch);
    const double tile_sum = s.sums[kThreads - 1];
    all_threads([&](int thread) { s.terms[thread] = s.terms[thread] > 0.0 ? before + s.sums[thread] : -1.0; });
    all_threads([&](int thread) {
      if (s.counts[thread] >= 0) return;
      const double target = s.keys[thread];
      int found = -1;
      for (int j = kThreads - 1; j >= 0; --j) found = s.terms[j] > target ? j : found;
      if (found >= 0) s.counts[thread] = tile + found;
    });
    before += tile_sum;
  }
  all_threads([&](int thread) {
    const int64_t j = block * kThreads + thread;
    if (j >= o.draws) return;
    int64_t index = s.counts[thread];
    if (index < 0) {  // u total was rounded to the end, or is NaN
      for (index = o.count - 1; index > 0 && !(gibbs.term(index) > 0.0);) --index;
    }
    o.indices[j] = index;
    store_weight(o, j, replacement_weight(gibbs.term(index), total, static_cast<double>(o.draws) * static_cast<double>(o.count)));
  });
}

// The places of one block's items in the order of all keys. What an item leaves behind is summed in the same loop.
SAM_INLINE void rank(const DrawOptions& o, int64_t block, Shared& s) {
  const Gibbs gibbs(o, s);
  const int64_t first = block * kItems;
  const auto key = [&](int64_t i) { return gumbel_key(gibbs.exponent(i), sampling_uniform(i, o.seed)); };
  all_threads([&](int thread) {
    const int64_t i = first + thread / kParts;
    s.scratch[thread] = i < o.count ? key(i) : 0.0;
    s.sums[thread] = 0.0;
    s.counts[thread] = 0;
  });
  for (int64_t tile = 0; tile < o.count; tile += kThreads) {
    all_threads([&](int thread) {
      const int64_t j = tile + thread;
      s.keys[thread] = j < o.count ? key(j) : -HUGE_VAL;  // what is not there comes last
      s.terms[thread] = j < o.count ? gibbs.term(j) : 0.0;
    });
    all_threads([&](int thread) {
      const int64_t i = first + thread / kParts;
      const double mine = s.scratch[thread];
      double rest = s.sums[thread];
      int64_t before = s.counts[thread];
      for (int j = thread % kParts; j < kThreads; j += kParts) {
        const bool precedes = s.keys[j] > mine || (s.keys[j] == mine && tile + j < i);
        before += precedes;
        rest += s.terms[j] * (precedes ? 0.0 : 1.0);  // NaN, if it is, from wherever it was drawn
      }
      s.sums[thread] = rest;
      s.counts[thread] = before;
    });
  }
  all_threads([&](int thread) {
    const int64_t i = first + thread;
    if (thread >= kItems || i >= o.count) return;
    double rest = 0.0;
    int64_t place = 0;
    for (int part = kParts * thread; part < kParts * thread + kParts; ++part) {
      rest += s.sums[part];
      place += s.counts[part];
    }
    if (place >= o.draws) return;
    o.indices[place] = i;
    const double places = static_cast<double>(o.draws) * static_cast<double>(o.count);
    store_weight(o, place, ordered_weight(gibbs.term(i), rest, static_cast<double>(o.draws - 1 - place), places));
  });
}

int64_t blocks_of(int64_t items, int64_t of_a_block) { return (items + of_a_block - 1) / of_a_block; }

struct SharpnessWeights {
  using Options = GibbsOptions;
  static SAM_BLOCK void run(const Options& options, int64_t) {
    SAM_SHARED Shared shared;
    weigh(options, shared);
  }
};

struct SharpnessDraw {
  using Options = DrawOptions;
  static SAM_BLOCK void run(const Options& options, int64_t block) {
    SAM_SHARED Shared shared;
    draw(options, block, shared);
  }
};

struct SharpnessRank {
  using Options = DrawOptions;
  static SAM_BLOCK void run(const Options& options, int64_t block) {
    SAM_SHARED Shared shared;
    rank(options, block, shared);
  }
};

}  // namespace

void sharpness_weights(const GibbsOptions& options, const Place& place) { launch_blocks<SharpnessWeights>(options, 1, place); }
void sharpness_draw(const DrawOptions& options, const Place& place) {
  launch_blocks<SharpnessDraw>(options, blocks_of(options.draws, kThreads), place);
}
void sharpness_rank(const DrawOptions& options, const Place& place) {
  launch_blocks<SharpnessRank>(options, blocks_of(options.count, kItems), place);
}

}  // namespace sam::cuda
