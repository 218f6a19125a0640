// What Python mirrors by hand of these sources, told by name: compared when it loads the library,
// which may have been built from others.

#include <cstddef>
#include <string>

#include "layer.h"
#include "token_masks.h"

using namespace bitwatt;

#define BW_SIZE(type) {#type, sizeof(type)}
#define BW_FIELD(type, field) {#type "." #field, offsetof(type, field)}
#define BW_NUMBER(name) {#name, static_cast<size_t>(name)}

// "name=number,...": sizes of structures, offsets of their fields, and numbers, as in abi.py.
BW_API const char* bw_abi() {
    static const struct {
        const char* name;
        size_t number;
    } facts[] = {
        BW_SIZE(Matrix), BW_FIELD(Matrix, blocks), BW_FIELD(Matrix, scales),
        BW_FIELD(Matrix, bias), BW_FIELD(Matrix, N), BW_FIELD(Matrix, K),
        BW_FIELD(Matrix, scale_group), BW_FIELD(Matrix, scales_dtype),
        BW_SIZE(Layer), BW_FIELD(Layer, qkv), BW_FIELD(Layer, o), BW_FIELD(Layer, gate_up),
        BW_FIELD(Layer, down), BW_FIELD(Layer, input_norm), BW_FIELD(Layer, attention_sub_norm),
        BW_FIELD(Layer, mlp_norm), BW_FIELD(Layer, mlp_sub_norm), BW_FIELD(Layer, H),
        BW_FIELD(Layer, G), BW_FIELD(Layer, D), BW_FIELD(Layer, activation),
        BW_FIELD(Layer, eps), BW_FIELD(Layer, attention_scale), BW_FIELD(Layer, query_norm),
        BW_FIELD(Layer, key_norm), BW_FIELD(Layer, head_eps),
        BW_SIZE(StepCall), BW_FIELD(StepCall, positions), BW_FIELD(StepCall, slots),
        BW_FIELD(StepCall, query_starts), BW_FIELD(StepCall, context_lens),
        BW_FIELD(StepCall, block_tables), BW_FIELD(StepCall, T), BW_FIELD(StepCall, S),
        BW_FIELD(StepCall, max_blocks),
        BW_SIZE(CacheView), BW_FIELD(CacheView, data), BW_FIELD(CacheView, num_blocks),
        BW_FIELD(CacheView, dtype),
        BW_SIZE(RopeTable), BW_FIELD(RopeTable, rows), BW_FIELD(RopeTable, num_rows),
        BW_SIZE(DrawSettings), BW_FIELD(DrawSettings, temperature), BW_FIELD(DrawSettings, top_k),
        BW_FIELD(DrawSettings, top_p), BW_FIELD(DrawSettings, min_p),
        BW_FIELD(DrawSettings, uniform), BW_FIELD(DrawSettings, mask),
        BW_SIZE(MatcherCalls), BW_FIELD(MatcherCalls, commit_token),
        BW_FIELD(MatcherCalls, compute_mask),
        BW_SIZE(MatchedRow), BW_FIELD(MatchedRow, matcher), BW_FIELD(MatchedRow, mask),
        BW_FIELD(MatchedRow, stops), BW_FIELD(MatchedRow, instead),
        BW_FIELD(MatchedRow, num_stops), BW_FIELD(MatchedRow, num_instead),
        BW_FIELD(MatchedRow, num_words), BW_FIELD(MatchedRow, end),
        BW_FIELD(MatchedRow, min_tokens), BW_FIELD(MatchedRow, num_tokens),
        BW_FIELD(MatchedRow, is_masked), BW_FIELD(MatchedRow, must_end),
        BW_FIELD(MatchedRow, status),
        BW_NUMBER(kMatches), BW_NUMBER(kMatcherFailed), BW_NUMBER(kNothingAllowed),
        BW_NUMBER(kFloat32), BW_NUMBER(kBFloat16), BW_NUMBER(kFloat16), BW_NUMBER(kInt8),
        BW_NUMBER(kRelu2), BW_NUMBER(kSilu),
        BW_NUMBER(kOk), BW_NUMBER(kBlockOutOfRange), BW_NUMBER(kSlotOutOfRange),
        BW_NUMBER(kPositionOutOfRange), BW_NUMBER(kTokenOutOfRange),
        BW_NUMBER(kMaskOutOfRange),
        BW_NUMBER(kRowBlockRows), BW_NUMBER(kKvBlockTokens),
        {"dense_columns_per_line.kFloat32", dense_columns_per_line(kFloat32)},
        {"dense_columns_per_line.kBFloat16", dense_columns_per_line(kBFloat16)},
        {"dense_columns_per_line.kFloat16", dense_columns_per_line(kFloat16)},
    };
    static const std::string told = [] {
        std::string joined;
        for (const auto& fact : facts) {
            if (!joined.empty()) joined += ',';
            joined.append(fact.name).append("=").append(std::to_string(fact.number));
        }
        return joined;
    }();
    return told.c_str();
}
