// |G'A|^2 of one group from the tiles of G'A: each is squared, kept where the products are wanted, and dropped.
#include "cpu/panels.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static double block(const Matrix& inputs, const Matrix& grads, const Product& product, Workspace<T>& workspace) {
  const bool across = inputs.window != nullptr;
  const int64_t tokens = across ? inputs.cols : inputs.rows, features = across ? inputs.rows : inputs.cols;
  const int64_t m = product.rows.end - product.rows.begin, n = product.cols.end - product.cols.begin;
  T* kept = static_cast<T*>(product.data);
  DoubleSums sums;
  for (int64_t begin = 0; begin < tokens; begin += kDepth) {
    const int64_t depth = tokens - begin < kDepth ? tokens - begin : kDepth;
    pack(grads, across, product.rows, {begin, begin + depth}, workspace.left, workspace);
    pack(inputs, across, product.cols, {begin, begin + depth}, workspace.right, workspace);
    const bool is_last = begin + depth == tokens, in_one = depth == tokens;
    for (int64_t col = 0; col < n; col += kWidth<T>) {
      const int64_t valid = n - col < kWidth<T> ? n - col : kWidth<T>;
      const int vectors = static_cast<int>((valid + kLength<T> - 1) / kLength<T>);
      const int64_t stride = in_one ? kWidth<T> : padded<T>(n);
      for (int64_t row = 0; row < m; row += kTileHeight) {
        T* out = in_one ? workspace.first : workspace.first + row * stride + col;
        multiply(tile_of<T>(workspace.left, row, depth), workspace.right + col * depth, vectors, depth, out, stride, begin > 0);
        if (!is_last) continue;
        for (int64_t i = 0; i < kTileHeight && row + i < m; ++i) {
          sums.add(out + i * stride, out + i * stride, valid);
          if (kept == nullptr) continue;
          T* to = kept + (product.rows.begin + row + i) * features + product.cols.begin + col;
          std::memcpy(to, out + i * stride, static_cast<std::size_t>(valid) * sizeof(T));
        }
      }
    }
  }
  return sums.total();
}

double direct(const Matrix& inputs, const Matrix& grads, const Product& product, bool is_double, void* memory) {
  return is_double ? block(inputs, grads, product, *static_cast<Workspace<double>*>(memory))
                   : block(inputs, grads, product, *static_cast<Workspace<float>*>(memory));
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
