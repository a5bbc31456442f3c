// The operations per sample: they cut the work into tasks by sizes alone and own the threads; the kernels own the arithmetic. Tensors are
// dense and in C order. Which thread takes which task never shows in the result.
#pragma once

#include <cstdint>

#include "cpu/layers.h"

namespace sam::cpu {

struct Layer {
  double* square_norms;  // (groups,), added to
  Operand inputs, grads;
  void* products;  // in the arithmetic type; null: not kept
  bool is_double;  // the arithmetic
  int64_t groups;  // of samples
  bool gram;       // otherwise direct
  bool with_bias;  // the bias's squared norms too; gram alone
  int threads;
};

// inputs (groups, tokens, in_features), grads (groups, tokens, out_features), products (groups, out_features, in_features)
void linear_square_norms(const Layer& layer, int64_t tokens, int64_t in_features, int64_t out_features);

struct Convolution {
  int64_t samples;  // of one group
  int64_t in_channels, out_channels, channel_groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// inputs (groups samples, in_channels, *in), grads (groups samples, out_channels, *out), products (groups, out_channels, in_channels /
// channel_groups, *kernel)
void conv_square_norms(const Layer& layer, const Convolution& convolution);

// weight, bias (groups, channels) in the arithmetic type, null: not wanted; normalized, grads (groups, samples, channels, length)
void affine_grads(void* weight, void* bias, Operand normalized, Operand grads, bool is_double, int64_t groups, int64_t samples,
                  int64_t channels, int64_t length, int threads);

// indices (groups, tokens), grads (groups, tokens, dim); padding_idx null: none
void embedding_square_norms(double* square_norms, const int64_t* indices, Operand grads, int64_t groups, int64_t tokens, int64_t dim,
                            const int64_t* padding_idx, int threads);

}  // namespace sam::cpu
