#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// A row of the table is one of this build, or nothing.
#define BW_ANY(...) BW_ROW(__VA_ARGS__)
#if defined(__x86_64__)
#define BW_X86_64(...) BW_ROW(__VA_ARGS__)
#else
#define BW_X86_64(...)
#endif
#if defined(__aarch64__)
#define BW_AARCH64(...) BW_ROW(__VA_ARGS__)
#else
#define BW_AARCH64(...)
#endif
#if defined(BITWATT_EMULATE_AMX)
#define BW_EMULATED(...) BW_ROW(__VA_ARGS__)
#else
#define BW_EMULATED(...)
#endif

namespace bitwatt {

#define BW_ROW(name, base, flags, needs) extern const Kernels kernels_##name;
#include "instruction_sets.inc"
#undef BW_ROW

namespace {

#if defined(__x86_64__)
#define BW_HAS(feature) __builtin_cpu_supports(#feature)

// For features that __builtin_cpu_supports doesn't know: AMX in GCC 12, others in clang 14.
enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

bool has_cpuid(unsigned leaf, unsigned subleaf, CpuidRegister in, int bit) {
    unsigned registers[4];
    return __get_cpuid_count(leaf, subleaf, &registers[kEax], &registers[kEbx], &registers[kEcx],
                             &registers[kEdx]) &&
           (registers[in] >> bit & 1);
}

// Whether the system saves the tile registers and their configuration when it switches threads.
bool saves_tiles() {
    constexpr unsigned kTileConfigAndData = 3u << 17;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileConfigAndData) == kTileConfigAndData;
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor has it
#endif
}
#endif

bool runs_none() { return true; }

#define BW_ROW(name, base, flags, needs) \
    bool runs_##name() { return runs_##base() && (needs); }
#include "instruction_sets.inc"
#undef BW_ROW

std::vector<const Kernels*> find_kernels() {
    struct Row {
        const Kernels* kernels;
        bool (*runs)();
    };
#define BW_ROW(name, base, flags, needs) {&kernels_##name, runs_##name},
    constexpr Row rows[] = {
#include "instruction_sets.inc"
    };
#undef BW_ROW
    std::vector<const Kernels*> fastest_first;
    for (const Row& row : rows)
        if (row.runs() && row.kernels->prepare())
            fastest_first.insert(fastest_first.begin(), row.kernels);
    return fastest_first;
}

}  // namespace

const std::vector<const Kernels*>& kernels_that_run() {
    static const std::vector<const Kernels*> kernels = find_kernels();
    return kernels;
}

}  // namespace bitwatt
