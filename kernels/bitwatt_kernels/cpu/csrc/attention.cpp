#include <cstring>
#include <vector>

#include "ops.h"

namespace bitwatt {

namespace {

constexpr size_t kWhole = SIZE_MAX;

// What the threads share out.
struct AttentionPlan {
    std::vector<AttentionTile> tiles, merges;
    std::vector<size_t> places, merge_places;
    size_t num_partials;
};

constexpr int kAttentionTileRows = 64;  // queries of a group's heads

void make_plan(const AttentionCall& c, int num_threads, AttentionPlan& plan) {
    plan.tiles.clear(), plan.merges.clear(), plan.places.clear(), plan.merge_places.clear();
    plan.num_partials = 0;
    const int heads = c.H / c.G;
    const int tile_tokens = kAttentionTileRows / heads > 1 ? kAttentionTileRows / heads : 1;
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
                    plan.merge_places.push_back(plan.num_partials);
                    for (int split = 0; split < tile.last_split; ++split) {
                        AttentionTile part = tile;
                        part.first_split = split, part.last_split = split + 1;
                        plan.tiles.push_back(part);
                        plan.places.push_back(plan.num_partials++);
                    }
                } else {
                    plan.tiles.push_back(tile);
                    plan.places.push_back(kWhole);
                }
            }
    }
}

}  // namespace

Attention::Attention(const Context& context, const AttentionCall& c, int num_tokens)
    : context_(context), c_(c), num_tokens_(num_tokens) {
    thread_local AttentionPlan plan;
    make_plan(c, context.pool.num_threads(), plan);
    num_tiles_ = static_cast<int64_t>(plan.tiles.size());
    num_merges_ = static_cast<int64_t>(plan.merges.size());
    tiles_ = plan.tiles.data(), merges_ = plan.merges.data();
    places_ = plan.places.data(), merge_places_ = plan.merge_places.data();
    partial_floats_ = static_cast<size_t>(c.H / c.G) * (padded_width(c.D) + kLanes);
    partials_ =
        plan.num_partials ? scratch(kCallScratch, plan.num_partials * partial_floats_) : nullptr;
    double multiplies = 0;
    for (const AttentionTile& tile : plan.tiles)
        multiplies += double(tile.num_tokens) * (c.H / c.G) * c.D * 2 * kSplitTokens *
                      (tile.last_split - tile.first_split);
    tile_ns_ = num_tiles_ ? multiplies / double(num_tiles_) / 10 : 0;
}

int Attention::check() const {
    for (int s = 0; s < c_.S; ++s) {
        const int used = (c_.context_lens[s] + kKvBlockTokens - 1) / kKvBlockTokens;
        if (used > c_.max_blocks) return kBlockOutOfRange;
        const int32_t* blocks = c_.block_tables + static_cast<size_t>(s) * c_.max_blocks;
        for (int i = 0; i < used; ++i)
            if (blocks[i] < 0 || blocks[i] >= c_.num_blocks) return kBlockOutOfRange;
    }
    return kOk;
}

void Attention::clear_padding() const {
    const size_t row_bytes = static_cast<size_t>(c_.H) * c_.D * item_size(c_.dtype);
    const auto clear = [&](int first, int last) {
        if (last > first)
            std::memset(static_cast<char*>(c_.out) + first * row_bytes, 0,
                        (last - first) * row_bytes);
    };
    for (int s = 0; s < c_.S; ++s)
        if (c_.context_lens[s] == 0) clear(c_.query_starts[s], c_.query_starts[s + 1]);
    clear(c_.query_starts[c_.S], num_tokens_);
}

void Attention::attend(int first, int last) const {
    for (int i = first; i < last; ++i)
        context_.kernels->attention(
            c_, tiles_[i],
            places_[i] == kWhole ? nullptr : partials_ + places_[i] * partial_floats_);
}

void Attention::merge(int first, int last) const {
    for (int i = first; i < last; ++i)
        context_.kernels->merge_splits(c_, merges_[i],
                                       partials_ + merge_places_[i] * partial_floats_);
}

}  // namespace bitwatt
