// One instruction set's kernels: compiled once for each, with its flags and its name.

#if defined(BITWATT_LEFT_OUT)
#include "calls.h"
#elif defined(BITWATT_EMULATE_AMX)
#include "coded_linear.h"
#else
#include "attention.h"
#include "coded_linear.h"
#include "dense.h"
#include "drawing.h"
#include "elementwise.h"
#include "ternary_rows.h"
#endif

namespace bitwatt {

#define BW_STRING(x) #x
#define BW_NAME(x) BW_STRING(x)
#define BW_JOIN(a, b) a##b
#define BW_TABLE(isa) BW_JOIN(kernels_, isa)

extern const Kernels BW_TABLE(BITWATT_ISA);

#if defined(BITWATT_LEFT_OUT)
// A build of a few sets has the others by name alone: none can be asked for.
const Kernels BW_TABLE(BITWATT_ISA) = {BW_NAME(BITWATT_ISA), [] { return false; }};
#else

#if defined(BW_AMX)
static bool prepare() { return BITWATT_ISA::request_tiles(); }
#else
static bool prepare() { return true; }
#endif

#if defined(BITWATT_EMULATE_AMX)
// Linears alone go by tiles. All else is the portable set's, which the build has to have.
extern const Kernels kernels_portable;
static Kernels portable_but_linears() {
    Kernels kernels = kernels_portable;
    kernels.name = BW_NAME(BITWATT_ISA);
    kernels.prepare = prepare;
    kernels.linear = BITWATT_ISA::linear;
    kernels.linear_cut = BITWATT_ISA::linear_cut;
    return kernels;
}
const Kernels BW_TABLE(BITWATT_ISA) = portable_but_linears();
#else

const Kernels BW_TABLE(BITWATT_ISA) = {
    BW_NAME(BITWATT_ISA),
    prepare,
    BITWATT_ISA::linear,
    BITWATT_ISA::linear_cut,
    BITWATT_ISA::ternary_rows,
    BITWATT_ISA::elementwise,
    BITWATT_ISA::rope_and_cache,
    BITWATT_ISA::attention,
    BITWATT_ISA::merge_splits,
    BITWATT_ISA::widen_row,
    BITWATT_ISA::dense,
    BITWATT_ISA::dense_takes,
    BITWATT_ISA::mask,
    BITWATT_ISA::scale,
    BITWATT_ISA::weigh,
};
#endif
#endif

}  // namespace bitwatt
