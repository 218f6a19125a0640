// The operations of a context: a call cut into parts worth a thread's while, run on its pool.
//
// How a call is cut never shows in its result. Buffers are the caller's; what an operation needs
// besides is its thread's scratch.

#pragma once

#include "calls.h"
#include "pool.h"

namespace bitwatt {

struct Context {
    const Kernels* kernels;
    Pool pool;
};

// As native.py names them.
enum Status : int { kOk = 0, kBlockOutOfRange = 1, kSlotOutOfRange = 2, kPositionOutOfRange = 3,
                    kTokenOutOfRange = 4 };

// Handing a part to another thread costs about a microsecond; a part should take several.
constexpr double kPartNanoseconds = 3000;
constexpr int kPartsPerThread = 4;
// One core, roughly: what a part is worth, never how it is computed.
constexpr double kBytesPerNanosecond = 16, kMultipliesPerNanosecond = 150;
constexpr double kElementsPerNanosecond = 2;

// body(first, last) over [0, num_units), cut into parts; unit_ns is what one unit takes a core.
template <class Body>
void run_ranges(Context& context, int64_t num_units, double unit_ns, const Body& body) {
    const double worth = num_units * unit_ns / kPartNanoseconds;
    int64_t parts = static_cast<int64_t>(context.pool.num_threads()) * kPartsPerThread;
    if (worth < parts) parts = static_cast<int64_t>(worth);
    if (parts > num_units) parts = num_units;
    if (parts <= 1) {
        if (num_units > 0) body(0, static_cast<int>(num_units));
        return;
    }
    context.pool.run(static_cast<int>(parts), [&](int part) {
        body(static_cast<int>(num_units * part / parts),
             static_cast<int>(num_units * (part + 1) / parts));
    });
}

inline void run_linear(Context& context, const CodesCall& c) {
    const double bytes = kBlockRows * double(c.K) * c.bits / 8;
    const double multiplies = kBlockRows * double(c.K) * c.T;
    run_ranges(context, blocks_of(c.N),
               bytes / kBytesPerNanosecond + multiplies / kMultipliesPerNanosecond,
               [&](int first, int last) { context.kernels->linear(c, first, last); });
}

inline void run_elementwise(Context& context, const ElementwiseCall& c) {
    run_ranges(context, c.T, c.K * (c.gated ? 2 : 1) / kElementsPerNanosecond,
               [&](int first, int last) { context.kernels->elementwise(c, first, last); });
}

inline int run_rope_and_cache(Context& context, const RopeCall& c, int64_t rope_rows) {
    for (int t = 0; t < c.T; ++t) {
        if (c.slots[t] >= c.num_blocks * kLanes) return kSlotOutOfRange;
        if (c.positions[t] < 0 || c.positions[t] >= rope_rows) return kPositionOutOfRange;
    }
    run_ranges(context, c.T, (c.H + 2 * c.G) * c.D / kElementsPerNanosecond,
               [&](int first, int last) { context.kernels->rope_and_cache(c, first, last); });
    return kOk;
}

int run_attention(Context& context, const AttentionCall& c, int T);

}  // namespace bitwatt
