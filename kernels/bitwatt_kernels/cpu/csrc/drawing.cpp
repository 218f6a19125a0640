// Draws a token of a row from what top-k, top-p and min-p leave of its softmax, in the orders of
// bitwatt.model.truncation_sampling: by rank where top-k or top-p is set, else by token id.

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace bitwatt {

namespace {

constexpr int64_t kNoToken = -1;
// Of the largest weight. Tokens are ranked from the first of these up, or from the next one where
// those turn out too few.
constexpr float kLeastRanked[] = {0x1p-6f, 0x1p-12f, 0x1p-24f};

struct Ranked {
    float scaled;
    int32_t token;
    float weight;
};

struct Row {
    const float* scaled;   // [num_words, 32]
    const float* weights;  // [num_words, 32]
    const int32_t* words;  // [num_words], numbers of a mask's words
    const double* sums;    // [num_words], of the weights up to each word
    int num_words;

    int num_tokens() const { return num_words * kWordTokens; }
    int64_t token(int i) const {
        return int64_t{words[i / kWordTokens]} * kWordTokens + i % kWordTokens;
    }
    double total() const { return sums[num_words - 1]; }
};

// What of the total precedes the token drawn: below the total, even where the product rounds up.
double share(double uniform, double total) {
    return std::min(uniform * total, std::nextafter(total, 0.0));
}

int64_t draw_by_id(const Row& row, double uniform) {
    const double target = share(uniform, row.total());
    const double* found = std::upper_bound(row.sums, row.sums + row.num_words, target);
    const int word = static_cast<int>(found - row.sums);
    double sum = word ? row.sums[word - 1] : 0;
    int drawn = 0;
    for (int i = word * kWordTokens; i < (word + 1) * kWordTokens; ++i) {
        if (row.weights[i] == 0) continue;
        drawn = i;  // the word's last one where its sum, of another order, is the larger
        if ((sum += static_cast<double>(row.weights[i])) > target) break;
    }
    return row.token(drawn);
}

// The tokens of at least such a weight, by rising id. Returns their number.
int rank(const Row& row, float least, Ranked* ranked) {
    int n = 0;
    for (int i = 0; i < row.num_tokens(); ++i)
        if (row.weights[i] >= least && row.scaled[i] > -std::numeric_limits<float>::infinity())
            ranked[n++] = {row.scaled[i], static_cast<int32_t>(row.token(i)), row.weights[i]};
    return n;
}

int64_t draw_by_rank(const Row& row, const DrawSettings& s, int vocab_size, Ranked* ranked) {
    const bool has_top_k = s.top_k > 0 && s.top_k < vocab_size;
    const float top_p = static_cast<float>(s.top_p), min_p = static_cast<float>(s.min_p);
    const auto is_enough = [&](int n) {
        if (has_top_k) return n >= s.top_k;
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += static_cast<double>(ranked[i].weight);
        return top_p < 1 && sum >= top_p * row.total();
    };
    int n = 0;
    bool enough = false;
    for (const float least : kLeastRanked)
        if ((enough = is_enough(n = rank(row, least, ranked)))) break;
    if (!enough) n = rank(row, 0, ranked);
    const auto precedes = [](const Ranked& a, const Ranked& b) {
        return a.scaled > b.scaled || (a.scaled == b.scaled && a.token < b.token);
    };
    if (has_top_k && s.top_k < n) {
        const int k = static_cast<int>(s.top_k);
        std::nth_element(ranked, ranked + k, ranked + n, precedes);
        n = k;
    }
    std::sort(ranked, ranked + n, precedes);
    double total = row.total();
    if (has_top_k) {
        total = 0;
        for (int i = 0; i < n; ++i) total += static_cast<double>(ranked[i].weight);
    }
    double before = 0, left = 0;  // of all that precede one, and of those that the filters leave
    int num_left = 0;
    for (int i = 0; i < n; ++i) {
        if (i && top_p < 1 && before >= top_p * total) break;
        before += static_cast<double>(ranked[i].weight);
        if (ranked[i].weight < min_p) break;
        left += static_cast<double>(ranked[i].weight);
        num_left = i + 1;
    }
    const double target = share(s.uniform, left);
    double sum = 0;
    for (int i = 0; i < num_left; ++i)
        if ((sum += static_cast<double>(ranked[i].weight)) > target) return ranked[i].token;
    return kNoToken;
}

}  // namespace

void draw(const Kernels& kernels, const DrawCall& c, int m) {
    const size_t most_words = (static_cast<size_t>(c.N) + kWordTokens - 1) / kWordTokens;
    const size_t most_tokens = most_words * kWordTokens;
    constexpr size_t kSumFloats = sizeof(double) / sizeof(float);
    constexpr size_t kRankedFloats = sizeof(Ranked) / sizeof(float);
    float* const scaled = scratch(
        kRowScratch, most_tokens * (2 + kRankedFloats) + most_words * (kSumFloats + 1));
    float* const weights = scaled + most_tokens;
    double* const sums = reinterpret_cast<double*>(weights + most_tokens);
    Ranked* const ranked = reinterpret_cast<Ranked*>(sums + most_words);
    int32_t* const words = reinterpret_cast<int32_t*>(ranked + most_tokens);

    const DrawSettings& s = c.settings[m];
    float largest;
    const int num_words = kernels.scale(c, m, scaled, words, &largest);
    int64_t& token = c.tokens[m];
    token = kNoToken;
    if (!std::isfinite(largest)) return;
    Row row{scaled, weights, words, sums, num_words};
    if (s.temperature == 0) {
        token = row.token(static_cast<int>(std::find(scaled, scaled + row.num_tokens(), largest) - scaled));
        return;
    }
    const bool is_ranked = s.top_k > 0 || s.top_p < 1;
    kernels.weigh(scaled, num_words, largest, is_ranked ? 0 : static_cast<float>(s.min_p), weights,
                  sums);
    token = is_ranked ? draw_by_rank(row, s, c.N, ranked) : draw_by_id(row, s.uniform);
}

}  // namespace bitwatt
