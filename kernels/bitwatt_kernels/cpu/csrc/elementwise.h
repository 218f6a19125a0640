// Norm, gated activation, quantization and rotary embedding of rows, as reference/elementwise.py.
//
// The same float32 operations in the same order as the reference; the norm's mean is summed in
// float64 and rounded once, so that codes and norms equal the reference's.

#pragma once

#include "int8_heads.h"

namespace bitwatt {
namespace BITWATT_ISA {

constexpr float kQuantizationEps = 1e-5f;

BW_INLINE F32 activate(F32 gate, int activation) {
    if (activation == kRelu2) {
        const F32 positive = max(zero(), gate);
        return positive * positive;
    }
    return gate / (splat(1.0f) + exponential(zero() - gate));
}

static void gate_row(const ElementwiseCall& c, const void* gate, float* y) {
    const void* up = offset(gate, c.dtype, c.K);
    for (int i = 0; i < c.K; i += kLanes) {
        const int n = c.K - i;
        store(y + i, activate(load_some(gate, c.dtype, i, n), c.activation) *
                         load_some(up, c.dtype, i, n));
    }
}

// y holds K floats and zeros up to a multiple of 16; so it does after.
static void norm_row(float* y, int K, const void* weight, int weight_dtype, float eps) {
    F64 squares = zero_f64();
    for (int i = 0; i < K; i += kLanes) squares = add_squares(squares, load(y + i));
    const float mean = static_cast<float>(total(squares) / K);
    const F32 inverse = splat(1.0f / __builtin_sqrtf(mean + eps));
    for (int i = 0; i < K; i += kLanes)
        store(y + i, load(y + i) * inverse * load_some(weight, weight_dtype, i, K - i));
}

// K floats, and zeros up to a multiple of 16, to the codes of one scale.
static void quantize_group(const float* y, int K, int8_t* codes, float& its_scale,
                           int32_t& its_sum) {
    I32 most = splat(int32_t{0});
    for (int i = 0; i < K; i += kLanes) most = max(most, magnitude(load(y + i)));
    float peak = bits<float>(largest(most));
    if (peak < kQuantizationEps) peak = kQuantizationEps;
    const float scale = 1.0f / peak * 127.0f;  // as torch divides a number by a tensor
    I32 sum = splat(int32_t{0});
    for (int i = 0; i < K; i += kLanes) {
        I32 code = round_to_int(load(y + i) * splat(scale));
        code = max(splat(int32_t{-128}), min(splat(int32_t{127}), code));
        sum = sum + code;
        if (K - i >= kLanes) {
            store_int8(codes + i, code);
        } else {
            int8_t lanes[kLanes];
            store_int8(lanes, code);
            __builtin_memcpy(codes + i, lanes, K - i);
        }
    }
    its_scale = scale;
    its_sum = total(sum);
}

static void quantize_row(const float* y, const ElementwiseCall& c, int token) {
    const Quantized& q = c.quantized;
    int8_t* codes = q.codes + static_cast<size_t>(token) * c.K;
    size_t i = static_cast<size_t>(token) * (c.K / c.scale_group);
    for (int k = 0; k < c.K; k += c.scale_group, ++i)
        quantize_group(y + k, c.scale_group, codes + k, q.scales[i], q.sums[i]);
}

static void elementwise(const ElementwiseCall& c, int first_token, int last_token) {
    float* y = scratch(kRowScratch, padded_width(c.K));
    for (int t = first_token; t < last_token; ++t) {
        const void* x = offset(c.x, c.dtype, static_cast<size_t>(t) * c.K * (c.gated ? 2 : 1));
        if (c.gated)
            gate_row(c, x, y);
        else
            widen_row(x, c.dtype, c.K, y);
        if (c.weight) norm_row(y, c.K, c.weight, c.weight_dtype, c.eps);
        if (c.out)
            narrow_row(y, c.K, offset(c.out, c.dtype, static_cast<size_t>(t) * c.K), c.dtype);
        else
            quantize_row(y, c, t);
    }
}

// Pairs (i, i + D / 2): a * cos - b * sin and b * cos + a * sin; normed before by norm, if any.
static void rotate(const void* in, int dtype, const float* norm, float eps, const float* cos,
                   int D, void* out, int out_dtype) {
    const int half = D / 2;
    if (norm) {
        float* y = scratch(kRowScratch, padded_width(D));
        widen_row(in, dtype, D, y);
        norm_row(y, D, norm, kFloat32, eps);
        in = y;
        dtype = kFloat32;
    }
    const float* sin = cos + half;
    const void* second = offset(in, dtype, half);
    void* out_second = offset(out, out_dtype, half);
    for (int i = 0; i < half; i += kLanes) {
        const int n = half - i;
        const F32 a = load_some(in, dtype, i, n), b = load_some(second, dtype, i, n);
        const F32 c = load_some(cos, kFloat32, i, n), s = load_some(sin, kFloat32, i, n);
        store_some(out, out_dtype, i, n, a * c - b * s);
        store_some(out_second, out_dtype, i, n, b * c + a * s);
    }
}

static void rope_and_cache(const RopeCall& c, int first_token, int last_token) {
    const size_t width = static_cast<size_t>(c.H + 2 * c.G) * c.D;
    const size_t block_bytes = kv_block_bytes(c.cache_dtype, c.D);
    const size_t value_plane = static_cast<size_t>(c.num_blocks) * c.G * block_bytes;
    for (int t = first_token; t < last_token; ++t) {
        const void* row = offset(c.qkv, c.dtype, t * width);
        const float* cos = c.rope + c.positions[t] * c.D;
        for (int h = 0; h < c.H; ++h)
            rotate(offset(row, c.dtype, static_cast<size_t>(h) * c.D), c.dtype, c.query_norm, c.eps,
                   cos, c.D,
                   offset(c.queries, c.dtype, (static_cast<size_t>(t) * c.H + h) * c.D), c.dtype);
        if (c.slots[t] < 0) continue;
        const size_t block = c.slots[t] / kKvBlockTokens, place = c.slots[t] % kKvBlockTokens;
        for (int g = 0; g < c.G; ++g) {
            char* keys = static_cast<char*>(c.cache) + (block * c.G + g) * block_bytes;
            char* values = keys + value_plane;
            const void* key = offset(row, c.dtype, static_cast<size_t>(c.H + g) * c.D);
            const void* value = offset(key, c.dtype, static_cast<size_t>(c.G) * c.D);
            if (c.cache_dtype == kInt8) {
                float* wide = scratch(kTileScratch, padded_width(c.D));
                store(wide + padded_width(c.D) - kLanes, zero());  // what pads a last vector
                rotate(key, c.dtype, c.key_norm, c.eps, cos, c.D, wide, kFloat32);
                write_key(wide, c.D, keys, place);
                widen_row(value, c.dtype, c.D, wide);
                write_value(wide, c.D, values, place);
                continue;
            }
            rotate(key, c.dtype, c.key_norm, c.eps, cos, c.D,
                   offset(keys, c.cache_dtype, place * c.D), c.cache_dtype);
            void* to = offset(values, c.cache_dtype, place * c.D);
            for (int i = 0; i < c.D; i += kLanes)
                store_some(to, c.cache_dtype, i, c.D - i, load_some(value, c.dtype, i, c.D - i));
        }
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
