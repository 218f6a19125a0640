// What a mask leaves of a row of logits: the tokens whose bit is set keep theirs, the others get -inf.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

// The logits of one word of a mask, n of them. A loop over bits that the compiler makes vectors of.
BW_INLINE void mask_word(float* x, uint32_t word, int n) {
    static constexpr uint32_t kBits[32] = {
        1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
        1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
        1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
        1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};
    for (int i = 0; i < n; ++i) x[i] = word & kBits[i] ? x[i] : -__builtin_inff();
}

static void mask(const MaskCall& c, int first, int last) {
    for (int m = first; m < last; ++m) {
        float* x = c.logits + static_cast<size_t>(c.rows[m]) * c.N;
        const uint32_t* words = c.bits + static_cast<size_t>(m) * c.num_words;
        for (int i = 0; i < c.N; i += 32, ++words) {
            if (*words == ~0u) continue;
            if (c.N - i >= 32)
                mask_word(x + i, *words, 32);
            else
                mask_word(x + i, *words, c.N - i);
        }
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
