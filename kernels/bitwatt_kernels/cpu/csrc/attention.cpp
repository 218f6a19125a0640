// One step's attention, cut into tiles of queries and, where those are few, splits of keys.

#include <cstring>
#include <vector>

#include "ops.h"

namespace bitwatt {

namespace {

// What the threads share out.
struct AttentionPlan {
    std::vector<AttentionTile> tiles;      // parts of the first pass
    std::vector<AttentionTile> merges;     // parts of the second, in order of their partials
    std::vector<size_t> partials;          // a tile's place among the partials, or kWhole
    size_t num_partials = 0;
    static constexpr size_t kWhole = SIZE_MAX;
};

constexpr int kTileRows = 64;

void plan_attention(const AttentionCall& c, int num_threads, AttentionPlan& plan) {
    plan.tiles.clear(), plan.merges.clear(), plan.partials.clear();
    plan.num_partials = 0;
    const int tile_tokens = kTileRows / (c.H / c.G) > 1 ? kTileRows / (c.H / c.G) : 1;
    const bool few = c.S * c.G < num_threads * kPartsPerThread;
    for (int s = 0; s < c.S; ++s) {
        const int first = c.query_starts[s], last = c.query_starts[s + 1];
        const int context_len = c.context_lens[s];
        if (first == last || context_len == 0) continue;
        for (int g = 0; g < c.G; ++g)
            for (int token = first; token < last; token += tile_tokens) {
                AttentionTile tile{s, g, token, 0, context_len - (last - token), 0, 0};
                tile.num_tokens = last - token < tile_tokens ? last - token : tile_tokens;
                const int num_keys = tile.first_position + tile.num_tokens;
                tile.last_split = (num_keys + kSplitTokens - 1) / kSplitTokens;
                if (few && tile.num_tokens == 1 && tile.last_split > 1) {
                    plan.merges.push_back(tile);
                    for (int split = 0; split < tile.last_split; ++split) {
                        AttentionTile part = tile;
                        part.first_split = split, part.last_split = split + 1;
                        plan.tiles.push_back(part);
                        plan.partials.push_back(plan.num_partials++);
                    }
                } else {
                    plan.tiles.push_back(tile);
                    plan.partials.push_back(AttentionPlan::kWhole);
                }
            }
    }
}

int check_blocks(const AttentionCall& c) {
    for (int s = 0; s < c.S; ++s) {
        const int used = (c.context_lens[s] + kLanes - 1) / kLanes;
        if (used > c.max_blocks) return kBlockOutOfRange;
        const int32_t* blocks = c.block_tables + static_cast<size_t>(s) * c.max_blocks;
        for (int i = 0; i < used; ++i)
            if (blocks[i] < 0 || blocks[i] >= c.num_blocks) return kBlockOutOfRange;
    }
    return kOk;
}

// Tokens of no sequence with a context have zeros.
void clear_padding(const AttentionCall& c, int T) {
    const size_t row_bytes = static_cast<size_t>(c.H) * c.D * item_size(c.dtype);
    const auto clear = [&](int first, int last) {
        if (last > first)
            std::memset(static_cast<char*>(c.out) + first * row_bytes, 0,
                        (last - first) * row_bytes);
    };
    for (int s = 0; s < c.S; ++s)
        if (c.context_lens[s] == 0) clear(c.query_starts[s], c.query_starts[s + 1]);
    clear(c.query_starts[c.S], T);
}

}  // namespace

int run_attention(Context& context, const AttentionCall& c, int T) {
    if (const int status = check_blocks(c)) return status;
    clear_padding(c, T);
    thread_local AttentionPlan plan;
    const AttentionPlan& planned = plan;
    plan_attention(c, context.pool.num_threads(), plan);
    const size_t partial_floats =
        static_cast<size_t>(c.H / c.G) * (padded_width(c.D) + kLanes);
    float* partials =
        plan.num_partials ? scratch(kCallScratch, plan.num_partials * partial_floats) : nullptr;
    double multiplies = 0;
    for (const AttentionTile& tile : plan.tiles)
        multiplies += double(tile.num_tokens) * (c.H / c.G) * c.D * 2 * kSplitTokens *
                      (tile.last_split - tile.first_split);
    const double num_tiles = double(plan.tiles.size());
    run_ranges(context, plan.tiles.size(), multiplies / num_tiles / 10, [&](int first, int last) {
        for (int i = first; i < last; ++i) {
            const size_t place = planned.partials[i];
            context.kernels->attention(
                c, planned.tiles[i],
                place == AttentionPlan::kWhole ? nullptr : partials + place * partial_floats);
        }
    });
    const float* next = partials;
    for (const AttentionTile& tile : plan.merges) {
        context.kernels->merge_splits(c, tile, next);
        next += tile.last_split * partial_floats;
    }
    return kOk;
}

}  // namespace bitwatt
