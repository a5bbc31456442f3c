// What one instruction set offers: a function a kernel that does one chunk of one row. The engine cuts the work and owns the threads.
// This header is seen by every instruction set's translation unit: plain structs and declarations only.
#pragma once

#include <cstdint>

#include "common/operand.h"
#include "common/options.h"
#include "common/roles.h"
#include "cpu/layers.h"

namespace sam::cpu {

// The tensors of one parameter by role (common/roles.h), all dense, of one size and in one memory order.
struct Row {
  Operand operands[kMostRoles];

  SAM_INLINE const Operand& operator[](int role) const { return operands[role]; }
};

using Perturb = PerturbOptions<double>;
using PerturbVariant = PerturbVariantOptions<double>;
using RandomPerturb = RandomOptions<double>;
using MovingDirection = DirectionOptions<double>;
using Combine = CombineOptions<double>;
using Sgd = SgdOptions<double>;
using Adam = AdamOptions<double>;

// streams: outputs that are only written bypass the caches. index: of the row in the caller's list. Doubles that are returned are sums of
// squares.
struct KernelTable {
  const char* name;
  double (*norm)(const Row&, Span, const Scaling<double>&);
  bool (*finite)(const Row&, Span);  // all elements of role kNormGrad
  void (*perturb)(const Row&, Span, const Perturb&, bool streams);
  void (*perturb_variant)(const Row&, Span, const PerturbVariant&, bool streams, uint32_t index);
  double (*direction_norm)(const Row&, Span, const MovingDirection&);
  double (*centralize)(const Row&, Span, const Scaling<double>&, int64_t slice_size);  // a span is made of whole slices
  Dots (*grad_dots)(const Row&, Span);
  double (*combine)(const Row&, Span, const Combine&, bool streams);
  void (*random_perturb)(const Row&, Span, const RandomPerturb&, bool streams, uint32_t index);
  void (*copy)(const Row&, Span, const NoOptions&, bool streams);
  void (*sgd)(const Row&, Span, const Sgd&, bool streams, uint32_t index);
  void (*adamw)(const Row&, Span, const Adam&, bool streams, double step, uint32_t index);  // step: 1 on the first
  // The squared norm of one group's G'A, or of one block of it. memory: a Workspace<double>, or <float>.
  double (*gram)(const Matrix& inputs, const Matrix& grads, Span rows, Span cols, bool with_bias, bool is_double, void* memory);
  double (*direct)(const Matrix& inputs, const Matrix& grads, const Product&, bool is_double, void* memory);
  void (*dots)(const Matrix& inputs, const Matrix& grads, Span groups, int64_t tokens, bool with_bias, double* square_norms, bool is_double,
               void* memory);
  void (*affine)(const AffineTask&, bool is_double);
  // The rows of each index added up and squared, for the indices that begin in the span.
  double (*row_squares)(const Operand& grads, int64_t dim, const Position* sorted, int64_t total, Span, const int64_t* padding_idx);
};

// Calls X(kernel) for each kernel of the table, in its order.
// clang-format off
#define SAM_FOR_EACH_KERNEL(X) \
  X(norm) X(finite) X(perturb) X(perturb_variant) X(direction_norm) X(centralize) X(grad_dots) X(combine) X(random_perturb) X(copy) X(sgd) \
  X(adamw) X(gram) X(direct) X(dots) X(affine) X(row_squares)
// clang-format on

// The best table this processor can run, or the one named by SAM_KERNELS_ISA. Throws std::runtime_error when that one cannot run here.
const KernelTable& kernel_table();

// Whether kernels over lists ask for memory ahead of their reads: where the processor is faster so, or as SAM_KERNELS_PREFETCH says. Set by
// kernel_table(), before any kernel runs.
extern bool prefetches_ahead;

}  // namespace sam::cpu
