// The C surface, with signatures as in library.py: pointers and sizes in, a Status out.

#include <atomic>
#include <cstring>
#include <string>

#include "instruction_sets.h"
#include "layer.h"
#include "row_blocks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace bitwatt;

// The names of the instruction sets that run here, the fastest first, separated by commas.
BW_API const char* bw_instruction_sets() {
    static const std::string names = [] {
        std::string joined;
        for (const Kernels* kernels : kernels_that_run()) {
            if (!joined.empty()) joined += ',';
            joined += kernels->name;
        }
        return joined;
    }();
    return names.c_str();
}

// A context for one backend, or null if the instruction set does not run here.
BW_API Context* bw_create(const char* instruction_set, int num_threads) {
    for (const Kernels* kernels : kernels_that_run())
        if (std::strcmp(kernels->name, instruction_set) == 0)
            return new Context{kernels, Pool(num_threads)};
    return nullptr;
}

BW_API void bw_destroy(Context* context) { delete context; }

// Ask for huge pages behind a buffer that is not written yet: fewer misses in the TLB.
BW_API void bw_advise_huge_pages(void* start, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHugePageBytes = 2 << 20;
    const uintptr_t first = reinterpret_cast<uintptr_t>(start);
    const uintptr_t from = (first + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const uintptr_t to = (first + bytes) / kHugePageBytes * kHugePageBytes;
    if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

// The sum of [num_words] integers, read once by all threads: what memory gives, for the roofline.
BW_API uint64_t bw_read(Context* context, const uint64_t* words, int64_t num_words) {
    constexpr int64_t kUnit = 1 << 15;
    std::atomic<uint64_t> total{0};
    const auto read = [&](int first, int last) {
        uint64_t sums[8] = {};
        for (int64_t i = first * kUnit; i < last * kUnit; i += 8) {
            __builtin_prefetch(words + i + 256);
            for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
        }
        for (uint64_t sum : sums) total += sum;
    };
    ranges(*context, num_words / kUnit, kUnit * 8 / kBytesPerNanosecond, read).run(*context);
    return total;
}

// Ternary codes [N, K / 4] into row blocks, row_blocks_of(N) * 32 * K / 4 bytes.
BW_API int bw_repack(Context* context, const uint8_t* codes, uint8_t* blocks, int N, int K) {
    repack_ternary(*context, codes, blocks, N, K);
    return kOk;
}

// A matrix [num_rows, columns] into row blocks [blocks][lines][32][columns_per_line], a line 2 or 4
// bytes a row.
BW_API int bw_block_rows(Context* context, const char* rows, char* out, int num_rows, int columns,
                         int item_bytes, int columns_per_line) {
    block_rows(*context, rows, out, num_rows, columns, {columns, item_bytes, columns_per_line});
    return kOk;
}

// Rows ids [T] of a matrix that bw_block_rows blocked, [T, columns].
BW_API int bw_embed(Context* context, const int64_t* ids, const char* blocks, char* out, int T,
                    int num_rows, int columns, int item_bytes, int columns_per_line) {
    for (int t = 0; t < T; ++t)
        if (ids[t] < 0 || ids[t] >= num_rows) return kTokenOutOfRange;
    gather_rows(*context, ids, blocks, out, T, columns, {columns, item_bytes, columns_per_line});
    return kOk;
}

// Rows ids [T] of N in blocks of bw_repack, [T, K] of dtype: code * scale.
BW_API int bw_ternary_rows(Context* context, const int64_t* ids, const uint8_t* blocks,
                           const void* scales, void* out, int dtype, int T, int N, int K,
                           int scale_group, int scales_dtype) {
    for (int t = 0; t < T; ++t)
        if (ids[t] < 0 || ids[t] >= N) return kTokenOutOfRange;
    const TernaryRowsCall c{ids, blocks, scales, out, dtype, T, K, scale_group, scales_dtype};
    ternary_rows(*context, c).run(*context);
    return kOk;
}

// bits: 2 for blocks of bw_repack, 8 for those that bw_block_rows made of weights plus 128.
BW_API int bw_linear(Context* context, int8_t* codes, float* x_scales, int32_t* x_sums, int bits,
                     const uint8_t* blocks, const void* scales, const float* bias,
                     const void* residual, void* out, int dtype, int T, int N, int K,
                     int scale_group, int scales_dtype) {
    const CodedLinearCall c{{codes, x_scales, x_sums}, bits, blocks, scales, bias, residual, out,
                            dtype, T, N, K, scale_group, scales_dtype};
    linear(*context, c).run(*context);
    return kOk;
}

// quantize, rms_norm_quantize and gated_activation_quantize (out null); rms_norm, gated_activation.
BW_API int bw_elementwise(Context* context, const void* x, int dtype, int activation,
                          const void* weight, int weight_dtype, float eps, void* out,
                          int8_t* codes, float* scales, int32_t* sums, int T, int K,
                          int scale_group) {
    const bool gated = activation >= 0;
    const ElementwiseCall c{x,   dtype, gated, activation, weight, weight_dtype,
                            eps, out,   {codes, scales, sums}, T, K, scale_group};
    elementwise(*context, c).run(*context);
    return kOk;
}

BW_API int bw_rope_and_cache(Context* context, const void* qkv, int dtype, const float* rope,
                             int64_t rope_rows, void* cache, int cache_dtype, int64_t num_blocks,
                             const int64_t* positions, const int64_t* slots, void* queries,
                             const float* query_norm, const float* key_norm, float eps, int T,
                             int H, int G, int D) {
    const RopeCall c{qkv,   rope,        cache, positions, slots, queries, query_norm, key_norm, eps,
                     dtype, cache_dtype, T,     H,         G,     D,       num_blocks};
    if (const int status = check(c, rope_rows)) return status;
    rope_and_cache(*context, c).run(*context);
    return kOk;
}

BW_API int bw_attention(Context* context, const void* queries, int dtype, const void* cache,
                        int cache_dtype, int64_t num_blocks, const int32_t* query_starts,
                        const int32_t* context_lens, const int32_t* block_tables, int max_blocks,
                        void* out, int T, int S, int H, int G, int D, float scale) {
    const AttentionCall c{queries, cache,       query_starts, context_lens, block_tables, out,
                          dtype,   cache_dtype, S,            H,            G,            D,
                          max_blocks, num_blocks, scale};
    const Attention attention(*context, c, T);
    if (const int status = attention.check()) return status;
    attention.clear_padding();
    attention.tiles().run(*context);
    attention.merges().run(*context);
    return kOk;
}

// Layers one after the other, each with its own part of cache [num_layers, 2, num_blocks, ...].
BW_API int bw_ternary_layers(Context* context, const Layer* layers, int num_layers,
                             const StepCall* step, const CacheView* cache, const RopeTable* rope,
                             const void* h, void* out, int dtype) {
    CacheView its_cache = *cache;
    for (int i = 0; i < num_layers; ++i) {
        const Layer& layer = layers[i];
        // The stream may stay in place: what reads it in a layer is done before what writes it.
        if (const int status =
                run_layer(*context, layer, *step, its_cache, *rope, i ? out : h, out, dtype))
            return status;
        its_cache.data = static_cast<char*>(its_cache.data) +
                         static_cast<size_t>(2 * cache->num_blocks) * layer.G *
                             kv_block_bytes(cache->dtype, layer.D);
    }
    return kOk;
}

// weight: what bw_block_rows made of [N, K], dense_columns_per_line(weight_dtype) a line. bias,
// residual and out are of out_dtype.
BW_API int bw_dense_linear(Context* context, const void* x, int dtype, const void* weight,
                           int weight_dtype, const void* bias, const void* residual, void* out,
                           int out_dtype, int T, int N, int K) {
    const int of_line = dense_columns_per_line(weight_dtype);
    const int columns = (K + of_line - 1) / of_line * of_line;
    const bool as_is = context->kernels->dense_takes(dtype, weight_dtype) && columns == K;
    DenseCall c{x,         weight, bias, residual, out, out_dtype, dtype, static_cast<size_t>(columns),
                weight_dtype, T,   N,    columns};
    if (!as_is) {
        c.x_dtype = kFloat32;
        c.x_stride = padded_width(columns);
        float* wide = scratch(kCallScratch, T * c.x_stride);
        const auto widen = [&](int first, int last) {
            for (int t = first; t < last; ++t)
                context->kernels->widen(
                    static_cast<const char*>(x) + static_cast<size_t>(t) * K * item_size(dtype),
                    dtype, K, wide + t * c.x_stride);
        };
        ranges(*context, T, K / kElementsPerNanosecond, widen).run(*context);
        c.x = wide;
    }
    const double block_bytes = kRowBlockRows * double(columns) * item_size(weight_dtype);
    const auto multiply = [&](int first, int last) { context->kernels->dense(c, first, last); };
    ranges(*context, row_blocks_of(N),
           block_bytes / kBytesPerNanosecond + kRowBlockRows * double(columns) * T / 25, multiply)
        .run(*context);
    return kOk;
}

// bits [M, num_words]: one for each of N tokens at least, for the rows [M] of logits
BW_API int bw_mask(Context* context, float* logits, const int64_t* rows, const uint32_t* bits, int M,
                   int N, int num_words) {
    const MaskCall c{logits, rows, bits, M, N, num_words};
    const auto mask = [&](int first, int last) { context->kernels->mask(c, first, last); };
    ranges(*context, M, N * sizeof(float) / kBytesPerNanosecond, mask).run(*context);
    return kOk;
}

// tokens [M] of logits [M, N] by settings [M], whose masks are rows of bits [num_masks, num_words]
BW_API int bw_draw(Context* context, const float* logits, const DrawSettings* settings,
                   const uint32_t* bits, int64_t* tokens, int M, int N, int num_masks,
                   int num_words) {
    for (int m = 0; m < M; ++m)
        if (!(settings[m].mask < num_masks)) return kMaskOutOfRange;
    const DrawCall c{logits, settings, bits, tokens, M, N, num_words};
    const auto draw_some = [&](int first, int last) {
        for (int m = first; m < last; ++m) draw(*context->kernels, c, m);
    };
    ranges(*context, M, N / kElementsPerNanosecond, draw_some).run(*context);
    return kOk;
}
