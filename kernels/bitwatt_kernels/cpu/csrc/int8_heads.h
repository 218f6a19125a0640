// Keys, values and queries as 8-bit codes, a scale to each head of a token: the int8 KV cache.
//
// As kv_blocks.py: a code is x · 127 / max|x|, rounded half to even. A product of codes is exact, so
// that a score depends on no order; calls.h has where codes and scales lie in a KV block.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

constexpr float kSmallestPeak = 1e-30f;  // under which 127 / max|x| would leave float32

BW_INLINE float* scales_of(void* rows, int D) {
    return reinterpret_cast<float*>(static_cast<char*>(rows) + kKvBlockTokens * D);
}
BW_INLINE const float* scales_of(const void* rows, int D) {
    return reinterpret_cast<const float*>(static_cast<const char*>(rows) + kKvBlockTokens * D);
}

// x holds n floats and zeros up to a multiple of 16; so do the codes after. Returns the scale, by
// which a code is multiplied; NaN, with codes of zero, where a value is infinite or NaN.
static float quantize_head(const float* x, int n, int8_t* codes) {
    I32 most = splat(int32_t{0});
    for (int i = 0; i < n; i += kLanes) most = max(most, magnitude(load(x + i)));
    float peak = bits<float>(largest(most));
    const bool is_finite = largest(most) < 0x7F800000;
    if (peak < kSmallestPeak) peak = kSmallestPeak;
    const F32 inverse = splat(127.0f / peak);
    for (int i = 0; i < n; i += kLanes)
        store_int8(codes + i, is_finite ? round_to_int(load(x + i) * inverse) : splat(int32_t{0}));
    return is_finite ? peak * (1.0f / 127.0f) : __builtin_nanf("");
}

// The key of a KV block's token at place.
static void write_key(const float* x, int D, void* keys, size_t place) {
    int8_t* codes = reinterpret_cast<int8_t*>(scratch(kRowScratch, padded_width(D) / 4));
    scales_of(keys, D)[place] = quantize_head(x, D, codes);
    uint8_t* line = static_cast<uint8_t*>(keys) + 4 * place;
    for (int i = 0; i < D; i += 4, line += kGroupLineBytes)
        for (int j = 0; j < 4; ++j) line[j] = static_cast<uint8_t>(codes[i + j] + 128);
}

static void write_value(const float* x, int D, void* values, size_t place) {
    int8_t* codes = reinterpret_cast<int8_t*>(scratch(kRowScratch, padded_width(D) / 4));
    scales_of(values, D)[place] = quantize_head(x, D, codes);
    __builtin_memcpy(static_cast<char*>(values) + place * D, codes, D);
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
