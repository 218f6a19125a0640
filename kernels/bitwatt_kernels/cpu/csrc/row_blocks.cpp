#include "row_blocks.h"

#include <cstring>

namespace bitwatt {

namespace {

void repack_block(const uint8_t* codes, uint8_t* out, int N, int K, int block) {
    // Unpacked to a byte a code, 32 rows at a time; rows past N have codes 1, weight 0.
    const int quarter = K / 4;
    uint8_t* rows = reinterpret_cast<uint8_t*>(scratch(kRowScratch, kRowBlockRows * K / 4));
    std::memset(rows, 1, static_cast<size_t>(kRowBlockRows) * K);
    for (int r = 0; r < kRowBlockRows && block * kRowBlockRows + r < N; ++r) {
        const uint8_t* row = codes + static_cast<size_t>(block * kRowBlockRows + r) * quarter;
        for (int plane = 0; plane < 4; ++plane)
            for (int j = 0; j < quarter; ++j)
                rows[static_cast<size_t>(r) * K + plane * quarter + j] = row[j] >> 2 * plane & 3;
    }
    for (int line = 0; line < K / 16; ++line)
        for (int r = 0; r < kRowBlockRows; ++r) {
            const uint8_t* row = rows + static_cast<size_t>(r) * K + line * 16;
            for (int b = 0; b < 4; ++b)
                *out++ = static_cast<uint8_t>(row[b] | row[4 + b] << 2 | row[8 + b] << 4 |
                                              row[12 + b] << 6);
        }
}

// Chunks of neighbouring columns, of each of a block's 32 rows in turn.
template <size_t kChunkBytes>
void fill_block(const char* rows, char* out, int num_rows, size_t row_bytes) {
    for (size_t at = 0; at < row_bytes; at += kChunkBytes)
        for (int r = 0; r < kRowBlockRows; ++r, out += kChunkBytes) {
            const char* from = rows + r * row_bytes + at;
            std::memset(out, 0, kChunkBytes);
            if (r >= num_rows) continue;
            if (at + kChunkBytes <= row_bytes)
                std::memcpy(out, from, kChunkBytes);
            else
                std::memcpy(out, from, row_bytes - at);
        }
}

}  // namespace

void repack_ternary(Context& context, const uint8_t* codes, uint8_t* blocks, int N, int K) {
    const auto repack = [&](int first, int last) {
        for (int block = first; block < last; ++block)
            repack_block(codes, blocks + static_cast<size_t>(block) * kRowBlockRows * K / 4, N, K,
                         block);
    };
    ranges(context, row_blocks_of(N), K * kRowBlockRows / kElementsPerNanosecond, repack)
        .run(context);
}

void block_rows(Context& context, const char* rows, char* blocks, int num_rows, int columns,
                const BlockedRows& layout) {
    const auto fill = layout.chunk_bytes == 2 ? fill_block<2> : fill_block<4>;
    const auto fill_range = [&](int first, int last) {
        for (int block = first; block < last; ++block)
            fill(rows + layout.row_bytes * block * kRowBlockRows,
                 blocks + layout.block_bytes * block, num_rows - block * kRowBlockRows,
                 layout.row_bytes);
    };
    ranges(context, row_blocks_of(num_rows), columns * kRowBlockRows / kElementsPerNanosecond,
           fill_range)
        .run(context);
}

void gather_rows(Context& context, const int64_t* ids, const char* blocks, char* out, int T,
                 int columns, const BlockedRows& layout) {
    const size_t chunk = layout.chunk_bytes, row_bytes = layout.row_bytes;
    const auto gather = [&](int first, int last) {
        for (int t = first; t < last; ++t) {
            const char* from = blocks + ids[t] / kRowBlockRows * layout.block_bytes +
                               ids[t] % kRowBlockRows * chunk;
            char* to = out + t * row_bytes;
            for (size_t at = 0; at < row_bytes; at += chunk, from += kRowBlockRows * chunk)
                std::memcpy(to + at, from, row_bytes - at < chunk ? row_bytes - at : chunk);
        }
    };
    ranges(context, T, columns / kElementsPerNanosecond, gather).run(context);
}

}  // namespace bitwatt
