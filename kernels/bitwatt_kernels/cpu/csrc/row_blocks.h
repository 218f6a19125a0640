// Making row blocks of matrices, once, at load; and reading rows from them. Layouts in
// coded_linear.h (codes) and dense.h (numbers): here a line is the same columns of all 32 rows.

#pragma once

#include "ops.h"

namespace bitwatt {

// How a matrix lies in row blocks: [blocks][lines][32][columns of a line].
struct BlockedRows {
    size_t chunk_bytes;  // of a line, a row's
    size_t row_bytes, block_bytes;

    BlockedRows(int columns, int item_bytes, int columns_per_line)
        : chunk_bytes(static_cast<size_t>(item_bytes) * columns_per_line),
          row_bytes(static_cast<size_t>(item_bytes) * columns),
          block_bytes((row_bytes + chunk_bytes - 1) / chunk_bytes * chunk_bytes * kRowBlockRows) {}
};

// Ternary codes [N, K / 4], layout in packing.py, into row blocks of 2-bit lines.
void repack_ternary(Context& context, const uint8_t* codes, uint8_t* blocks, int N, int K);

// rows [num_rows, columns] into blocks; zeros past the matrix. A chunk has 2 bytes or 4.
void block_rows(Context& context, const char* rows, char* blocks, int num_rows, int columns,
                const BlockedRows& layout);

// out [T, columns] = the rows ids [T] of blocks.
void gather_rows(Context& context, const int64_t* ids, const char* blocks, char* out, int T,
                 int columns, const BlockedRows& layout);

}  // namespace bitwatt
