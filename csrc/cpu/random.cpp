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
static void random_perturb_chunk(const Row& row, Span span, const RandomPerturbArgs& args, uint32_t index) {
  const T scale = T(args.scale);
  const Operand& source = args.from_old ? row.old_param : row.param;
  Tile tile;
  Numbers numbers;
  const auto start = [&](int64_t begin, int lanes) {
    fill(tile, begin, lanes, args.key, index);
    args.normal ? normals(tile, lanes, numbers) : rademachers(tile, lanes, numbers);
  };
  for_each_tile(span, start, [&](int64_t begin, int count, int word) {
    Buffer<T> param_buffer, result_buffer;
    const T* param = load(source, begin, count, param_buffer);
    if (!args.from_old) copy(row.param, row.old_param, begin, count, args.streaming);
    T* result = args.from_old ? result_buffer.data : target(row.param, begin, result_buffer);
    const float* z = numbers.z[word];
#pragma omp simd
    for (int i = 0; i < count; ++i) result[i] = perturb(param[i], T(z[i]), scale);
    store(row.param, begin, count, result, args.from_old && args.streaming);
  });
  stream_fence();
}

void random_perturb(const Row& row, Span span, const RandomPerturbArgs& args, uint32_t index) {
  if (has_float64(row)) {
    random_perturb_chunk<double>(row, span, args, index);
  } else {
    random_perturb_chunk<float>(row, span, args, index);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
