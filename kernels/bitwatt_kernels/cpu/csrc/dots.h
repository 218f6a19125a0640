// Sixteen dot products at a time, for attention's scores.
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
    if constexpr (dtype == kInt8) return load_int8(static_cast<const int8_t*>(p) + index);
    return load_f16(static_cast<const uint16_t*>(p) + index);
}

// Fetch what lies at index elements past ahead, once a cache line; nothing where ahead is null.
BW_INLINE void prefetch(const void* ahead, int dtype, size_t index) {
    if (ahead && index * item_size(dtype) % kCacheLineBytes == 0)
        __builtin_prefetch(offset(ahead, dtype, index));
}

// sums[q * stride + r] = the lanes of row r times x[q], for R rows row_stride elements apart.
// ahead: what to fetch meanwhile, of the rows' size, or null.
template <int Q, int R, int dtype>
BW_INLINE void dot_lanes(const float* x, size_t x_stride, const void* rows, size_t row_stride,
                         int n, F32* sums, int stride, const void* ahead) {
    F32 s[R * Q];
    for (int j = 0; j < R * Q; ++j) s[j] = zero();
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        F32 a[Q];
        for (int q = 0; q < Q; ++q) a[q] = load(x + q * x_stride + i);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            prefetch(ahead, dtype, r * row_stride + i);
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
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sums[q * stride + r] = s[r * Q + q];
}

// Lane q * (16 / Q) + r = row r · x[q], for 16 / Q rows; x padded with zeros to a multiple of 16.
template <int Q, int dtype>
BW_INLINE F32 dots(const float* x, size_t x_stride, const void* rows, size_t row_stride, int n,
                   const void* ahead) {
    constexpr int kRows = kLanes / Q, R = kSumsInRegisters / Q;
    F32 sums[kLanes];
    for (int r = 0; r < kRows; r += R)
        dot_lanes<Q, R, dtype>(x, x_stride, offset(rows, dtype, r * row_stride), row_stride, n,
                               sums + r, kRows,
                               ahead ? offset(ahead, dtype, r * row_stride) : nullptr);
    return totals(sums);
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
