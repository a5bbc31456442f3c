// Products of matrices from packed panels: (depth, kWidth) each, all of a panel's elements of one depth beside each other, zeros past the
// last one. A panel serves as the left side, kTileHeight of its elements at a time, and as the right one.
// Included only by files compiled once per instruction set.
#pragma once

#include "cpu/patches.h"

namespace sam::cpu {
inline namespace SAM_ISA {

#if defined(__AVX512F__)
// 16 rows of 16 to 16 columns. count < 16 rows: the others are zeros. Masked by all ones, which compiles to nothing: without a mask GCC 12
// warns of a value that its own header leaves undefined.
SAM_ALWAYS_INLINE void transpose_square(const float* source, int64_t stride, int count, float* target, int64_t target_stride) {
  constexpr __mmask16 kAll = 0xFFFF;
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < count ? _mm512_loadu_ps(source + i * stride) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_ps(kAll, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_ps(kAll, a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, _mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, _mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, _mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, _mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_maskz_shuffle_f32x4(kAll, a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_maskz_shuffle_f32x4(kAll, a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_maskz_shuffle_f32x4(kAll, a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_maskz_shuffle_f32x4(kAll, a[i + 8], a[i + 12], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(target + i * target_stride, _mm512_maskz_shuffle_f32x4(kAll, b[i], b[i + 8], 0x88));
    _mm512_storeu_ps(target + (i + 8) * target_stride, _mm512_maskz_shuffle_f32x4(kAll, b[i], b[i + 8], 0xDD));
  }
}
constexpr int kSquare = 16;
#elif defined(__AVX2__)
SAM_ALWAYS_INLINE void transpose_square(const float* source, int64_t stride, int count, float* target, int64_t target_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = i < count ? _mm256_loadu_ps(source + i * stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
constexpr int kSquare = 8;
#endif

// count <= kWidth rows of (count, depth) as columns of one panel. ahead: elements from these rows to those that will be read next. A block
// that is read across its rows is nothing that the hardware's prefetcher follows.
template <class T>
static void pack_rows(Rectangle<T> rows, int64_t count, int64_t depth, [[maybe_unused]] int64_t ahead, T* panel) {
  constexpr int64_t kPanel = kWidth<T>;
  int64_t done = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    for (; done + kSquare <= depth; done += kSquare) {
      if (ahead != 0 && done % 16 == 0) {
        const char* next = reinterpret_cast<const char*>(rows.data) + (ahead + done) * 4;
        for (int64_t row = 0; row < count; ++row) __builtin_prefetch(next + row * rows.stride * 4, 0, 2);
      }
      for (int64_t row = 0; row < kPanel; row += kSquare) {
        const int64_t left = count - row;
        const T* source = rows.data + row * rows.stride + done;
        float* target = panel + done * kPanel + row;
        if (left >= kSquare) {
          transpose_square(source, rows.stride, kSquare, target, kPanel);
        } else {
          transpose_square(source, rows.stride, static_cast<int>(left), target, kPanel);
        }
      }
    }
  }
#endif
  for (int64_t row = 0; row < kPanel; ++row) {
    for (int64_t k = done; k < depth; ++k) panel[k * kPanel + row] = row < count ? rows.data[row * rows.stride + k] : T(0);
  }
}

// depth rows of (depth, count) as they are, cut into panels that lie panel_stride apart.
template <class T>
static void pack_columns(Rectangle<T> rows, int64_t count, int64_t depth, T* panels, int64_t panel_stride) {
  constexpr int64_t kPanel = kWidth<T>;
  for (int64_t k = 0; k < depth; ++k) {
    const T* source = rows.data + k * rows.stride;
    T* target = panels + k * kPanel;
    int64_t i = 0;
    for (; i + kPanel <= count; i += kPanel, target += panel_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store_vector(target + v * kLength<T>, load_vector(source + i + v * kLength<T>));
    }
    if (i == count) continue;
    for (int v = 0; v < kTileVectors; ++v, i += kLength<T>) {
      if (i + kLength<T> <= count) {
        store_vector(target + v * kLength<T>, load_vector(source + i));
        continue;
      }
      store_vector(target + v * kLength<T>, Vector<T>{});
      for (int64_t j = i; j < count; ++j) target[v * kLength<T> + j - i] = source[j];
    }
  }
}

// The matrix's columns (its rows, where across) of one range, over a range of depth, as panels one after the other.
template <class T>
static void pack(const Matrix& matrix, bool across, Span columns, Span depth, T* panels, Workspace<T>& workspace) {
  constexpr int64_t kPanel = kWidth<T>;
  const int64_t deep = depth.end - depth.begin;
  if (across) {
    for (int64_t begin = columns.begin; begin < columns.end; begin += kPanel, panels += kPanel * deep) {
      const int64_t end = begin + kPanel < columns.end ? begin + kPanel : columns.end;
      const Rectangle<T> rows = rectangle(matrix, {begin, end}, depth, workspace);
      const int64_t next = end < columns.end ? kPanel * rows.stride : deep - (begin - columns.begin) * rows.stride;
      pack_rows(rows, end - begin, deep, rows.data == workspace.tile ? 0 : next, panels);
    }
    return;
  }
  for (int64_t begin = depth.begin; begin < depth.end; begin += kTileRows) {
    const int64_t end = begin + kTileRows < depth.end ? begin + kTileRows : depth.end;
    T* target = panels + (begin - depth.begin) * kPanel;
    pack_columns(rectangle(matrix, {begin, end}, columns, workspace), columns.end - columns.begin, end - begin, target, kPanel * deep);
  }
}

// kTileHeight elements of the left panel times kVectors vectors of the right one, summed over the depth in registers.
template <class T, int kVectors>
static inline void multiply_tile(const T* left, const T* right, int64_t depth, T* out, int64_t stride, bool adds) {
  constexpr int64_t kPanel = kWidth<T>;
  Vector<T> sums[kTileHeight][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, left += kPanel, right += kPanel) {
    Vector<T> b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load_vector(right + v * kLength<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kTileHeight; ++i) {
      const Vector<T> a = all_lanes(left[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(a, b[v], sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + i * stride + v * kLength<T>;
      store_vector(to, adds ? load_vector(to) + sums[i][v] : sums[i][v]);
    }
  }
}

template <class T>
static __attribute__((noinline)) void multiply(const T* left, const T* right, int vectors, int64_t depth, T* out, int64_t stride,
                                               bool adds) {
  switch (vectors) {
    case 1: multiply_tile<T, 1>(left, right, depth, out, stride, adds); return;
    case 2: multiply_tile<T, 2>(left, right, depth, out, stride, adds); return;
    default: multiply_tile<T, kTileVectors>(left, right, depth, out, stride, adds);
  }
}

// The element of left panels from which a tile begins.
template <class T>
static inline const T* tile_of(const T* panels, int64_t row, int64_t depth) {
  return panels + row / kWidth<T> * kWidth<T> * depth + row % kWidth<T>;
}

template <class T>
static inline int64_t padded(int64_t count) {
  return (count + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
