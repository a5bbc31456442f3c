// One vector register of the instruction set, with fused multiply-adds where it has them: the only place that asks for any. Their bits
// differ from those of a product and a sum, so what is built on this differs between instruction sets.
// Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sam::cpu {
inline namespace SAM_ISA {

// A tile of products in registers is kTileHeight rows of kTileVectors vectors: 16 of 32 registers, 12 of 16, 8 of 16. The height divides
// the tile's width, so that one packed panel serves as either side of a product.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileHeight = 8, kTileVectors = 2;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32, kTileHeight = 4, kTileVectors = 3;
#else
constexpr int kVectorBytes = 16, kTileHeight = 4, kTileVectors = 2;
#endif

template <class T>
struct Register {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
struct HalfRegister {
  typedef float type __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Vector = typename Register<T>::type;

template <class T>
constexpr int kLength = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWidth = kTileVectors * kLength<T>;  // of a panel

#define SAM_ALWAYS_INLINE static inline __attribute__((always_inline))

template <class T>
SAM_ALWAYS_INLINE Vector<T> load_vector(const T* source) {
  Vector<T> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <class T>
SAM_ALWAYS_INLINE void store_vector(T* target, Vector<T> value) {
  std::memcpy(target, &value, sizeof(value));
}

// kLength<double> elements as double.
SAM_ALWAYS_INLINE Vector<double> load_doubles(const double* source) { return load_vector(source); }
SAM_ALWAYS_INLINE Vector<double> load_doubles(const float* source) {
  HalfRegister::type value;
  std::memcpy(&value, source, sizeof(value));
  return __builtin_convertvector(value, Vector<double>);
}

SAM_ALWAYS_INLINE Vector<float> all_lanes(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#elif defined(__SSE2__)
  return _mm_set1_ps(value);
#else
  return Vector<float>{value, value, value, value};
#endif
}

SAM_ALWAYS_INLINE Vector<double> all_lanes(double value) {
#if defined(__AVX512F__)
  return _mm512_set1_pd(value);
#elif defined(__AVX2__)
  return _mm256_set1_pd(value);
#elif defined(__SSE2__)
  return _mm_set1_pd(value);
#else
  return Vector<double>{value, value};
#endif
}

SAM_ALWAYS_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

SAM_ALWAYS_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The lanes added up in double, in halves.
SAM_ALWAYS_INLINE double sum_lanes(Vector<double> value) {
  double lanes[kLength<double>];
  store_vector(lanes, value);
#pragma GCC unroll 4
  for (int width = kLength<double> / 2; width > 0; width /= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
SAM_ALWAYS_INLINE double sum_lanes(Vector<float> value) {
  HalfRegister::type halves[2];
  std::memcpy(halves, &value, sizeof(value));
  return sum_lanes(__builtin_convertvector(halves[0], Vector<double>) + __builtin_convertvector(halves[1], Vector<double>));
}

// Sums of products in double, in one order: four vectors in turn, and what is left of each stretch in a sum of its own.
struct DoubleSums {
  Vector<double> lanes[4] = {};
  double rest = 0;

  // (x + shift) y
  template <class T>
  __attribute__((always_inline)) inline void add(const T* x, const T* y, int64_t count, double shift = 0) {
    constexpr int kStep = kLength<double>;
    int64_t i = 0;
    for (; i + 4 * kStep <= count; i += 4 * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        lanes[v] = multiply_add(load_doubles(x + i + v * kStep) + shift, load_doubles(y + i + v * kStep), lanes[v]);
      }
    }
    for (; i + kStep <= count; i += kStep) lanes[0] = multiply_add(load_doubles(x + i) + shift, load_doubles(y + i), lanes[0]);
    for (; i < count; ++i) rest += (static_cast<double>(x[i]) + shift) * static_cast<double>(y[i]);
  }

  template <class T>
  __attribute__((always_inline)) inline void add(const T* x, int64_t count) {
    constexpr int kStep = kLength<double>;
    int64_t i = 0;
    for (; i + 4 * kStep <= count; i += 4 * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) lanes[v] += load_doubles(x + i + v * kStep);
    }
    for (; i + kStep <= count; i += kStep) lanes[0] += load_doubles(x + i);
    for (; i < count; ++i) rest += static_cast<double>(x[i]);
  }

  __attribute__((always_inline)) inline double total() const { return sum_lanes((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest; }
};

}  // namespace SAM_ISA
}  // namespace sam::cpu
