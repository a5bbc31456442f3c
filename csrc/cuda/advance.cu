// Adam's step counters, which lie on the device as only there it is known whether a step is skipped: adds one to each and makes both bias
// corrections of its row. A thread a row.
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

constexpr unsigned kRowsPerBlock = 128;
using Counters = Table<1, kSmallArguments>;

SAM_INLINE void advance_row(const Counters& table, const AdamLaunch& o, int row) {
  if (is_skipped(o.options.update.step)) return;
  auto* counter = reinterpret_cast<float*>(table.pointers[0][row]);
  const float step = *counter + 1.0f;
  *counter = step;
  const BiasCorrections found = bias_corrections(o.options, step);
  double* corrections = o.corrections + 2 * table.tags[row];
  corrections[0] = found.step_size;
  corrections[1] = found.inv_sqrt_correction;
}

#if defined(SAM_CUDA_ON_HOST)

void launch_rows(const Counters& table, const AdamLaunch& options, const Place&) {
  ++on_host().launches;
  for (int row = 0; row < table.rows; ++row) advance_row(table, options, row);
}

#else

__global__ void __launch_bounds__(kRowsPerBlock)
    advance_kernel(const __grid_constant__ Counters table, const __grid_constant__ AdamLaunch options) {
  const int row = static_cast<int>(blockIdx.x * kRowsPerBlock + threadIdx.x);
  if (row < table.rows) advance_row(table, options, row);
}

void launch_rows(const Counters& table, const AdamLaunch& options, const Place& place) {
  void* arguments[] = {const_cast<Counters*>(&table), const_cast<AdamLaunch*>(&options)};
  const unsigned blocks = (static_cast<unsigned>(table.rows) + kRowsPerBlock - 1) / kRowsPerBlock;
  launch_kernel(reinterpret_cast<const void*>(&advance_kernel), blocks, kRowsPerBlock, arguments, place);
}

#endif

}  // namespace

void advance(const RowLists<1>& steps, const AdamLaunch& options, const Place& place) {
  for_each_table<Counters>(steps, nullptr, kLeastChunkSize, false,
                           [&](const Counters& table, bool) { launch_rows(table, options, place); });
}

}  // namespace sam::cuda
