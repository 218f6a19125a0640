// A ternary layer in one job: the operations of bitwatt_kernels/layer.py, one after the other.

#pragma once

#include "ops.h"

namespace bitwatt {

// Mirrored in abi.py: Matrix, Layer, StepCall, CacheView, RopeTable.
struct Matrix {
    const uint8_t* blocks;
    const void* scales;
    const float* bias;  // or null
    int N, K, scale_group, scales_dtype;
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    const float* input_norm;          // [hidden]
    const float* attention_sub_norm;  // [H * D] or null
    const float* mlp_norm;            // [hidden]
    const float* mlp_sub_norm;        // [down.K] or null
    int H, G, D, activation;
    float eps, attention_scale;
    const float* query_norm;  // [D] or null, with key_norm
    const float* key_norm;    // [D]
    float head_eps;
};

// A StepLayout's tensors, as in backend.py.
struct StepCall {
    const int64_t* positions;     // [T]
    const int64_t* slots;         // [T]
    const int32_t* query_starts;  // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* block_tables;  // [S, max_blocks]
    int T, S, max_blocks;
};

struct CacheView {
    void* data;  // [2, num_blocks, G, kv_block_bytes]
    int64_t num_blocks;
    int dtype;
};

struct RopeTable {
    const float* rows;  // [num_rows, D]
    int64_t num_rows;
};

// out = the stream h after the layer, both [T, hidden] of dtype, out perhaps h itself; writes the
// cache.
int run_layer(Context& context, const Layer& layer, const StepCall& step, const CacheView& cache,
              const RopeTable& rope, const void* h, void* out, int dtype);

}  // namespace bitwatt
