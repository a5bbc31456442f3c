// Squared norms of sums of rows: the gradient of an embedding, row by row. Reads g once, where no index comes up twice.
#include "cpu/block.h"
#include "cpu/vector.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static double squares(const Operand& grads, int64_t dim, const Position* sorted, int64_t total, Span span, const int64_t* padding_idx) {
  Buffer<T> buffer;
  Buffer<double> sum;
  double* added = sum.data;
  DoubleSums sums;
  int64_t begin = span.begin;
  while (begin > 0 && begin < total && sorted[begin].index == sorted[begin - 1].index) ++begin;  // not ours: it begins before the span
  while (begin < span.end) {
    const int64_t index = sorted[begin].index;
    int64_t end = begin + 1;
    while (end < total && sorted[end].index == index) ++end;
    if (padding_idx == nullptr || index != *padding_idx) {
      for_each_block({0, dim}, [&](int64_t first, int count) {
        for (int64_t i = begin; i < end; ++i) {
          const T* row = load(grads, sorted[i].token * dim + first, count, buffer, false);
          if (end == begin + 1) {
            sums.add(row, row, count);
          } else if (i == begin) {
            for (int k = 0; k < count; ++k) added[k] = static_cast<double>(row[k]);
          } else {
            for (int k = 0; k < count; ++k) added[k] += static_cast<double>(row[k]);
          }
        }
        if (end > begin + 1) sums.add(added, added, count);
      });
    }
    begin = end;
  }
  return sums.total();
}

double row_squares(const Operand& grads, int64_t dim, const Position* sorted, int64_t total, Span span, const int64_t* padding_idx) {
  return grads.dtype == DType::kFloat64 ? squares<double>(grads, dim, sorted, total, span, padding_idx)
                                        : squares<float>(grads, dim, sorted, total, span, padding_idx);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
