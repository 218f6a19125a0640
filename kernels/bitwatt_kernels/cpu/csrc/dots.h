// Sixteen dot products at a time: attention's scores and the language-model head's logits.
//
// Each is summed in sixteen lanes along its length and then over the lanes by the tree of totals(),
// whatever the shape of the tile it falls in: so a token's result doesn't depend on its neighbours.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

#if defined(__AVX512F__)
constexpr int kSumsInRegisters = 16;
#else
constexpr int kSumsInRegisters = 4;
#endif

template <int dtype>
BW_INLINE F32 load_dtype(const void* p, size_t index) {
    if constexpr (dtype == kFloat32) return load(static_cast<const float*>(p) + index);
    if constexpr (dtype == kBFloat16) return load_bf16(static_cast<const uint16_t*>(p) + index);
    return load_f16(static_cast<const uint16_t*>(p) + index);
}

// sums[r * Q + q] += lanes of row r times x[q], for R rows of the given stride (in elements).
template <int Q, int R, int dtype>
BW_INLINE void dot_lanes(const float* x, size_t x_stride, const void* rows, size_t row_stride,
                         int n, F32* sums) {
    F32 s[R * Q];
    for (int i = 0; i < R * Q; ++i) s[i] = zero();
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        F32 a[Q];
        for (int q = 0; q < Q; ++q) a[q] = load(x + q * x_stride + i);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F32 w = load_dtype<dtype>(rows, r * row_stride + i);
            for (int q = 0; q < Q; ++q) s[r * Q + q] = fma(w, a[q], s[r * Q + q]);
        }
    }
    if (i < n)
        for (int r = 0; r < R; ++r) {
            const F32 w = load_some(offset(rows, dtype, r * row_stride + i), dtype, 0, n - i);
            for (int q = 0; q < Q; ++q)
                s[r * Q + q] = fma(w, load(x + q * x_stride + i), s[r * Q + q]);
        }
    for (int j = 0; j < R * Q; ++j) sums[j] = s[j];
}

// Lane r * Q + q = row r · x[q], for 16 / Q rows; x padded with zeros to a multiple of 16.
template <int Q, int dtype>
BW_INLINE F32 dots(const float* x, size_t x_stride, const void* rows, size_t row_stride, int n) {
    constexpr int R = kSumsInRegisters / Q;
    F32 sums[kLanes];
    for (int r = 0; r < kLanes / Q; r += R)
        dot_lanes<Q, R, dtype>(x, x_stride, offset(rows, dtype, r * row_stride), row_stride, n,
                               sums + r * Q);
    return totals(sums);
}

template <int Q, int dtype>
static void head_rows(const HeadCall& c, int first_row, int last_row) {
    constexpr int R = kLanes / Q;
    const int width = padded_width(c.hidden);
    for (int row = first_row; row < last_row; row += R) {
        const int rows = min_int(R, last_row - row);
        for (int t = 0; t < c.T; t += Q) {
            float lanes[kLanes];
            const float* x = c.x + static_cast<size_t>(t) * width;
            const void* w = offset(c.weight, dtype, static_cast<size_t>(row) * c.hidden);
            if (rows == R) {
                store(lanes, dots<Q, dtype>(x, width, w, c.hidden, c.hidden));
            } else {
                F32 sums[kLanes];
                for (int j = 0; j < kLanes; ++j) sums[j] = zero();
                for (int r = 0; r < rows; ++r)
                    dot_lanes<Q, 1, dtype>(x, width,
                                           offset(w, dtype, static_cast<size_t>(r) * c.hidden),
                                           c.hidden, c.hidden, sums + r * Q);
                store(lanes, totals(sums));
            }
            for (int q = 0; q < min_int(Q, c.T - t); ++q)
                for (int r = 0; r < rows; ++r)
                    c.out[static_cast<size_t>(t + q) * c.V + row + r] = lanes[r * Q + q];
        }
    }
}

template <int dtype>
static void head_tiles(const HeadCall& c, int first_row, int last_row) {
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

}  // namespace BITWATT_ISA
}  // namespace bitwatt
