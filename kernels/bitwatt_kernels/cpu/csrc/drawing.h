// The weights of a row's softmax, of the tokens that its mask allows.
//
// Tokens are taken 32 at a time, as a mask has them in its words: a word without a bit is passed
// over, and the others' tokens lie side by side. What is drawn of them is drawing.cpp's.

#pragma once

#include "masking.h"

namespace bitwatt {
namespace BITWATT_ISA {

// out: of each word with a bit, in order, its number and 32 logits over the temperature, -inf where
// a bit isn't set. Returns how many such words there are.
static int scale(const DrawCall& c, int m, float* out, int32_t* words, float* largest_of_all) {
    const float* x = c.logits + static_cast<size_t>(m) * c.N;
    const DrawSettings& s = c.settings[m];
    const uint32_t* bits =
        s.mask < 0 ? nullptr : c.bits + static_cast<size_t>(s.mask) * c.num_words;
    const F32 temperature = splat(s.temperature == 0 ? 1.0f : static_cast<float>(s.temperature));
    F32 most = splat(-__builtin_inff());
    bool any_nan = false;
    int num_words = 0;
    for (int i = 0; i < c.N; i += kWordTokens) {
        const int n = min_int(c.N - i, kWordTokens);
        const uint32_t all = ~0u >> (kWordTokens - n);
        const uint32_t word = bits ? bits[i / kWordTokens] & all : all;
        if (!word) continue;
        float* y = out + static_cast<size_t>(num_words) * kWordTokens;
        words[num_words++] = i / kWordTokens;
        for (int j = 0; j < kWordTokens; j += kLanes)
            store(y + j, load_some(x, kFloat32, i + j, max_int(n - j, 0)) / temperature);
        if (word != ~0u) mask_word(y, word, kWordTokens);
        for (int j = 0; j < kWordTokens; j += kLanes) {
            any_nan |= has_nan(load(y + j));
            most = max(most, load(y + j));
        }
    }
    float lanes[kLanes];
    store(lanes, most);
    float found = lanes[0];
    for (int i = 1; i < kLanes; ++i) found = lanes[i] > found ? lanes[i] : found;
    *largest_of_all = any_nan ? __builtin_nanf("") : found;
    return num_words;
}

// weights = e^(scaled - largest), 0 where that is less than least; sums: of the words up to each
static void weigh(const float* scaled, int num_words, float largest, float least, float* weights,
                  double* sums) {
    double sum = 0;
    for (int w = 0; w < num_words; ++w) {
        const float* x = scaled + static_cast<size_t>(w) * kWordTokens;
        float* y = weights + static_cast<size_t>(w) * kWordTokens;
        for (int j = 0; j < kWordTokens; j += kLanes)
            store(y + j, exponential(load(x + j) - splat(largest)));
        double lanes[8] = {};
        for (int j = 0; j < kWordTokens; ++j) y[j] = y[j] < least ? 0.0f : y[j];
        for (int j = 0; j < kWordTokens; j += 8)
            for (int i = 0; i < 8; ++i) lanes[i] += static_cast<double>(y[j + i]);
        for (int half = 4; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        sums[w] = sum += lanes[0];
    }
}

}  // namespace BITWATT_ISA
}  // namespace bitwatt
