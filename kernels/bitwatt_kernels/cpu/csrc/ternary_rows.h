// Rows of a ternary matrix as floats, read from the row blocks that coded_linear.h multiplies: what
// an embedding looks up where the head has its weights.

#pragma once

#include "simd.h"

namespace bitwatt {
namespace BITWATT_ISA {

// out [T, K] = code * scale of the rows ids, rounded once.
static void ternary_rows(const TernaryRowsCall& c, int first, int last) {
    constexpr int kColumns = 16;  // of a line; a row's four bytes of it are one vector of weights
    const size_t block_bytes = static_cast<size_t>(c.K) * kRowBlockRows / 4;
    const int num_groups = c.K / c.scale_group;
    for (int t = first; t < last; ++t) {
        const size_t block = static_cast<size_t>(c.ids[t] / kRowBlockRows);
        const int row = static_cast<int>(c.ids[t] % kRowBlockRows);
        const uint8_t* bytes = c.blocks + block * block_bytes + row * 4;
        for (int group = 0, k = 0; group < num_groups; ++group) {
            const size_t place = (block * num_groups + group) * kRowBlockRows + row;
            float lanes[kLanes];
            store(lanes, load_some(offset(c.scales, c.scales_dtype, place), c.scales_dtype, 0, 1));
            const F32 scale = splat(lanes[0]);
            for (; k < (group + 1) * c.scale_group; k += kColumns, bytes += kRowBlockRows * 4) {
                int32_t codes[kLanes];
                for (int j = 0; j < 4; ++j)
                    for (int b = 0; b < 4; ++b) codes[4 * j + b] = bytes[b] >> 2 * j & 3;
                const F32 weights = to_float(load(codes) - splat(1));
                store_some(offset(c.out, c.dtype, static_cast<size_t>(t) * c.K + k), c.dtype, 0,
                           kColumns, weights * scale);
            }
        }
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
