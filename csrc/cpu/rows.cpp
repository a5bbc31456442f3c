// Squared norms of sums of rows: the gradient of an embedding, row by row. Reads g once, where no index comes up twice.
#include "cpu/patches.h"

namespace sam::cpu {
inline namespace SAM_ISA {

constexpr int64_t kPiece = 256;

template <class T>
static double squares(const Operand& grads, int64_t dim, const Position* sorted, int64_t total, Span span, const int64_t* padding_idx) {
  alignas(64) T buffer[kPiece];
  alignas(64) double added[kPiece];
  const bool in_place = grads.dtype == kStorage<T>;
  DoubleSums sums;
  int64_t begin = span.begin;
  while (begin > 0 && begin < total && sorted[begin].index == sorted[begin - 1].index) ++begin;  // not ours: it begins before the span
  while (begin < span.end) {
    const int64_t index = sorted[begin].index;
    int64_t end = begin + 1;
    while (end < total && sorted[end].index == index) ++end;
    if (padding_idx == nullptr || index != *padding_idx) {
      for (int64_t first = 0; first < dim; first += kPiece) {
        const int64_t count = dim - first < kPiece ? dim - first : kPiece;
        for (int64_t i = begin; i < end; ++i) {
          const char* source = element(grads, sorted[i].token * dim + first);
          const T* row = buffer;
          if (in_place) {
            row = reinterpret_cast<const T*>(source);
          } else {
            convert(grads.dtype, source, count, buffer);
          }
          if (end == begin + 1) {
            sums.add(row, row, count);
          } else if (i == begin) {
            for (int64_t k = 0; k < count; ++k) added[k] = static_cast<double>(row[k]);
          } else {
            for (int64_t k = 0; k < count; ++k) added[k] += static_cast<double>(row[k]);
          }
        }
        if (end > begin + 1) sums.add(added, added, count);
      }
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
