// Gradients of a scale and a shift: sums of x g and of g over everything but the channels, in double. Reads x and g once: 2 N s bytes.
#include "cpu/block.h"
#include "cpu/vector.h"

namespace sam::cpu {
inline namespace SAM_ISA {

// Channels beside each other: a running sum for each.
template <class T>
static void beside(const AffineTask& task) {
  Buffer<T> grad_buffer, value_buffer;
  const int count = static_cast<int>(task.channels.end - task.channels.begin);  // at most kBlock
  for (int64_t sample = task.samples.begin; sample < task.samples.end; ++sample) {
    const int64_t index = sample * task.all_channels + task.channels.begin;
    const T* grad = load(task.grad, index, count, grad_buffer, false);
    if (task.weight != nullptr) {
      const T* value = load(task.normalized, index, count, value_buffer, false);
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
  Buffer<T> grad_buffer, value_buffer;
  for (int64_t channel = task.channels.begin; channel < task.channels.end; ++channel) {
    DoubleSums products, sums;
    for (int64_t sample = task.samples.begin; sample < task.samples.end; ++sample) {
      const int64_t first = (sample * task.all_channels + channel) * task.length;
      for_each_block({first, first + task.length}, [&](int64_t begin, int count) {
        const T* grad = load(task.grad, begin, count, grad_buffer, false);
        if (task.weight != nullptr) products.add(load(task.normalized, begin, count, value_buffer, false), grad, count);
        if (task.bias != nullptr) sums.add(grad, count);
      });
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
