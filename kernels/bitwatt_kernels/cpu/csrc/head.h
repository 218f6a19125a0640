// The language-model head: logits in float32 of rows kept as they came.
//
// A weight row is read once a token tile; while one group of rows is multiplied, the next is
// fetched. Where the machine multiplies pairs of bfloat16 (AVX512_BF16), it does so for a bfloat16
// head of bfloat16 activations; else everything is widened to float32.

#pragma once

#include "dots.h"

namespace bitwatt {
namespace BITWATT_ISA {

#if defined(__AVX512BF16__)

constexpr int kPairLanes = 32;

BW_INLINE __m512bh load_pairs(const uint16_t* p) {
    return bits<__m512bh>(_mm512_loadu_si512(p));
}

template <int Q, int R>
BW_INLINE void dot_pairs(const uint16_t* x, size_t x_stride, const uint16_t* rows,
                         size_t row_stride, int n, F32* sums, int stride, Ahead ahead) {
    __m512 s[R * Q];
    for (int j = 0; j < R * Q; ++j) s[j] = _mm512_setzero_ps();
    int i = 0;
    for (; i + kPairLanes <= n; i += kPairLanes) {
        __m512bh a[Q];
        for (int q = 0; q < Q; ++q) a[q] = load_pairs(x + q * x_stride + i);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const uint16_t* row = rows + r * row_stride + i;
            if (ahead.rows >> r & 1)
                _mm_prefetch(reinterpret_cast<const char*>(row + ahead.distance), _MM_HINT_T0);
            const __m512bh w = load_pairs(row);
            for (int q = 0; q < Q; ++q) s[r * Q + q] = _mm512_dpbf16_ps(s[r * Q + q], w, a[q]);
        }
    }
    if (i < n) {
        const __mmask32 rest = (1u << (n - i)) - 1;
        for (int r = 0; r < R; ++r) {
            const __m512bh w =
                bits<__m512bh>(_mm512_maskz_loadu_epi16(rest, rows + r * row_stride + i));
            for (int q = 0; q < Q; ++q)
                s[r * Q + q] = _mm512_dpbf16_ps(s[r * Q + q], w, load_pairs(x + q * x_stride + i));
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sums[q * stride + r].v = s[r * Q + q];
}

#endif

// Logits of Q tokens from t on, for a group of up to R = 16 / Q rows.
template <int Q, int dtype>
BW_INLINE void head_group(const HeadCall& c, int t, int row, int num_rows) {
    constexpr int R = kLanes / Q;
    const void* w = offset(c.weight, dtype, static_cast<size_t>(row) * c.hidden);
    // The tiles of tokens share out bringing the next group into the cache.
    unsigned fetched = 0;
    for (int r = t / Q; r < R; r += (c.T + Q - 1) / Q) fetched |= 1u << r;
    const Ahead ahead{static_cast<size_t>(R) * c.hidden, fetched};
    F32 sums[kLanes];
    if (num_rows < R)
        for (int j = 0; j < kLanes; ++j) sums[j] = zero();
    F32 logits;
#if defined(__AVX512BF16__)
    if (dtype == kBFloat16 && c.x_dtype == kBFloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(c.x) + static_cast<size_t>(t) * c.x_stride;
        const uint16_t* rows = static_cast<const uint16_t*>(w);
        if (num_rows == R)
            dot_pairs<Q, R>(x, c.x_stride, rows, c.hidden, c.hidden, sums, R, ahead);
        else
            for (int r = 0; r < num_rows; ++r)
                dot_pairs<Q, 1>(x, c.x_stride, rows + static_cast<size_t>(r) * c.hidden, c.hidden,
                                c.hidden, sums + r, R, Ahead());
        logits = totals(sums);
    } else
#endif
    {
        const float* x = static_cast<const float*>(c.x) + static_cast<size_t>(t) * c.x_stride;
        if (num_rows == R) {
            logits = dots<Q, dtype>(x, c.x_stride, w, c.hidden, c.hidden, ahead);
        } else {
            for (int r = 0; r < num_rows; ++r)
                dot_lanes<Q, 1, dtype>(x, c.x_stride,
                                       offset(w, dtype, static_cast<size_t>(r) * c.hidden),
                                       c.hidden, c.hidden, sums + r, R, Ahead());
            logits = totals(sums);
        }
    }
    float lanes[kLanes];
    store(lanes, logits);
    for (int q = 0; q < min_int(Q, c.T - t); ++q)
        for (int r = 0; r < num_rows; ++r)
            c.out[static_cast<size_t>(t + q) * c.V + row + r] = lanes[q * R + r];
}

template <int Q, int dtype>
static void head_rows(const HeadCall& c, int first_row, int last_row) {
    constexpr int R = kLanes / Q;
    for (int row = first_row; row < last_row; row += R)
        for (int t = 0; t < c.T; t += Q)
            head_group<Q, dtype>(c, t, row, min_int(R, last_row - row));
}

#if defined(__AVX512BF16__)

// sums[q * R + r] += columns [0, n) of row r times x[q], n a multiple of 32.
template <int Q, int R>
BW_INLINE void add_pairs(const uint16_t* x, size_t x_stride, const uint16_t* rows,
                         size_t row_stride, int n, F32* sums, size_t ahead) {
    __m512 s[R * Q];
    for (int j = 0; j < R * Q; ++j) s[j] = sums[j].v;
    for (int i = 0; i < n; i += kPairLanes) {
        __m512bh a[Q];
        for (int q = 0; q < Q; ++q) a[q] = load_pairs(x + q * x_stride + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint16_t* row = rows + r * row_stride + i;
            if (ahead) _mm_prefetch(reinterpret_cast<const char*>(row + ahead), _MM_HINT_T1);
            const __m512bh w = load_pairs(row);
            for (int q = 0; q < Q; ++q) s[q * R + r] = _mm512_dpbf16_ps(s[q * R + r], w, a[q]);
        }
    }
    for (int j = 0; j < R * Q; ++j) sums[j].v = s[j];
}

// The same sums as head_rows<4>, 16 rows and 8 tokens at a time, cut along the row: so that the
// tokens' part stays in the first cache while the rows pass. Returns the first row not done.
static int head_blocks(const HeadCall& c, int first_row, int last_row) {
    constexpr int kRows = 16, kTokens = 8, kColumns = 640, kTile = 4;
    int row = first_row;
    for (; row + kRows <= last_row; row += kRows)
        for (int t = 0; t < c.T; t += kTokens) {
            const int tiles = min_int(kTokens, head_tokens(c.T) - t) / kTile;
            F32 sums[kTokens / kTile][kRows / kTile][kLanes];
            for (int i = 0; i < kTokens / kTile; ++i)
                for (int g = 0; g < kRows / kTile; ++g)
                    for (int j = 0; j < kLanes; ++j) sums[i][g][j] = zero();
            for (int column = 0; column < c.hidden; column += kColumns)
                for (int g = 0; g < kRows / kTile; ++g)
                    for (int i = 0; i < tiles; ++i) {
                        const uint16_t* x = static_cast<const uint16_t*>(c.x) +
                                            (t + i * kTile) * c.x_stride + column;
                        const uint16_t* w =
                            static_cast<const uint16_t*>(c.weight) +
                            (static_cast<size_t>(row) + g * kTile) * c.hidden + column;
                        add_pairs<kTile, kTile>(
                            x, c.x_stride, w, c.hidden, min_int(kColumns, c.hidden - column),
                            sums[i][g],
                            t == 0 && i == 0 ? static_cast<size_t>(kRows) * c.hidden : 0);
                    }
            for (int i = 0; i < tiles; ++i)
                for (int g = 0; g < kRows / kTile; ++g) {
                    float lanes[kLanes];
                    store(lanes, totals(sums[i][g]));
                    const int token = t + i * kTile;
                    for (int q = 0; q < min_int(kTile, c.T - token); ++q)
                        __builtin_memcpy(c.out + static_cast<size_t>(token + q) * c.V + row +
                                             g * kTile,
                                         lanes + q * kTile, kTile * sizeof(float));
                }
        }
    return row;
}

#endif

template <int dtype>
static void head_tiles(const HeadCall& c, int first_row, int last_row) {
#if defined(__AVX512BF16__)
    if (c.x_dtype == kBFloat16 && c.T > 4 && c.hidden % kPairLanes == 0)
        first_row = head_blocks(c, first_row, last_row);
#endif
    switch (head_tile(c.T)) {
        case 1: return head_rows<1, dtype>(c, first_row, last_row);
        case 2: return head_rows<2, dtype>(c, first_row, last_row);
        default: return head_rows<4, dtype>(c, first_row, last_row);
    }
}

static void head(const HeadCall& c, int first_row, int last_row) {
    switch (c.weight_dtype) {
        case kBFloat16: return head_tiles<kBFloat16>(c, first_row, last_row);
        case kFloat16: return head_tiles<kFloat16>(c, first_row, last_row);
        default: return head_tiles<kFloat32>(c, first_row, last_row);
    }
}

// Whether a head of this dtype reads its activations as they are; else they are widened for it.
static bool head_takes(int dtype, int weight_dtype) {
#if defined(__AVX512BF16__)
    return dtype == kBFloat16 && weight_dtype == kBFloat16;
#else
    (void)dtype, (void)weight_dtype;
    return false;
#endif
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
