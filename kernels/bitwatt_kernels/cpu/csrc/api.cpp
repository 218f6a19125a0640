// The C surface that native.py calls: pointers and sizes in, one Status out.
//
// Each function cuts its call into parts worth a thread's while and runs them on the context's
// pool. How a call is cut never shows in its result.

#include <cstring>
#include <string>
#include <vector>

#include "calls.h"
#include "pool.h"

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
extern const Kernels kernels_amx_int8, kernels_avx512_bf16, kernels_avx512_vnni, kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon_dotprod;
#endif
extern const Kernels kernels_portable;
#if defined(BITWATT_EMULATE_AMX)
extern const Kernels kernels_amx_emulated;
#endif

namespace {

#if defined(__x86_64__)
// GCC 12's __builtin_cpu_supports doesn't know AMX. The system must also save the tiles' state.
bool has_amx_int8() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    if ((edx & (kTile | kInt8)) != (kTile | kInt8)) return false;
    constexpr unsigned kTileConfigAndData = 3u << 17;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileConfigAndData) == kTileConfigAndData;
}
#endif

bool can_run(const Kernels* kernels) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (kernels == &kernels_avx2) return avx2;
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

struct Context {
    const Kernels* kernels;
    Pool pool;
};

enum Status : int { kOk = 0, kBlockOutOfRange = 1, kSlotOutOfRange = 2, kPositionOutOfRange = 3 };

// Handing a part to another thread costs about a microsecond; a part should take several.
constexpr double kPartNanoseconds = 3000;
constexpr int kPartsPerThread = 4;
// One core, roughly: what a part is worth, never how it is computed.
constexpr double kBytesPerNanosecond = 16, kMultipliesPerNanosecond = 150;
constexpr double kElementsPerNanosecond = 2;

// body(first, last) over [0, num_units), cut into parts; unit_ns is what one unit takes a core.
template <class Body>
void run_ranges(Context& context, int64_t num_units, double unit_ns, const Body& body) {
    const double worth = num_units * unit_ns / kPartNanoseconds;
    int64_t parts = static_cast<int64_t>(context.pool.num_threads()) * kPartsPerThread;
    if (worth < parts) parts = static_cast<int64_t>(worth);
    if (parts > num_units) parts = num_units;
    if (parts <= 1) {
        if (num_units > 0) body(0, static_cast<int>(num_units));
        return;
    }
    context.pool.run(static_cast<int>(parts), [&](int part) {
        body(static_cast<int>(num_units * part / parts),
             static_cast<int>(num_units * (part + 1) / parts));
    });
}

int blocks_of(int n) { return (n + kLanes - 1) / kLanes; }

void repack_block(const RepackCall& c, int block) {
    // Unpacked to a byte a code, 16 rows at a time; rows past N have codes 1, weight 0.
    const int quarter = c.K / 4;
    uint8_t* rows = reinterpret_cast<uint8_t*>(scratch(kRowScratch, (kLanes * c.K + 3) / 4));
    std::memset(rows, 1, static_cast<size_t>(kLanes) * c.K);
    for (int r = 0; r < kLanes && block * kLanes + r < c.N; ++r) {
        const uint8_t* codes = c.codes + static_cast<size_t>(block * kLanes + r) * quarter;
        for (int plane = 0; plane < 4; ++plane)
            for (int j = 0; j < quarter; ++j)
                rows[static_cast<size_t>(r) * c.K + plane * quarter + j] = codes[j] >> 2 * plane & 3;
    }
    uint8_t* out = c.blocks + static_cast<size_t>(block) * (c.K / 16) * kBlockBytes;
    for (int line = 0; line < c.K / 16; ++line)
        for (int r = 0; r < kLanes; ++r) {
            const uint8_t* row = rows + static_cast<size_t>(r) * c.K + line * 16;
            for (int b = 0; b < 4; ++b)
                *out++ = static_cast<uint8_t>(row[b] | row[4 + b] << 2 | row[8 + b] << 4 |
                                              row[12 + b] << 6);
        }
}

int run_elementwise(Context& context, const ElementwiseCall& c) {
    run_ranges(context, c.T, c.K * (c.gated ? 2 : 1) / kElementsPerNanosecond,
               [&](int first, int last) { context.kernels->elementwise(c, first, last); });
    return kOk;
}

// One step's attention: tiles of queries and, where those are few, splits of a decode's keys.
struct AttentionPlan {
    std::vector<AttentionTile> tiles;      // parts of the first pass
    std::vector<AttentionTile> merges;     // parts of the second, in order of their partials
    std::vector<size_t> partials;          // a tile's place among the partials, or kWhole
    size_t num_partials = 0;
    static constexpr size_t kWhole = SIZE_MAX;
};

constexpr int kTileRows = 64;

void plan_attention(const AttentionCall& c, int num_threads, AttentionPlan& plan) {
    plan.tiles.clear(), plan.merges.clear(), plan.partials.clear();
    plan.num_partials = 0;
    const int tile_tokens = kTileRows / (c.H / c.G) > 1 ? kTileRows / (c.H / c.G) : 1;
    const bool few = c.S * c.G < num_threads * kPartsPerThread;
    for (int s = 0; s < c.S; ++s) {
        const int first = c.query_starts[s], last = c.query_starts[s + 1];
        const int context_len = c.context_lens[s];
        if (first == last || context_len == 0) continue;
        for (int g = 0; g < c.G; ++g)
            for (int token = first; token < last; token += tile_tokens) {
                AttentionTile tile{s, g, token, 0, context_len - (last - token), 0, 0};
                tile.num_tokens = last - token < tile_tokens ? last - token : tile_tokens;
                const int num_keys = tile.first_position + tile.num_tokens;
                tile.last_split = (num_keys + kSplitTokens - 1) / kSplitTokens;
                if (few && tile.num_tokens == 1 && tile.last_split > 1) {
                    plan.merges.push_back(tile);
                    for (int split = 0; split < tile.last_split; ++split) {
                        AttentionTile part = tile;
                        part.first_split = split, part.last_split = split + 1;
                        plan.tiles.push_back(part);
                        plan.partials.push_back(plan.num_partials++);
                    }
                } else {
                    plan.tiles.push_back(tile);
                    plan.partials.push_back(AttentionPlan::kWhole);
                }
            }
    }
}

int check_blocks(const AttentionCall& c) {
    for (int s = 0; s < c.S; ++s) {
        const int used = blocks_of(c.context_lens[s]);
        if (used > c.max_blocks) return kBlockOutOfRange;
        const int32_t* blocks = c.block_tables + static_cast<size_t>(s) * c.max_blocks;
        for (int i = 0; i < used; ++i)
            if (blocks[i] < 0 || blocks[i] >= c.num_blocks) return kBlockOutOfRange;
    }
    return kOk;
}

// Tokens of no sequence with a context have zeros.
void clear_padding(const AttentionCall& c, int T) {
    const size_t row_bytes = static_cast<size_t>(c.H) * c.D * item_size(c.dtype);
    const auto clear = [&](int first, int last) {
        if (last > first)
            std::memset(static_cast<char*>(c.out) + first * row_bytes, 0,
                        (last - first) * row_bytes);
    };
    for (int s = 0; s < c.S; ++s)
        if (c.context_lens[s] == 0) clear(c.query_starts[s], c.query_starts[s + 1]);
    clear(c.query_starts[c.S], T);
}

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
    run_ranges(*context, num_words / kUnit, kUnit * 8 / kBytesPerNanosecond,
               [&](int first, int last) {
                   uint64_t sums[8] = {};
                   for (int64_t i = first * kUnit; i < last * kUnit; i += 8) {
                       __builtin_prefetch(words + i + 256);
                       for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
                   }
                   for (uint64_t sum : sums) total += sum;
               });
    return total;
}

BW_API int bw_repack(Context* context, const uint8_t* codes, uint8_t* blocks, int N, int K) {
    const RepackCall c{codes, blocks, N, K};
    run_ranges(*context, blocks_of(N), K * kLanes / kElementsPerNanosecond,
               [&](int first, int last) {
                   for (int block = first; block < last; ++block) repack_block(c, block);
               });
    return kOk;
}

BW_API int bw_ternary_linear(Context* context, int8_t* codes, float* x_scales, int32_t* x_sums,
                             const uint8_t* blocks, const float* scales, const float* bias,
                             const void* residual, void* out, int dtype, int T, int N, int K) {
    const TernaryCall c{{codes, x_scales, x_sums}, blocks, scales, bias, residual, out, dtype,
                        T,                         N,      K};
    constexpr int kUnit = 2;  // blocks that a tile may take together
    const int num_blocks = blocks_of(N);
    const double bytes = kUnit * kLanes * K / 4.0, multiplies = kUnit * kLanes * double(K) * T;
    run_ranges(*context, (num_blocks + kUnit - 1) / kUnit,
               bytes / kBytesPerNanosecond + multiplies / kMultipliesPerNanosecond,
               [&](int first, int last) {
                   const int end = last * kUnit < num_blocks ? last * kUnit : num_blocks;
                   context->kernels->ternary_linear(c, first * kUnit, end);
               });
    return kOk;
}

// quantize, rms_norm_quantize and gated_activation_quantize (out null); rms_norm, gated_activation.
BW_API int bw_elementwise(Context* context, const void* x, int dtype, int activation,
                          const void* weight, int weight_dtype, float eps, void* out,
                          int8_t* codes, float* scales, int32_t* sums, int T, int K) {
    const bool gated = activation >= 0;
    return run_elementwise(*context, {x, dtype, gated, activation, weight, weight_dtype, eps, out,
                                      {codes, scales, sums}, T, K});
}

BW_API int bw_rope_and_cache(Context* context, const void* qkv, int dtype, const float* rope,
                             int64_t rope_rows, void* cache, int cache_dtype, int64_t num_blocks,
                             const int64_t* positions, const int64_t* slots, void* queries, int T,
                             int H, int G, int D) {
    for (int t = 0; t < T; ++t) {
        if (slots[t] >= num_blocks * kLanes) return kSlotOutOfRange;
        if (positions[t] < 0 || positions[t] >= rope_rows) return kPositionOutOfRange;
    }
    const RopeCall c{qkv,   rope,        cache, positions, slots, queries,
                     dtype, cache_dtype, T,     H,         G,     D,       num_blocks};
    run_ranges(*context, T, (H + 2 * G) * D / kElementsPerNanosecond,
               [&](int first, int last) { context->kernels->rope_and_cache(c, first, last); });
    return kOk;
}

BW_API int bw_attention(Context* context, const void* queries, int dtype, const void* cache,
                        int cache_dtype, int64_t num_blocks, const int32_t* query_starts,
                        const int32_t* context_lens, const int32_t* block_tables, int max_blocks,
                        void* out, int T, int S, int H, int G, int D, float scale) {
    const AttentionCall c{queries, cache,       query_starts, context_lens, block_tables, out,
                          dtype,   cache_dtype, S,            H,            G,            D,
                          max_blocks, num_blocks, scale};
    if (const int status = check_blocks(c)) return status;
    clear_padding(c, T);
    thread_local AttentionPlan plan;
    const AttentionPlan& planned = plan;
    plan_attention(c, context->pool.num_threads(), plan);
    const size_t partial_floats =
        static_cast<size_t>(H / G) * (padded_width(D) + kLanes);
    float* partials =
        plan.num_partials ? scratch(kCallScratch, plan.num_partials * partial_floats) : nullptr;
    double multiplies = 0;
    for (const AttentionTile& tile : plan.tiles)
        multiplies += double(tile.num_tokens) * (H / G) * D * 2 * kSplitTokens *
                      (tile.last_split - tile.first_split);
    const double num_tiles = double(plan.tiles.size());
    run_ranges(*context, plan.tiles.size(), multiplies / num_tiles / 10, [&](int first, int last) {
        for (int i = first; i < last; ++i) {
            const size_t place = planned.partials[i];
            context->kernels->attention(
                c, planned.tiles[i],
                place == AttentionPlan::kWhole ? nullptr : partials + place * partial_floats);
        }
    });
    const float* next = partials;
    for (const AttentionTile& tile : plan.merges) {
        context->kernels->merge_splits(c, tile, next);
        next += tile.last_split * partial_floats;
    }
    return kOk;
}

BW_API int bw_head(Context* context, const void* x, int dtype, const void* weight,
                   int weight_dtype, float* out, int T, int V, int hidden) {
    const int tokens = head_tokens(T);
    const size_t stride = (static_cast<size_t>(hidden) + 31) / 32 * 32;
    const bool as_is = context->kernels->head_takes(dtype, weight_dtype);
    const int x_dtype = as_is ? dtype : int{kFloat32};
    float* copy = scratch(kCallScratch, tokens * stride);
    std::memset(copy, 0, tokens * stride * item_size(x_dtype));
    for (int t = 0; t < T; ++t) {
        const size_t row_bytes = hidden * item_size(dtype);
        const char* row = static_cast<const char*>(x) + t * row_bytes;
        char* to = reinterpret_cast<char*>(copy) + t * stride * item_size(x_dtype);
        if (as_is)
            std::memcpy(to, row, row_bytes);
        else
            context->kernels->widen(row, dtype, hidden, reinterpret_cast<float*>(to));
    }
    const HeadCall c{copy, weight, out, x_dtype, stride, weight_dtype, T, V, hidden};
    const double row_bytes = double(hidden) * item_size(weight_dtype);
    run_ranges(*context, blocks_of(V),
               kLanes * (row_bytes / kBytesPerNanosecond + double(hidden) * tokens / 25),
               [&](int first, int last) {
                   const int end = last * kLanes < V ? last * kLanes : V;
                   context->kernels->head(c, first * kLanes, end);
               });
    return kOk;
}

BW_API int bw_int8_head(Context* context, const int8_t* x_codes, const float* x_scales,
                        const int8_t* codes, const float* scales, const int32_t* sums, float* out,
                        int T, int V, int hidden) {
    const int tokens = head_tokens(T);
    const size_t stride = (static_cast<size_t>(hidden) + 63) / 64 * 64;
    int8_t* copy = reinterpret_cast<int8_t*>(scratch(kCallScratch, tokens * stride / 4));
    std::memset(copy, 0, tokens * stride);
    for (int t = 0; t < T; ++t)
        std::memcpy(copy + t * stride, x_codes + static_cast<size_t>(t) * hidden, hidden);
    const Int8HeadCall c{copy, stride, x_scales, codes, scales, sums, out, T, V, hidden};
    run_ranges(*context, blocks_of(V),
               kLanes * (hidden / kBytesPerNanosecond + double(hidden) * tokens / 100),
               [&](int first, int last) {
                   const int end = last * kLanes < V ? last * kLanes : V;
                   context->kernels->int8_head(c, first * kLanes, end);
               });
    return kOk;
}
