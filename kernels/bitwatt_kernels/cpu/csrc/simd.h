// Sixteen floats at a time, the same arithmetic in the same order on every instruction set.
//
// Included once per instruction set inside its own namespace; uses nothing that the linker could
// merge between them. Every fused multiply-add is written as one (the portable set has none).

#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "calls.h"

#if defined(BITWATT_SANITIZE)
#define BW_INLINE [[maybe_unused]] static inline  // instrumented and inlined, it takes minutes to compile
#else
#define BW_INLINE static inline __attribute__((always_inline))
#endif

namespace bitwatt {
namespace BITWATT_ISA {

constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }

template <class To, class From>
BW_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// Have x in a register here. Of several sums that are added to, a compiler takes the addends together
// first, which is the same of integers, and spills them.
template <class V>
BW_INLINE void keep_in_register([[maybe_unused]] V& x) {
#if defined(__SSE2__)
    asm("" : "+x"(x));
#endif
}

#if defined(__AVX512F__)

struct F32 {
    __m512 v;
};
struct I32 {
    __m512i v;
};
struct F64 {
    __m512d v[2];
};

BW_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
BW_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
BW_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
BW_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
BW_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
BW_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BW_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BW_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
BW_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// x86 returns b where either operand is NaN: what may be NaN is passed as b, and comes through.
BW_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
BW_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
BW_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
BW_INLINE void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
BW_INLINE I32 splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
BW_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BW_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BW_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
BW_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
BW_INLINE I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
template <int n>
BW_INLINE I32 shift_left(I32 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n>
BW_INLINE I32 shift_right(I32 a) { return {_mm512_srai_epi32(a.v, n)}; }
BW_INLINE I32 as_int(F32 a) { return {_mm512_castps_si512(a.v)}; }
BW_INLINE F32 as_float(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
BW_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
BW_INLINE I32 round_to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
BW_INLINE void store_int8(int8_t* p, I32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
BW_INLINE F32 load_bf16(const uint16_t* p) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
BW_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
BW_INLINE F32 load_int8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
BW_INLINE void store_low_halves(uint16_t* p, I32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
BW_INLINE void store_f16(uint16_t* p, F32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BW_INLINE bool has_nan(F32 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
BW_INLINE F64 zero_f64() { return {{_mm512_setzero_pd(), _mm512_setzero_pd()}}; }
BW_INLINE F64 add_squares(F64 sum, F32 x) {
    __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    return {{_mm512_fmadd_pd(lo, lo, sum.v[0]), _mm512_fmadd_pd(hi, hi, sum.v[1])}};
}
BW_INLINE double total(F64 sum) {
    double lanes[8];
    _mm512_storeu_pd(lanes, _mm512_add_pd(sum.v[0], sum.v[1]));
    for (int half = 4; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
template <int order>
BW_INLINE F32 shuffle_quarters(F32 a, F32 b) { return {_mm512_shuffle_f32x4(a.v, b.v, order)}; }
template <int order>
BW_INLINE I32 shuffle_quarters(I32 a, I32 b) { return {_mm512_shuffle_i32x4(a.v, b.v, order)}; }
template <int order>
BW_INLINE F32 shuffle_lanes(F32 a, F32 b) { return {_mm512_shuffle_ps(a.v, b.v, order)}; }
template <int order>
BW_INLINE I32 shuffle_lanes(I32 a, I32 b) {
    return {_mm512_castps_si512(shuffle_lanes<order>(F32{_mm512_castsi512_ps(a.v)},
                                                     F32{_mm512_castsi512_ps(b.v)})
                                    .v)};
}
BW_INLINE F32 permute(F32 a, __m512i lane) { return {_mm512_permutexvar_ps(lane, a.v)}; }
BW_INLINE I32 permute(I32 a, __m512i lane) { return {_mm512_permutexvar_epi32(lane, a.v)}; }
// Lane i of the result is the sum of a[i]'s lanes, added in the order of total(): each lane to the
// one 8 further, then those 4, 2 and 1 further.
template <class V>
BW_INLINE V totals(const V* a) {
    V t[8], u[4], w[2];
    for (int i = 0; i < 8; ++i)
        t[i] = shuffle_quarters<0x44>(a[i], a[i + 8]) + shuffle_quarters<0xEE>(a[i], a[i + 8]);
    for (int i = 0; i < 4; ++i)
        u[i] = shuffle_quarters<0x88>(t[i], t[i + 4]) + shuffle_quarters<0xDD>(t[i], t[i + 4]);
    for (int i = 0; i < 2; ++i)
        w[i] = shuffle_lanes<0x44>(u[i], u[i + 2]) + shuffle_lanes<0xEE>(u[i], u[i + 2]);
    // By now the sum of a[i] lies in the lane whose number is i with its two lowest bits exchanged,
    // and its two highest: each pair of shuffles above deals with one bit, in its own order.
    const __m512i lane = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return permute(shuffle_lanes<0x88>(w[0], w[1]) + shuffle_lanes<0xDD>(w[0], w[1]), lane);
}

#elif defined(__AVX2__)

struct F32 {
    __m256 v[2];
};
struct I32 {
    __m256i v[2];
};
struct F64 {
    __m256d v[4];
};

#define BW_PAIR(type, expression) \
    type r;                       \
    for (int i = 0; i < 2; ++i) r.v[i] = expression; \
    return r

BW_INLINE F32 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
BW_INLINE F32 splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
BW_INLINE F32 load(const float* p) { BW_PAIR(F32, _mm256_loadu_ps(p + 8 * i)); }
BW_INLINE void store(float* p, F32 x) {
    _mm256_storeu_ps(p, x.v[0]);
    _mm256_storeu_ps(p + 8, x.v[1]);
}
BW_INLINE F32 operator+(F32 a, F32 b) { BW_PAIR(F32, _mm256_add_ps(a.v[i], b.v[i])); }
BW_INLINE F32 operator-(F32 a, F32 b) { BW_PAIR(F32, _mm256_sub_ps(a.v[i], b.v[i])); }
BW_INLINE F32 operator*(F32 a, F32 b) { BW_PAIR(F32, _mm256_mul_ps(a.v[i], b.v[i])); }
BW_INLINE F32 operator/(F32 a, F32 b) { BW_PAIR(F32, _mm256_div_ps(a.v[i], b.v[i])); }
BW_INLINE F32 fma(F32 a, F32 b, F32 c) { BW_PAIR(F32, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])); }
BW_INLINE F32 min(F32 a, F32 b) { BW_PAIR(F32, _mm256_min_ps(a.v[i], b.v[i])); }
BW_INLINE F32 max(F32 a, F32 b) { BW_PAIR(F32, _mm256_max_ps(a.v[i], b.v[i])); }
BW_INLINE I32 load(const int32_t* p) {
    BW_PAIR(I32, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * i)));
}
BW_INLINE void store(int32_t* p, I32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.v[1]);
}
BW_INLINE I32 splat(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
BW_INLINE I32 operator+(I32 a, I32 b) { BW_PAIR(I32, _mm256_add_epi32(a.v[i], b.v[i])); }
BW_INLINE I32 operator-(I32 a, I32 b) { BW_PAIR(I32, _mm256_sub_epi32(a.v[i], b.v[i])); }
BW_INLINE I32 operator&(I32 a, I32 b) { BW_PAIR(I32, _mm256_and_si256(a.v[i], b.v[i])); }
BW_INLINE I32 max(I32 a, I32 b) { BW_PAIR(I32, _mm256_max_epi32(a.v[i], b.v[i])); }
BW_INLINE I32 min(I32 a, I32 b) { BW_PAIR(I32, _mm256_min_epi32(a.v[i], b.v[i])); }
template <int n>
BW_INLINE I32 shift_left(I32 a) { BW_PAIR(I32, _mm256_slli_epi32(a.v[i], n)); }
template <int n>
BW_INLINE I32 shift_right(I32 a) { BW_PAIR(I32, _mm256_srai_epi32(a.v[i], n)); }
BW_INLINE I32 as_int(F32 a) { BW_PAIR(I32, _mm256_castps_si256(a.v[i])); }
BW_INLINE F32 as_float(I32 a) { BW_PAIR(F32, _mm256_castsi256_ps(a.v[i])); }
BW_INLINE F32 to_float(I32 a) { BW_PAIR(F32, _mm256_cvtepi32_ps(a.v[i])); }
BW_INLINE I32 round_to_int(F32 a) { BW_PAIR(I32, _mm256_cvtps_epi32(a.v[i])); }
BW_INLINE __m256i pack_halves(I32 a) {  // the low 16 bits of each lane, in order
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    __m256i p = _mm256_packus_epi32(_mm256_and_si256(a.v[0], low), _mm256_and_si256(a.v[1], low));
    return _mm256_permute4x64_epi64(p, 0xD8);
}
BW_INLINE void store_int8(int8_t* p, I32 a) {
    __m256i h = pack_halves(a);
    __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b);
}
BW_INLINE F32 load_bf16(const uint16_t* p) {
    BW_PAIR(F32, _mm256_castsi256_ps(_mm256_slli_epi32(
                     _mm256_cvtepu16_epi32(
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i))),
                     16)));
}
BW_INLINE F32 load_f16(const uint16_t* p) {
    BW_PAIR(F32, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i))));
}
BW_INLINE F32 load_int8(const int8_t* p) {
    BW_PAIR(F32, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
                     _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)))));
}
BW_INLINE void store_low_halves(uint16_t* p, I32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_halves(a));
}
BW_INLINE void store_f16(uint16_t* p, F32 a) {
    for (int i = 0; i < 2; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                         _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT));
}
BW_INLINE bool has_nan(F32 a) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.v[0], a.v[0], _CMP_UNORD_Q),
                                           _mm256_cmp_ps(a.v[1], a.v[1], _CMP_UNORD_Q))) != 0;
}
BW_INLINE F64 zero_f64() {
    __m256d z = _mm256_setzero_pd();
    return {{z, z, z, z}};
}
BW_INLINE F64 add_squares(F64 sum, F32 x) {
    for (int i = 0; i < 4; ++i) {
        __m128 quarter = i % 2 ? _mm256_extractf128_ps(x.v[i / 2], 1)
                               : _mm256_castps256_ps128(x.v[i / 2]);
        __m256d wide = _mm256_cvtps_pd(quarter);
        sum.v[i] = _mm256_fmadd_pd(wide, wide, sum.v[i]);
    }
    return sum;
}
BW_INLINE double total(F64 sum) {
    double lanes[4];
    __m256d lo = _mm256_add_pd(sum.v[0], sum.v[2]), hi = _mm256_add_pd(sum.v[1], sum.v[3]);
    _mm256_storeu_pd(lanes, _mm256_add_pd(lo, hi));
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}
BW_INLINE F32 totals(const F32* a) {
    F32 r;
    for (int h = 0; h < 2; ++h) {
        __m256 s[8], t[4], u[2];
        for (int i = 0; i < 8; ++i) s[i] = _mm256_add_ps(a[8 * h + i].v[0], a[8 * h + i].v[1]);
        for (int i = 0; i < 4; ++i)
            t[i] = _mm256_add_ps(_mm256_permute2f128_ps(s[i], s[i + 4], 0x20),
                                 _mm256_permute2f128_ps(s[i], s[i + 4], 0x31));
        for (int i = 0; i < 2; ++i)
            u[i] = _mm256_add_ps(_mm256_shuffle_ps(t[i], t[i + 2], 0x44),
                                 _mm256_shuffle_ps(t[i], t[i + 2], 0xEE));
        __m256 v = _mm256_add_ps(_mm256_shuffle_ps(u[0], u[1], 0x88),
                                 _mm256_shuffle_ps(u[0], u[1], 0xDD));
        // As above, within eight lanes: the two lowest bits are exchanged.
        r.v[h] = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
    }
    return r;
}

BW_INLINE I32 totals(const I32* a) {
    int32_t sums[16];
    for (int i = 0; i < 16; ++i) {
        __m256i s = _mm256_add_epi32(a[i].v[0], a[i].v[1]);
        __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4E));
        q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0xB1));
        sums[i] = _mm_cvtsi128_si32(q);
    }
    return load(sums);
}

#undef BW_PAIR

#else

#if defined(__ARM_NEON)
using Floats = float32x4_t;
using Ints = int32x4_t;
using Unsigned = uint32x4_t;
struct F32 {
    Floats v[4];
};
struct I32 {
    Ints v[4];
};
struct F64 {
    float64x2_t v[8];
};

#define BW_QUAD(type, expression) \
    type r;                       \
    for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

BW_INLINE F32 splat(float x) { BW_QUAD(F32, vdupq_n_f32(x)); }
BW_INLINE F32 load(const float* p) { BW_QUAD(F32, vld1q_f32(p + 4 * i)); }
BW_INLINE void store(float* p, F32 x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
BW_INLINE F32 operator+(F32 a, F32 b) { BW_QUAD(F32, vaddq_f32(a.v[i], b.v[i])); }
BW_INLINE F32 operator-(F32 a, F32 b) { BW_QUAD(F32, vsubq_f32(a.v[i], b.v[i])); }
BW_INLINE F32 operator*(F32 a, F32 b) { BW_QUAD(F32, vmulq_f32(a.v[i], b.v[i])); }
BW_INLINE F32 operator/(F32 a, F32 b) { BW_QUAD(F32, vdivq_f32(a.v[i], b.v[i])); }
BW_INLINE F32 fma(F32 a, F32 b, F32 c) { BW_QUAD(F32, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
BW_INLINE F32 min(F32 a, F32 b) { BW_QUAD(F32, vminq_f32(a.v[i], b.v[i])); }
BW_INLINE F32 max(F32 a, F32 b) { BW_QUAD(F32, vmaxq_f32(a.v[i], b.v[i])); }
BW_INLINE I32 load(const int32_t* p) { BW_QUAD(I32, vld1q_s32(p + 4 * i)); }
BW_INLINE void store(int32_t* p, I32 x) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.v[i]);
}
BW_INLINE I32 splat(int32_t x) { BW_QUAD(I32, vdupq_n_s32(x)); }
BW_INLINE I32 operator+(I32 a, I32 b) { BW_QUAD(I32, vaddq_s32(a.v[i], b.v[i])); }
BW_INLINE I32 operator-(I32 a, I32 b) { BW_QUAD(I32, vsubq_s32(a.v[i], b.v[i])); }
BW_INLINE I32 operator&(I32 a, I32 b) { BW_QUAD(I32, vandq_s32(a.v[i], b.v[i])); }
BW_INLINE I32 max(I32 a, I32 b) { BW_QUAD(I32, vmaxq_s32(a.v[i], b.v[i])); }
BW_INLINE I32 min(I32 a, I32 b) { BW_QUAD(I32, vminq_s32(a.v[i], b.v[i])); }
template <int n>
BW_INLINE I32 shift_left(I32 a) { BW_QUAD(I32, vshlq_n_s32(a.v[i], n)); }
template <int n>
BW_INLINE I32 shift_right(I32 a) { BW_QUAD(I32, vshrq_n_s32(a.v[i], n)); }
BW_INLINE I32 as_int(F32 a) { BW_QUAD(I32, vreinterpretq_s32_f32(a.v[i])); }
BW_INLINE F32 as_float(I32 a) { BW_QUAD(F32, vreinterpretq_f32_s32(a.v[i])); }
BW_INLINE F32 to_float(I32 a) { BW_QUAD(F32, vcvtq_f32_s32(a.v[i])); }
BW_INLINE I32 round_to_int(F32 a) { BW_QUAD(I32, vcvtnq_s32_f32(a.v[i])); }
#undef BW_QUAD
#else
// Of the compiler's own vectors, which every target has. Loops over 16 floats become as much, in twice
// the time to compile.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Unsigned = uint32_t __attribute__((vector_size(16)));
struct F32 {
    Floats v[4];
};
struct I32 {
    Ints v[4];
};

#define BW_QUAD(type, expression) \
    type r;                       \
    for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

BW_INLINE F32 splat(float x) { BW_QUAD(F32, (Floats{x, x, x, x})); }
BW_INLINE F32 load(const float* p) {
    F32 r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
BW_INLINE void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }
BW_INLINE F32 operator+(F32 a, F32 b) { BW_QUAD(F32, a.v[i] + b.v[i]); }
BW_INLINE F32 operator-(F32 a, F32 b) { BW_QUAD(F32, a.v[i] - b.v[i]); }
BW_INLINE F32 operator*(F32 a, F32 b) { BW_QUAD(F32, a.v[i] * b.v[i]); }
BW_INLINE F32 operator/(F32 a, F32 b) { BW_QUAD(F32, a.v[i] / b.v[i]); }
BW_INLINE F32 fma(F32 a, F32 b, F32 c) { BW_QUAD(F32, a.v[i] * b.v[i] + c.v[i]); }
BW_INLINE F32 min(F32 a, F32 b) { BW_QUAD(F32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
BW_INLINE F32 max(F32 a, F32 b) { BW_QUAD(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
BW_INLINE I32 load(const int32_t* p) {
    I32 r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
BW_INLINE void store(int32_t* p, I32 x) { __builtin_memcpy(p, &x, sizeof x); }
BW_INLINE I32 splat(int32_t x) { BW_QUAD(I32, (Ints{x, x, x, x})); }
BW_INLINE I32 operator+(I32 a, I32 b) { BW_QUAD(I32, (Ints)((Unsigned)a.v[i] + (Unsigned)b.v[i])); }
BW_INLINE I32 operator-(I32 a, I32 b) { BW_QUAD(I32, (Ints)((Unsigned)a.v[i] - (Unsigned)b.v[i])); }
BW_INLINE I32 operator&(I32 a, I32 b) { BW_QUAD(I32, a.v[i] & b.v[i]); }
BW_INLINE I32 max(I32 a, I32 b) { BW_QUAD(I32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
BW_INLINE I32 min(I32 a, I32 b) { BW_QUAD(I32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
template <int n>
BW_INLINE I32 shift_left(I32 a) { BW_QUAD(I32, (Ints)((Unsigned)a.v[i] << n)); }
template <int n>
BW_INLINE I32 shift_right(I32 a) { BW_QUAD(I32, a.v[i] >> n); }
BW_INLINE I32 as_int(F32 a) { return bits<I32>(a); }
BW_INLINE F32 as_float(I32 a) { return bits<F32>(a); }
BW_INLINE F32 to_float(I32 a) { BW_QUAD(F32, __builtin_convertvector(a.v[i], Floats)); }
// Half to even for |a| < 2^22 by the float's own rounding; others and NaN to the lowest integer.
BW_INLINE I32 round_to_int(F32 a) {
    const Ints lowest = splat(INT32_MIN).v[0];
    BW_QUAD(I32, (a.v[i] > -4194304.0f) & (a.v[i] < 4194304.0f)
                     ? (Ints)((Unsigned)(a.v[i] + 12582912.0f) - 0x4B400000)
                     : lowest);
}
#undef BW_QUAD
#endif

BW_INLINE F32 zero() { return splat(0.0f); }
BW_INLINE bool has_nan(F32 a) {
    float lanes[16];
    store(lanes, a);
    bool any = false;
    for (int i = 0; i < 16; ++i) any |= lanes[i] != lanes[i];
    return any;
}
BW_INLINE void store_int8(int8_t* p, I32 a) {
    int32_t lanes[16];
    store(lanes, a);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
#if defined(__ARM_NEON)
BW_INLINE F32 load_int8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
#else
BW_INLINE F32 load_int8(const int8_t* p) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(p[i]);
    return load(lanes);
}
#endif
BW_INLINE void store_low_halves(uint16_t* p, I32 a) {
    int32_t lanes[16];
    uint16_t halves[16];
    store(lanes, a);
    for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(lanes[i]);
    __builtin_memcpy(p, halves, sizeof halves);  // p may point into an array of another type
}
// Sixteen numbers of 16 bits, none of them negative.
BW_INLINE I32 load_halves(const uint16_t* p) {
    using Halves = uint16_t __attribute__((vector_size(8)));
    I32 r;
    for (int i = 0; i < 4; ++i) {
        Halves halves;
        __builtin_memcpy(&halves, p + 4 * i, sizeof halves);
        r.v[i] = __builtin_convertvector(halves, Ints);
    }
    return r;
}
BW_INLINE F32 load_bf16(const uint16_t* p) { return as_float(shift_left<16>(load_halves(p))); }
BW_INLINE F32 load_f16(const uint16_t* p) {
    const I32 halves = load_halves(p);
    F32 r;
    for (int i = 0; i < 4; ++i) {
        const Unsigned h = (Unsigned)halves.v[i], sign = (h & 0x8000) << 16, rest = h & 0x7FFF;
        // Exponent moved from bias 15 to 127 by a multiplication, which takes subnormals along.
        const Unsigned finite = (Unsigned)((Floats)(rest << 13) * 0x1p112f);
        const Unsigned other = (rest & 0x3FF) << 13 | 0x7F800000;
        r.v[i] = (Floats)(sign | ((Ints)rest >= 0x7C00 ? other : finite));
    }
    return r;
}
BW_INLINE void store_f16(uint16_t* p, F32 a) {
    I32 r;
    for (int i = 0; i < 4; ++i) {
        const Unsigned b = (Unsigned)a.v[i], sign = b >> 16 & 0x8000, rest = b & 0x7FFFFFFF;
        Unsigned half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
        // Subnormal: the sum's last bit is 2^-24.
        const Unsigned subnormal = (Unsigned)((Floats)rest + 0.5f) - 0x3F000000;
        half = (Ints)rest < 0x38800000 ? subnormal : half;
        half = (Ints)rest >= 0x477FF000 ? Unsigned{} + 0x7C00 : half;
        half = (Ints)rest > 0x7F800000 ? Unsigned{} + 0x7E00 : half;
        r.v[i] = (Ints)(sign | half);
    }
    store_low_halves(p, r);
}
#if defined(__ARM_NEON)
BW_INLINE F64 zero_f64() {
    F64 r;
    for (int i = 0; i < 8; ++i) r.v[i] = vdupq_n_f64(0);
    return r;
}
BW_INLINE F64 add_squares(F64 sum, F32 x) {
    for (int i = 0; i < 4; ++i) {
        float64x2_t lo = vcvt_f64_f32(vget_low_f32(x.v[i])), hi = vcvt_high_f64_f32(x.v[i]);
        sum.v[2 * i] = vfmaq_f64(sum.v[2 * i], lo, lo);
        sum.v[2 * i + 1] = vfmaq_f64(sum.v[2 * i + 1], hi, hi);
    }
    return sum;
}
BW_INLINE void store(double* p, F64 x) {
    for (int i = 0; i < 8; ++i) vst1q_f64(p + 2 * i, x.v[i]);
}
#else
struct F64 {
    double v[16];
};
BW_INLINE F64 zero_f64() { return {}; }
BW_INLINE F64 add_squares(F64 sum, F32 x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) sum.v[i] += static_cast<double>(lanes[i]) * lanes[i];
    return sum;
}
BW_INLINE void store(double* p, F64 x) { for (int i = 0; i < 16; ++i) p[i] = x.v[i]; }
#endif
BW_INLINE double total(F64 sum) {
    double lanes[16];
    store(lanes, sum);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
BW_INLINE F32 totals(const F32* a) {
    float out[16];
    for (int k = 0; k < 16; ++k) {
        const Floats s = (a[k].v[0] + a[k].v[2]) + (a[k].v[1] + a[k].v[3]);
        out[k] = (s[0] + s[2]) + (s[1] + s[3]);
    }
    return load(out);
}
BW_INLINE I32 totals(const I32* a) {
    int32_t out[16];
    for (int k = 0; k < 16; ++k) {
        int32_t lanes[16];
        store(lanes, a[k]);
        out[k] = 0;
        for (int i = 0; i < 16; ++i) out[k] += lanes[i];
    }
    return load(out);
}

#endif

BW_INLINE float total(F32 a) {
    float lanes[16];
    store(lanes, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
BW_INLINE int32_t total(I32 a) {
    int32_t lanes[16], sum = 0;
    store(lanes, a);
    for (int i = 0; i < 16; ++i) sum += lanes[i];
    return sum;
}
BW_INLINE int32_t largest(I32 a) {
    int32_t lanes[16];
    store(lanes, a);
    int32_t m = lanes[0];
    for (int i = 1; i < 16; ++i) m = max_int(m, lanes[i]);
    return m;
}
// A float's magnitude as an integer: it orders like the magnitude, with NaN above infinity.
BW_INLINE I32 magnitude(F32 a) { return as_int(a) & splat(int32_t{0x7FFFFFFF}); }

// Rounded half to even; a NaN becomes the quiet NaN torch writes.
BW_INLINE void store_bf16(uint16_t* p, F32 a) {
    I32 x = as_int(a);
    I32 rounded = x + splat(int32_t{0x7FFF}) + (shift_right<16>(x) & splat(int32_t{1}));
    if (__builtin_expect(has_nan(a), 0)) {
        int32_t lanes[16], halves[16];
        store(lanes, x);
        store(halves, rounded);
        for (int i = 0; i < 16; ++i)
            if ((lanes[i] & 0x7FFFFFFF) > 0x7F800000) halves[i] = 0x7FC00000;
        rounded = load(halves);
    }
    store_low_halves(p, shift_right<16>(rounded));
}

BW_INLINE F32 load_as(const void* p, int dtype, int index) {
    switch (dtype) {
        case kBFloat16: return load_bf16(static_cast<const uint16_t*>(p) + index);
        case kFloat16: return load_f16(static_cast<const uint16_t*>(p) + index);
        case kInt8: return load_int8(static_cast<const int8_t*>(p) + index);
        default: return load(static_cast<const float*>(p) + index);
    }
}
BW_INLINE void store_as(void* p, int dtype, int index, F32 x) {
    switch (dtype) {
        case kBFloat16: return store_bf16(static_cast<uint16_t*>(p) + index, x);
        case kFloat16: return store_f16(static_cast<uint16_t*>(p) + index, x);
        default: return store(static_cast<float*>(p) + index, x);
    }
}
BW_INLINE const void* offset(const void* p, int dtype, size_t index) {
    return static_cast<const char*>(p) + index * item_size(dtype);
}
BW_INLINE void* offset(void* p, int dtype, size_t index) {
    return static_cast<char*>(p) + index * item_size(dtype);
}
// The first n lanes from memory, zeros after.
BW_INLINE F32 load_some(const void* p, int dtype, int index, int n) {
    if (n >= kLanes) return load_as(p, dtype, index);
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, offset(p, dtype, index), n * item_size(dtype));
    return load_as(lanes, dtype, 0);
}
BW_INLINE void store_some(void* p, int dtype, int index, int n, F32 x) {
    if (n >= kLanes) return store_as(p, dtype, index, x);
    float lanes[kLanes];
    store_as(lanes, dtype, 0, x);
    __builtin_memcpy(offset(p, dtype, index), lanes, n * item_size(dtype));
}
// n values as floats, padded with zeros to a multiple of 16.
BW_INLINE void widen_row(const void* in, int dtype, int n, float* out) {
    for (int i = 0; i < n; i += kLanes) store(out + i, load_some(in, dtype, i, n - i));
}
BW_INLINE void narrow_row(const float* in, int n, void* out, int dtype) {
    for (int i = 0; i < n; i += kLanes) store_some(out, dtype, i, n - i, load(in + i));
}

// e^x within 2 ulp: 2^k * p(r), |r| <= ln(2) / 2; 0 below -104, infinity above 88.73.
BW_INLINE F32 exponential(F32 x) {
    x = min(splat(128.0f), max(splat(-150.0f), x));
    I32 k = round_to_int(x * splat(1.44269504f));
    F32 n = to_float(k);
    F32 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F32 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    // In two factors, so that neither leaves the exponent's range.
    I32 half = shift_right<1>(k);
    F32 low = as_float(shift_left<23>(half + splat(int32_t{127})));
    F32 high = as_float(shift_left<23>(k - half + splat(int32_t{127})));
    return p * low * high;
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
