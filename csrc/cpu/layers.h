// What the gradient norms per sample work on: a layer's inputs, or the gradient of its outputs, of one group of samples as a matrix.
// Seen by every instruction set's translation unit: plain structs and declarations only.
#pragma once

#include <cstdint>

#include "common/operand.h"

namespace sam::cpu {

struct Span {
  int64_t begin, end;  // elements, or whatever is counted
};

// How a convolution's window moves over a sample, in three dimensions. 1x1 windows that touch every position once are flat: no unfolding.
struct Window {
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t sample;               // elements from one sample to the next
  int64_t plane;                // elements of one channel
  int64_t positions, elements;  // of the output, of the kernel
  bool is_flat;
};

// Without a window: (rows, cols) = (tokens, features), row-major. With one: (features, tokens), a feature being a channel and an element of
// the kernel, a token being a sample and a position of the output.
struct Matrix {
  Operand operand;  // begins with this group's first element
  int64_t rows, cols;
  const Window* window;
};

// A block of a group's work has at most so many tokens or features on a side, and sums over so many at a time: two panels of 256 x 256
// float32 and two blocks of products are 1 MiB, half of the second-level cache they are meant for.
constexpr int64_t kMaxSide = 256;
constexpr int64_t kDepth = 256;
constexpr int64_t kSlack = 32;  // a side is padded to whole panels
constexpr int64_t kTileRows = 32;
constexpr int64_t kSlab = 8192;        // elements of the part of a padded channel that a tile of patches is made of
constexpr int64_t kMaxDotTokens = 24;  // at most so many tokens are multiplied row by row

// One thread's memory, T being float or double.
template <class T>
struct Workspace {
  alignas(64) T left[kDepth * (kMaxSide + kSlack)];
  T right[kDepth * (kMaxSide + kSlack)];
  T first[(kMaxSide + kSlack) * (kMaxSide + kSlack)];
  T second[(kMaxSide + kSlack) * (kMaxSide + kSlack)];
  T tile[kTileRows * (kDepth + kSlack)];
  T slab[kSlab + kSlack];
};

// One block of a group's direct product: rows of out_features, columns of in_features.
struct Product {
  Span rows, cols;
  void* data;  // this group's (p, d) in the arithmetic type; null: not kept
};

struct AffineTask {
  Operand normalized, grad;  // begin with this group's first element
  Span samples, channels;    // what this task sums over, at most kAffineChannels channels
  int64_t all_channels, length;
  double* weight;  // (channels,), null: not wanted
  double* bias;
};

// A token of a group and its index.
struct Position {
  int64_t index, token;
};

constexpr int64_t kAffineChannels = 256;

}  // namespace sam::cpu
