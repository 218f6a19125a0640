// Causal attention over the paged cache, in splits of 256 keys by absolute position.
//
// Within a split: scores, their maximum, exponentials, and their sum over the values, key by key.
// Splits are merged first to last with the running maximum (arXiv:2205.14135). A query's sums thus
// depend on its own position alone: the same whether its splits run on one thread or on many, and
// whether it arrives in a chunk of 1 or of 500.

#pragma once

#include "dots.h"

namespace bitwatt {
namespace BITWATT_ISA {

// The memory of one tile: rows are its queries, token by token, a group's heads side by side.
struct Workspace {
    float *queries, *keys, *scores, *values, *sums, *running, *maxima, *totals;
    int width;

    Workspace(int rows, int D) : width(padded_width(D)) {
        const size_t row_floats = static_cast<size_t>(rows) * width;
        float* p = scratch(kTileScratch, 3 * row_floats + 2 * kLanes * width +
                                             static_cast<size_t>(rows) * (kSplitTokens + 2));
        queries = p, p += row_floats;
        sums = p, p += row_floats;
        running = p, p += row_floats;
        keys = p, p += kLanes * width;
        values = p, p += kLanes * width;
        scores = p, p += static_cast<size_t>(rows) * kSplitTokens;
        maxima = p, p += rows;
        totals = p;
    }
};

template <int Q>
BW_INLINE void score(const Workspace& w, int row, int key_offset, float scale) {
    constexpr int R = kLanes / Q;
    for (int key = 0; key < kLanes; key += R) {
        float lanes[kLanes];
        store(lanes, dots<Q, kFloat32>(w.queries + static_cast<size_t>(row) * w.width, w.width,
                                       w.keys + static_cast<size_t>(key) * w.width, w.width,
                                       w.width) *
                         splat(scale));
        for (int q = 0; q < Q; ++q)
            for (int r = 0; r < R; ++r)
                w.scores[static_cast<size_t>(row + q) * kSplitTokens + key_offset + key + r] =
                    lanes[r * Q + q];
    }
}

// sums[row + q] += score * value for the keys [first, last) of a block, 16 * N columns from column.
template <int Q, int N>
BW_INLINE void add_values_columns(const Workspace& w, int row, int key_offset, int first, int last,
                                  int column) {
    F32 s[Q][N];
    float* sums = w.sums + static_cast<size_t>(row) * w.width + column;
    const float* scores = w.scores + static_cast<size_t>(row) * kSplitTokens + key_offset;
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) s[q][n] = load(sums + q * w.width + n * kLanes);
    for (int key = first; key < last; ++key) {
        F32 v[N];
        for (int n = 0; n < N; ++n)
            v[n] = load(w.values + static_cast<size_t>(key) * w.width + column + n * kLanes);
        for (int q = 0; q < Q; ++q) {
            const F32 p = splat(scores[static_cast<size_t>(q) * kSplitTokens + key]);
            for (int n = 0; n < N; ++n) s[q][n] = fma(p, v[n], s[q][n]);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) store(sums + q * w.width + n * kLanes, s[q][n]);
}

template <int Q>
BW_INLINE void add_values(const Workspace& w, int row, int key_offset, int first, int last) {
    constexpr int N = max_int(1, min_int(4, kSumsInRegisters / Q));
    int column = 0;
    for (; column + N * kLanes <= w.width; column += N * kLanes)
        add_values_columns<Q, N>(w, row, key_offset, first, last, column);
    for (; column < w.width; column += kLanes)
        add_values_columns<Q, 1>(w, row, key_offset, first, last, column);
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

struct Running {
    float maximum = -__builtin_inff(), total = 0.0f;
};

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

// 16 rows of the cache as floats; rows from num_valid on, not written yet, as zeros.
BW_INLINE void widen_block(const AttentionCall& c, int plane, int64_t block, int group,
                           int num_valid, float* out) {
    const int width = padded_width(c.D);
    const size_t first =
        (((static_cast<size_t>(plane) * c.num_blocks + block) * c.G + group) * kLanes) * c.D;
    const void* page = offset(c.cache, c.cache_dtype, first);
    for (int key = 0; key < kLanes; ++key) {
        float* row = out + static_cast<size_t>(key) * width;
        if (key < num_valid)
            widen_row(offset(page, c.cache_dtype, static_cast<size_t>(key) * c.D), c.cache_dtype,
                      c.D, row);
        else
            for (int i = 0; i < width; i += kLanes) store(row + i, zero());
    }
}

static void attention(const AttentionCall& c, const AttentionTile& tile, float* partial) {
    const int heads = c.H / c.G, rows = tile.num_tokens * heads;
    const Workspace w(rows, c.D);
    const int32_t* blocks = c.block_tables + static_cast<size_t>(tile.sequence) * c.max_blocks;
    for (int row = 0; row < rows; ++row) {
        const size_t head =
            static_cast<size_t>(tile.first_token + row / heads) * c.H + tile.group * heads +
            row % heads;
        widen_row(offset(c.queries, c.dtype, head * c.D), c.dtype, c.D,
                  w.queries + static_cast<size_t>(row) * w.width);
    }
    Running* states = reinterpret_cast<Running*>(
        scratch(kRowScratch, static_cast<size_t>(rows) * sizeof(Running) / sizeof(float)));
    for (int row = 0; row < rows; ++row) states[row] = Running();
    for (size_t i = 0; i < static_cast<size_t>(rows) * w.width; i += kLanes)
        store(w.running + i, zero());

    const int num_keys = tile.first_position + tile.num_tokens;
    for (int split = tile.first_split; split < tile.last_split; ++split) {
        const int start = split * kSplitTokens;
        const int keys = min_int(kSplitTokens, num_keys - start);
        // Rows of earlier tokens may not reach this split.
        const int first_row = max_int(0, start - tile.first_position) * heads;
        auto seen = [&](int row) {
            return min_int(keys, tile.first_position + row / heads + 1 - start);
        };
        for (int key = 0; key < keys; key += kLanes) {
            widen_block(c, 0, blocks[(start + key) / kLanes], tile.group, keys - key, w.keys);
            int row = first_row;
            for (; row + 4 <= rows; row += 4) score<4>(w, row, key, c.scale);
            for (; row < rows; ++row) score<1>(w, row, key, c.scale);
        }
        for (int row = first_row; row < rows; ++row) softmax_split(w, row, seen(row));
        for (size_t i = 0; i < static_cast<size_t>(rows) * w.width; i += kLanes)
            store(w.sums + i, zero());
        for (int key = 0; key < keys; key += kLanes) {
            widen_block(c, 1, blocks[(start + key) / kLanes], tile.group, keys - key, w.values);
            int row = first_row;
            for (; row + 4 <= rows; row += 4) {
                // Unseen keys are skipped, not multiplied by zero: their values may be anything.
                const int common = min_int(kLanes, seen(row) - key);
                if (common > 0) add_values<4>(w, row, key, 0, common);
                for (int r = row; r < row + 4; ++r) {
                    const int last = min_int(kLanes, seen(r) - key);
                    if (last > max_int(0, common))
                        add_values<1>(w, r, key, max_int(0, common), last);
                }
            }
            for (; row < rows; ++row) {
                const int last = min_int(kLanes, seen(row) - key);
                if (last > 0) add_values<1>(w, row, key, 0, last);
            }
        }
        for (int row = first_row; row < rows; ++row) {
            const float* sums = w.sums + static_cast<size_t>(row) * w.width;
            if (partial) {
                float* p = partial + static_cast<size_t>(row) * (w.width + kLanes);
                for (int i = 0; i < w.width; i += kLanes) store(p + i, load(sums + i));
                p[w.width] = w.maxima[row];
                p[w.width + 1] = w.totals[row];
            } else {
                merge(states[row], w.running + static_cast<size_t>(row) * w.width, w.maxima[row],
                      w.totals[row], sums, w.width);
            }
        }
    }
    if (partial) return;
    for (int row = 0; row < rows; ++row)
        finish_row(c, tile.first_token + row / heads, tile.group * heads + row % heads,
                   states[row], w.running + static_cast<size_t>(row) * w.width);
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
