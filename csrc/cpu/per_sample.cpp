#include "cpu/per_sample.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sam::cpu {
namespace {

constexpr int64_t kSmallestSide = 64;
constexpr int64_t kEnoughTasks = 8;  // below, blocks are made smaller so that several threads find work

Operand moved(const Operand& operand, int64_t elements) { return {address(operand, elements), operand.dtype}; }

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Kept between calls, or each would have its pages from the system anew. What is never written costs nothing.
void* workspace() {
  static thread_local std::unique_ptr<Workspace<double>> memory;
  if (!memory) memory.reset(new Workspace<double>);
  return memory.get();
}

// [0, size) in parts of one width, a multiple of kSlack, at most side.
std::vector<Span> cut(int64_t size, int64_t side) {
  const int64_t width = parts(parts(size, parts(size, side)), kSlack) * kSlack;
  std::vector<Span> spans;
  for (int64_t begin = 0; begin < size; begin += width) spans.push_back({begin, std::min(size, begin + width)});
  return spans;
}

// A group's share of a layer, or one group of channels of it.
struct Unit {
  Matrix inputs, grads;
};

struct Task {
  Span rows, cols;
};

// The blocks of every unit; unit(i) for i in [0, layer.groups * units_each), a group's units one after the other.
template <class MakeUnit>
void add_square_norms(const Layer& layer, int64_t units_each, int64_t tokens, int64_t in_features, int64_t out_features, MakeUnit unit) {
  const int64_t units = layer.groups * units_each;
  const auto blocks = [&](int64_t side) {
    const int64_t n = parts(tokens, side);
    return units * (layer.gram ? n * (n + 1) / 2 : parts(out_features, side) * parts(in_features, side));
  };
  int64_t side = kMaxSide;
  while (side > kSmallestSide && blocks(side) < kEnoughTasks) side /= 2;
  std::vector<Task> tasks;
  const std::vector<Span> rows = cut(layer.gram ? tokens : out_features, side), cols = layer.gram ? rows : cut(in_features, side);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t j = layer.gram ? i : 0; j < cols.size(); ++j) tasks.push_back({rows[i], cols[j]});
  }
  const int64_t each = static_cast<int64_t>(tasks.size());
  std::vector<double> sums(static_cast<std::size_t>(units * each));
  const int64_t flops = (layer.gram ? tokens * (in_features + out_features) : 2 * in_features * out_features) * tokens * units;
  const KernelTable& kernels = kernel_table();
  const int64_t size = layer.is_double ? sizeof(double) : sizeof(float);
  for_each_task(units * each, flops, layer.threads, [&](int64_t i) {
    const Unit made = unit(i / each);
    const Task& task = tasks[static_cast<std::size_t>(i % each)];
    double& sum = sums[static_cast<std::size_t>(i)];
    if (layer.gram) {
      sum = kernels.gram(made.inputs, made.grads, task.rows, task.cols, layer.with_bias, layer.is_double, workspace());
      return;
    }
    const int64_t offset = i / each * in_features * out_features * size;
    void* kept = layer.products == nullptr ? nullptr : static_cast<char*>(layer.products) + offset;
    sum = kernels.direct(made.inputs, made.grads, {task.rows, task.cols, kept}, layer.is_double, workspace());
  });
  for (int64_t group = 0; group < layer.groups; ++group) {
    const double* first = sums.data() + group * units_each * each;
    double sum = 0;
    for (int64_t i = 0; i < units_each * each; ++i) sum += first[i];
    layer.square_norms[group] += sum;
  }
}

Window window_of(const Convolution& c, int64_t channels) {
  Window w{};
  w.plane = w.positions = w.elements = 1;
  w.is_flat = true;
  for (int i = 0; i < 3; ++i) {
    w.in[i] = c.in[i], w.out[i] = c.out[i], w.kernel[i] = c.kernel[i];
    w.stride[i] = c.stride[i], w.padding[i] = c.padding[i], w.dilation[i] = c.dilation[i];
    w.plane *= c.in[i], w.positions *= c.out[i], w.elements *= c.kernel[i];
    w.is_flat = w.is_flat && c.kernel[i] == 1 && c.stride[i] == 1 && c.padding[i] == 0;
  }
  w.sample = channels * w.plane;
  return w;
}

}  // namespace

void linear_square_norms(const Layer& layer, int64_t tokens, int64_t in_features, int64_t out_features) {
  if (layer.gram && tokens <= kMaxDotTokens) {
    const KernelTable& kernels = kernel_table();
    const Matrix inputs{layer.inputs, layer.groups * tokens, in_features, nullptr};
    const Matrix grads{layer.grads, layer.groups * tokens, out_features, nullptr};
    const int64_t flops = 2 * layer.groups * tokens * tokens * (in_features + out_features);
    for_each_task(layer.groups, flops, layer.threads, [&](int64_t i) {
      kernels.dots(inputs, grads, {i, i + 1}, tokens, layer.with_bias, layer.square_norms, layer.is_double, workspace());
    });
    return;
  }
  add_square_norms(layer, 1, tokens, in_features, out_features, [&](int64_t i) -> Unit {
    return {{moved(layer.inputs, i * tokens * in_features), tokens, in_features, nullptr},
            {moved(layer.grads, i * tokens * out_features), tokens, out_features, nullptr}};
  });
}

void conv_square_norms(const Layer& layer, const Convolution& convolution) {
  const Convolution& c = convolution;
  const Window patches = window_of(c, c.in_channels);
  Convolution flat = c;  // the outputs' gradient: every position once
  for (int i = 0; i < 3; ++i) flat.in[i] = c.out[i], flat.kernel[i] = flat.stride[i] = flat.dilation[i] = 1, flat.padding[i] = 0;
  const Window outputs = window_of(flat, c.out_channels);
  const int64_t channels = c.in_channels / c.channel_groups, out_features = c.out_channels / c.channel_groups;
  const int64_t in_features = channels * patches.elements, tokens = c.samples * patches.positions;
  add_square_norms(layer, c.channel_groups, tokens, in_features, out_features, [&](int64_t i) -> Unit {
    const int64_t sample = i / c.channel_groups * c.samples, part = i % c.channel_groups;
    return {{moved(layer.inputs, sample * patches.sample + part * channels * patches.plane), in_features, tokens, &patches},
            {moved(layer.grads, sample * outputs.sample + part * out_features * outputs.plane), out_features, tokens, &outputs}};
  });
}

void affine_grads(void* weight, void* bias, Operand normalized, Operand grads, bool is_double, int64_t groups, int64_t samples,
                  int64_t channels, int64_t length, int threads) {
  // Long channels are tasks in smaller numbers; few groups and channels are cut by samples too, and the parts added in order.
  const int64_t width = length == 1 ? kAffineChannels : std::clamp<int64_t>(kAffineChannels / length, 1, kAffineChannels);
  const int64_t blocks = parts(channels, width);
  int64_t cuts = 1;
  while (groups * blocks * cuts < kEnoughTasks && samples / cuts >= 2 * kSlack) cuts *= 2;
  const int64_t some = parts(samples, cuts), group = samples * channels * length;
  std::vector<double> sums(static_cast<std::size_t>(2 * groups * cuts * channels));
  double* weights = sums.data();
  double* biases = weights + groups * cuts * channels;
  const KernelTable& kernels = kernel_table();
  for_each_task(groups * cuts * blocks, 8 * groups * group, threads, [&](int64_t i) {
    const int64_t block = i % blocks * width, part = i / blocks % cuts, m = i / blocks / cuts;
    AffineTask task{};
    if (weight != nullptr) task.normalized = moved(normalized, m * group);
    task.grad = moved(grads, m * group);
    task.samples = {std::min(samples, part * some), std::min(samples, part * some + some)};
    task.channels = {block, std::min(channels, block + width)};
    task.all_channels = channels;
    task.length = length;
    const int64_t to = (m * cuts + part) * channels + block;
    task.weight = weight == nullptr ? nullptr : weights + to;
    task.bias = bias == nullptr ? nullptr : biases + to;
    kernels.affine(task, is_double);
  });
  const auto finish = [&](void* out, const double* from) {
    if (out == nullptr) return;
    for (int64_t m = 0; m < groups; ++m) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        double sum = 0;
        for (int64_t part = 0; part < cuts; ++part) sum += from[(m * cuts + part) * channels + channel];
        if (is_double) {
          static_cast<double*>(out)[m * channels + channel] = sum;
        } else {
          static_cast<float*>(out)[m * channels + channel] = static_cast<float>(sum);
        }
      }
    }
  };
  finish(weight, weights);
  finish(bias, biases);
}

void embedding_square_norms(double* square_norms, const int64_t* indices, Operand grads, int64_t groups, int64_t tokens, int64_t dim,
                            const int64_t* padding_idx, int threads) {
  constexpr int64_t kTokens = 256;  // a task
  const int64_t each = parts(tokens, kTokens);
  std::vector<Position> sorted(static_cast<std::size_t>(groups * tokens));
  std::vector<double> sums(static_cast<std::size_t>(groups * each));
  for_each_task(groups, groups * tokens * 512, threads, [&](int64_t m) {
    Position* first = sorted.data() + m * tokens;
    for (int64_t t = 0; t < tokens; ++t) first[t] = {indices[m * tokens + t], t};
    std::sort(first, first + tokens,
              [](const Position& a, const Position& b) { return a.index != b.index ? a.index < b.index : a.token < b.token; });
  });
  const KernelTable& kernels = kernel_table();
  for_each_task(groups * each, 8 * groups * tokens * dim, threads, [&](int64_t i) {
    const int64_t m = i / each, begin = i % each * kTokens;
    const Span span{begin, std::min(tokens, begin + kTokens)};
    const Operand grad = moved(grads, m * tokens * dim);
    sums[static_cast<std::size_t>(i)] = kernels.row_squares(grad, dim, sorted.data() + m * tokens, tokens, span, padding_idx);
  });
  for (int64_t m = 0; m < groups; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < each; ++i) sum += sums[static_cast<std::size_t>(m * each + i)];
    square_norms[m] += sum;
  }
}

}  // namespace sam::cpu
