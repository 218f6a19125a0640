// Checks every instruction set this machine has against plain arithmetic and against each other,
// through the C surface, with no Python: to be run where there is none, as under qemu-aarch64.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
const char* bw_instruction_sets();
void* bw_create(const char*, int);
void bw_destroy(void*);
int bw_repack(void*, const uint8_t*, uint8_t*, int, int);
int bw_block_rows(void*, const char*, char*, int, int, int, int);
int bw_ternary_rows(void*, const int64_t*, const uint8_t*, const void*, void*, int, int, int, int,
                    int, int);
int bw_linear(void*, int8_t*, float*, int32_t*, int, const uint8_t*, const void*, const float*,
              const void*, void*, int, int, int, int, int, int);
int bw_elementwise(void*, const void*, int, int, const void*, int, float, void*, int8_t*, float*,
                   int32_t*, int, int, int);
int bw_attention(void*, const void*, int, const void*, int, int64_t, const int32_t*,
                 const int32_t*, const int32_t*, int, void*, int, int, int, int, int, float);
int bw_rope_and_cache(void*, const void*, int, const float*, int64_t, void*, int, int64_t,
                      const int64_t*, const int64_t*, void*, const float*, const float*, float, int,
                      int, int, int);
int bw_dense_linear(void*, const void*, int, const void*, int, const void*, const void*, void*, int,
                    int, int, int);
int bw_mask(void*, float*, const int64_t*, const uint32_t*, int, int, int);
}

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }
float uniform() { return static_cast<float>(next()) / (1 << 23) - 1.0f; }

int failures = 0;

template <class T>
void expect_equal(const std::vector<T>& ours, const std::vector<T>& theirs, const char* what) {
    if (std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(T)) == 0) return;
    std::printf("FAILED %s: not equal\n", what);
    ++failures;
}

void expect_near(const std::vector<float>& ours, const std::vector<float>& theirs, float most,
                 const char* what) {
    float worst = 0;
    for (size_t i = 0; i < ours.size(); ++i) worst = std::fmax(worst, std::fabs(ours[i] - theirs[i]));
    if (worst <= most) return;
    std::printf("FAILED %s: off by %g\n", what, static_cast<double>(worst));
    ++failures;
}

template <class T>
char* bytes(std::vector<T>& values) {
    return reinterpret_cast<char*>(values.data());
}

struct Results {
    std::vector<int8_t> codes, cached;
    std::vector<float> normed, attended, attended_codes, logits;
};

Results check(const std::string& name) {
    state = 1;
    void* context = bw_create(name.c_str(), 2);
    Results results;
    for (int T : {1, 3, 8, 33}) {
        const int N = 50, K = 192, V = 37;
        std::vector<float> x(T * K), weight(K, 1.5f), scales(64, 0.5f), x_scales(T);
        for (float& value : x) value = uniform() * 3;
        std::vector<int8_t> codes(T * K);
        std::vector<int32_t> sums(T);
        bw_elementwise(context, x.data(), 0, -1, nullptr, 0, 0, nullptr, codes.data(),
                       x_scales.data(), sums.data(), T, K, K);
        results.codes.insert(results.codes.end(), codes.begin(), codes.end());
        std::vector<float> normed(T * K);
        bw_elementwise(context, x.data(), 0, -1, weight.data(), 0, 1e-5f, normed.data(), nullptr,
                       nullptr, nullptr, T, K, K);
        results.normed.insert(results.normed.end(), normed.begin(), normed.end());

        std::vector<uint8_t> packed(N * K / 4), blocks(64 * K / 4);
        std::vector<int> trits(N * K);
        for (int n = 0; n < N; ++n)
            for (int k = 0; k < K; ++k) {
                const int trit = static_cast<int>(next() % 3);
                trits[n * K + k] = trit - 1;
                packed[n * K / 4 + k % (K / 4)] |= static_cast<uint8_t>(trit << 2 * (k / (K / 4)));
            }
        bw_repack(context, packed.data(), blocks.data(), N, K);
        std::vector<float> y(T * N), expected(T * N);
        bw_linear(context, codes.data(), x_scales.data(), sums.data(), 2, blocks.data(),
                  scales.data(), nullptr, nullptr, y.data(), 0, T, N, K, K, 0);
        for (int t = 0; t < T; ++t)
            for (int n = 0; n < N; ++n) {
                int32_t sum = 0;
                for (int k = 0; k < K; ++k) sum += codes[t * K + k] * trits[n * K + k];
                expected[t * N + n] = static_cast<float>(sum) / x_scales[t] * 0.5f;
            }
        expect_equal(y, expected, "ternary_linear");

        // The same codes by three scale groups, of 32 rows' scales each.
        const int group = 64, groups = K / group;
        std::vector<int8_t> group_codes(T * K);
        std::vector<float> group_x_scales(T * groups), group_scales(64 * groups);
        std::vector<int32_t> group_sums(T * groups);
        std::vector<uint16_t> half_scales(64 * groups);  // the same numbers in float16
        for (int i = 0; i < 64 * groups; ++i) {
            const int fraction = static_cast<int>(next() % 1024);
            half_scales[i] = static_cast<uint16_t>((i % 2 ? 0xB800 : 0x3800) | fraction);
            group_scales[i] = (i % 2 ? -0.5f : 0.5f) * (1 + fraction / 1024.0f);
        }
        bw_elementwise(context, x.data(), 0, -1, nullptr, 0, 0, nullptr, group_codes.data(),
                       group_x_scales.data(), group_sums.data(), T, K, group);
        results.codes.insert(results.codes.end(), group_codes.begin(), group_codes.end());
        bw_linear(context, group_codes.data(), group_x_scales.data(), group_sums.data(), 2,
                  blocks.data(), group_scales.data(), nullptr, nullptr, y.data(), 0, T, N, K,
                  group, 0);
        for (int t = 0; t < T; ++t)
            for (int n = 0; n < N; ++n) {
                volatile float total = 0;  // of products that are rounded each
                for (int g = 0; g < groups; ++g) {
                    int32_t sum = 0;
                    for (int k = g * group; k < (g + 1) * group; ++k)
                        sum += group_codes[t * K + k] * trits[n * K + k];
                    volatile float part = 1.0f / group_x_scales[t * groups + g];
                    part = static_cast<float>(sum) * part;
                    part = part * group_scales[(n / 32 * groups + g) * 32 + n % 32];
                    total = total + part;
                }
                expected[t * N + n] = total;
            }
        expect_equal(y, expected, "ternary_linear by groups");
        bw_linear(context, group_codes.data(), group_x_scales.data(), group_sums.data(), 2,
                  blocks.data(), bytes(half_scales), nullptr, nullptr, y.data(), 0, T, N, K,
                  group, 2);
        expect_equal(y, expected, "ternary_linear by groups of float16 scales");

        const std::vector<int64_t> ids{N - 1, 0, 31, 32};
        std::vector<float> embedded(ids.size() * K), weights(ids.size() * K);
        bw_ternary_rows(context, ids.data(), blocks.data(), bytes(half_scales), embedded.data(), 0,
                        static_cast<int>(ids.size()), N, K, group, 2);
        for (size_t i = 0; i < weights.size(); ++i) {
            const int n = static_cast<int>(ids[i / K]), k = static_cast<int>(i % K);
            weights[i] = static_cast<float>(trits[n * K + k]) *
                         group_scales[(n / 32 * groups + k / group) * 32 + n % 32];
        }
        expect_equal(embedded, weights, "ternary_rows");

        std::vector<float> head(V * K), head_blocks(64 * K), logits(T * V), exact(T * V);
        for (float& value : head) value = uniform();
        bw_block_rows(context, bytes(head), bytes(head_blocks), V, K, 4, 1);
        bw_dense_linear(context, x.data(), 0, head_blocks.data(), 0, nullptr, nullptr, logits.data(),
                        0, T, V, K);
        results.logits.insert(results.logits.end(), logits.begin(), logits.end());
        std::vector<uint8_t> halves(2 * V * K), half_blocks(2 * 64 * K);
        for (int i = 0; i < V * K; ++i) std::memcpy(&halves[2 * i], bytes(head) + 4 * i + 2, 2);
        bw_block_rows(context, bytes(halves), bytes(half_blocks), V, K, 2, 2);
        bw_dense_linear(context, x.data(), 0, half_blocks.data(), 1, nullptr, nullptr, logits.data(),
                        0, T, V, K);
        results.logits.insert(results.logits.end(), logits.begin(), logits.end());

        std::vector<int8_t> head_codes(V * K);
        std::vector<uint8_t> offset_codes(V * K), code_blocks(64 * K);
        std::vector<float> ones(64, 1.0f);
        for (int i = 0; i < V * K; ++i) {
            head_codes[i] = static_cast<int8_t>(static_cast<int>(next() % 255) - 127);
            offset_codes[i] = static_cast<uint8_t>(head_codes[i] + 128);
        }
        bw_block_rows(context, bytes(offset_codes), bytes(code_blocks), V, K, 1, 4);
        bw_linear(context, codes.data(), x_scales.data(), sums.data(), 8, code_blocks.data(),
                  ones.data(), nullptr, nullptr, logits.data(), 0, T, V, K, K, 0);
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) {
                int32_t sum = 0;
                for (int k = 0; k < K; ++k) sum += codes[t * K + k] * head_codes[v * K + k];
                exact[t * V + v] = static_cast<float>(sum) / x_scales[t];
            }
        expect_equal(logits, exact, "int8_head");

        const int num_words = (V + 31) / 32;
        const std::vector<int64_t> masked{T - 1, 0};
        std::vector<uint32_t> masks(2 * num_words);
        for (uint32_t& word : masks) word = next() | next() << 16;
        for (int m = 0; m < 2; ++m)
            for (int v = 0; v < V; ++v)
                if (!(masks[m * num_words + v / 32] >> v % 32 & 1))
                    exact[masked[m] * V + v] = -INFINITY;
        bw_mask(context, logits.data(), masked.data(), masks.data(), 2, V, num_words);
        expect_equal(logits, exact, "mask");
    }

    const int H = 6, G = 2, D = 48, tokens = 70, blocks = 5;
    std::vector<float> queries(tokens * H * D), cache(2 * blocks * G * 16 * D), out(tokens * H * D);
    for (float& value : queries) value = uniform();
    for (float& value : cache) value = uniform();
    const int32_t starts[] = {0, tokens}, lens[] = {tokens}, table[] = {3, 0, 4, 1, 2};
    bw_attention(context, queries.data(), 0, cache.data(), 0, blocks, starts, lens, table, 5,
                 out.data(), tokens, 1, H, G, D, 0.2f);
    results.attended = out;

    // The same over a cache of codes, which its tokens are written to.
    std::vector<float> qkv(tokens * (H + 2 * G) * D), rope(tokens * D);
    for (float& value : qkv) value = uniform();
    for (float& value : rope) value = uniform();
    std::vector<int64_t> positions(tokens), slots(tokens);
    for (int t = 0; t < tokens; ++t) {
        positions[t] = t;
        slots[t] = table[t / 16] * 16 + t % 16;
    }
    results.cached.assign(2 * blocks * G * 16 * (D + 4), -1);
    bw_rope_and_cache(context, qkv.data(), 0, rope.data(), tokens, results.cached.data(), 3, blocks,
                      positions.data(), slots.data(), queries.data(), nullptr, nullptr, 0, tokens, H,
                      G, D);
    bw_attention(context, queries.data(), 0, results.cached.data(), 3, blocks, starts, lens, table, 5,
                 out.data(), tokens, 1, H, G, D, 0.2f);
    results.attended_codes = out;
    bw_destroy(context);
    return results;
}

}  // namespace

int main() {
    std::istringstream names(bw_instruction_sets());
    const Results plain = check("portable");
    for (std::string name; std::getline(names, name, ',');) {
        std::printf("%s\n", name.c_str());
        const Results results = check(name);
        expect_equal(results.codes, plain.codes, "quantize");
        expect_equal(results.normed, plain.normed, "rms_norm");
        expect_near(results.logits, plain.logits, 1e-4f, "head");
        expect_near(results.attended, plain.attended, 1e-5f, "attention");
        expect_equal(results.cached, plain.cached, "int8 KV cache");
        expect_near(results.attended_codes, plain.attended_codes, 1e-5f, "attention over codes");
    }
    std::printf(failures ? "%d failures\n" : "all equal\n", failures);
    return failures != 0;
}
