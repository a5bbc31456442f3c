// |G'A|^2 of one group as the sum over s, t of (AA')_st (GG')_st: a block of tokens against another, or against itself, where what lies
// above the diagonal counts twice. With the bias's: (AA')_st + 1, as of inputs with a 1 behind the last feature.
#include "cpu/panels.h"

namespace sam::cpu {
inline namespace SAM_ISA {

// (rows, cols) products of the features of two ranges of tokens into out; only what lies on or above the diagonal where both are the same.
template <class T>
static void token_products(const Matrix& matrix, Span rows, Span cols, T* out, int64_t stride, Workspace<T>& workspace) {
  const bool across = matrix.window == nullptr, same = rows.begin == cols.begin;
  const int64_t features = across ? matrix.cols : matrix.rows;
  const int64_t m = rows.end - rows.begin, n = cols.end - cols.begin;
  for (int64_t begin = 0; begin < features; begin += kDepth) {
    const int64_t depth = features - begin < kDepth ? features - begin : kDepth;
    const T* left = workspace.right;
    pack(matrix, across, cols, {begin, begin + depth}, workspace.right, workspace);
    if (!same) {
      pack(matrix, across, rows, {begin, begin + depth}, workspace.left, workspace);
      left = workspace.left;
    }
    for (int64_t col = 0; col < n; col += kWidth<T>) {
      const int64_t valid = n - col < kWidth<T> ? n - col : kWidth<T>;
      for (int64_t row = 0; row < m && !(same && row >= col + valid); row += kTileHeight) {
        const int64_t skipped = same && row > col ? (row - col) / kLength<T> * kLength<T> : 0;
        const int vectors = static_cast<int>((valid - skipped + kLength<T> - 1) / kLength<T>);
        const T* right = workspace.right + col * depth + skipped;
        multiply(tile_of(left, row, depth), right, vectors, depth, out + row * stride + col + skipped, stride, begin > 0);
      }
    }
  }
}

template <class T>
static double block(const Matrix& inputs, const Matrix& grads, Span rows, Span cols, double one, Workspace<T>& workspace) {
  const int64_t m = rows.end - rows.begin, n = cols.end - cols.begin, stride = padded<T>(n);
  token_products(inputs, rows, cols, workspace.first, stride, workspace);
  token_products(grads, rows, cols, workspace.second, stride, workspace);
  const bool same = rows.begin == cols.begin;
  DoubleSums sums;
  double diagonal = 0;
  for (int64_t row = 0; row < m; ++row) {
    const T* x = workspace.first + row * stride;
    const T* y = workspace.second + row * stride;
    if (same) diagonal += (static_cast<double>(x[row]) + one) * static_cast<double>(y[row]);
    const int64_t begin = same ? row + 1 : 0;
    sums.add(x + begin, y + begin, n - begin, one);
  }
  return diagonal + 2.0 * sums.total();
}

double gram(const Matrix& inputs, const Matrix& grads, Span rows, Span cols, bool with_bias, bool is_double, void* memory) {
  const double one = with_bias ? 1 : 0;
  return is_double ? block(inputs, grads, rows, cols, one, *static_cast<Workspace<double>*>(memory))
                   : block(inputs, grads, rows, cols, one, *static_cast<Workspace<float>*>(memory));
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
