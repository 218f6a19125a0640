// What one call of each kernel reads and writes, and the table of kernels an instruction set gives.
//
// T tokens, S sequences, H and G query and key-value heads, D head_dim, as in backend.py. A kernel
// works on a range of its call's independent parts (row blocks, tokens, heads); ops.h splits the
// ranges over threads. No kernel's result for a token depends on the range it is called with.

#pragma once

#include <cstddef>
#include <cstdint>

namespace bitwatt {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // kInt8: of a cache alone

inline size_t item_size(int dtype) {
    return dtype == kFloat32 ? sizeof(float) : dtype == kInt8 ? 1 : 2;
}

enum Activation : int { kRelu2 = 0, kSilu = 1 };

// Vectors: the arithmetic of simd.h is on so many floats at a time.
constexpr int kLanes = 16;

// Weights lie in row blocks, each of two row groups, and a group in lines of neighbouring columns;
// layouts in coded_linear.h and dense.h. A line is one cache line, read once: streams of lines are
// prefetched at this distance past the line being multiplied.
constexpr int kGroupRows = 16;
constexpr int kRowBlockRows = 2 * kGroupRows;
constexpr int kCacheLineBytes = 64;
constexpr int kGroupLineBytes = kCacheLineBytes;
constexpr int kPrefetchBytes = 4096;

// The KV cache lies in blocks of so many tokens. Attention sums split by split of so many keys.
constexpr int kKvBlockTokens = 16;
constexpr int kSplitTokens = 256;

static_assert(kGroupRows == kLanes, "a row group's sums are a vector");
static_assert(kKvBlockTokens % kLanes == 0, "a KV block's scores are whole vectors");
static_assert(kSplitTokens % kKvBlockTokens == 0, "a split has whole KV blocks");

// Bytes of one head's keys, or values, in a KV block: of floats [16, D]. In int8 a scale a token
// follows the codes, which of values lie as [16, D], and of keys as a row group's 8-bit lines do,
// plus 128: [D / 4][16][4]. kv_blocks.py has the same.
inline size_t kv_block_bytes(int dtype, int D) {
    return kKvBlockTokens * (D * item_size(dtype) + (dtype == kInt8 ? sizeof(float) : 0));
}

inline int row_blocks_of(int rows) { return (rows + kRowBlockRows - 1) / kRowBlockRows; }

// codes [T, K] int8, scales float32 and sums int32 [T], or [T, K / scale_group] where a token's
// features have scales by groups
struct Quantized {
    int8_t* codes;
    float* scales;
    int32_t* sums;
};

// out = (x · codes' weights) / x scales · scales (+ bias) (+ residual); by scale groups the sum of
// those of each, in their order
struct CodedLinearCall {
    Quantized x;
    int bits;               // 2: ternary weights; 8: weights in [-127, 127]
    const uint8_t* blocks;  // row blocks: [ceil(N / 32)][K / (32 / bits)][2][64]
    const void* scales;     // [ceil(N / 32)][K / scale_group][32], of scales_dtype
    const float* bias;      // [ceil(N / 32) * 32] or null
    const void* residual;   // [T, N] or null
    void* out;              // [T, N]
    int dtype;
    int T, N, K;
    int scale_group;  // columns that share a row's scale, a multiple of 64 where bits is 2; or K
    int scales_dtype;  // float32; float16 too where there are groups
};

// out = code * scale of rows of ternary weights; blocks and scales as in CodedLinearCall
struct TernaryRowsCall {
    const int64_t* ids;  // [T]
    const uint8_t* blocks;
    const void* scales;
    void* out;  // [T, K]
    int dtype;
    int T, K;
    int scale_group, scales_dtype;
};

// Covers quantize, rms_norm and gated_activation with or without quantization: x is widened, gated
// if it has a gate, normed if it has a weight, then quantized or rounded to dtype.
struct ElementwiseCall {
    const void* x;  // [T, K], or [T, 2 * K] = gate | up
    int dtype;
    bool gated;
    int activation;
    const void* weight;  // [K] or null: no norm
    int weight_dtype;
    float eps;
    void* out;          // [T, K] dtype, or null: quantize
    Quantized quantized;
    int T, K;
    int scale_group;  // of quantized: features that share a scale, a multiple of 64; or K
};

struct RopeCall {
    const void* qkv;  // [T, (H + 2 * G) * D]
    const float* rope;  // [max_model_len, D], cos | sin
    void* cache;  // [2, num_blocks, G, kv_block_bytes]
    const int64_t* positions;  // [T]
    const int64_t* slots;      // [T]
    void* queries;             // [T, H, D]
    const float* query_norm;   // [D] or null, with key_norm: no norm before the rotation
    const float* key_norm;     // [D]
    float eps;
    int dtype, cache_dtype;
    int T, H, G, D;
    int64_t num_blocks;
};

struct AttentionCall {
    const void* queries;  // [T, H, D]
    const void* cache;    // [2, num_blocks, G, kv_block_bytes]
    const int32_t* query_starts;  // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* block_tables;  // [S, max_blocks]
    void* out;                    // [T, H * D]
    int dtype, cache_dtype;
    int S, H, G, D, max_blocks;
    int64_t num_blocks;
    float scale;
};

// The queries one unit of attention work covers, over the splits [first_split, last_split).
struct AttentionTile {
    int sequence, group;
    int first_token, num_tokens;  // tokens of the step
    int first_position;           // position of the first token in its sequence
    int first_split, last_split;
};

inline int padded_width(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Neighbouring columns a line of dense weights of this dtype holds, P in dense.h.
constexpr int dense_columns_per_line(int dtype) { return dtype == kBFloat16 ? 2 : 1; }

// out = x · weights (+ bias) (+ residual), rounded once
struct DenseCall {
    const void* x;         // [T, x_stride], zeros past K
    const void* weight;    // [ceil(N / 32)][columns / P][2][16][P], P columns a line
    const void* bias;      // [N] or null
    const void* residual;  // [T, N] or null
    void* out;             // [T, N]
    int dtype;             // of bias, residual and out
    int x_dtype;         // float32, or whatever dense_takes
    size_t x_stride;
    int weight_dtype;
    int T, N, columns;  // columns: K, padded to a multiple of P
};

// -inf to the logits of the tokens whose bit a row's mask lacks
struct MaskCall {
    float* logits;         // [.., N]
    const int64_t* rows;   // [M], of logits, each once
    const uint32_t* bits;  // [M, num_words], a bit a token, the lowest first
    int M, N, num_words;
};

// A mask's words, and the sums of weights, are of so many tokens.
constexpr int kWordTokens = 32;
static_assert(kWordTokens % kLanes == 0, "a word's tokens are whole vectors");

// How a token is drawn; as Python writes them, numbers that a double holds.
struct DrawSettings {
    double temperature;  // 0: the largest logit's
    double top_k;        // 0 for all
    double top_p, min_p;
    double uniform;  // in [0, 1)
    double mask;     // a row of bits, or -1
};

// tokens [M]: one a row of logits
struct DrawCall {
    const float* logits;           // [M, N]
    const DrawSettings* settings;  // [M]
    const uint32_t* bits;          // [.., num_words], a bit a token, the lowest first
    int64_t* tokens;               // [M], -1 where none can be drawn
    int M, N, num_words;
};

// Parts a thread that a call is cut into, if they are worth it.
constexpr int kPartsPerThread = 4, kManyParts = 16;

// How a linear is cut best: into so many parts a thread, of so many row blocks, or a few less where
// there would be too few parts.
struct LinearCut {
    int thread_parts, blocks, fewest_blocks;
};

struct Kernels {
    const char* name;
    bool (*prepare)();  // once a process before the first kernel; false: not permitted here
    void (*linear)(const CodedLinearCall&, int first_block, int last_block);
    LinearCut (*linear_cut)(const CodedLinearCall&);
    void (*ternary_rows)(const TernaryRowsCall&, int first_token, int last_token);
    void (*elementwise)(const ElementwiseCall&, int first_token, int last_token);
    void (*rope_and_cache)(const RopeCall&, int first_token, int last_token);
    // partial: null to write the result, else for merge_splits a row's sums, its maximum and its
    // total, [tokens * H / G, padded_width(D) + 16]
    void (*attention)(const AttentionCall&, const AttentionTile&, float* partial);
    // partials: of one query token, split by split in order
    void (*merge_splits)(const AttentionCall&, const AttentionTile&, const float* partials);
    void (*widen)(const void* in, int dtype, int n, float* out);
    void (*dense)(const DenseCall&, int first_block, int last_block);
    bool (*dense_takes)(int dtype, int weight_dtype);
    void (*mask)(const MaskCall&, int first_row, int last_row);
    int (*scale)(const DrawCall&, int row, float* out, int32_t* words, float* largest_of_all);
    void (*weigh)(const float* scaled, int num_words, float largest, float least, float* weights,
                  double* sums);
};

// At least num_floats floats, 64-byte aligned, this thread's own until it next asks for this use.
enum ScratchUse {
    kRowScratch, kTileScratch, kGroupScratch, kCallScratch, kLayerScratch, kNumScratchUses
};
float* scratch(ScratchUse use, size_t num_floats);

}  // namespace bitwatt
