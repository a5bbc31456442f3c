// Lists of tensors to launches: as many rows as the arguments of one hold, in order, empty ones left out.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/work_list.h"
#include "cuda/config.h"
#include "cuda/multi_tensor.cuh"

namespace sam::cuda {

// Chunks of a launch at most: their numbers are counted up in 32 bits by the number of blocks.
constexpr uint32_t kMostChunks = 0x7FFFFFFF;

template <int kRoles>
struct RowLists {
  std::array<const TensorList*, kRoles> roles;        // null: takes no part; the first never is
  const std::vector<uint32_t>* tags = nullptr;        // (n,); null: the rows' numbers
  const std::vector<int64_t>* slice_sizes = nullptr;  // (n,) of slices that no chunk cuts; 0, or null: none

  const std::vector<int64_t>& numels() const { return roles[0]->numels; }

  // As check_sizes.
  void check() const {
    check_sizes(roles);
    if (tags != nullptr && tags->size() != numels().size()) throw std::invalid_argument("one tag a tensor");
    if (slice_sizes != nullptr) check_slices(numels(), *slice_sizes);
  }
};

// Calls launch(table, is_last) for each launch. members: the rows to take, null for all.
template <class Table, int kRoles, class Launch>
void for_each_table(const RowLists<kRoles>& lists, const std::vector<uint32_t>* members, int chunk_size, bool backwards, Launch launch) {
  const std::vector<int64_t>& numels = lists.numels();
  const std::size_t count = members == nullptr ? numels.size() : members->size();
  const std::unique_ptr<Table> table(new Table);  // not zeroed: 32 KB, of which a launch reads what is written here
  table->rows = 0;
  table->chunk_size = chunk_size;
  table->backwards = backwards;
  uint32_t chunks = 0;
  const auto flush = [&](bool is_last) {
    if (table->rows > 0) launch(*table, is_last);
    table->rows = 0;
    chunks = 0;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t row = members == nullptr ? i : (*members)[i];
    if (numels[row] == 0) continue;
    const int64_t slice_size = lists.slice_sizes == nullptr ? 0 : (*lists.slice_sizes)[row];
    const int64_t wanted = (numels[row] - 1) / whole_slices(slice_size, chunk_size) + 1;
    if (wanted > kMostChunks) throw std::length_error("a tensor of more than 2^31 chunks");
    if (table->rows == Table::kCapacity || wanted > kMostChunks - chunks) flush(false);
    chunks += static_cast<uint32_t>(wanted);
    const int32_t slot = table->rows++;
    for (int role = 0; role < kRoles; ++role) {
      const Operand operand = lists.roles[role] == nullptr ? Operand{} : lists.roles[role]->operands[row];
      table->pointers[role][slot] = static_cast<char*>(operand.data);
      table->dtypes[role][slot] = operand.dtype;
    }
    if constexpr (Table::kSlices) table->slice_sizes[slot] = slice_size;
    table->numels[slot] = numels[row];
    table->chunk_ends[slot] = chunks;
    table->tags[slot] = lists.tags == nullptr ? static_cast<uint32_t>(row) : (*lists.tags)[row];
  }
  flush(true);
}

}  // namespace sam::cuda
