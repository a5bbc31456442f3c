// Chooses the instruction set at run time, and whether kernels prefetch. The extension is built for the oldest processor of its
// architecture; only the chunk kernels are compiled again for newer ones, each in a namespace of its own.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/kernels.h"

#define SAM_DECLARE(KERNEL) std::remove_pointer_t<decltype(KernelTable::KERNEL)> KERNEL;
#define SAM_NAME(KERNEL) KERNEL,
#define SAM_DECLARE_KERNELS(ISA)                                     \
  namespace ISA {                                                    \
  SAM_FOR_EACH_KERNEL(SAM_DECLARE)                                   \
  constexpr KernelTable kTable{#ISA, SAM_FOR_EACH_KERNEL(SAM_NAME)}; \
  }

namespace sam::cpu {

SAM_DECLARE_KERNELS(baseline)
#if defined(SAM_AVX2_KERNELS)
SAM_DECLARE_KERNELS(avx2)
#endif
#if defined(SAM_AVX512_KERNELS)
SAM_DECLARE_KERNELS(avx512)
#endif

namespace {

bool runs_here(const KernelTable& table) {
#if defined(SAM_AVX2_KERNELS)
  __builtin_cpu_init();
  if (&table == &avx2::kTable) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(SAM_AVX512_KERNELS)
  __builtin_cpu_init();
  if (&table == &avx512::kTable) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
  }
#endif
  return &table == &baseline::kTable;
}

const KernelTable* const kBestFirst[] = {
#if defined(SAM_AVX512_KERNELS)
    &avx512::kTable,
#endif
#if defined(SAM_AVX2_KERNELS)
    &avx2::kTable,
#endif
    &baseline::kTable};

// Not on AMD's processors: there the hardware's prefetcher alone is faster (measured: docs/internals/cpu.md).
bool choose_prefetches() {
  const char* wanted = std::getenv("SAM_KERNELS_PREFETCH");
  const std::string value = wanted == nullptr ? "" : wanted;
  if (value == "0" || value == "1") return value == "1";
  if (!value.empty()) throw std::runtime_error("SAM_KERNELS_PREFETCH=" + value + ": must be 0 or 1");
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("amd");
#else
  return true;
#endif
}

const KernelTable& choose() {
  prefetches_ahead = choose_prefetches();
  const char* wanted = std::getenv("SAM_KERNELS_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const KernelTable* table : kBestFirst) {
    if ((any || std::string(wanted) == table->name) && runs_here(*table)) return *table;
  }
  throw std::runtime_error("SAM_KERNELS_ISA=" + std::string(wanted) +
                           ": unknown, not compiled, or this processor cannot run it; the names are baseline, avx2 and avx512");
}

}  // namespace

bool prefetches_ahead = true;

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace sam::cpu
