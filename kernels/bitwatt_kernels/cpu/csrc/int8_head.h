// The language-model head rounded to int8, a scale a row: half the bytes of the 16-bit one.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

constexpr int kChunk = 64;  // columns multiplied at once

// What a row's sum exceeds the product by, per unit of the sum of its codes.
#if defined(__AVX512VNNI__)
constexpr int kActivationOffset = 128;  // vpdpbusd wants them unsigned
#else
constexpr int kActivationOffset = 0;
#endif

// sum += 64 activations times 64 codes, whichever lanes they fall in.
BW_INLINE I32 multiply_chunk(I32 sum, const int8_t* x, const int8_t* codes) {
#if defined(__AVX512VNNI__)
    const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(x), _mm512_set1_epi8(static_cast<char>(0x80)));
    return {_mm512_dpbusd_epi32(sum.v, a, _mm512_loadu_si512(codes))};
#elif defined(__AVX2__)
    // |a| times the code with a's sign: two such products are at most 2 * 128 * 127, within int16.
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
        sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(pairs, ones));
    }
    return sum;
#elif defined(__ARM_FEATURE_DOTPROD)
    for (int i = 0; i < 4; ++i)
        sum.v[i] = vdotq_s32(sum.v[i], vld1q_s8(x + 16 * i), vld1q_s8(codes + 16 * i));
    return sum;
#else
    int32_t lanes[kLanes];
    store(lanes, sum);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) lanes[i] += x[4 * i + j] * codes[4 * i + j];
    return load(lanes);
#endif
}

template <int Q>
static void int8_head_rows(const Int8HeadCall& c, int first_row, int last_row) {
    constexpr int R = kLanes / Q;
    const int whole = c.hidden / kChunk * kChunk;
    for (int row = first_row; row < last_row; row += R) {
        const int rows = min_int(R, last_row - row);
        const int8_t* codes = c.codes + static_cast<size_t>(row) * c.hidden;
        for (int t = 0; t < c.T; t += Q) {
            const int8_t* x = c.x + static_cast<size_t>(t) * c.x_stride;
            I32 sums[kLanes];
            for (I32& sum : sums) sum = splat(int32_t{0});
            for (int i = 0; i < whole; i += kChunk)
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    // Rows past the last repeat it; their logits are not stored.
                    const int8_t* w =
                        codes + static_cast<size_t>(min_int(r, rows - 1)) * c.hidden + i;
                    if (t == 0) __builtin_prefetch(w + static_cast<size_t>(R) * c.hidden);
                    for (int q = 0; q < Q; ++q)
                        sums[q * R + r] = multiply_chunk(sums[q * R + r], x + q * c.x_stride + i, w);
                }
            if (whole < c.hidden)
                for (int r = 0; r < rows; ++r) {
                    int8_t rest[kChunk] = {};
                    __builtin_memcpy(rest, codes + static_cast<size_t>(r) * c.hidden + whole,
                                     c.hidden - whole);
                    for (int q = 0; q < Q; ++q)
                        sums[q * R + r] =
                            multiply_chunk(sums[q * R + r], x + q * c.x_stride + whole, rest);
                }
            int32_t lanes[kLanes];
            store(lanes, totals(sums));
            for (int q = 0; q < min_int(Q, c.T - t); ++q)
                for (int r = 0; r < rows; ++r) {
                    const int32_t sum = lanes[q * R + r] - kActivationOffset * c.sums[row + r];
                    c.out[static_cast<size_t>(t + q) * c.V + row + r] =
                        static_cast<float>(sum) / c.x_scales[t + q] * c.scales[row + r];
                }
        }
    }
}

static void int8_head(const Int8HeadCall& c, int first_row, int last_row) {
    switch (head_tile(c.T)) {
        case 1: return int8_head_rows<1>(c, first_row, last_row);
        case 2: return int8_head_rows<2>(c, first_row, last_row);
        default: return int8_head_rows<4>(c, first_row, last_row);
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
