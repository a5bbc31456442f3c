// |G'A|^2 of groups of few tokens by the Gram form, without packing: products of rows with rows, as they lie in memory.
#include "cpu/patches.h"

namespace sam::cpu {
inline namespace SAM_ISA {

constexpr int kRows = 4;            // of a tile: 16 sums, 8 loads a step
constexpr int64_t kStretch = 1024;  // features at a time, so that the rows of a tile stay in the first-level cache

// Adds kM x kN products of rows. The same rows on both sides: all of the tile, though half would do.
template <class T, int kM, int kN>
static inline void multiply_rows(const T* x, const T* y, int64_t stride, int64_t count, double* out) {
  Vector<T> sums[kM][kN] = {};
  int64_t k = 0;
  for (; k + kLength<T> <= count; k += kLength<T>) {
    Vector<T> b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = load_vector(y + j * stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
      const Vector<T> a = load_vector(x + i * stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) sums[i][j] = multiply_add(a, b[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      double sum = sum_lanes(sums[i][j]);
      for (int64_t rest = k; rest < count; ++rest)
        sum += static_cast<double>(x[i * stride + rest]) * static_cast<double>(y[j * stride + rest]);
      out[i * kMaxDotTokens + j] += sum;
    }
  }
}

template <class T, int kM>
static inline void multiply_rows(int n, const T* x, const T* y, int64_t stride, int64_t count, double* out) {
  switch (n) {
    case 1: multiply_rows<T, kM, 1>(x, y, stride, count, out); return;
    case 2: multiply_rows<T, kM, 2>(x, y, stride, count, out); return;
    case 3: multiply_rows<T, kM, 3>(x, y, stride, count, out); return;
    default: multiply_rows<T, kM, 4>(x, y, stride, count, out);
  }
}

// One row with itself: four sums, so that their latency hides.
template <class T>
static inline double square(const T* x, int64_t count) {
  Vector<T> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLength<T> <= count; k += 4 * kLength<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vector<T> a = load_vector(x + k + v * kLength<T>);
      sums[v] = multiply_add(a, a, sums[v]);
    }
  }
  double sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < count; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  return sum;
}

// (tokens, tokens) products of rows, on and above the diagonal's tiles.
template <class T>
static inline void token_products(const Matrix& matrix, int64_t row, double* out, Workspace<T>& workspace, int64_t tokens) {
  for (int64_t i = 0; i < tokens * kMaxDotTokens; ++i) out[i] = 0;
  const int64_t at_once = matrix.operand.dtype == kArithmetic<T> ? kStretch : kDepth;
  for (int64_t begin = 0; begin < matrix.cols; begin += at_once) {
    const int64_t count = matrix.cols - begin < at_once ? matrix.cols - begin : at_once;
    const Rectangle<T> rows = rectangle(matrix, {row, row + tokens}, {begin, begin + count}, workspace);
    if (tokens == 1) {
      out[0] += square(rows.data, count);
      continue;
    }
    for (int64_t s = 0; s < tokens; s += kRows) {
      for (int64_t t = s; t < tokens; t += kRows) {
        const int n = static_cast<int>(tokens - t < kRows ? tokens - t : kRows);
        const T* x = rows.data + s * rows.stride;
        const T* y = rows.data + t * rows.stride;
        double* to = out + s * kMaxDotTokens + t;
        switch (tokens - s) {
          case 1: multiply_rows<T, 1>(n, x, y, rows.stride, count, to); break;
          case 2: multiply_rows<T, 2>(n, x, y, rows.stride, count, to); break;
          case 3: multiply_rows<T, 3>(n, x, y, rows.stride, count, to); break;
          default: multiply_rows<T, 4>(n, x, y, rows.stride, count, to);
        }
      }
    }
  }
}

template <class T>
static void groups_of(const Matrix& inputs, const Matrix& grads, Span groups, int64_t tokens, double one, double* square_norms,
                      Workspace<T>& workspace) {
  double first[kMaxDotTokens * kMaxDotTokens], second[kMaxDotTokens * kMaxDotTokens];
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    token_products(inputs, group * tokens, first, workspace, tokens);
    token_products(grads, group * tokens, second, workspace, tokens);
    double sum = 0;
    for (int64_t s = 0; s < tokens; ++s) {
      double twice = 0;
      for (int64_t t = s + 1; t < tokens; ++t) twice += (first[s * kMaxDotTokens + t] + one) * second[s * kMaxDotTokens + t];
      sum += (first[s * kMaxDotTokens + s] + one) * second[s * kMaxDotTokens + s] + 2.0 * twice;
    }
    square_norms[group] += sum;
  }
}

// Matrices of all groups' tokens: (M T, features).
void dots(const Matrix& inputs, const Matrix& grads, Span groups, int64_t tokens, bool with_bias, double* square_norms, bool is_double,
          void* memory) {
  const double one = with_bias ? 1 : 0;
  if (is_double) {
    groups_of(inputs, grads, groups, tokens, one, square_norms, *static_cast<Workspace<double>*>(memory));
  } else {
    groups_of(inputs, grads, groups, tokens, one, square_norms, *static_cast<Workspace<float>*>(memory));
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
