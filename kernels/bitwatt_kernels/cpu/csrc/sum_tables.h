// Ternary linears of several tokens by tables of sums: additions alone, and a fraction of them.
//
// A byte of a row block is a row's weights of four columns, one of 81 vectors in {-1, 0, 1}^4. What
// each makes of the four columns' activations is worked out once, for W tokens side by side, and then
// looked up and added for every row: one addition of int16 lanes does the work of four products a
// token. Included by coded_linear.h, whose register tiles serve few tokens, few rows, and machines
// that multiply and sum four bytes in one instruction.
//
// A table's sums are at most 4 * 128 in size, so int16 holds the sum of 60 of them: a segment of 15
// lines. Sums are exact in any order, and scale groups are added in their own, as in add_group.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

#if defined(__AVX2__)
constexpr int kHalves = 16;
constexpr int kFewTableTokens = 32, kMostTableTokens = 32;
// From so many tokens on each takes less time than in register tiles; and in so many row blocks the
// tables are used often enough.
constexpr int kFewTablesFrom = 30, kMostTablesFrom = 30, kTablesFromBlocks = 8;
#else
constexpr int kHalves = 8;
constexpr int kFewTableTokens = 8, kMostTableTokens = 16;
constexpr int kFewTablesFrom = 1, kMostTablesFrom = 9, kTablesFromBlocks = 2;
#endif
using Halves = int16_t __attribute__((vector_size(2 * kHalves), may_alias));
using UnsignedHalves = uint16_t __attribute__((vector_size(2 * kHalves)));

constexpr int kTableSums = 81;
constexpr int kColumnsPerLine = 16;
constexpr int kTablesPerLine = 4;
constexpr int kTableRowBlocks = 64;  // whose sums of a segment stay in the second cache
constexpr int kTableLineBytes = 2 * kGroupLineBytes;

// Transposes N vectors of N lanes: log2 N times, the vectors of either half are interleaved.
using Bytes16 = int8_t __attribute__((vector_size(16)));
BW_INLINE void transpose(Bytes16 (&a)[16]) {
    for (int round = 0; round < 4; ++round) {
        Bytes16 b[16];
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                               21, 6, 22, 7, 23);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                                   28, 13, 29, 14, 30, 15, 31);
        }
        __builtin_memcpy(&a, &b, sizeof a);
    }
}
using Words4 = int32_t __attribute__((vector_size(16)));
BW_INLINE void transpose(Words4 (&a)[4]) {
    for (int round = 0; round < 2; ++round) {
        Words4 b[4];
        for (int i = 0; i < 2; ++i) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 2], 0, 4, 1, 5);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 6, 3, 7);
        }
        __builtin_memcpy(&a, &b, sizeof a);
    }
}

// Which of a table's sums each of a line's bytes names: its four digits base 4, read base 3. Fetches
// what lies ahead bytes further into the caches.
BW_INLINE void table_indices(const uint8_t* line, uint8_t* indices, int ahead) {
    for (int i = 0; i < kTableLineBytes; i += 2 * kHalves) {
        if (i % kCacheLineBytes == 0) __builtin_prefetch(line + i + ahead, 0, 2);
        UnsignedHalves x;
        __builtin_memcpy(&x, line + i, sizeof x);
        x -= x >> 2 & 0x3333;  // two digits of 2 bits: of size 4 and 1, then of size 3 and 1
        const UnsignedHalves high = x >> 4 & 0x0F0F;
        x -= (high << 3) - high;  // two of 4 bits: of size 16 and 1, then of size 9 and 1
        __builtin_memcpy(indices + i, &x, sizeof x);
    }
}

// The outputs of W tokens or fewer and some row blocks, in this thread's scratch.
template <int W>
class TableLinear {
public:
    TableLinear(const CodedLinearCall& c, int token, int num_tokens, int first_block, int last_block)
        : c_(c), token_(token), num_tokens_(num_tokens), first_block_(first_block),
          num_blocks_(last_block - first_block) {
        // What isn't used isn't touched: all of it together has to stay in the second cache.
        const size_t sums = static_cast<size_t>(num_blocks_) * kRowBlockRows * W;
        const size_t halves = sums / 2, indices = num_blocks_ * kMostLines * kTableLineBytes / 4;
        float* p = scratch(kTileScratch, 2 * sums + halves + indices);
        segment_sums_ = reinterpret_cast<int16_t*>(p);
        sums_ = reinterpret_cast<int32_t*>(p + halves);
        outputs_ = p + halves + sums;
        indices_ = reinterpret_cast<uint8_t*>(outputs_ + sums);
        if (!is_scaled_by_segment()) __builtin_memset(sums_, 0, sums * sizeof(int32_t));
        if (has_groups()) __builtin_memset(outputs_, 0, sums * sizeof(float));
    }

    void run() {
        const int num_lines = c_.K / kColumnsPerLine, group_lines = c_.scale_group / kColumnsPerLine;
        for (int line = 0; line < num_lines;) {
            const int group = line / group_lines, group_end = (group + 1) * group_lines;
            const int n = min_int(kMostLines, group_end - line);
            take_activations(line, n);
            take_indices(line, n);
            if (line % group_lines == 0 && has_groups()) take_inverses(group);
            for (int i = 0; i < n; i += kPanelLines) {
                make_tables(i);
                const bool is_last = is_scaled_by_segment() && i + kPanelLines == n;
                if (i == 0)
                    is_last ? look_up<true, true>(i, group) : look_up<true, false>(i, group);
                else
                    is_last ? look_up<false, true>(i, group) : look_up<false, false>(i, group);
            }
            line += n;
            if (is_scaled_by_segment()) continue;
            if (line == group_end && has_groups())
                add_segment_and_group(group);
            else
                add_segment();
        }
        finish_tokens();
    }

private:
    static constexpr int V = W / kHalves;
    static constexpr int kPanelLines = W >= 32 ? 1 : 32 / W;  // whose tables fill the first cache
    static constexpr int kMostLines = 15 / kPanelLines * kPanelLines;
    static_assert(64 / kColumnsPerLine % kPanelLines == 0, "groups have whole panels");

    bool has_groups() const { return c_.scale_group != c_.K; }
    // Whether a segment's sums are those of a scale group.
    bool is_scaled_by_segment() const {
        return has_groups() && c_.scale_group <= kMostLines * kColumnsPerLine;
    }
    int num_rows() const { return num_blocks_ * kRowBlockRows; }

    void take_activations(int first_line, int n) {
        for (int i = 0; i < n; ++i)
            for (int t = 0; t < W; t += 16) {
                Bytes16 a[16] = {};
                for (int m = 0; m < min_int(16, num_tokens_ - t); ++m)
                    __builtin_memcpy(&a[m],
                                     c_.x.codes + static_cast<size_t>(token_ + t + m) * c_.K +
                                         (first_line + i) * kColumnsPerLine,
                                     kColumnsPerLine);
                transpose(a);
                for (int k = 0; k < kColumnsPerLine; ++k)
                    __builtin_memcpy(&columns_[i * kColumnsPerLine + k][t], &a[k], min_int(W, 16));
            }
    }

    void take_indices(int first_line, int n) {
        const size_t block_bytes = static_cast<size_t>(c_.K) * kRowBlockRows / 4;
        for (int b = 0; b < num_blocks_; ++b)
            for (int i = 0; i < n; ++i)
                table_indices(c_.blocks + (first_block_ + b) * block_bytes +
                                  static_cast<size_t>(first_line + i) * kTableLineBytes,
                              indices_of(i) + b * kTableLineBytes, n * kTableLineBytes);
    }
    uint8_t* indices_of(int line) const {
        return indices_ + static_cast<size_t>(line) * num_blocks_ * kTableLineBytes;
    }

    void make_tables(int first_line) {
        using Narrow = int8_t __attribute__((vector_size(kHalves)));
        for (int i = 0; i < kPanelLines * kTablesPerLine; ++i)
            for (int v = 0; v < V; ++v) {
                Halves a[4];
                for (int j = 0; j < 4; ++j) {
                    const int column = (first_line + i / 4) * kColumnsPerLine + 4 * j + i % 4;
                    Narrow narrow;
                    __builtin_memcpy(&narrow, &columns_[column][v * kHalves], sizeof narrow);
                    a[j] = __builtin_convertvector(narrow, Halves);
                }
                Halves low[9], high[9];
                for (int h = 0; h < 3; ++h)
                    for (int l = 0; l < 3; ++l) {
                        low[3 * h + l] = a[0] * static_cast<int16_t>(l - 1) +
                                         a[1] * static_cast<int16_t>(h - 1);
                        high[3 * h + l] = a[2] * static_cast<int16_t>(l - 1) +
                                          a[3] * static_cast<int16_t>(h - 1);
                    }
                for (int h = 0; h < 9; ++h)
                    for (int l = 0; l < 9; ++l) tables_[i][9 * h + l][v] = high[h] + low[l];
            }
    }

    // Adds a panel's sums to the segment's, of which it may be the first; or else, having them in
    // registers, the segment's as those of its group to the outputs.
    template <bool is_first, bool is_last_of_group>
    void look_up(int first_line, int group) {
        const uint8_t* indices = indices_of(first_line);
        const size_t next_line = static_cast<size_t>(num_blocks_) * kTableLineBytes;
        Halves* sums = reinterpret_cast<Halves*>(segment_sums_);
        float* y = outputs_;
        for (int b = 0; b < num_blocks_; ++b) {
            float scales[kRowBlockRows];
            if (is_last_of_group) take_scales(b, group, scales);
            for (int r = 0; r < kRowBlockRows; ++r, sums += V, y += W, indices += kTablesPerLine) {
                Halves s[V] = {};
                if (!is_first)
                    for (int v = 0; v < V; ++v) s[v] = sums[v];
#pragma GCC unroll 4
                for (int l = 0; l < kPanelLines; ++l) {
                    const int32_t its_indices =
                        four(reinterpret_cast<const int8_t*>(indices + l * next_line));
#pragma GCC unroll 4
                    for (int q = 0; q < kTablesPerLine; ++q) {
                        const Halves* entry =
                            tables_[4 * l + q][static_cast<uint32_t>(its_indices) >> 8 * q & 0xFF];
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v) {
                            s[v] += entry[v];
                            keep_in_register(s[v]);
                        }
                    }
                }
                if (is_last_of_group) {
                    int16_t sum[W];
                    __builtin_memcpy(sum, s, sizeof sum);
                    for (int m = 0; m < W; ++m)
                        y[m] = y[m] + static_cast<float>(int32_t{sum[m]}) * inverses_[m] * scales[r];
                } else {
                    for (int v = 0; v < V; ++v) sums[v] = s[v];
                }
            }
        }
    }

    void add_segment() {
        const size_t n = static_cast<size_t>(num_rows()) * W;
        for (size_t i = 0; i < n; ++i) sums_[i] += segment_sums_[i];
    }

    // Of a scale group, 1 / the activations' scales, and a block's.
    void take_inverses(int group) {
        const int num_groups = c_.K / c_.scale_group;
        for (int m = 0; m < num_tokens_; ++m)
            inverses_[m] = 1.0f / c_.x.scales[static_cast<size_t>(token_ + m) * num_groups + group];
    }
    void take_scales(int block, int group, float* scales) const {
        const size_t first =
            (static_cast<size_t>(first_block_ + block) * (c_.K / c_.scale_group) + group) *
            kRowBlockRows;
        widen_row(offset(c_.scales, c_.scales_dtype, first), c_.scales_dtype, kRowBlockRows, scales);
    }

    // As add_group, with tokens side by side.
    void add_segment_and_group(int group) {
        int16_t* segment = segment_sums_;
        int32_t* sums = sums_;
        float* y = outputs_;
        for (int b = 0; b < num_blocks_; ++b) {
            float scales[kRowBlockRows];
            take_scales(b, group, scales);
            for (int r = 0; r < kRowBlockRows; ++r, segment += W, sums += W, y += W)
                for (int m = 0; m < W; ++m) {
                    const float sum = static_cast<float>(sums[m] + segment[m]);
                    y[m] = y[m] + sum * inverses_[m] * scales[r];
                    sums[m] = 0;
                }
        }
    }

    void finish_tokens() {
        for (int row = 0; row < num_rows(); row += kGroupRows)
            for (int t = 0; t < num_tokens_; t += 4) {
                const void* results = has_groups() ? static_cast<const void*>(outputs_) : sums_;
                alignas(64) int32_t tile[4][kGroupRows];
                for (int r = 0; r < kGroupRows; r += 4) {
                    Words4 a[4];
                    for (int i = 0; i < 4; ++i) {
                        const size_t place = static_cast<size_t>(row + r + i) * W + t;
                        __builtin_memcpy(&a[i], offset(results, kFloat32, place), sizeof a[i]);
                    }
                    transpose(a);
                    for (int i = 0; i < 4; ++i) __builtin_memcpy(&tile[i][r], &a[i], sizeof a[i]);
                }
                const int its_row = first_block_ * kRowBlockRows + row;
                const int M = min_int(4, num_tokens_ - t);
                if (!has_groups())
                    finish_sums(c_, 0, tile[0], kGroupRows, token_ + t, M, its_row);
                for (int m = 0; m < M && has_groups() && its_row < c_.N; ++m)
                    finish(c_, as_float(load(tile[m])), token_ + t + m, its_row);
            }
    }

    alignas(64) Halves tables_[kPanelLines * kTablesPerLine][kTableSums][V];
    alignas(64) int8_t columns_[kMostLines * kColumnsPerLine][W];
    float inverses_[W] = {};
    const CodedLinearCall& c_;
    const int token_, num_tokens_, first_block_, num_blocks_;
    int16_t* segment_sums_;  // [rows, W] of the segment so far
    int32_t* sums_;          // [rows, W] of a scale group's segments so far
    float* outputs_;         // [rows, W] of the scale groups so far
    uint8_t* indices_;       // [lines of a segment, rows, 4] into the tables
};

template <int W>
static void table_tile(const CodedLinearCall& c, int token, int num_tokens, int first_block,
                       int last_block) {
    const int num_parts = (last_block - first_block + kTableRowBlocks - 1) / kTableRowBlocks;
    for (int i = 0; i < num_parts; ++i)
        TableLinear<W>(c, token, num_tokens, first_block + (last_block - first_block) * i / num_parts,
                       first_block + (last_block - first_block) * (i + 1) / num_parts)
            .run();
}

// The outputs of a call's first tokens; returns how many, leaving to others those too few for it.
static int table_linear(const CodedLinearCall& c, int first_block, int last_block) {
    int token = 0;
    if (last_block - first_block < kTablesFromBlocks) return token;
    while (c.T - token >= kFewTablesFrom) {
        const bool has_most = c.T - token >= kMostTablesFrom;
        const int tokens = min_int(has_most ? kMostTableTokens : kFewTableTokens, c.T - token);
        (has_most ? table_tile<kMostTableTokens> : table_tile<kFewTableTokens>)(
            c, token, tokens, first_block, last_block);
        token += tokens;
    }
    return token;
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
