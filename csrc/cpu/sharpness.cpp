#include "cpu/sharpness.h"

#include <algorithm>
#include <vector>

#include "common/sampling.h"

namespace sam::cpu {
namespace {

using Numbers = std::vector<double>;

double load(const Operand& operand, int64_t i) {
  return operand.dtype == DType::kFloat64 ? static_cast<const double*>(operand.data)[i] : static_cast<const float*>(operand.data)[i];
}

void store(const Operand& operand, int64_t i, double value) {
  if (operand.dtype == DType::kFloat64) {
    static_cast<double*>(operand.data)[i] = value;
  } else {
    static_cast<float*>(operand.data)[i] = static_cast<float>(value);
  }
}

struct Gibbs {
  Numbers exponents, terms;
};

Gibbs gibbs_of(const Operand& norms, int64_t count, double beta) {
  double largest = -HUGE_VAL;
  for (int64_t i = 0; i < count; ++i) {
    const double norm = load(norms, i);
    if (norm > largest) largest = norm;
  }
  Gibbs found;
  found.exponents.reserve(static_cast<std::size_t>(count));
  found.terms.reserve(static_cast<std::size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double norm = load(norms, i), exponent = gibbs_exponent(norm, largest, beta);
    found.exponents.push_back(exponent);
    found.terms.push_back(gibbs_term(norm, exponent));
  }
  return found;
}

// Inclusive sums; the last one is the total.
Numbers sums_of(const Numbers& terms) {
  Numbers sums;
  sums.reserve(terms.size());
  double sum = 0.0;
  for (const double term : terms) sums.push_back(sum += term);
  return sums;
}

}  // namespace

void sharpness_weights(Operand norms, Operand weights, int64_t count, double beta) {
  const Gibbs gibbs = gibbs_of(norms, count, beta);
  const double total = sums_of(gibbs.terms).back();
  for (int64_t i = 0; i < count; ++i) store(weights, i, gibbs.terms[static_cast<std::size_t>(i)] / total);
}

namespace {

void draw(const Gibbs& gibbs, const Operand& weights, int64_t* indices, int64_t draws, const RandomSeed& seed) {
  const Numbers sums = sums_of(gibbs.terms);
  const double total = sums.back(), places = static_cast<double>(draws) * static_cast<double>(sums.size());
  auto last = static_cast<int64_t>(sums.size()) - 1;  // of positive weight
  while (last > 0 && !(gibbs.terms[static_cast<std::size_t>(last)] > 0.0)) --last;
  for (int64_t j = 0; j < draws; ++j) {
    const double target = sampling_uniform(j, seed) * total;
    const int64_t found = std::upper_bound(sums.begin(), sums.end(), target) - sums.begin();
    indices[j] = std::min(found, last);
    store(weights, j, replacement_weight(gibbs.terms[static_cast<std::size_t>(indices[j])], total, places));
  }
}

struct Item {
  double key;
  int64_t index;
};

void draw_successively(const Gibbs& gibbs, const Operand& weights, int64_t* indices, int64_t draws, const RandomSeed& seed) {
  std::vector<Item> items;
  items.reserve(gibbs.terms.size());
  for (const double exponent : gibbs.exponents) {
    const auto index = static_cast<int64_t>(items.size());
    items.push_back({gumbel_key(exponent, sampling_uniform(index, seed)), index});
  }
  const auto precedes = [](const Item& a, const Item& b) { return a.key != b.key ? a.key > b.key : a.index < b.index; };
  std::partial_sort(items.begin(), items.begin() + draws, items.end(), precedes);
  double rest = 0.0;
  for (const double term : gibbs.terms) rest += term * 0.0;  // NaN where a norm is not finite, wherever that is drawn
  for (auto item = items.begin() + draws; item != items.end(); ++item) rest += gibbs.terms[static_cast<std::size_t>(item->index)];
  const double places = static_cast<double>(draws) * static_cast<double>(items.size());
  for (int64_t r = draws - 1; r >= 0; --r) {
    indices[r] = items[static_cast<std::size_t>(r)].index;
    const double term = gibbs.terms[static_cast<std::size_t>(indices[r])];
    rest += term;
    store(weights, r, ordered_weight(term, rest, static_cast<double>(draws - 1 - r), places));
  }
}

}  // namespace

void sharpness_sample(Operand norms, Operand weights, int64_t* indices, int64_t count, int64_t draws, double beta, bool replacement,
                      const RandomSeed& seed) {
  (replacement ? draw : draw_successively)(gibbs_of(norms, count, beta), weights, indices, draws, seed);
}

}  // namespace sam::cpu
