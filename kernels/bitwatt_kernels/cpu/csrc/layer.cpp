#include "layer.h"

#include <algorithm>
#include <iterator>

namespace bitwatt {

namespace {

// A layer's intermediate results: the calling thread's own, and the next layer's too.
class Workspace {
public:
    Workspace(const Layer& layer, int T, int dtype) {
        const size_t tokens = T, item = item_size(dtype);
        const size_t attended = static_cast<size_t>(layer.H) * layer.D;
        size_t widest = 0, most_groups = 0;  // of what a linear reads
        for (const Matrix& m : {layer.qkv, layer.o, layer.gate_up, layer.down}) {
            widest = std::max(widest, static_cast<size_t>(m.K));
            most_groups = std::max(most_groups, static_cast<size_t>(m.K / m.scale_group));
        }
        const size_t sizes[] = {
            tokens * widest,
            tokens * most_groups * sizeof(float),
            tokens * most_groups * sizeof(int32_t),
            tokens * layer.qkv.N * item,
            tokens * attended * item,
            tokens * attended * item,
            tokens * layer.o.N * item,
            tokens * layer.gate_up.N * item,
        };
        size_t total = 0;
        for (size_t size : sizes) total += aligned(size);
        char* p = reinterpret_cast<char*>(scratch(kLayerScratch, total / sizeof(float)));
        char* parts[8];
        for (int i = 0; i < 8; ++i) parts[i] = p, p += aligned(sizes[i]);
        x = {reinterpret_cast<int8_t*>(parts[0]), reinterpret_cast<float*>(parts[1]),
             reinterpret_cast<int32_t*>(parts[2])};
        qkv = parts[3], queries = parts[4], attention = parts[5], h = parts[6], gate_up = parts[7];
    }

    Quantized x;
    void *qkv, *queries, *attention, *h, *gate_up;

private:
    static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
};

}  // namespace

int run_layer(Context& context, const Layer& layer, const StepCall& step, const CacheView& cache,
              const RopeTable& rope, const void* h, void* out, int dtype) {
    const int T = step.T, H = layer.H, G = layer.G, D = layer.D;
    const Workspace w(layer, T, dtype);
    const auto norm_quantize = [&](const void* in, const float* weight, const Matrix& reader) {
        return elementwise(context, {in, dtype, false, 0, weight, kFloat32, layer.eps, nullptr,
                                     w.x, T, reader.K, reader.scale_group});
    };
    const auto multiply = [&](const Matrix& m, const void* residual, void* y) {
        return linear(context, {w.x, 2, m.blocks, m.scales, m.bias, residual, y, dtype, T, m.N,
                                m.K, m.scale_group, m.scales_dtype});
    };

    const auto input = norm_quantize(h, layer.input_norm, layer.qkv);
    const auto qkv = multiply(layer.qkv, nullptr, w.qkv);
    const RopeCall rope_call{w.qkv, rope.rows,   cache.data, step.positions, step.slots, w.queries,
                             layer.query_norm, layer.key_norm, layer.head_eps,
                             dtype, cache.dtype, T,          H,              G,          D,
                             cache.num_blocks};
    if (const int status = check(rope_call, rope.num_rows)) return status;
    const auto rotation = rope_and_cache(context, rope_call);
    const Attention attention(context,
                              {w.queries, cache.data, step.query_starts, step.context_lens,
                               step.block_tables, w.attention, dtype, cache.dtype, step.S, H, G, D,
                               step.max_blocks, cache.num_blocks, layer.attention_scale},
                              T);
    if (const int status = attention.check()) return status;
    attention.clear_padding();
    const auto tiles = attention.tiles();
    const auto merges = attention.merges();
    const auto attended = norm_quantize(w.attention, layer.attention_sub_norm, layer.o);
    const auto o = multiply(layer.o, h, w.h);

    const auto mlp_input = norm_quantize(w.h, layer.mlp_norm, layer.gate_up);
    const auto gate_up = multiply(layer.gate_up, nullptr, w.gate_up);
    const auto gated = elementwise(context, {w.gate_up, dtype, true, layer.activation,
                                             layer.mlp_sub_norm, kFloat32, layer.eps, nullptr, w.x,
                                             T, layer.down.K, layer.down.scale_group});
    const auto down = multiply(layer.down, w.h, out);

    const Phase phases[] = {
        input.phase(),    qkv.phase(), rotation.phase(),  tiles.phase(),   merges.phase(),
        attended.phase(), o.phase(),   mlp_input.phase(), gate_up.phase(), gated.phase(),
        down.phase(),
    };
    context.pool.run(phases, std::size(phases));
    return kOk;
}

}  // namespace bitwatt
