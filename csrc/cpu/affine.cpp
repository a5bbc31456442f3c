// Gradients of a scale and a shift: sums of x g and of g over everything but the channels, in double. Reads x and g once: 2 N s bytes.
#include "cpu/patches.h"

namespace sam::cpu {
inline namespace SAM_ISA {

constexpr int64_t kPiece = 256;

// count <= kPiece elements from one on: where they lie, or converted.
template <class T>
static inline const T* values(const Operand& operand, int64_t index, int64_t count, T* buffer) {
  const char* source = element(operand, index);
  if (operand.dtype == kStorage<T>) return reinterpret_cast<const T*>(source);
  convert(operand.dtype, source, count, buffer);
  return buffer;
}

// Channels beside each other: a running sum for each.
template <class T>
static void beside(const AffineTask& task) {
  alignas(64) T grad_buffer[kPiece], value_buffer[kPiece];
  const int64_t count = task.channels.end - task.channels.begin;
  for (int64_t sample = task.samples.begin; sample < task.samples.end; ++sample) {
    const int64_t index = sample * task.all_channels + task.channels.begin;
    const T* grad = values(task.grad, index, count, grad_buffer);
    if (task.weight != nullptr) {
      const T* value = values(task.normalized, index, count, value_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) task.weight[i] += static_cast<double>(value[i]) * static_cast<double>(grad[i]);
    }
    if (task.bias != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) task.bias[i] += static_cast<double>(grad[i]);
    }
  }
}

// Channels of many elements: one after the other.
template <class T>
static void after(const AffineTask& task) {
  alignas(64) T grad_buffer[kPiece], value_buffer[kPiece];
  for (int64_t channel = task.channels.begin; channel < task.channels.end; ++channel) {
    DoubleSums products, sums;
    for (int64_t sample = task.samples.begin; sample < task.samples.end; ++sample) {
      const int64_t first = (sample * task.all_channels + channel) * task.length;
      for (int64_t begin = 0; begin < task.length; begin += kPiece) {
        const int64_t count = task.length - begin < kPiece ? task.length - begin : kPiece;
        const T* grad = values(task.grad, first + begin, count, grad_buffer);
        if (task.weight != nullptr) products.add(values(task.normalized, first + begin, count, value_buffer), grad, count);
        if (task.bias != nullptr) sums.add(grad, count);
      }
    }
    if (task.weight != nullptr) task.weight[channel - task.channels.begin] += products.total();
    if (task.bias != nullptr) task.bias[channel - task.channels.begin] += sums.total();
  }
}

void affine(const AffineTask& task, bool is_double) {
  if (task.length == 1) {
    is_double ? beside<double>(task) : beside<float>(task);
  } else {
    is_double ? after<double>(task) : after<float>(task);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
