// Matmuls of weights kept as they came, in 16 bits or 32: a dense model's linears, and every head.
//
// Rows lie in blocks of 32 as [N / 32][ceil(K / P)][2][16][P]: two groups of 16 rows take turns,
// and a line has P neighbouring columns of 16 rows, two of bfloat16 and one of other types. So a
// block is one stream of memory, a line meets one broadcast of activations, and the sums of 16 rows
// are the lanes of a vector. Each is summed column by column, in segments of 256 columns, whatever
// the tile of tokens it falls in. Where the machine multiplies pairs of bfloat16 (AVX512_BF16), it
// does so for bfloat16 weights of bfloat16 activations; else everything is widened to float32.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

constexpr int kSegmentColumns = 256;

#if defined(__AVX512F__)
constexpr int kDenseTokens = 12;
constexpr int dense_groups(int) { return 2; }
#else
#if defined(__AVX2__)
constexpr int kDenseTokens = 5;
#else
constexpr int kDenseTokens = 4;
#endif
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr int dense_groups(int num_tokens) { return num_tokens <= 2 ? 2 : 1; }
#else
constexpr int dense_groups(int) { return 1; }  // SSE2 has registers for no more
#endif
#endif

// sums[m][r] = the 16 rows of group r times columns [first, last) of token m.
template <int M, int R, int dtype>
BW_INLINE void dense_segment(const void* lines, const float* x, size_t x_stride, int first, int last,
                            F32 (&sums)[M][R]) {
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) sums[m][r] = zero();
    if constexpr (dtype == kBFloat16) {
        for (int k = first; k < last; k += 2) {
            F32 even[R], odd[R];
            for (int r = 0; r < R; ++r) {
                const int32_t* line = static_cast<const int32_t*>(lines) + (k + r) * kGroupRows;
                if (M > 2) __builtin_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes);
                const I32 pair = load(line);
                even[r] = as_float(shift_left<16>(pair));
                odd[r] = as_float(pair & splat(static_cast<int32_t>(0xFFFF0000)));
            }
            for (int m = 0; m < M; ++m) {
                const F32 a = splat(x[m * x_stride + k]), b = splat(x[m * x_stride + k + 1]);
                for (int r = 0; r < R; ++r)
                    sums[m][r] = fma(odd[r], b, fma(even[r], a, sums[m][r]));
            }
        }
    } else {
        for (int k = first; k < last; ++k) {
            F32 w[R];
            for (int r = 0; r < R; ++r)
                w[r] = load_as(lines, dtype, (2 * k + r) * kGroupRows);
            for (int m = 0; m < M; ++m) {
                const F32 a = splat(x[m * x_stride + k]);
                for (int r = 0; r < R; ++r) sums[m][r] = fma(w[r], a, sums[m][r]);
            }
        }
    }
}

#if defined(__AVX512BF16__)

// The same of pairs of bfloat16: a line times two activations of each token.
template <int M, int R>
BW_INLINE void dense_segment_pairs(const void* lines, const uint16_t* x, size_t x_stride, int first,
                                  int last, F32 (&sums)[M][R]) {
    __m512 s[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) s[m][r] = _mm512_setzero_ps();
    for (int k = first; k < last; k += 2) {
        __m512bh w[R];
        for (int r = 0; r < R; ++r) {
            const int32_t* line = static_cast<const int32_t*>(lines) + (k + r) * kGroupRows;
            // On a Zen 5 eight tokens take 9% less with it, one takes 2% more.
            if (M > 2) __builtin_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes);
            w[r] = bits<__m512bh>(_mm512_loadu_si512(line));
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            __builtin_memcpy(&pair, x + m * x_stride + k, 4);
            const __m512bh a = bits<__m512bh>(_mm512_set1_epi32(pair));
            for (int r = 0; r < R; ++r) s[m][r] = _mm512_dpbf16_ps(s[m][r], w[r], a);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) sums[m][r] = {s[m][r]};
}

#endif

// Results of tokens [t, t + M) for R groups of rows from row on.
template <int M, int R, int dtype>
static void dense_tile(const DenseCall& c, const void* lines, int t, int row) {
    F32 total[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) total[m][r] = zero();
    for (int first = 0; first < c.columns; first += kSegmentColumns) {
        const int last = min_int(first + kSegmentColumns, c.columns);
        F32 sums[M][R];
#if defined(__AVX512BF16__)
        if (dtype == kBFloat16 && c.x_dtype == kBFloat16)
            dense_segment_pairs<M, R>(lines, static_cast<const uint16_t*>(c.x) + t * c.x_stride,
                                     c.x_stride, first, last, sums);
        else
#endif
            dense_segment<M, R, dtype>(lines, static_cast<const float*>(c.x) + t * c.x_stride,
                                      c.x_stride, first, last, sums);
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) total[m][r] = total[m][r] + sums[m][r];
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) {
            const int first = row + r * kGroupRows, rows = min_int(kGroupRows, c.N - first);
            if (rows <= 0) continue;
            F32 y = total[m][r];
            const size_t at = static_cast<size_t>(t + m) * c.N + first;
            if (c.bias) y = y + load_some(offset(c.bias, c.dtype, first), c.dtype, 0, rows);
            if (c.residual) y = y + load_some(offset(c.residual, c.dtype, at), c.dtype, 0, rows);
            store_some(offset(c.out, c.dtype, at), c.dtype, 0, rows, y);
        }
}

template <int M, int dtype>
static void dense_block(const DenseCall& c, const void* block, int t, int row) {
    constexpr int R = dense_groups(M), P = dense_columns_per_line(dtype);
    for (int r = 0; r < 2; r += R)
        dense_tile<M, R, dtype>(c, offset(block, dtype, r * kGroupRows * P), t,
                               row + r * kGroupRows);
}

template <int dtype, int M = kDenseTokens>
static void dense_block_of(int num_tokens, const DenseCall& c, const void* block, int t, int row) {
    if (num_tokens == M) return dense_block<M, dtype>(c, block, t, row);
    if constexpr (M > 1) dense_block_of<dtype, M - 1>(num_tokens, c, block, t, row);
}

template <int dtype>
static void dense_blocks(const DenseCall& c, int first_block, int last_block) {
    const int num_tiles = (c.T + kDenseTokens - 1) / kDenseTokens;
    for (int b = first_block; b < last_block; ++b) {
        const void* block =
            offset(c.weight, dtype, static_cast<size_t>(b) * kRowBlockRows * c.columns);
        for (int i = 0; i < num_tiles; ++i) {
            const int t = static_cast<int>(static_cast<int64_t>(c.T) * i / num_tiles);
            const int M = static_cast<int>(static_cast<int64_t>(c.T) * (i + 1) / num_tiles) - t;
            dense_block_of<dtype>(M, c, block, t, b * kRowBlockRows);
        }
    }
}

static void dense(const DenseCall& c, int first_block, int last_block) {
    switch (c.weight_dtype) {
        case kBFloat16: return dense_blocks<kBFloat16>(c, first_block, last_block);
        case kFloat16: return dense_blocks<kFloat16>(c, first_block, last_block);
        default: return dense_blocks<kFloat32>(c, first_block, last_block);
    }
}

// Whether weights of this dtype take such activations as they are; else those are widened first.
static bool dense_takes(int dtype, int weight_dtype) {
#if defined(__AVX512BF16__)
    return dtype == kBFloat16 && weight_dtype == kBFloat16;
#else
    (void)dtype, (void)weight_dtype;
    return false;
#endif
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
