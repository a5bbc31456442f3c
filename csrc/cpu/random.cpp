// The random perturbation: saves the parameter and moves it by numbers that are made on the fly and never stored. Reads p; writes old_p, p:
// 3 N s bytes (from_old: reads old_p; writes p: 2 N s).
#include "cpu/tile.h"

namespace sam::cpu {
inline namespace SAM_ISA {

struct Numbers {
  alignas(64) float z[kWords][kTileLanes];
};

static inline void rademachers(const Tile& tile, int lanes, Numbers& numbers) {
  for (int word = 0; word < kWords; ++word) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) numbers.z[word][lane] = rademacher(tile.word[word][lane]);
  }
}

// Box and Muller: two normals from two words.
static inline void normals(const Tile& tile, int lanes, Numbers& numbers) {
  for (int word = 0; word < kWords; word += 2) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      const float radius = box_muller_radius(tile.word[word][lane]);
      const CosineSine direction = box_muller_direction(tile.word[word + 1][lane]);
      numbers.z[word][lane] = radius * direction.cosine;
      numbers.z[word + 1][lane] = radius * direction.sine;
    }
  }
}

template <class T>
static void random_perturb_chunk(const Row& row, Span span, const RandomPerturb& options, bool streams, uint32_t index) {
  const T scale = T(options.scale);
  const bool from_old = options.from_old;
  Tile tile;
  Numbers numbers;
  const auto start = [&](int64_t begin, int lanes) {
    fill(tile, begin, lanes, options.seed, kPerturbationStream, index);
    options.is_normal ? normals(tile, lanes, numbers) : rademachers(tile, lanes, numbers);
  };
  for_each_tile(span, start, [&](int64_t begin, int count, int word) {
    const int from = from_old ? kRandomOldParam : kRandomParam;
    rewrite<T>(row, kRandomParam, from, begin, count, streams, [&](const T* param, T* result) {
      if (!from_old) copy(row[kRandomParam], row[kRandomOldParam], begin, count, streams);
      const float* z = numbers.z[word];
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = perturb(param[i], T(z[i]), scale);
    });
  });
  stream_fence();
}

void random_perturb(const Row& row, Span span, const RandomPerturb& options, bool streams, uint32_t index) {
  has_float64(row) ? random_perturb_chunk<double>(row, span, options, streams, index)
                   : random_perturb_chunk<float>(row, span, options, streams, index);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
