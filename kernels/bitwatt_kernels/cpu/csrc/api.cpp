// The C surface that native.py calls: pointers and sizes in, one Status out.

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "layer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define BW_API extern "C" __attribute__((visibility("default")))

namespace bitwatt {

#if defined(__x86_64__)
extern const Kernels kernels_amx_int8, kernels_avx512_bf16, kernels_avx512_vnni, kernels_avx_vnni,
    kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon_dotprod;
#endif
extern const Kernels kernels_portable;
#if defined(BITWATT_EMULATE_AMX)
extern const Kernels kernels_amx_emulated;
#endif

namespace {

#if defined(__x86_64__)
// Features that __builtin_cpu_supports doesn't know: AMX in GCC 12, the others in clang 14.
enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

bool has_cpuid(unsigned leaf, unsigned subleaf, CpuidRegister in, unsigned bits) {
    unsigned registers[4];
    return __get_cpuid_count(leaf, subleaf, &registers[kEax], &registers[kEbx], &registers[kEcx],
                             &registers[kEdx]) &&
           (registers[in] & bits) == bits;
}

bool has_f16c() { return has_cpuid(1, 0, kEcx, 1u << 29); }
bool has_avx_vnni() { return has_cpuid(7, 1, kEax, 1u << 4); }

// The system must also save the tiles' state.
bool has_amx_int8() {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    if (!has_cpuid(7, 0, kEdx, kTile | kInt8)) return false;
    constexpr unsigned kTileConfigAndData = 3u << 17;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileConfigAndData) == kTileConfigAndData;
}
#endif

bool can_run(const Kernels* kernels) {
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (kernels == &kernels_avx2) return avx2;
    if (kernels == &kernels_avx_vnni) return avx2 && has_avx_vnni();
    const bool vnni = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (kernels == &kernels_avx512_vnni) return vnni;
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (kernels == &kernels_avx512_bf16) return bf16;
    if (kernels == &kernels_amx_int8) return bf16 && has_amx_int8();
#elif defined(__aarch64__)
    if (kernels == &kernels_neon_dotprod) {
#if defined(__linux__)
        return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
        return true;  // every Apple processor has it
#endif
    }
#endif
#if defined(BITWATT_EMULATE_AMX)
    if (kernels == &kernels_amx_emulated) return true;
#endif
    return kernels == &kernels_portable;
}

// The fastest first.
std::vector<const Kernels*> kernels_that_run() {
    std::vector<const Kernels*> all = {
#if defined(__x86_64__)
        &kernels_amx_int8,
        &kernels_avx512_bf16,
        &kernels_avx512_vnni,
        &kernels_avx_vnni,
        &kernels_avx2,
#elif defined(__aarch64__)
        &kernels_neon_dotprod,
#endif
        &kernels_portable,
#if defined(BITWATT_EMULATE_AMX)
        &kernels_amx_emulated,
#endif
    };
    std::vector<const Kernels*> running;
    for (const Kernels* kernels : all)
        if (can_run(kernels) && kernels->prepare()) running.push_back(kernels);
    return running;
}

// From codes [N, K / 4], layout in packing.py, to a row block's 2-bit lines, layout in codes.h.
void repack_block(const uint8_t* codes, uint8_t* out, int N, int K, int block) {
    // Unpacked to a byte a code, 32 rows at a time; rows past N have codes 1, weight 0.
    const int quarter = K / 4;
    uint8_t* rows = reinterpret_cast<uint8_t*>(scratch(kRowScratch, kBlockRows * K / 4));
    std::memset(rows, 1, static_cast<size_t>(kBlockRows) * K);
    for (int r = 0; r < kBlockRows && block * kBlockRows + r < N; ++r) {
        const uint8_t* row = codes + static_cast<size_t>(block * kBlockRows + r) * quarter;
        for (int plane = 0; plane < 4; ++plane)
            for (int j = 0; j < quarter; ++j)
                rows[static_cast<size_t>(r) * K + plane * quarter + j] = row[j] >> 2 * plane & 3;
    }
    for (int line = 0; line < K / 16; ++line)
        for (int r = 0; r < kBlockRows; ++r) {
            const uint8_t* row = rows + static_cast<size_t>(r) * K + line * 16;
            for (int b = 0; b < 4; ++b)
                *out++ = static_cast<uint8_t>(row[b] | row[4 + b] << 2 | row[8 + b] << 4 |
                                              row[12 + b] << 6);
        }
}

// Chunks of neighbouring columns, of each of a block's 32 rows in turn; zeros past the matrix.
template <size_t kChunk>
void block_rows(const char* rows, char* out, int num_rows, size_t row_bytes) {
    for (size_t at = 0; at < row_bytes; at += kChunk)
        for (int r = 0; r < kBlockRows; ++r, out += kChunk) {
            const char* from = rows + r * row_bytes + at;
            std::memset(out, 0, kChunk);
            if (r >= num_rows) continue;
            if (at + kChunk <= row_bytes)
                std::memcpy(out, from, kChunk);
            else
                std::memcpy(out, from, row_bytes - at);
        }
}

// How a matrix of row blocks lies: see bw_block_rows.
struct BlockedRows {
    size_t chunk, row_bytes, block_bytes;
    BlockedRows(int columns, int item_bytes, int columns_per_line)
        : chunk(static_cast<size_t>(item_bytes) * columns_per_line),
          row_bytes(static_cast<size_t>(item_bytes) * columns),
          block_bytes((row_bytes + chunk - 1) / chunk * chunk * kBlockRows) {}
};

}  // namespace

}  // namespace bitwatt

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
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(start) + bytes) / kPage * kPage;
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

// Ternary codes [N, K / 4] into row blocks, blocks_of(N) * 32 * K / 4 bytes.
BW_API int bw_repack(Context* context, const uint8_t* codes, uint8_t* blocks, int N, int K) {
    const auto repack = [&](int first, int last) {
        for (int block = first; block < last; ++block)
            repack_block(codes, blocks + static_cast<size_t>(block) * kBlockRows * K / 4, N, K,
                         block);
    };
    ranges(*context, blocks_of(N), K * kBlockRows / kElementsPerNanosecond, repack).run(*context);
    return kOk;
}

// A matrix [num_rows, columns] into row blocks [blocks][lines][32][columns_per_line], a line 2 or 4
// bytes a row.
BW_API int bw_block_rows(Context* context, const char* rows, char* out, int num_rows, int columns,
                         int item_bytes, int columns_per_line) {
    const BlockedRows to(columns, item_bytes, columns_per_line);
    const auto one = to.chunk == 2 ? block_rows<2> : block_rows<4>;
    const auto block_range = [&](int first, int last) {
        for (int block = first; block < last; ++block)
            one(rows + to.row_bytes * block * kBlockRows, out + to.block_bytes * block,
                num_rows - block * kBlockRows, to.row_bytes);
    };
    ranges(*context, blocks_of(num_rows), columns * kBlockRows / kElementsPerNanosecond,
           block_range)
        .run(*context);
    return kOk;
}

// Rows ids [T] of a matrix that bw_block_rows blocked, [T, columns].
BW_API int bw_embed(Context* context, const int64_t* ids, const char* blocks, char* out, int T,
                    int num_rows, int columns, int item_bytes, int columns_per_line) {
    for (int t = 0; t < T; ++t)
        if (ids[t] < 0 || ids[t] >= num_rows) return kTokenOutOfRange;
    const BlockedRows in(columns, item_bytes, columns_per_line);
    const auto gather = [&](int first, int last) {
        for (int t = first; t < last; ++t) {
            const char* from =
                blocks + ids[t] / kBlockRows * in.block_bytes + ids[t] % kBlockRows * in.chunk;
            char* to = out + t * in.row_bytes;
            for (size_t at = 0; at < in.row_bytes; at += in.chunk, from += kBlockRows * in.chunk)
                std::memcpy(to + at, from,
                            in.row_bytes - at < in.chunk ? in.row_bytes - at : in.chunk);
        }
    };
    ranges(*context, T, columns / kElementsPerNanosecond, gather).run(*context);
    return kOk;
}

// bits: 2 for blocks of bw_repack, 8 for those that bw_block_rows made of weights plus 128.
BW_API int bw_linear(Context* context, int8_t* codes, float* x_scales, int32_t* x_sums, int bits,
                     const uint8_t* blocks, const float* scales, const float* bias,
                     const void* residual, void* out, int dtype, int T, int N, int K) {
    const CodesCall c{{codes, x_scales, x_sums}, bits, blocks, scales, bias, residual, out, dtype,
                      T, N, K};
    linear(*context, c).run(*context);
    return kOk;
}

// quantize, rms_norm_quantize and gated_activation_quantize (out null); rms_norm, gated_activation.
BW_API int bw_elementwise(Context* context, const void* x, int dtype, int activation,
                          const void* weight, int weight_dtype, float eps, void* out,
                          int8_t* codes, float* scales, int32_t* sums, int T, int K) {
    const bool gated = activation >= 0;
    const ElementwiseCall c{x,   dtype, gated, activation, weight, weight_dtype,
                            eps, out,   {codes, scales, sums}, T, K};
    elementwise(*context, c).run(*context);
    return kOk;
}

BW_API int bw_rope_and_cache(Context* context, const void* qkv, int dtype, const float* rope,
                             int64_t rope_rows, void* cache, int cache_dtype, int64_t num_blocks,
                             const int64_t* positions, const int64_t* slots, void* queries, int T,
                             int H, int G, int D) {
    const RopeCall c{qkv,   rope,        cache, positions, slots, queries,
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
                             const Step* step, const CacheView* cache, const RopeTable* rope,
                             const void* h, void* out, int dtype) {
    CacheView its_cache = *cache;
    for (int i = 0; i < num_layers; ++i) {
        const Layer& layer = layers[i];
        // The stream may stay in place: what reads it in a layer is done before what writes it.
        if (const int status =
                run_layer(*context, layer, *step, its_cache, *rope, i ? out : h, out, dtype))
            return status;
        its_cache.data = static_cast<char*>(its_cache.data) +
                         static_cast<size_t>(2 * cache->num_blocks) * layer.G * kLanes * layer.D *
                             item_size(cache->dtype);
    }
    return kOk;
}

// weight: what bw_block_rows made of [V, hidden], head_pair(weight_dtype) columns a line.
BW_API int bw_head(Context* context, const void* x, int dtype, const void* weight,
                   int weight_dtype, float* out, int T, int V, int hidden) {
    const int pair = head_pair(weight_dtype), columns = (hidden + pair - 1) / pair * pair;
    const bool as_is = context->kernels->head_takes(dtype, weight_dtype) && columns == hidden;
    HeadCall c{x, weight, out, dtype, static_cast<size_t>(columns), weight_dtype, T, V, columns};
    if (!as_is) {
        c.x_dtype = kFloat32;
        c.x_stride = padded_width(columns);
        float* wide = scratch(kCallScratch, T * c.x_stride);
        for (int t = 0; t < T; ++t)
            context->kernels->widen(static_cast<const char*>(x) + t * hidden * item_size(dtype),
                                    dtype, hidden, wide + t * c.x_stride);
        c.x = wide;
    }
    const double block_bytes = kBlockRows * double(columns) * item_size(weight_dtype);
    const auto multiply = [&](int first, int last) { context->kernels->head(c, first, last); };
    ranges(*context, blocks_of(V),
           block_bytes / kBytesPerNanosecond + kBlockRows * double(columns) * T / 25, multiply)
        .run(*context);
    return kOk;
}
