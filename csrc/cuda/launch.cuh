// Running an operation over lists: rows by how they are accessed, tables, kernels; on the host, the same code thread by thread.
//
// An operation is a struct Op<Access> with kRoles, kBlocks (resident on a processor), Options (trivially copyable), a constructor from
// these, and either apply(piece, thread), or, where kSums, sum(piece, thread), a double or Dots; its Options are then Summed. kBackwards:
// it follows a read of the same gradients. One whose threads need each other's results (a struct Shared in it) has together(piece, shared),
// which leaves a thread's sum in shared.squares, in place of sum; its rows have slices.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/device.h"
#include "cuda/finish.cuh"
#include "cuda/reduce.cuh"
#include "cuda/split.h"

#if defined(SAM_CUDA_ON_HOST)
#include <algorithm>
#include <utility>
#endif

namespace sam::cuda {

template <class Op, class = void>
struct Sharing : std::false_type {};
template <class Op>
struct Sharing<Op, std::void_t<typename Op::Shared>> : std::true_type {};

// The chunk whose turn it is.
template <class Op, class Table>
SAM_INLINE Piece<Op::kRoles> piece_of(const Table& table, uint32_t turn) {
  const Location location = table.locate(Op::kBackwards && table.backwards ? table.chunks() - 1 - turn : turn);
  Piece<Op::kRoles> piece;
  SAM_UNROLL
  for (int role = 0; role < Op::kRoles; ++role) {
    Operand& operand = piece.operands[role];
    operand.dtype = table.dtypes[role][location.row];
    char* data = table.pointers[role][location.row];
    operand.data = data == nullptr ? nullptr : data + location.begin * Op::Access::size_of(operand);
  }
  piece.begin = location.begin;
  piece.chunk = location.chunk;
  piece.tag = table.tags[location.row];
  piece.count = location.count;
  piece.slice_size = table.slice_size(location.row);
  return piece;
}

// In thread 0 alone. All threads of a block call it, as what follows. active: as of each_thread.
template <class Op>
SAM_BLOCK auto sum_of_piece(const Op& op, const Piece<Op::kRoles>& piece, int active) {
  if constexpr (Sharing<Op>::value) {
    SAM_SHARED typename Op::Shared shared;
    op.together(piece, shared);
    return sum_of_threads([&](int thread) { return shared.squares[thread]; });
  } else {
    return sum_of_threads([&](int thread) { return op.sum(piece, thread); }, active);
  }
}

template <class Op>
SAM_BLOCK void run_piece(const Op& op, const Piece<Op::kRoles>& piece, const typename Op::Options& options) {
  const int active = piece.count < kThreads ? piece.count : kThreads;
  if constexpr (Op::kSums) {
    const auto sum = sum_of_piece(op, piece, active);
    if (is_first_thread()) options.finish.sums[piece.tag + piece.chunk] = sum;
  } else {
    each_thread(active, [&](int thread) { op.apply(piece, thread); });
  }
}

#if defined(SAM_CUDA_ON_HOST)

// Blocks run one after another; a few of them, so that tickets are taken. Which is the first is a test's to say.
inline uint32_t blocks_on_host(uint32_t chunks) { return std::min(chunks, on_host().blocks); }

// The chunk of a turn, and whether its block has no other after it.
inline std::pair<uint32_t, bool> turn_on_host(uint32_t turn, uint32_t chunks, uint32_t blocks) {
  uint32_t block = on_host().first % blocks;
  while (true) {
    const uint32_t mine = (chunks - block + blocks - 1) / blocks;
    if (turn < mine) return {block + turn * blocks, turn + 1 == mine};
    turn -= mine;
    block = (block + 1) % blocks;
  }
}

template <class Op, class Table>
void launch_table(const Table& table, const typename Op::Options& options, const Place&) {
  ++on_host().launches;
  if (!on_host().runs) return;
  const Op op(options);
  const uint32_t blocks = blocks_on_host(table.chunks());
  for (uint32_t turn = 0; turn < table.chunks(); ++turn) {
    const auto [chunk, ends] = turn_on_host(turn, table.chunks(), blocks);
    run_piece(op, piece_of<Op>(table, chunk), options);
    if constexpr (Op::kSums) {
      if (ends) finish_in_last_block(options.finish, blocks);
    }
  }
}

inline bool large_arguments() { return true; }

#else

// Blocks stay and take chunk after chunk. The operation, with the scalars it has read, is made once a block and lies in shared memory: in
// each thread's registers it would cost occupancy (sgd in fp32 then spills at the 32 registers that let all threads run).
template <class Op, class Table>
__global__ void __launch_bounds__(kThreads, Op::kBlocks < kMostBlocks ? Op::kBlocks : kMostBlocks)
    chunk_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Options options) {
  __shared__ alignas(16) unsigned char storage[sizeof(Op)];
  if (threadIdx.x == 0) new (storage) Op(options);
  __syncthreads();
  const Op& op = *reinterpret_cast<const Op*>(storage);
  SAM_NO_UNROLL
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    run_piece(op, piece_of<Op>(table, chunk), options);
  }
  if constexpr (Op::kSums) finish_in_last_block(options.finish, gridDim.x);
}

template <class Op, class Table>
void launch_table(const Table& table, const typename Op::Options& options, const Place& place) {
  static_assert(sizeof(Table) + kOptionBytes <= Table::kBytes && sizeof(typename Op::Options) <= kOptionBytes);
  const auto* kernel = reinterpret_cast<const void*>(&chunk_kernel<Op, Table>);
  const unsigned resident = resident_blocks(kernel, place);
  void* arguments[] = {const_cast<Table*>(&table), const_cast<typename Op::Options*>(&options)};
  launch_kernel(kernel, resident < table.chunks() ? resident : table.chunks(), kThreads, arguments, place);
}

inline bool large_arguments() { return takes_large_arguments(); }

#endif

// is_last: no launch of the same call follows these.
template <class Op>
void launch(const RowLists<Op::kRoles>& lists, const std::vector<uint32_t>* members, const typename Op::Options& options, bool is_last,
            const Place& place) {
  using Small = Table<Op::kRoles, kSmallArguments, Sharing<Op>::value>;
  using Large = Table<Op::kRoles, kLargeArguments, Sharing<Op>::value>;
  const auto launch_one = [&](const auto& table, bool is_last_table) {
    typename Op::Options mine = options;
    if constexpr (Op::kSums) {
      if (!is_last || !is_last_table) mine.finish.counter = nullptr;
    }
    launch_table<Op>(table, mine, place);
  };
  const std::size_t count = members == nullptr ? lists.numels().size() : members->size();
  const int chunk_size = chunk_size_of(lists.numels());  // of all rows, as their partial sums are counted
  if (count <= static_cast<std::size_t>(Small::kCapacity) || !large_arguments()) {
    for_each_table<Small>(lists, members, chunk_size, cut().backwards, launch_one);
  } else {
    for_each_table<Large>(lists, members, chunk_size, cut().backwards, launch_one);
  }
}

enum class Kind { kFloat32, kBFloat16, kFloat16, kMixed, kDouble };
constexpr int kKinds = 5;

template <int kRoles>
Kind kind_of(const RowLists<kRoles>& lists, std::size_t row) {
  const DType first = lists.roles[0]->operands[row].dtype;
  bool same = true, is_double = false;
  for (const TensorList* list : lists.roles) {
    if (list == nullptr) continue;
    const DType dtype = list->operands[row].dtype;
    same = same && dtype == first;
    is_double = is_double || dtype == DType::kFloat64;
  }
  if (is_double) return Kind::kDouble;
  if (!same) return Kind::kMixed;
  return first == DType::kFloat32 ? Kind::kFloat32 : first == DType::kBFloat16 ? Kind::kBFloat16 : Kind::kFloat16;
}

template <template <class> class Op, int kRoles, class Options>
void launch_kind(Kind kind, const RowLists<kRoles>& lists, const std::vector<uint32_t>* members, const Options& options, bool is_last,
                 const Place& place) {
  switch (kind) {
    case Kind::kFloat32: launch<Op<Uniform<float>>>(lists, members, options, is_last, place); break;
    case Kind::kBFloat16: launch<Op<Uniform<BFloat16>>>(lists, members, options, is_last, place); break;
    case Kind::kFloat16: launch<Op<Uniform<Float16>>>(lists, members, options, is_last, place); break;
    case Kind::kMixed: launch<Op<Mixed<float>>>(lists, members, options, is_last, place); break;
    case Kind::kDouble: launch<Op<Mixed<double>>>(lists, members, options, is_last, place); break;
  }
}

template <class Options, class = void>
struct Finishes : std::false_type {};
template <class Options>
struct Finishes<Options, std::void_t<decltype(Options::finish)>> : std::true_type {};

template <class Options>
bool has_counter(const Options& options) {
  if constexpr (Finishes<Options>::value) return options.finish.counter != nullptr;
  return false;
}

// The operation over all rows: one launch for each kind of row there is, unless the rows are too many for one. Returns whether the last of
// them has finished the sums.
template <template <class> class Op, int kRoles, class Options>
bool run(const RowLists<kRoles>& lists, const Options& options, const Place& place) {
  lists.check();
  const std::vector<int64_t>& numels = lists.numels();
  std::vector<uint32_t> members[kKinds];  // without empty ones, so that the last launch is known
  std::size_t count = 0;
  int last = -1;
  for (std::size_t row = 0; row < numels.size(); ++row) {
    if (numels[row] == 0) continue;
    const int kind = static_cast<int>(kind_of(lists, row));
    members[kind].push_back(static_cast<uint32_t>(row));
    last = kind > last ? kind : last;
    ++count;
  }
  if (count == 0) return false;
  for (int kind = 0; kind <= last; ++kind) {
    if (!members[kind].empty()) launch_kind<Op>(static_cast<Kind>(kind), lists, &members[kind], options, kind == last, place);
  }
  return has_counter(options);
}

}  // namespace sam::cuda
