// Rectangles of a matrix in the arithmetic type: where they lie, or converted, or unfolded from a convolution's input.
// Included only by files compiled once per instruction set.
#pragma once

#include "cpu/convert.h"
#include "cpu/layers.h"
#include "cpu/vector.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
struct Rectangle {
  const T* data;
  int64_t stride;
};

// Positions [begin, end) of one sample's output, and the box of the padded input that their windows touch.
struct Box {
  int64_t count;
  int64_t at[3];              // the first position
  int64_t first[3], size[3];  // in padded coordinates

  __attribute__((always_inline)) Box(const Window& w, int64_t begin, int64_t end) : count(end - begin) {
    const int64_t line = w.out[2], area = w.out[1] * line;
    at[0] = begin / area, at[1] = begin % area / line, at[2] = begin % line;
    const int64_t last = end - 1;
    int64_t low[3] = {at[0], 0, 0}, high[3] = {last / area, w.out[1] - 1, w.out[2] - 1};
    if (low[0] == high[0]) {
      low[1] = at[1];
      high[1] = last % area / line;
      if (low[1] == high[1]) {
        low[2] = at[2];
        high[2] = last % line;
      }
    }
    for (int i = 0; i < 3; ++i) {
      first[i] = low[i] * w.stride[i];
      size[i] = (high[i] - low[i]) * w.stride[i] + (w.kernel[i] - 1) * w.dilation[i] + 1;
    }
  }

  __attribute__((always_inline)) int64_t elements() const { return size[0] * size[1] * size[2]; }
};

// The part of a box that lies in the input, from there on in the box. What lies outside is zero, for every channel.
struct Inside {
  int64_t begin[3], count[3];

  __attribute__((always_inline)) Inside(const Window& w, const Box& box) {
    for (int i = 0; i < 3; ++i) {
      const int64_t low = w.padding[i] - box.first[i], high = w.padding[i] + w.in[i] - box.first[i];
      begin[i] = low > 0 ? low : 0;
      count[i] = (high < box.size[i] ? high : box.size[i]) - begin[i];
    }
  }
};

// The input's part of the box of one channel. source: the channel's first element.
template <class T>
static inline void fill_slab(const Window& w, const Box& box, const Inside& inside, DType dtype, const char* source, T* slab) {
  const int64_t count = inside.count[2];
  if (count <= 0) return;
  for (int64_t k = 0; k < inside.count[0]; ++k) {
    const int64_t z = box.first[0] + inside.begin[0] + k - w.padding[0];
    const int64_t y = box.first[1] + inside.begin[1] - w.padding[1], x = box.first[2] + inside.begin[2] - w.padding[2];
    const char* from = source + ((z * w.in[1] + y) * w.in[2] + x) * element_size(dtype);
    T* to = slab + ((inside.begin[0] + k) * box.size[1] + inside.begin[1]) * box.size[2] + inside.begin[2];
    for (int64_t j = 0; j < inside.count[1]; ++j, from += w.in[2] * element_size(dtype), to += box.size[2]) {
      if (dtype != kArithmetic<T>) {
        widen(dtype, from, count, to);
        continue;
      }
      const T* line = reinterpret_cast<const T*>(from);
      int64_t i = 0;
      for (; i + kLength<T> <= count; i += kLength<T>) store_vector(to + i, load_vector(line + i));
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, float>) {
        const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
        _mm512_mask_storeu_ps(to + i, rest, _mm512_maskz_loadu_ps(rest, line + i));
        continue;
      }
#endif
      for (; i < count; ++i) to[i] = line[i];
    }
  }
}

// One element of the kernel at the box's positions, from the slab. Writes up to a vector past the last position, reads as much past the
// slab's: both have the room.
template <class T>
static inline void copy_positions(const Window& w, const Box& box, const int64_t (&tap)[3], const T* slab, T* target) {
  const int64_t moved[3] = {tap[0] * w.dilation[0] - box.first[0], tap[1] * w.dilation[1] - box.first[1],
                            tap[2] * w.dilation[2] - box.first[2]};
  int64_t z = box.at[0], y = box.at[1], x = box.at[2];
  for (int64_t left = box.count; left > 0;) {
    const int64_t count = w.out[2] - x < left ? w.out[2] - x : left;
    const int64_t line = (z * w.stride[0] + moved[0]) * box.size[1] + y * w.stride[1] + moved[1];
    const T* from = slab + line * box.size[2] + x * w.stride[2] + moved[2];
    for (int64_t i = 0; i < count; i += kLength<T>) store_vector(target + i, load_vector(from + i));
    target += count;
    left -= count;
    x = 0;
    if (++y == w.out[1]) y = 0, ++z;
  }
}

// Where the windows of the box's positions begin in the slab.
static inline void find_positions(const Window& w, const Box& box, int32_t* offsets) {
  int64_t z = box.at[0], y = box.at[1], x = box.at[2];
  for (int64_t i = 0; i < box.count; ++i) {
    const int64_t line = (z * w.stride[0] - box.first[0]) * box.size[1] + y * w.stride[1] - box.first[1];
    offsets[i] = static_cast<int32_t>(line * box.size[2] + x * w.stride[2] - box.first[2]);
    if (++x == w.out[2]) x = 0, ++y;
    if (y == w.out[1]) y = 0, ++z;
  }
}

// The same as copy_positions, element by element: for lines shorter than a vector, and for strides.
template <class T>
static inline void gather_positions(const Window& w, const Box& box, const int64_t (&tap)[3], const int32_t* offsets, const T* slab,
                                    T* target) {
  const T* from = slab + (tap[0] * w.dilation[0] * box.size[1] + tap[1] * w.dilation[1]) * box.size[2] + tap[2] * w.dilation[2];
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    constexpr __mmask16 kAll = 0xFFFF;
    for (; i + 16 <= box.count; i += 16) {
      _mm512_storeu_ps(target + i, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, _mm512_loadu_si512(offsets + i), from, 4));
    }
  }
#endif
  for (; i < box.count; ++i) target[i] = from[offsets[i]];
}

// One element of the kernel at one position, where even a single window's box is larger than the slab.
template <class T>
static inline T lone_element(const Window& w, const Box& box, const int64_t (&tap)[3], DType dtype, const char* source) {
  int64_t index = 0;
  for (int i = 0; i < 3; ++i) {
    const int64_t in = box.at[i] * w.stride[i] + tap[i] * w.dilation[i] - w.padding[i];
    if (in < 0 || in >= w.in[i]) return T(0);
    index = index * w.in[i] + in;
  }
  T value;
  widen(dtype, source + index * element_size(dtype), 1, &value);
  return value;
}

// Rows of patches at positions [begin, end) of one sample, as many at a time as the slab holds. target: (rows, stride).
template <class T>
static void unfold(const Matrix& matrix, Span rows, const char* sample, int64_t begin, int64_t end, T* target, int64_t stride, T* slab) {
  const Window& w = *matrix.window;
  const DType dtype = matrix.operand.dtype;
  while (begin < end) {
    int64_t stop = end;
    while (stop - begin > 1 && Box(w, begin, stop).elements() > kSlab) stop = begin + (stop - begin) / 2;
    const Box box(w, begin, stop);
    const bool fits = box.elements() <= kSlab;
    const char* source = sample + rows.begin / w.elements * w.plane * element_size(dtype);
    const int64_t which = rows.begin % w.elements;
    int64_t tap[3] = {which / (w.kernel[1] * w.kernel[2]), which / w.kernel[2] % w.kernel[1], which % w.kernel[2]};
    const bool by_lines = w.stride[2] == 1 && w.out[2] >= kLength<T>;
    int32_t offsets[kDepth];
    if (fits && !by_lines) find_positions(w, box, offsets);
    const Inside inside(w, box);
    if (fits) {
      for (int64_t i = 0; i < box.elements(); ++i) slab[i] = T(0);
    }
    bool filled = false;
    for (int64_t row = 0; row < rows.end - rows.begin; ++row) {
      if (fits && !filled) fill_slab(w, box, inside, dtype, source, slab);
      filled = true;
      if (fits && !by_lines) {
        gather_positions(w, box, tap, offsets, slab, target + row * stride);
      } else if (fits) {
        copy_positions(w, box, tap, slab, target + row * stride);
      } else {
        target[row * stride] = lone_element<T>(w, box, tap, dtype, source);
      }
      if (++tap[2] == w.kernel[2]) tap[2] = 0, ++tap[1];
      if (tap[1] == w.kernel[1]) tap[1] = 0, ++tap[0];
      if (tap[0] == w.kernel[0]) tap[0] = 0, filled = false, source += w.plane * element_size(dtype);
    }
    target += stop - begin;
    begin = stop;
  }
}

// At most kTileRows rows and kDepth columns.
template <class T>
static inline Rectangle<T> rectangle(const Matrix& matrix, Span rows, Span cols, Workspace<T>& workspace) {
  const Operand& operand = matrix.operand;
  const Window* w = matrix.window;
  const int64_t count = cols.end - cols.begin;
  const int64_t stride = count + kLength<T>;  // room for what copy_positions writes past the last position
  if (w == nullptr) {
    const char* source = address(operand, rows.begin * matrix.cols + cols.begin);
    if (operand.dtype == kArithmetic<T>) return {reinterpret_cast<const T*>(source), matrix.cols};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      widen(operand.dtype, address(operand, row * matrix.cols + cols.begin), count, workspace.tile + (row - rows.begin) * stride);
    }
    return {workspace.tile, stride};
  }
  const int64_t first = cols.begin / w->positions;
  if (w->is_flat && operand.dtype == kArithmetic<T> && cols.end <= (first + 1) * w->positions) {
    const int64_t index = first * w->sample + rows.begin * w->plane + cols.begin - first * w->positions;
    return {reinterpret_cast<const T*>(address(operand, index)), w->plane};
  }
  T* target = workspace.tile;
  for (int64_t sample = first; sample * w->positions < cols.end; ++sample) {
    const int64_t before = sample * w->positions;
    const int64_t begin = cols.begin > before ? cols.begin - before : 0;
    const int64_t end = cols.end - before < w->positions ? cols.end - before : w->positions;
    if (w->is_flat) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const char* source = address(operand, sample * w->sample + row * w->plane + begin);
        widen(operand.dtype, source, end - begin, target + (row - rows.begin) * stride);
      }
    } else {
      unfold(matrix, rows, address(operand, sample * w->sample), begin, end, target, stride, workspace.slab);
    }
    target += end - begin;
  }
  return {workspace.tile, stride};
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
