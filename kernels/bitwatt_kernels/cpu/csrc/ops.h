// The operations of a context: a call cut into parts worth a thread's while, run on its pool.
//
// How a call is cut never shows in its result. Buffers are the caller's; what an operation needs
// besides is its thread's scratch.

#pragma once

#include "calls.h"
#include "pool.h"

#define BW_API extern "C" __attribute__((visibility("default")))

namespace bitwatt {

struct Context {
    const Kernels* kernels;
    Pool pool;
};

// What a call can be refused for; abi.py has the words.
enum Status : int { kOk = 0, kBlockOutOfRange = 1, kSlotOutOfRange = 2, kPositionOutOfRange = 3,
                    kTokenOutOfRange = 4, kMaskOutOfRange = 5 };

// Handing a part to another thread costs about a microsecond; a part should take several.
constexpr double kPartNanoseconds = 3000;
// One core, roughly: what a part is worth, never how it is computed.
constexpr double kBytesPerNanosecond = 16, kMultipliesPerNanosecond = 150;
constexpr double kElementsPerNanosecond = 2;
// The fewest tokens worth a part of their own.
constexpr int kLinearPartTokens = 32;

// body(first, last) over [0, num_units), cut into parts: a phase of a job, or a job of its own.
template <class Body>
struct Ranges {
    Body body;
    int64_t num_units;
    int num_parts;

    void operator()(int part) const {
        body(static_cast<int>(num_units * part / num_parts),
             static_cast<int>(num_units * (part + 1) / num_parts));
    }
    Phase phase() const { return Phase::of(*this, num_parts); }
    void run(Context& context) const {
        const Phase only = phase();
        context.pool.run(&only, 1);
    }
};

// unit_ns is what one unit takes a core; part_units how many a part should have, if there are enough
// for every thread, and thread_parts how many parts.
template <class Body>
Ranges<Body> ranges(const Context& context, int64_t num_units, double unit_ns, const Body& body,
                    int part_units = 1, int thread_parts = kPartsPerThread) {
    const double worth = num_units * unit_ns / kPartNanoseconds;
    const int64_t num_threads = context.pool.num_threads();
    int64_t parts = num_threads * thread_parts;
    if (parts > num_units / part_units) parts = num_units / part_units;
    if (parts < num_threads) parts = num_threads;
    if (worth < parts) parts = static_cast<int64_t>(worth);
    if (parts < 1) parts = 1;
    if (parts > num_units) parts = num_units;
    return {body, num_units, static_cast<int>(parts)};
}

// The tokens [first, last) of a call.
inline CodedLinearCall tokens_of(CodedLinearCall c, int first, int last) {
    const size_t groups = static_cast<size_t>(first) * (c.K / c.scale_group);
    const size_t out_bytes = static_cast<size_t>(first) * c.N * item_size(c.dtype);
    c.x = {c.x.codes + static_cast<size_t>(first) * c.K, c.x.scales + groups, c.x.sums + groups};
    if (c.residual) c.residual = static_cast<const char*>(c.residual) + out_bytes;
    c.out = static_cast<char*>(c.out) + out_bytes;
    c.T = last - first;
    return c;
}

// Threads share out the rows; and the tokens too, where a part's rows would be fewer than its kernel
// asks for.
inline auto linear(const Context& context, const CodedLinearCall& c) {
    const LinearCut cut = context.kernels->linear_cut(c);
    const int num_blocks = row_blocks_of(c.N);
    const int64_t num_parts = int64_t{context.pool.num_threads()} * cut.thread_parts;
    int token_parts = 1, part_blocks = cut.blocks;
    while (part_blocks > 1 && int64_t{num_blocks} * token_parts < num_parts * part_blocks &&
           c.T >= 2 * token_parts * kLinearPartTokens)
        token_parts *= 2;
    while (part_blocks > cut.fewest_blocks &&
           int64_t{num_blocks} * token_parts < num_parts * part_blocks)
        part_blocks /= 2;
    const double block_bytes = kRowBlockRows * double(c.K) * c.bits / 8;
    const double multiplies = kRowBlockRows * double(c.K) * (c.T / token_parts);
    const auto multiply = [&context, c, num_blocks, token_parts](int first, int last) {
        for (int i = first / num_blocks; i * num_blocks < last; ++i) {
            const int from = i * num_blocks < first ? first - i * num_blocks : 0;
            const int to = (i + 1) * num_blocks > last ? last - i * num_blocks : num_blocks;
            // Of whole kLinearPartTokens, but for the last.
            const auto token = [&](int64_t part) {
                const int64_t near = c.T * part / token_parts + kLinearPartTokens / 2;
                return part == token_parts ? c.T
                                           : static_cast<int>(near - near % kLinearPartTokens);
            };
            context.kernels->linear(tokens_of(c, token(i), token(i + 1)), from, to);
        }
    };
    return ranges(context, int64_t{num_blocks} * token_parts,
                  block_bytes / kBytesPerNanosecond + multiplies / kMultipliesPerNanosecond,
                  multiply, part_blocks, cut.thread_parts);
}

inline auto ternary_rows(const Context& context, const TernaryRowsCall& c) {
    return ranges(context, c.T, c.K / kElementsPerNanosecond, [&context, c](int first, int last) {
        context.kernels->ternary_rows(c, first, last);
    });
}

inline auto elementwise(const Context& context, const ElementwiseCall& c) {
    return ranges(context, c.T, c.K * (c.gated ? 2 : 1) / kElementsPerNanosecond,
                  [&context, c](int first, int last) {
                      context.kernels->elementwise(c, first, last);
                  });
}

inline int check(const RopeCall& c, int64_t rope_rows) {
    for (int t = 0; t < c.T; ++t) {
        if (c.slots[t] >= c.num_blocks * kKvBlockTokens) return kSlotOutOfRange;
        if (c.positions[t] < 0 || c.positions[t] >= rope_rows) return kPositionOutOfRange;
    }
    return kOk;
}

inline auto rope_and_cache(const Context& context, const RopeCall& c) {
    return ranges(context, c.T, (c.H + 2 * c.G) * c.D / kElementsPerNanosecond,
                  [&context, c](int first, int last) {
                      context.kernels->rope_and_cache(c, first, last);
                  });
}

// One call's attention, cut into tiles of queries and, where those are few, splits of keys.
class Attention {
public:
    // The plan is this thread's, and stands until it makes the next.
    Attention(const Context& context, const AttentionCall& c, int num_tokens);

    int check() const;
    // Tokens of no sequence with a context have zeros.
    void clear_padding() const;

    auto tiles() const {
        return ranges(context_, num_tiles_, tile_ns_,
                      [this](int first, int last) { attend(first, last); });
    }
    // After the tiles.
    auto merges() const {
        return ranges(context_, num_merges_, kPartNanoseconds,
                      [this](int first, int last) { merge(first, last); });
    }

private:
    void attend(int first, int last) const;
    void merge(int first, int last) const;

    const Context& context_;
    const AttentionCall c_;
    const int num_tokens_;
    int64_t num_tiles_, num_merges_;
    double tile_ns_;
    const AttentionTile* tiles_;   // [num_tiles_]
    const AttentionTile* merges_;  // [num_merges_], in order of their partials
    const size_t* places_;         // [num_tiles_], a tile's place among the partials, or kWhole
    const size_t* merge_places_;   // [num_merges_], of the first of its partials
    float* partials_;
    size_t partial_floats_;
};

// Draw one row's token.
void draw(const Kernels& kernels, const DrawCall& c, int m);

}  // namespace bitwatt
