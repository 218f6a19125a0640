// The ternary matmul: 2-bit codes {0, 1, 2} times int8 activations, int32 sums, exact in any order.
//
// Weights lie in row blocks of 16: [N / 16][K / 16][64 bytes]. Byte b of a 64-byte line holds row
// b / 4 and column offset b % 4; its bits 2j and 2j + 1 are the code of column 4j + b % 4. So
// (line >> 2j) & 3 multiplies against four activations, broadcast, for sixteen rows at once:
// one operand of vpdpbusd, of vpmaddubsw, of NEON's sdot, and one row of an AMX tile.
// Sum of a * (code - 1) = sum of a * code - sum of a: the +1 is undone once an output.

#pragma once

#include "simd.h"
#include "tiles.h"

namespace bitwatt {
namespace BITWATT_ISA {

// Tokens a tile covers: their sums and a row block's codes fill the vector registers.
#if defined(__AVX512VNNI__)
constexpr int kTileTokens = 12;
constexpr int kTileBlocks = 2;
#elif defined(__AVX2__)
constexpr int kTileTokens = 4;
constexpr int kTileBlocks = 1;
#else
constexpr int kTileTokens = 4;
constexpr int kTileBlocks = 1;
#endif

BW_INLINE int32_t four(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
}

// sums[m][r] = the 16 outputs of row block r for token m, over the lines of K / 16 columns.
// R row blocks of block_bytes each, M tokens of K activations each.
#if defined(__AVX512VNNI__)

template <int M, int R>
static void tile(const uint8_t* blocks, size_t block_bytes, const int8_t* x, int K,
                 int32_t* sums) {
    constexpr int kPrefetchBytes = 1024;
    const int lines = K / 16;
    if constexpr (M <= 2 && R == 1) {
        // Shifts saved: (line & 3 << 2j) is the code times 4^j, at most 128, and each j sums apart.
        __m512i s[M][4];
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) s[m][j] = _mm512_setzero_si512();
        for (int i = 0; i < lines; ++i) {
            const uint8_t* p = blocks + i * 64;
            _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
            const __m512i line = _mm512_loadu_si512(p);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m512i mask = _mm512_set1_epi8(static_cast<char>(3 << 2 * j));
                const __m512i code = _mm512_and_si512(line, mask);
                for (int m = 0; m < M; ++m) {
                    const int8_t* a = x + static_cast<size_t>(m) * K + i * 16 + j * 4;
                    s[m][j] = _mm512_dpbusd_epi32(s[m][j], code, _mm512_set1_epi32(four(a)));
                }
            }
        }
        for (int m = 0; m < M; ++m) {
            const __m512i low = _mm512_add_epi32(s[m][0], _mm512_srai_epi32(s[m][1], 2));
            const __m512i high =
                _mm512_add_epi32(_mm512_srai_epi32(s[m][2], 4), _mm512_srai_epi32(s[m][3], 6));
            _mm512_storeu_si512(sums + m * 16, _mm512_add_epi32(low, high));
        }
        return;
    }
    __m512i s[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) s[m][r] = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8(3);
    for (int i = 0; i < lines; ++i) {
        __m512i line[R];
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = blocks + r * block_bytes + i * 64;
            _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
            line[r] = _mm512_loadu_si512(p);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512i code[R];
            for (int r = 0; r < R; ++r) {
                code[r] = _mm512_and_si512(line[r], mask);
                line[r] = _mm512_srli_epi16(line[r], 2);
            }
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
                const __m512i a =
                    _mm512_set1_epi32(four(x + static_cast<size_t>(m) * K + i * 16 + j * 4));
                for (int r = 0; r < R; ++r) s[m][r] = _mm512_dpbusd_epi32(s[m][r], code[r], a);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) _mm512_storeu_si512(sums + (m * R + r) * 16, s[m][r]);
}

#elif defined(__AVX2__)

template <int M, int R>
static void tile(const uint8_t* blocks, size_t, const int8_t* x, int K, int32_t* sums) {
    static_assert(R == 1, "sums of one row block fill the registers");
    constexpr int kPrefetchBytes = 1024;
    // A pair of products is at most 2 * 2 * 128 in size, so int16 holds the 32 pairs of 8 lines.
    constexpr int kLinesInInt16 = 8;
    const int lines = K / 16;
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i s[M][2];
    for (int m = 0; m < M; ++m) s[m][0] = s[m][1] = _mm256_setzero_si256();
    for (int first = 0; first < lines; first += kLinesInInt16) {
        const int last = min_int(first + kLinesInInt16, lines);
        __m256i h[M][2];
        for (int m = 0; m < M; ++m) h[m][0] = h[m][1] = _mm256_setzero_si256();
        for (int i = first; i < last; ++i) {
            const uint8_t* p = blocks + i * 64;
            _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
            __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m256i code_lo = _mm256_and_si256(lo, mask);
                const __m256i code_hi = _mm256_and_si256(hi, mask);
                lo = _mm256_srli_epi16(lo, 2);
                hi = _mm256_srli_epi16(hi, 2);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    const __m256i a =
                        _mm256_set1_epi32(four(x + static_cast<size_t>(m) * K + i * 16 + j * 4));
                    h[m][0] = _mm256_add_epi16(h[m][0], _mm256_maddubs_epi16(code_lo, a));
                    h[m][1] = _mm256_add_epi16(h[m][1], _mm256_maddubs_epi16(code_hi, a));
                }
            }
        }
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < 2; ++r)
                s[m][r] = _mm256_add_epi32(s[m][r], _mm256_madd_epi16(h[m][r], ones));
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < 2; ++r)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + m * 16 + r * 8), s[m][r]);
}

#elif defined(__ARM_FEATURE_DOTPROD)

template <int M, int R>
static void tile(const uint8_t* blocks, size_t, const int8_t* x, int K, int32_t* sums) {
    static_assert(R == 1, "sums of one row block fill the registers");
    const int lines = K / 16;
    const uint8x16_t mask = vdupq_n_u8(3);
    int32x4_t s[M][4];
    for (int m = 0; m < M; ++m)
        for (int q = 0; q < 4; ++q) s[m][q] = vdupq_n_s32(0);
    for (int i = 0; i < lines; ++i) {
        __builtin_prefetch(blocks + i * 64 + 1024);
        int8x16_t a[M];
        for (int m = 0; m < M; ++m) a[m] = vld1q_s8(x + static_cast<size_t>(m) * K + i * 16);
        for (int q = 0; q < 4; ++q) {
            const uint8x16_t line = vld1q_u8(blocks + i * 64 + q * 16);
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
        }
    }
    for (int m = 0; m < M; ++m)
        for (int q = 0; q < 4; ++q) vst1q_s32(sums + m * 16 + q * 4, s[m][q]);
}

#else

template <int M, int R>
static void tile(const uint8_t* blocks, size_t, const int8_t* x, int K, int32_t* sums) {
    static_assert(R == 1, "one row block");
    for (int i = 0; i < M * 16; ++i) sums[i] = 0;
    for (int i = 0; i < K / 16; ++i)
        for (int j = 0; j < 4; ++j) {
            int16_t code[64];
            for (int b = 0; b < 64; ++b)
                code[b] = static_cast<int16_t>(blocks[i * 64 + b] >> 2 * j & 3);
            for (int m = 0; m < M; ++m) {
                const int8_t* a = x + static_cast<size_t>(m) * K + i * 16 + j * 4;
                for (int row = 0; row < 16; ++row)
                    sums[m * 16 + row] += code[4 * row] * a[0] + code[4 * row + 1] * a[1] +
                                          code[4 * row + 2] * a[2] + code[4 * row + 3] * a[3];
            }
        }
}

#endif

template <int R>
static void tile_of(int M, const uint8_t* blocks, size_t block_bytes, const int8_t* x, int K,
                    int32_t* sums) {
    static_assert(kTileTokens == 4 || kTileTokens == 12, "every count has its case");
    switch (M) {
        case 1: return tile<1, R>(blocks, block_bytes, x, K, sums);
        case 2: return tile<2, R>(blocks, block_bytes, x, K, sums);
        case 3: return tile<3, R>(blocks, block_bytes, x, K, sums);
        case 4: return tile<4, R>(blocks, block_bytes, x, K, sums);
    }
    if constexpr (kTileTokens == 12) switch (M) {
        case 5: return tile<5, R>(blocks, block_bytes, x, K, sums);
        case 6: return tile<6, R>(blocks, block_bytes, x, K, sums);
        case 7: return tile<7, R>(blocks, block_bytes, x, K, sums);
        case 8: return tile<8, R>(blocks, block_bytes, x, K, sums);
        case 9: return tile<9, R>(blocks, block_bytes, x, K, sums);
        case 10: return tile<10, R>(blocks, block_bytes, x, K, sums);
        case 11: return tile<11, R>(blocks, block_bytes, x, K, sums);
        case 12: return tile<12, R>(blocks, block_bytes, x, K, sums);
    }
}

// Round M tokens' int32 sums of one row block to their outputs, as reference/linear.py's rescale.
BW_INLINE void finish(const TernaryCall& c, const int32_t* sums, int stride, int token, int M,
                      int block) {
    const int row = block * 16, rows = min_int(16, c.N - row);
    const F32 scales = load(c.scales + row);
    for (int m = 0; m < M; ++m) {
        const int t = token + m;
        const size_t first = static_cast<size_t>(t) * c.N + row;
        F32 y = to_float(load(sums + m * stride) - splat(c.x.sums[t]));
        y = y / splat(c.x.scales[t]) * scales;
        if (c.bias) y = y + load(c.bias + row);
        if (c.residual) y = y + load_some(offset(c.residual, c.dtype, first), c.dtype, 0, rows);
        store_some(offset(c.out, c.dtype, first), c.dtype, 0, rows, y);
    }
}

#if defined(BW_AMX)

constexpr int kTilesFromTokens = 8;

// Two token tiles times two row blocks: sums in tiles 0 to 3, activations in 4 and 5, codes in 6
// and 7. A pair of row blocks is unpacked to bytes once and serves every token.
static void ternary_linear_tiles(const TernaryCall& c, int first_block, int last_block) {
    const int lines = c.K / 16, chunks = c.K / kTileBytes;
    const size_t panel_bytes = static_cast<size_t>(c.K) * 16;
    const int num_padded = (c.T + 2 * kTileRows - 1) / (2 * kTileRows) * (2 * kTileRows);
    const int num_tail = c.T % (2 * kTileRows);
    const size_t tail_bytes = static_cast<size_t>(2 * kTileRows) * c.K;
    uint8_t* panel =
        reinterpret_cast<uint8_t*>(scratch(kTileScratch, (2 * panel_bytes + tail_bytes) / 4));
    // The last tokens, padded with zeros to whole tiles.
    int8_t* tail = reinterpret_cast<int8_t*>(panel + 2 * panel_bytes);
    if (num_tail) {
        const size_t used = static_cast<size_t>(num_tail) * c.K;
        __builtin_memcpy(tail, c.x.codes + static_cast<size_t>(c.T - num_tail) * c.K, used);
        __builtin_memset(tail + used, 0, tail_bytes - used);
    }
    alignas(64) int32_t sums[4][16 * 16];
    configure_tiles();
    for (int block = first_block; block < last_block; block += 2) {
        const int R = min_int(2, last_block - block);
        for (int r = 0; r < 2; ++r) {
            const uint8_t* line = c.blocks + (static_cast<size_t>(block) + min_int(r, R - 1)) *
                                                 lines * kBlockBytes;
            uint8_t* out = panel + r * panel_bytes;
            for (int i = 0; i < lines; ++i, line += kBlockBytes)
                for (int j = 0; j < 4; ++j, out += kBlockBytes)
                    for (int b = 0; b < kBlockBytes; ++b)
                        out[b] = static_cast<uint8_t>(line[b] >> 2 * j & 3);
        }
        for (int t = 0; t < num_padded; t += 2 * kTileRows) {
            const bool is_tail = t + 2 * kTileRows > c.T;
            const int8_t* x = is_tail ? tail : c.x.codes + static_cast<size_t>(t) * c.K;
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
            for (int k = 0; k < chunks; ++k) {
                const uint8_t* codes = panel + static_cast<size_t>(k) * kTileRows * kTileBytes;
                load_tile<4>(x + k * kTileBytes, c.K);
                load_tile<6>(codes, kTileBytes);
                multiply_tiles<0, 4, 6>();
                load_tile<7>(codes + panel_bytes, kTileBytes);
                multiply_tiles<1, 4, 7>();
                load_tile<5>(x + static_cast<size_t>(kTileRows) * c.K + k * kTileBytes, c.K);
                multiply_tiles<2, 5, 6>();
                multiply_tiles<3, 5, 7>();
            }
            store_tile<0>(sums[0]), store_tile<1>(sums[1]);
            store_tile<2>(sums[2]), store_tile<3>(sums[3]);
            for (int half = 0; half < 2; ++half) {
                const int first = t + half * kTileRows, M = min_int(kTileRows, c.T - first);
                for (int r = 0; r < R && M > 0; ++r)
                    finish(c, sums[2 * half + r], 16, first, M, block + r);
            }
        }
    }
    release_tiles();
}

#endif

static void ternary_linear(const TernaryCall& c, int first_block, int last_block) {
#if defined(BW_AMX)
    if (c.T >= kTilesFromTokens) return ternary_linear_tiles(c, first_block, last_block);
#endif
    const size_t block_bytes = static_cast<size_t>(c.K) / 16 * kBlockBytes;
    int32_t sums[kTileTokens * kTileBlocks * 16];
    const int num_tiles = (c.T + kTileTokens - 1) / kTileTokens;
    for (int block = first_block; block < last_block;) {
        const int R = c.T >= 3 && last_block - block >= kTileBlocks ? kTileBlocks : 1;
        const uint8_t* blocks = c.blocks + block * block_bytes;
        for (int i = 0; i < num_tiles; ++i) {
            // Tiles of even sizes: a small last one would unpack the codes for few tokens.
            const int t = static_cast<int>(static_cast<int64_t>(c.T) * i / num_tiles);
            const int M = static_cast<int>(static_cast<int64_t>(c.T) * (i + 1) / num_tiles) - t;
            const int8_t* x = c.x.codes + static_cast<size_t>(t) * c.K;
            if (R == kTileBlocks)
                tile_of<kTileBlocks>(M, blocks, block_bytes, x, c.K, sums);
            else
                tile_of<1>(M, blocks, block_bytes, x, c.K, sums);
            for (int r = 0; r < R; ++r) finish(c, sums + r * 16, R * 16, t, M, block + r);
        }
        block += R;
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
