// Causal attention over a cache of KV blocks, in splits of 256 keys by absolute position.
//
// Within a split: scores, their maximum, exponentials, and their sum over the values, key by key.
// Splits are merged first to last with the running maximum (arXiv:2205.14135). A query's sums thus
// depend on its own position alone: the same whether its splits run on one thread or on many, and
// whether it arrives in a chunk of 1 or of 500.

#pragma once

#include "coded_linear.h"
#include "dots.h"
#include "int8_heads.h"

namespace bitwatt {
namespace BITWATT_ISA {

struct Running {
    float maximum = -__builtin_inff(), total = 0.0f;
};

// The memory of one tile: rows are its queries, token by token, a group's heads side by side.
struct Workspace {
    float* queries;  // [rows, width]
    float* sums;     // [rows, width], of the current split
    float* running;  // [rows, width], of the splits so far
    float* block;    // [16, width], keys or values of a KV block
    float* scores;   // [rows, kSplitTokens]
    float* maxima;   // [rows]
    float* totals;   // [rows]
    Running* states;  // [rows]
    // Of a cache in int8:
    int8_t* codes;          // [rows, width], of the queries
    float* query_scales;    // [rows], times attention's own
    int32_t* query_starts;  // [rows], what the sums of its products start from
    int width;

    Workspace(int rows, int D) : width(padded_width(D)) {
        const size_t row_floats = static_cast<size_t>(rows) * width;
        float* p = scratch(kTileScratch, 3 * row_floats + kKvBlockTokens * width +
                                             static_cast<size_t>(rows) *
                                                 (kSplitTokens + 6 + width / 4));
        queries = p, p += row_floats;
        sums = p, p += row_floats;
        running = p, p += row_floats;
        block = p, p += kKvBlockTokens * width;
        scores = p, p += static_cast<size_t>(rows) * kSplitTokens;
        maxima = p, p += rows;
        totals = p, p += rows;
        states = reinterpret_cast<Running*>(p), p += 2 * static_cast<size_t>(rows);
        codes = reinterpret_cast<int8_t*>(p), p += row_floats / 4;
        query_scales = p, p += rows;
        query_starts = reinterpret_cast<int32_t*>(p);
    }
};

// A KV block's keys or values of one group, as they are to be read.
struct KvBlock {
    const void* rows;   // [16, stride] of dtype
    int dtype;
    size_t stride;
    const void* ahead;  // the KV block to fetch into the caches meanwhile, or null
};

// Multiplying a KV block takes about as long as memory takes to answer. Fetching one block ahead
// would thus leave no margin; several fetches are kept under way, of as many bytes in either form.
constexpr int kv_blocks_ahead(int dtype) { return dtype == kInt8 ? 8 : 4; }

// scores[row + q][key_offset + key] = row + q's query · key of the block · scale, for its 16 keys.
template <int Q, int dtype>
BW_INLINE void score(const Workspace& w, int row, int key_offset, const KvBlock& block, int D,
                     float scale) {
    constexpr int R = kLanes / Q;
    for (int key = 0; key < kKvBlockTokens; key += R) {
        float lanes[kLanes];
        const F32 products = dots<Q, dtype>(
            w.queries + static_cast<size_t>(row) * w.width, w.width,
            offset(block.rows, dtype, key * block.stride), block.stride, D,
            block.ahead ? offset(block.ahead, dtype, key * block.stride) : nullptr);
        store(lanes, products * splat(scale));
        for (int q = 0; q < Q; ++q)
            __builtin_memcpy(w.scores + static_cast<size_t>(row + q) * kSplitTokens + key_offset +
                                 key,
                             lanes + q * R, R * sizeof(float));
    }
}

// sums[row + q] += score · value for the keys [first, last) of a block, 16 · N columns from column.
template <int Q, int N, int dtype>
BW_INLINE void add_values_columns(const Workspace& w, int row, int key_offset, const KvBlock& block,
                                  int first, int last, int column) {
    F32 s[Q][N];
    float* sums = w.sums + static_cast<size_t>(row) * w.width + column;
    const float* scores = w.scores + static_cast<size_t>(row) * kSplitTokens + key_offset;
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) s[q][n] = load(sums + q * w.width + n * kLanes);
    for (int key = first; key < last; ++key) {
        F32 v[N];
        for (int n = 0; n < N; ++n) {
            const size_t at = key * block.stride + column + n * kLanes;
            prefetch(block.ahead, dtype, at);
            v[n] = load_dtype<dtype>(block.rows, at);
        }
        for (int q = 0; q < Q; ++q) {
            const F32 p = splat(scores[static_cast<size_t>(q) * kSplitTokens + key]);
            for (int n = 0; n < N; ++n) s[q][n] = fma(p, v[n], s[q][n]);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) store(sums + q * w.width + n * kLanes, s[q][n]);
}

template <int Q, int dtype>
BW_INLINE void add_values(const Workspace& w, int row, int key_offset, const KvBlock& block,
                          int first, int last) {
    constexpr int N = max_int(1, min_int(4, kSumsInRegisters / Q));
    int column = 0;
    for (; column + N * kLanes <= w.width; column += N * kLanes)
        add_values_columns<Q, N, dtype>(w, row, key_offset, block, first, last, column);
    for (; column < w.width; column += kLanes)
        add_values_columns<Q, 1, dtype>(w, row, key_offset, block, first, last, column);
}

// Scores of a row's seen keys become e^(score - maximum), the others 0.
BW_INLINE void softmax_split(const Workspace& w, int row, int num_seen) {
    float* scores = w.scores + static_cast<size_t>(row) * kSplitTokens;
    const int padded = padded_width(num_seen);
    for (int i = num_seen; i < padded; ++i) scores[i] = -__builtin_inff();
    F32 most = splat(-__builtin_inff());
    for (int i = 0; i < padded; i += kLanes) most = max(most, load(scores + i));
    float lanes[kLanes], maximum;
    store(lanes, most);
    maximum = lanes[0];
    for (int i = 1; i < kLanes; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
    F32 sum = zero();
    for (int i = 0; i < padded; i += kLanes) {
        const F32 p = exponential(load(scores + i) - splat(maximum));
        store(scores + i, p);
        sum = sum + p;
    }
    w.maxima[row] = maximum;
    w.totals[row] = total(sum);
}

// Merge a split's sums into the running ones.
BW_INLINE void merge(Running& state, float* running, float maximum, float total, const float* sums,
                     int width) {
    const float most = state.maximum > maximum ? state.maximum : maximum;
    float factors[kLanes] = {};
    factors[0] = state.maximum - most;
    factors[1] = maximum - most;
    store(factors, exponential(load(factors)));
    for (int i = 0; i < width; i += kLanes)
        store(running + i, fma(load(running + i), splat(factors[0]),
                               load(sums + i) * splat(factors[1])));
    state.total = state.total * factors[0] + total * factors[1];
    state.maximum = most;
}

BW_INLINE void finish_row(const AttentionCall& c, int token, int head, const Running& state,
                          float* running) {
    const int width = padded_width(c.D);
    for (int i = 0; i < width; i += kLanes)
        store(running + i, load(running + i) / splat(state.total));
    narrow_row(running, c.D,
               offset(c.out, c.dtype, (static_cast<size_t>(token) * c.H + head) * c.D), c.dtype);
}

// What a split's rows and keys are.
struct Split {
    int start, num_keys;       // keys [start, start + num_keys) of the sequence
    int first_row, last_row;   // rows whose queries see any of them
    int first_position, heads;

    // How many of the split's keys a row sees.
    int seen(int row) const {
        return min_int(num_keys, first_position + row / heads + 1 - start);
    }
};

BW_INLINE const void* kv_block_at(const AttentionCall& c, int plane, int sequence, int group,
                                  int key) {
    const int64_t block =
        c.block_tables[static_cast<size_t>(sequence) * c.max_blocks + key / kKvBlockTokens];
    return static_cast<const char*>(c.cache) +
           ((plane * c.num_blocks + block) * c.G + group) * kv_block_bytes(c.cache_dtype, c.D);
}

// Where the i-th KV block that a split reads lies. A split of n blocks reads n of keys, then n of
// values. i >= 2n names what is read after the split, to be fetched ahead: the keys of the tile's
// next split. After its last one, if the tile is one decoding token's, those of the tile that is the
// next in the plan: of the sequence's next split, the next group, or the next sequence. Null where
// nothing is known.
BW_INLINE const void* kv_block_of_split(const AttentionCall& c, const AttentionTile& tile,
                                        const Split& split, int i) {
    const int num_blocks = (split.num_keys + kKvBlockTokens - 1) / kKvBlockTokens;
    if (i < 2 * num_blocks)
        return kv_block_at(c, i / num_blocks, tile.sequence, tile.group,
                           split.start + i % num_blocks * kKvBlockTokens);
    const int past = (i - 2 * num_blocks) * kKvBlockTokens;
    const int next = split.start + kSplitTokens + past;
    const int last = tile.first_position + tile.num_tokens;
    if (next < last && (tile.num_tokens == 1 || next < tile.last_split * kSplitTokens))
        return kv_block_at(c, 0, tile.sequence, tile.group, next);
    if (next < last || tile.num_tokens > 1) return nullptr;
    const bool is_last = tile.group + 1 == c.G;
    const int sequence = tile.sequence + is_last, group = is_last ? 0 : tile.group + 1;
    if (sequence == c.S || past >= c.context_lens[sequence]) return nullptr;
    return kv_block_at(c, 0, sequence, group, past);
}

// The i-th KV block of a split as it lies in the cache, or widened into out: that pays where more
// than one run of 4 rows reads it, and where its rows are not whole vectors.
BW_INLINE KvBlock read_kv_block(const AttentionCall& c, const AttentionTile& tile,
                                const Split& split, int i, int num_rows, bool widened, float* out) {
    const void* rows = kv_block_of_split(c, tile, split, i);
    const void* ahead = kv_block_of_split(c, tile, split, i + kv_blocks_ahead(c.cache_dtype));
    if (!widened) return {rows, c.cache_dtype, static_cast<size_t>(c.D), ahead};
    const int width = padded_width(c.D);
    for (int r = 0; r < num_rows; ++r) {
        const size_t at = static_cast<size_t>(r) * c.D;
        for (int k = 0; k < c.D; k += kLanes) prefetch(ahead, c.cache_dtype, at + k);
        widen_row(offset(rows, c.cache_dtype, at), c.cache_dtype, c.D,
                  out + static_cast<size_t>(r) * width);
    }
    return {out, kFloat32, static_cast<size_t>(width), nullptr};
}

template <int dtype>
static void score_kv_block(const Workspace& w, const Split& split, int key, const KvBlock& block,
                           int D, float scale) {
    int row = split.first_row;
    for (; row + 4 <= split.last_row; row += 4) score<4, dtype>(w, row, key, block, D, scale);
    for (; row + 2 <= split.last_row; row += 2) score<2, dtype>(w, row, key, block, D, scale);
    for (; row < split.last_row; ++row) score<1, dtype>(w, row, key, block, D, scale);
}

// The queries' codes, which the keys' are multiplied by.
static void quantize_queries(const Workspace& w, int rows, int D, float scale) {
    for (int row = 0; row < rows; ++row) {
        int8_t* codes = w.codes + static_cast<size_t>(row) * w.width;
        w.query_scales[row] =
            quantize_head(w.queries + static_cast<size_t>(row) * w.width, D, codes) * scale;
        int32_t sum = 0;
        for (int i = 0; i < D; ++i) sum += codes[i];
        w.query_starts[row] = -zero_of(8) * sum;
    }
}

// As score, of codes: a sum is exact in int32, and scaled once.
template <int Q>
static void score_codes(const Workspace& w, int row, int key_offset, const void* keys,
                        const void* ahead, int D) {
    int32_t sums[Q * kRowBlockRows];
    register_tile<8, Q, 1, true>(static_cast<const uint8_t*>(keys),
                                 w.codes + static_cast<size_t>(row) * w.width, w.width, D,
                                 w.query_starts + row, 1, sums, static_cast<const uint8_t*>(ahead));
    const F32 scales = load(scales_of(keys, D));
    for (int q = 0; q < Q; ++q)
        store(w.scores + static_cast<size_t>(row + q) * kSplitTokens + key_offset,
              to_float(load(sums + q * kRowBlockRows)) * (scales * splat(w.query_scales[row + q])));
}

static void score_codes_of_block(const Workspace& w, const Split& split, int key, const void* keys,
                                 const void* ahead, int D) {
    if (ahead) __builtin_prefetch(scales_of(ahead, D));
    else ahead = keys;
    constexpr int kMost = register_tile_tokens(8) / 4 * 4;
    int row = split.first_row;
    for (; row + kMost <= split.last_row; row += kMost, ahead = keys)
        score_codes<kMost>(w, row, key, keys, ahead, D);
    for (; row + 4 <= split.last_row; row += 4, ahead = keys)
        score_codes<4>(w, row, key, keys, ahead, D);
    for (; row + 2 <= split.last_row; row += 2, ahead = keys)
        score_codes<2>(w, row, key, keys, ahead, D);
    for (; row < split.last_row; ++row, ahead = keys) score_codes<1>(w, row, key, keys, ahead, D);
}

// A value is its code times its scale, which so goes into the weight: once a key, not once a column.
static void scale_weights(const Workspace& w, const Split& split, int key, const void* values,
                          const void* ahead, int D) {
    if (ahead) __builtin_prefetch(scales_of(ahead, D));
    const F32 scales = load(scales_of(values, D));
    for (int row = split.first_row; row < split.last_row; ++row) {
        float* weights = w.scores + static_cast<size_t>(row) * kSplitTokens + key;
        store(weights, load(weights) * scales);
    }
}

// Q rows from row on. Unseen keys are skipped, not multiplied by zero: their values may be anything.
template <int Q, int dtype>
BW_INLINE void add_rows(const Workspace& w, const Split& split, int row, int key,
                        const KvBlock& block) {
    const int common = max_int(0, min_int(kKvBlockTokens, split.seen(row) - key));
    if (common > 0) add_values<Q, dtype>(w, row, key, block, 0, common);
    for (int r = row + 1; r < row + Q; ++r) {
        const int last = min_int(kKvBlockTokens, split.seen(r) - key);
        if (last > common) add_values<1, dtype>(w, r, key, block, common, last);
    }
}

template <int dtype>
static void add_kv_block(const Workspace& w, const Split& split, int key, const KvBlock& block) {
    int row = split.first_row;
    for (; row + 4 <= split.last_row; row += 4) add_rows<4, dtype>(w, split, row, key, block);
    for (; row + 2 <= split.last_row; row += 2) add_rows<2, dtype>(w, split, row, key, block);
    for (; row < split.last_row; ++row) add_rows<1, dtype>(w, split, row, key, block);
}

// Leaves each row's maximum, total and sums over the split in the workspace.
static void attend_split(const AttentionCall& c, const AttentionTile& tile, const Split& split,
                         const Workspace& w) {
    const bool widened = split.last_row - split.first_row > 4 || c.D % kLanes;
    const int num_blocks = (split.num_keys + kKvBlockTokens - 1) / kKvBlockTokens;
    const auto block = [&](int i) {
        const int num_rows =
            min_int(kKvBlockTokens, split.num_keys - i % num_blocks * kKvBlockTokens);
        return read_kv_block(c, tile, split, i, num_rows, widened, w.block);
    };
    const auto rows = [&](int i) { return kv_block_of_split(c, tile, split, i); };
    const bool is_int8 = c.cache_dtype == kInt8;
    for (int i = 0; i < num_blocks; ++i) {
        const int key = i * kKvBlockTokens;
        if (is_int8) {
            score_codes_of_block(w, split, key, rows(i), rows(i + kv_blocks_ahead(kInt8)), c.D);
            continue;
        }
        const KvBlock keys = block(i);
        switch (keys.dtype) {
            case kBFloat16: score_kv_block<kBFloat16>(w, split, key, keys, c.D, c.scale); break;
            case kFloat16: score_kv_block<kFloat16>(w, split, key, keys, c.D, c.scale); break;
            default: score_kv_block<kFloat32>(w, split, key, keys, w.width, c.scale);
        }
    }
    for (int row = split.first_row; row < split.last_row; ++row)
        softmax_split(w, row, split.seen(row));
    for (size_t i = static_cast<size_t>(split.first_row) * w.width;
         i < static_cast<size_t>(split.last_row) * w.width; i += kLanes)
        store(w.sums + i, zero());
    for (int i = 0; i < num_blocks; ++i) {
        const KvBlock values = block(num_blocks + i);
        const int key = i * kKvBlockTokens;
        if (is_int8)
            scale_weights(w, split, key, rows(num_blocks + i),
                          rows(num_blocks + i + kv_blocks_ahead(kInt8)), c.D);
        switch (values.dtype) {
            case kInt8: add_kv_block<kInt8>(w, split, key, values); break;
            case kBFloat16: add_kv_block<kBFloat16>(w, split, key, values); break;
            case kFloat16: add_kv_block<kFloat16>(w, split, key, values); break;
            default: add_kv_block<kFloat32>(w, split, key, values);
        }
    }
}

static void attention(const AttentionCall& c, const AttentionTile& tile, float* partial) {
    const int heads = c.H / c.G, rows = tile.num_tokens * heads;
    const Workspace w(rows, c.D);
    for (int row = 0; row < rows; ++row) {
        const size_t head = static_cast<size_t>(tile.first_token + row / heads) * c.H +
                            tile.group * heads + row % heads;
        widen_row(offset(c.queries, c.dtype, head * c.D), c.dtype, c.D,
                  w.queries + static_cast<size_t>(row) * w.width);
    }
    if (c.cache_dtype == kInt8) quantize_queries(w, rows, c.D, c.scale);
    for (int row = 0; row < rows; ++row) w.states[row] = Running();
    for (size_t i = 0; i < static_cast<size_t>(rows) * w.width; i += kLanes)
        store(w.running + i, zero());

    const int num_keys = tile.first_position + tile.num_tokens;
    for (int index = tile.first_split; index < tile.last_split; ++index) {
        const int start = index * kSplitTokens;
        // Rows of earlier tokens may not reach this split.
        const Split split{start,
                          min_int(kSplitTokens, num_keys - start),
                          max_int(0, start - tile.first_position) * heads,
                          rows,
                          tile.first_position,
                          heads};
        attend_split(c, tile, split, w);
        for (int row = split.first_row; row < rows; ++row) {
            const float* sums = w.sums + static_cast<size_t>(row) * w.width;
            if (partial) {
                float* p = partial + static_cast<size_t>(row) * (w.width + kLanes);
                for (int i = 0; i < w.width; i += kLanes) store(p + i, load(sums + i));
                p[w.width] = w.maxima[row];
                p[w.width + 1] = w.totals[row];
            } else {
                merge(w.states[row], w.running + static_cast<size_t>(row) * w.width,
                      w.maxima[row], w.totals[row], sums, w.width);
            }
        }
    }
    if (partial) return;
    for (int row = 0; row < rows; ++row)
        finish_row(c, tile.first_token + row / heads, tile.group * heads + row % heads,
                   w.states[row], w.running + static_cast<size_t>(row) * w.width);
}

static void merge_splits(const AttentionCall& c, const AttentionTile& tile, const float* partials) {
    const int heads = c.H / c.G, width = padded_width(c.D), stride = width + kLanes;
    float* running = scratch(kRowScratch, width);
    for (int head = 0; head < heads; ++head) {
        Running state;
        for (int i = 0; i < width; i += kLanes) store(running + i, zero());
        for (int split = tile.first_split; split < tile.last_split; ++split) {
            const float* p =
                partials + (static_cast<size_t>(split - tile.first_split) * heads + head) * stride;
            merge(state, running, p[width], p[width + 1], p, width);
        }
        finish_row(c, tile.first_token, tile.group * heads + head, state, running);
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
