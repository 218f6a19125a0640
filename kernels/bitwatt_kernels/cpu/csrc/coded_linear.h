// Linears over coded weights, 2 bits or 8, and int8 activations: int32 sums, exact in any order.
//
// Weights lie in row blocks of 32 as [N / 32][lines][2][64 bytes]: the two groups of 16 rows take
// turns line by line, so that a block is one stream of memory. A 64-byte line holds, for 16 rows,
//   2 bits: 16 columns; byte b has row b / 4, its bits 2j and 2j + 1 the code of column 4j + b % 4
//   8 bits: 4 columns; byte b is the code of row b / 4 and column b % 4
// So (line >> 2j) & 3, or the line itself, multiplies against four activations, broadcast, for
// sixteen rows at once: an operand of vpdpbusd, of vpmaddubsw, of NEON's sdot, and one row of an AMX
// tile. Codes are unsigned, the weight plus 1 or plus 128: what that adds is undone once an output,
// sum of a * (code - zero) = sum of a * code - zero * sum of a.
//
// Where a row has scales by groups of its columns, a group's int32 sums are scaled as soon as they
// are complete, and added in float32 to those of the groups before: the order is the row's own.

#pragma once

#include "simd.h"
#include "amx.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define BW_VNNI 1
#endif

namespace bitwatt {
namespace BITWATT_ISA {

// Tokens a register tile covers, and row groups it takes at once: their sums and codes fill the
// vector registers. From kUnpackFromTokens on a block's 2-bit codes are unpacked to 8-bit ones once,
// for all tiles; 0: never.
#if defined(__AVX512VNNI__)
constexpr int register_tile_tokens(int bits) { return bits == 2 ? 12 : 14; }
constexpr int register_tile_groups(int) { return 2; }
constexpr int kUnpackFromTokens = 64;
#elif defined(__AVXVNNI__)
constexpr int register_tile_tokens(int bits) { return bits == 2 ? 4 : 6; }
constexpr int register_tile_groups(int num_tokens) { return num_tokens == 1 ? 2 : 1; }
constexpr int kUnpackFromTokens = 64;
#elif defined(__AVX2__)
constexpr int register_tile_tokens(int) { return 5; }
constexpr int register_tile_groups(int num_tokens) { return num_tokens == 1 ? 2 : 1; }
constexpr int kUnpackFromTokens = 0;
#else
constexpr int register_tile_tokens(int) { return 4; }
constexpr int register_tile_groups(int num_tokens) { return num_tokens <= 2 ? 2 : 1; }
constexpr int kUnpackFromTokens = 0;
#endif
constexpr int kMostTileTokens = register_tile_tokens(8);

constexpr int kLineStride = 2 * kGroupLineBytes;  // from a group's line to its next
constexpr int kRowBlockRows = 2 * kGroupRows;

constexpr int planes_of(int bits) { return bits == 2 ? 4 : 1; }
constexpr int columns_of(int bits) { return 4 * planes_of(bits); }

BW_INLINE int32_t four(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
}

// sums[m][r] = the 16 outputs of row group r for token m, over K columns. M tokens' activations,
// x_stride from one's to the next's, and what their sums start from, start_stride apart; R groups,
// from the one whose lines start at lines. is_kv: one group alone, a KV block's keys; ahead is then
// what to fetch into the caches meanwhile, as large.
#if defined(BW_VNNI)

#if defined(__AVX512VNNI__)
using Words = int32_t __attribute__((vector_size(64)));
BW_INLINE Words multiply_add(Words sums, Words codes, Words x) {
    return (Words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
}
constexpr int kMostPlaneSums = 16;  // half the registers
#else
using Words = int32_t __attribute__((vector_size(32)));
BW_INLINE Words multiply_add(Words sums, Words codes, Words x) {
    return (Words)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
}
constexpr int kMostPlaneSums = 8;  // half the registers
#endif

template <int bits, int M, int R, bool is_kv = false>
static void register_tile(const uint8_t* lines, const int8_t* x, int x_stride, int K,
                          const int32_t* starts, int start_stride, int32_t* sums,
                          [[maybe_unused]] const uint8_t* ahead = nullptr) {
    constexpr int kStride = is_kv ? kGroupLineBytes : kLineStride;
    constexpr int V = R * kGroupLineBytes / sizeof(Words), kRows = sizeof(Words) / 4;
    const int num_lines = K / columns_of(bits);
    const auto load_lines = [&](int i, Words (&line)[V]) __attribute__((always_inline)) {
        const uint8_t* p = lines + i * kStride;
        // On a Zen 5 a decode step takes 10% more without, one of 8 tokens 60% more.
        for (int r = 0; r < R; ++r)
            __builtin_prefetch(is_kv ? ahead + i * kStride : p + r * kGroupLineBytes + kPrefetchBytes);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            __builtin_memcpy(&line[v], p + v * sizeof(Words), sizeof(Words));
    };
    // Half of the tokens have a pointer of their own, which the compiler can't derive from the other:
    // it would keep more multiples of x_stride than there are registers, some in vector ones.
    constexpr int kHalf = M >= 8 ? M / 2 : M;
    const int8_t* x_half = x + static_cast<size_t>(kHalf) * x_stride;
    if (kHalf < M) asm("" : "+r"(x_half));
    const auto activations = [&](int m, int column) __attribute__((always_inline)) {
        const int8_t* from = m < kHalf ? x + static_cast<size_t>(m) * x_stride
                                       : x_half + static_cast<size_t>(m - kHalf) * x_stride;
        return Words{} + four(from + column);
    };
    if constexpr (bits == 2 && 4 * M * V <= kMostPlaneSums) {
        // Few tokens leave registers for one sum a plane j, and then no line need be shifted: where
        // it lies, the code is 4^j times itself, at most 2 * 64. In the end each plane's sum is
        // divided by its 4^j, exactly.
        Words s[M][V][4] = {};
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) s[m][v][0] += starts[m * start_stride];
        for (int i = 0; i < num_lines; ++i) {
            Words line[V];
            load_lines(i, line);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                for (int m = 0; m < M; ++m) {
                    const Words a = activations(m, i * 16 + j * 4);
                    for (int v = 0; v < V; ++v)
                        s[m][v][j] = multiply_add(s[m][v][j], line[v] & 0x03030303 << 2 * j, a);
                }
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) {
                const Words* t = s[m][v];
                const Words sum = t[0] + (t[1] >> 2) + ((t[2] >> 4) + (t[3] >> 6));
                __builtin_memcpy(sums + m * kRowBlockRows + v * kRows, &sum, sizeof(Words));
            }
        return;
    }
    Words s[M][V];
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) s[m][v] = Words{} + starts[m * start_stride];
    for (int i = 0; i < num_lines; ++i) {
        Words line[V];
        load_lines(i, line);
        const auto multiply_plane = [&](int j) __attribute__((always_inline)) {
            Words code[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                code[v] = bits == 8 ? line[v] : line[v] & 0x03030303;
                if (bits == 2) line[v] >>= 2;
            }
#pragma GCC unroll 14
            for (int m = 0; m < M; ++m) {
                const Words a = activations(m, i * columns_of(bits) + j * 4);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) s[m][v] = multiply_add(s[m][v], code[v], a);
            }
        };
        multiply_plane(0);
        if (bits == 2) multiply_plane(1), multiply_plane(2), multiply_plane(3);
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            __builtin_memcpy(sums + m * kRowBlockRows + v * kRows, &s[m][v], sizeof(Words));
}

#elif defined(__AVX2__)

// H halves of a line, of 8 rows each; where the line begins, what lies ahead is fetched.
template <int H>
BW_INLINE void load_halves(const uint8_t* line, const uint8_t* ahead, __m256i (&halves)[H]) {
    for (int h = 0; h < H; ++h) {
        if (h % 2 == 0) __builtin_prefetch(ahead + 32 * h);
        halves[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * h));
    }
}

// pairs[m][h] += the products of num_lines lines of 2-bit codes, two by two. A pair's is at most
// 2 * 2 * 127 in size, so int16 holds those of 16 lines.
constexpr int kLinesInInt16 = 16;
template <int M, int H, int kStride>
BW_INLINE void add_pairs_of_2(const uint8_t* lines, const uint8_t* ahead, const int8_t* x,
                              int x_stride, int num_lines, __m256i (&pairs)[M][H]) {
    const __m256i mask = _mm256_set1_epi8(3);
    for (int i = 0; i < num_lines; ++i) {
        __m256i line[H];
        load_halves(lines + i * kStride, ahead + i * kStride, line);
        const auto multiply_plane = [&](int j) __attribute__((always_inline)) {
            __m256i code[H];
            for (int h = 0; h < H; ++h) {
                code[h] = _mm256_and_si256(line[h], mask);
                line[h] = _mm256_srli_epi16(line[h], 2);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256i a = _mm256_set1_epi32(
                    four(x + static_cast<size_t>(m) * x_stride + i * 16 + j * 4));
                for (int h = 0; h < H; ++h) {
                    pairs[m][h] = _mm256_add_epi16(pairs[m][h], _mm256_maddubs_epi16(code[h], a));
                    keep_in_register(pairs[m][h]);
                }
            }
        };
        multiply_plane(0), multiply_plane(1), multiply_plane(2), multiply_plane(3);
    }
}

// sums[m][h] += the products of num_lines lines of 2-bit codes.
template <int M, int H, int kStride>
BW_INLINE void add_lines_of_2(const uint8_t* lines, const uint8_t* ahead, const int8_t* x,
                              int x_stride, int num_lines, __m256i (&sums)[M][H]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int first = 0; first < num_lines; first += kLinesInInt16) {
        __m256i pairs[M][H];
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < H; ++h) pairs[m][h] = _mm256_setzero_si256();
        add_pairs_of_2<M, H, kStride>(lines + first * kStride, ahead + first * kStride,
                                      x + first * 16, x_stride,
                                      min_int(kLinesInInt16, num_lines - first), pairs);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < H; ++h)
                sums[m][h] = _mm256_add_epi32(sums[m][h], _mm256_madd_epi16(pairs[m][h], ones));
    }
}

// The same of 8-bit codes: |a| times the weight with a's sign. A pair's product is at most
// 2 * 127 * 128 in size, and int16 holds no more.
template <int M, int H, int kStride>
BW_INLINE void add_lines_of_8(const uint8_t* lines, const uint8_t* ahead, const int8_t* x,
                              int x_stride, int num_lines, __m256i (&sums)[M][H]) {
    const __m256i zero_code = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < num_lines; ++i) {
        __m256i code[H];
        load_halves(lines + i * kStride, ahead + i * kStride, code);
        for (int h = 0; h < H; ++h) code[h] = _mm256_xor_si256(code[h], zero_code);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m256i a =
                _mm256_set1_epi32(four(x + static_cast<size_t>(m) * x_stride + i * 4));
            const __m256i size = _mm256_abs_epi8(a);
            for (int h = 0; h < H; ++h)
                sums[m][h] = _mm256_add_epi32(
                    sums[m][h],
                    _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(code[h], a)),
                                      ones));
        }
    }
}

template <int bits, int M, int R, bool is_kv = false>
static void register_tile(const uint8_t* lines, const int8_t* x, int x_stride, int K,
                          const int32_t* starts, int start_stride, int32_t* sums,
                          const uint8_t* ahead = nullptr) {
    constexpr int kStride = is_kv ? kGroupLineBytes : kLineStride;
    constexpr int H = 2 * R;
    if (!is_kv) ahead = lines + kPrefetchBytes;
    __m256i s[M][H];
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < H; ++h) s[m][h] = _mm256_set1_epi32(starts[m * start_stride]);
    if constexpr (bits == 2)
        add_lines_of_2<M, H, kStride>(lines, ahead, x, x_stride, K / 16, s);
    else
        add_lines_of_8<M, H, kStride>(lines, ahead, x, x_stride, K / 4, s);
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < H; ++h)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + m * kRowBlockRows + h * 8),
                                s[m][h]);
}

// What register_tile and add_group do of a block's scale group, with its sums never out of registers:
// on a Zen 3, 8 tokens take 6% less. steps lie as starts do, of which each is in the low 16 bits alone.
// A group's sums then fit int16, their start too: each is at most 128 * 128 in size. A fifth token
// would leave no register for the scales.
#define BW_SCALED_TILE 1
constexpr int kScaledTileColumns = 128, kScaledTileTokens = 4;
template <int M>
static void scaled_register_tile(const uint8_t* lines, const int8_t* x, int x_stride, int K,
                                 const int32_t* starts, const float* steps, int stride,
                                 const float* scales, float* y) {
    constexpr int H = 2 * register_tile_groups(M);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int first = 0; first < 4; first += H, lines += 32 * H, scales += 8 * H, y += 8 * H) {
        __m256i pairs[M][H];
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < H; ++h) pairs[m][h] = _mm256_set1_epi32(starts[m * stride]);
        add_pairs_of_2<M, H, kLineStride>(lines, lines + kPrefetchBytes, x, x_stride, K / 16, pairs);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < H; ++h) {
                const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[m][h], ones));
                const __m256 stepped = _mm256_mul_ps(sum, _mm256_set1_ps(steps[m * stride]));
                const __m256 scaled = _mm256_mul_ps(stepped, _mm256_loadu_ps(scales + h * 8));
                float* its_y = y + m * kRowBlockRows + h * 8;
                _mm256_storeu_ps(its_y, _mm256_add_ps(_mm256_loadu_ps(its_y), scaled));
            }
    }
}

#elif defined(__ARM_FEATURE_DOTPROD)

template <int bits, int M, int R, bool is_kv = false>
static void register_tile(const uint8_t* lines, const int8_t* x, int x_stride, int K,
                          const int32_t* starts, int start_stride, int32_t* sums,
                          [[maybe_unused]] const uint8_t* ahead = nullptr) {
    constexpr int kStride = is_kv ? kGroupLineBytes : kLineStride;
    const int num_lines = K / columns_of(bits);
    const uint8x16_t mask = vdupq_n_u8(3), zero_code = vdupq_n_u8(0x80);
    int32x4_t s[M][4 * R];
    for (int m = 0; m < M; ++m)
        for (int q = 0; q < 4 * R; ++q) s[m][q] = vdupq_n_s32(starts[m * start_stride]);
    for (int i = 0; i < num_lines; ++i) {
        const uint8_t* p = lines + i * kStride;
        __builtin_prefetch(is_kv ? ahead + i * kStride : p + kPrefetchBytes);
        int8x16_t a[M];
        for (int m = 0; m < M; ++m) {
            const int8_t* from = x + static_cast<size_t>(m) * x_stride + i * columns_of(bits);
            a[m] = bits == 2 ? vld1q_s8(from) : vreinterpretq_s8_s32(vdupq_n_s32(four(from)));
        }
        for (int q = 0; q < 4 * R; ++q) {
            const uint8x16_t line = vld1q_u8(p + q * 16);
            if constexpr (bits == 2) {
                const int8x16_t c0 = vreinterpretq_s8_u8(vandq_u8(line, mask));
                const int8x16_t c1 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(line, 2), mask));
                const int8x16_t c2 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(line, 4), mask));
                const int8x16_t c3 = vreinterpretq_s8_u8(vshrq_n_u8(line, 6));
                for (int m = 0; m < M; ++m) {
                    s[m][q] = vdotq_laneq_s32(s[m][q], c0, a[m], 0);
                    s[m][q] = vdotq_laneq_s32(s[m][q], c1, a[m], 1);
                    s[m][q] = vdotq_laneq_s32(s[m][q], c2, a[m], 2);
                    s[m][q] = vdotq_laneq_s32(s[m][q], c3, a[m], 3);
                }
            } else {
                const int8x16_t code = vreinterpretq_s8_u8(veorq_u8(line, zero_code));
                for (int m = 0; m < M; ++m) s[m][q] = vdotq_s32(s[m][q], code, a[m]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int q = 0; q < 4 * R; ++q) vst1q_s32(sums + m * kRowBlockRows + q * 4, s[m][q]);
}

#else

template <int bits, int M, int R, bool is_kv = false>
static void register_tile(const uint8_t* lines, const int8_t* x, int x_stride, int K,
                          const int32_t* starts, int start_stride, int32_t* sums,
                          [[maybe_unused]] const uint8_t* ahead = nullptr) {
    constexpr int kStride = is_kv ? kGroupLineBytes : kLineStride;
    constexpr int kCodes = R * kGroupLineBytes, kMask = bits == 2 ? 3 : 255;
    for (int m = 0; m < M; ++m)
        for (int row = 0; row < R * kGroupRows; ++row)
            sums[m * kRowBlockRows + row] = starts[m * start_stride];
    for (int i = 0; i < K / columns_of(bits); ++i)
        for (int j = 0; j < planes_of(bits); ++j) {
            int16_t code[kCodes];
            for (int b = 0; b < kCodes; ++b)
                code[b] = static_cast<int16_t>(lines[i * kStride + b] >> 2 * j & kMask);
            for (int m = 0; m < M; ++m) {
                const int8_t* a =
                    x + static_cast<size_t>(m) * x_stride + i * columns_of(bits) + j * 4;
                for (int row = 0; row < R * kGroupRows; ++row)
                    sums[m * kRowBlockRows + row] +=
                        code[4 * row] * a[0] + code[4 * row + 1] * a[1] + code[4 * row + 2] * a[2] +
                        code[4 * row + 3] * a[3];
            }
        }
}

#endif

// What the sums above have of each activation too much: a stored code is the weight plus 1 or plus
// 128, and is multiplied as it is, but for the 8-bit codes of AVX2 and NEON, which subtract 128
// first, having no product of unsigned by signed bytes that is wide enough.
constexpr int zero_of(int bits) {
#if !defined(BW_VNNI) && (defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD))
    return bits == 2 ? 1 : 0;
#else
    return bits == 2 ? 1 : 128;
#endif
}

#if !defined(BW_SCALED_TILE)
constexpr int kScaledTileColumns = 0, kScaledTileTokens = 0;
#endif
// Whether a call's groups are for scaled_register_tile.
BW_INLINE bool has_scaled_tiles(const CodedLinearCall& c) {
    return c.bits == 2 && c.scale_group != c.K && c.scale_group <= kScaledTileColumns;
}

// A block's lines of 2-bit codes as lines of 8-bit ones, which need no unpacking: four from each.
BW_INLINE void unpack_lines(const uint8_t* lines, int num_lines, uint8_t* out) {
    using Line = uint32_t __attribute__((vector_size(kGroupLineBytes)));
    for (int i = 0; i < num_lines; ++i, lines += kLineStride, out += 4 * kLineStride)
        for (int r = 0; r < 2; ++r) {
            const uint8_t* p = lines + r * kGroupLineBytes;
            __builtin_prefetch(p + kPrefetchBytes);
            Line line;
            __builtin_memcpy(&line, p, sizeof line);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j, line >>= 2) {
                const Line codes = line & 0x03030303;
                __builtin_memcpy(out + j * kLineStride + r * kGroupLineBytes, &codes, sizeof codes);
            }
        }
}

// Round a token's outputs of 16 rows.
BW_INLINE void finish(const CodedLinearCall& c, F32 y, int token, int row) {
    const int rows = min_int(kGroupRows, c.N - row);
    const size_t first = static_cast<size_t>(token) * c.N + row;
    if (c.bias) y = y + load(c.bias + row);
    if (c.residual) y = y + load_some(offset(c.residual, c.dtype, first), c.dtype, 0, rows);
    store_some(offset(c.out, c.dtype, first), c.dtype, 0, rows, y);
}

// Round M tokens' int32 sums of 16 rows to their outputs, as reference/linear.py's rescale.
BW_INLINE void finish_sums(const CodedLinearCall& c, int zero, const int32_t* sums, int stride,
                           int token, int M, int row) {
    if (row >= c.N) return;
    const F32 scales = load(static_cast<const float*>(c.scales) + row);
    for (int m = 0; m < M; ++m) {
        const int t = token + m;
        const F32 y = to_float(load(sums + m * stride) - splat(zero * c.x.sums[t]));
        finish(c, y / splat(c.x.scales[t]) * scales, t, row);
    }
}

// Of each token's scale groups, [T, groups], in this thread's scratch: what a sum starts from, to
// undo what codes have too much, its low 16 bits alone where has_scaled_tiles; and 1 / the
// activations' scale, null where a row is one group.
struct GroupTerms {
    const int32_t* starts;
    const float* steps;
};
static GroupTerms group_terms(const CodedLinearCall& c, int zero) {
    const int num_groups = c.K / c.scale_group, n = c.T * num_groups;
    float* steps = scratch(kGroupScratch, size_t{2} * padded_width(n));
    int32_t* starts = reinterpret_cast<int32_t*>(steps + padded_width(n));
    const int32_t kept = has_scaled_tiles(c) ? 0xFFFF : -1;
    for (int i = 0; i < n; ++i) starts[i] = -zero * c.x.sums[i] & kept;
    if (num_groups == 1) return {starts, nullptr};
    for (int i = 0; i < n; i += kLanes)
        store(steps + i, splat(1.0f) / load_some(c.x.scales, kFloat32, i, n - i));
    return {starts, steps};
}

// Add M tokens' int32 sums of a scale group to their outputs y, zeros at first, as reference/
// linear.py's sum_groups: for R of a block's groups of 16 rows, from r on.
template <int R>
BW_INLINE void add_group(const CodedLinearCall& c, const float* steps, int zero,
                         const int32_t* sums, float* y, int stride, int token, int M, int block,
                         int r, int group) {
    const int num_groups = c.K / c.scale_group;
    const size_t its_scales =
        (static_cast<size_t>(block) * num_groups + group) * kRowBlockRows + r * kGroupRows;
    F32 scales[R];
    for (int i = 0; i < R; ++i)
        scales[i] = load_as(offset(c.scales, c.scales_dtype, its_scales), c.scales_dtype,
                            i * kGroupRows);
    const size_t first = static_cast<size_t>(token) * num_groups + group;
    const int32_t* x_sums = c.x.sums + first;
    steps += first;
    for (int m = 0; m < M; ++m, sums += stride, y += stride, x_sums += num_groups, steps += num_groups)
        for (int i = 0; i < R; ++i) {
            const F32 sum = to_float(load(sums + i * kGroupRows) - splat(zero * *x_sums));
            float* its_y = y + i * kGroupRows;
            store(its_y, load(its_y) + sum * splat(*steps) * scales[i]);
        }
}

// M tokens' sums of a block's rows, which may be unpacked already; with groups, their outputs.
template <int bits, int M>
static void row_block_tile(const CodedLinearCall& c, const GroupTerms& terms, const uint8_t* codes,
                           int token, int block, int32_t* sums, float* outputs) {
    constexpr int R = register_tile_groups(M);
    const int num_groups = c.K / c.scale_group;
    const size_t group_bytes = static_cast<size_t>(c.scale_group) / columns_of(bits) * kLineStride;
    const int8_t* x = c.x.codes + static_cast<size_t>(token) * c.K;
    const int32_t* starts = terms.starts + static_cast<size_t>(token) * num_groups;
    if (terms.steps) __builtin_memset(outputs, 0, M * kRowBlockRows * sizeof(float));
    for (int g = 0; g < num_groups; ++g, codes += group_bytes, x += c.scale_group, ++starts) {
#if defined(BW_SCALED_TILE)
        if (bits == 2 && has_scaled_tiles(c)) {
            float scales[kRowBlockRows];
            const size_t its_scales = (static_cast<size_t>(block) * num_groups + g) * kRowBlockRows;
            widen_row(offset(c.scales, c.scales_dtype, its_scales), c.scales_dtype, kRowBlockRows,
                      scales);
            scaled_register_tile<M>(codes, x, c.K, c.scale_group, starts,
                                    terms.steps + static_cast<size_t>(token) * num_groups + g,
                                    num_groups, scales, outputs);
            continue;
        }
#endif
        for (int r = 0; r < 2; r += R)
            register_tile<bits, M, R>(codes + r * kGroupLineBytes, x, c.K, c.scale_group, starts,
                                      num_groups, sums + r * kGroupRows);
        if (terms.steps)
            add_group<2>(c, terms.steps, 0, sums, outputs, kRowBlockRows, token, M, block, 0, g);
    }
}

template <int bits, int M = register_tile_tokens(bits)>
static void row_block_tile_of(int num_tokens, const CodedLinearCall& c, const GroupTerms& terms,
                              const uint8_t* codes, int token, int block, int32_t* sums,
                              float* outputs) {
    if (num_tokens == M)
        return row_block_tile<bits, M>(c, terms, codes, token, block, sums, outputs);
    if constexpr (M > 1)
        row_block_tile_of<bits, M - 1>(num_tokens, c, terms, codes, token, block, sums, outputs);
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt

#if !defined(BW_VNNI) && !defined(BW_AMX) && !defined(__ARM_FEATURE_DOTPROD)
#define BW_SUM_TABLES 1
#include "sum_tables.h"
#endif

namespace bitwatt {
namespace BITWATT_ISA {

#if defined(BW_AMX)

constexpr int kAmxFromTokens = 8;

// Two token tiles times a block's two row groups: sums in tiles 0 to 3, activations in 4 and 5,
// codes in 6 and 7. A block of 2-bit codes is unpacked to 8-bit ones once and serves every token.
template <int bits>
static void coded_linear_amx(const CodedLinearCall& c, int first_block, int last_block) {
    const int num_lines = c.K / columns_of(bits), chunks = c.K / kAmxRowBytes;
    const size_t block_bytes = static_cast<size_t>(num_lines) * kLineStride;
    const size_t chunk_bytes = block_bytes / chunks;
    const size_t panel_bytes = bits == 2 ? static_cast<size_t>(c.K) * kRowBlockRows : 0;
    const int num_padded = (c.T + 2 * kAmxRows - 1) / (2 * kAmxRows) * (2 * kAmxRows);
    const int num_tail = c.T % (2 * kAmxRows);
    const size_t tail_bytes = static_cast<size_t>(2 * kAmxRows) * c.K;
    uint8_t* panel =
        reinterpret_cast<uint8_t*>(scratch(kTileScratch, (panel_bytes + tail_bytes) / 4));
    // The last tokens, padded with zeros to whole tiles.
    int8_t* tail = reinterpret_cast<int8_t*>(panel + panel_bytes);
    if (num_tail) {
        const size_t used = static_cast<size_t>(num_tail) * c.K;
        __builtin_memcpy(tail, c.x.codes + static_cast<size_t>(c.T - num_tail) * c.K, used);
        __builtin_memset(tail + used, 0, tail_bytes - used);
    }
    alignas(64) int32_t sums[4][16 * 16];
    alignas(64) float outputs[4][16 * 16];
    const float* steps = group_terms(c, zero_of(bits)).steps;
    const bool has_groups = steps;
    const int group_chunks = c.scale_group / kAmxRowBytes;
    configure_tiles();
    for (int block = first_block; block < last_block; ++block) {
        const uint8_t* codes = c.blocks + block * block_bytes;
        const uint8_t* next_codes = codes + block_bytes;
        if (bits == 2) {
            unpack_lines(codes, num_lines, panel);
            codes = panel;
        }
        for (int t = 0; t < num_padded; t += 2 * kAmxRows) {
            const bool is_tail = t + 2 * kAmxRows > c.T;
            const int8_t* x = is_tail ? tail : c.x.codes + static_cast<size_t>(t) * c.K;
            const bool has_second = c.T - t > kAmxRows;
            if (has_groups) __builtin_memset(outputs, 0, sizeof outputs);
            const auto take_sums = [&](const auto& take) __attribute__((always_inline)) {
                store_tile<0>(sums[0]), store_tile<1>(sums[1]);
                store_tile<2>(sums[2]), store_tile<3>(sums[3]);
                for (int half = 0; half < 2; ++half) {
                    const int first = t + half * kAmxRows, M = min_int(kAmxRows, c.T - first);
                    for (int r = 0; r < 2 && M > 0; ++r) take(2 * half + r, first, M, r);
                }
            };
            for (int k = 0; k < chunks; ++k) {
                if (k % group_chunks == 0)
                    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
                // The first tokens' products alone read a block from memory; later ones find it in
                // the caches. During the first the next block is fetched too: memory would idle.
                if (t == 0)
                    for (size_t i = 0; i < chunk_bytes; i += kGroupLineBytes)
                        __builtin_prefetch(next_codes + k * chunk_bytes + i, 0, 2);
                const uint8_t* w = codes + static_cast<size_t>(k) * kAmxRows * kLineStride;
                load_tile<4>(x + k * kAmxRowBytes, c.K);
                load_tile<6>(w, kLineStride);
                multiply_tiles<0, 4, 6>();
                load_tile<7>(w + kGroupLineBytes, kLineStride);
                multiply_tiles<1, 4, 7>();
                if (has_second) {
                    load_tile<5>(x + static_cast<size_t>(kAmxRows) * c.K + k * kAmxRowBytes, c.K);
                    multiply_tiles<2, 5, 6>();
                    multiply_tiles<3, 5, 7>();
                }
                if (has_groups && (k + 1) % group_chunks == 0)
                    take_sums([&](int tile, int first, int M, int r) __attribute__((always_inline)) {
                        add_group<1>(c, steps, zero_of(bits), sums[tile], outputs[tile], 16, first,
                                     M, block, r, k / group_chunks);
                    });
            }
            take_sums([&](int tile, int first, int M, int r) __attribute__((always_inline)) {
                const int row = block * kRowBlockRows + r * kGroupRows;
                if (!has_groups)
                    return finish_sums(c, zero_of(bits), sums[tile], 16, first, M, row);
                for (int m = 0; m < M && row < c.N; ++m)
                    finish(c, load(outputs[tile] + m * 16), first + m, row);
            });
        }
    }
    release_tiles();
}

#endif

template <int bits>
static void coded_linear(const CodedLinearCall& c, int first_block, int last_block) {
#if defined(BW_AMX)
    if (c.T >= kAmxFromTokens && c.K % kAmxRowBytes == 0)
        return coded_linear_amx<bits>(c, first_block, last_block);
#endif
    int first_token = 0;
#if defined(BW_SUM_TABLES)
    if (bits == 2) first_token = table_linear(c, first_block, last_block);
#endif
    const int num_tokens = c.T - first_token;
    const size_t block_bytes = static_cast<size_t>(c.K) / columns_of(bits) * kLineStride;
    const GroupTerms terms = group_terms(c, zero_of(bits));
    alignas(64) int32_t sums[kMostTileTokens * kRowBlockRows];
    alignas(64) float outputs[kMostTileTokens * kRowBlockRows];
    const bool is_unpacked = bits == 2 && kUnpackFromTokens && num_tokens >= kUnpackFromTokens;
    const int tile_tokens =
        has_scaled_tiles(c) ? kScaledTileTokens : register_tile_tokens(is_unpacked ? 8 : bits);
    const int num_tiles = (num_tokens + tile_tokens - 1) / tile_tokens;
    uint8_t* panel = nullptr;
    if (is_unpacked)
        panel = reinterpret_cast<uint8_t*>(
            scratch(kTileScratch, static_cast<size_t>(c.K) * kRowBlockRows / 4));
    for (int block = first_block; block < last_block; ++block) {
        const uint8_t* codes = c.blocks + block * block_bytes;
        if (is_unpacked) unpack_lines(codes, c.K / columns_of(bits), panel);
        for (int i = 0; i < num_tiles; ++i) {
            // Tiles of even sizes: a small last one would read the codes for few tokens.
            const auto tile_start = [&](int tile) {
                return first_token + static_cast<int>(static_cast<int64_t>(num_tokens) * tile / num_tiles);
            };
            const int t = tile_start(i), M = tile_start(i + 1) - t;
            if (is_unpacked)
                row_block_tile_of<8>(M, c, terms, panel, t, block, sums, outputs);
            else
                row_block_tile_of<bits>(M, c, terms, codes, t, block, sums, outputs);
            for (int r = 0; r < 2; ++r) {
                const int row = block * kRowBlockRows + r * kGroupRows;
                if (!terms.steps)
                    finish_sums(c, 0, sums + r * kGroupRows, kRowBlockRows, t, M, row);
                for (int m = 0; m < M && terms.steps && row < c.N; ++m)
                    finish(c, load(outputs + m * kRowBlockRows + r * kGroupRows), t + m, row);
            }
        }
    }
}

static LinearCut linear_cut([[maybe_unused]] const CodedLinearCall& c) {
#if defined(BW_SUM_TABLES)
    // Where arithmetic takes the time, one core may be much slower than another for what else runs
    // on it: of many parts it takes fewer. What is worked out once a part wants large ones.
    if (c.bits == 2 && c.T >= kFewTablesFrom)
        return {kManyParts, kTableRowBlocks, kTableRowBlocks / 4};
    return {kManyParts, 1, 1};
#else
    return {kPartsPerThread, 1, 1};
#endif
}

static void linear(const CodedLinearCall& c, int first_block, int last_block) {
    if (c.bits == 2) return coded_linear<2>(c, first_block, last_block);
    return coded_linear<8>(c, first_block, last_block);
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
