// Token masks of requests whose matchers another library advances, by functions of its own.
//
// The kernels call that library by address and know nothing of it: what its functions are is
// bitwatt/constraints/native.py's.

#pragma once

#include <cstdint>

namespace bitwatt {

// What the library's functions write; its own structures, LlgMaskResult and LlgCommitResult.
struct MatcherMask {
    const uint32_t* bits;  // its own until its next call; null where nothing can follow
    float temperature;
    bool is_stop;
};
struct MatcherCommit {
    const uint32_t* tokens;
    uint32_t num_tokens;
    bool is_stop;
};

// How a matcher is advanced; mirrored in abi.py. Each returns 0, or the matcher can't go on.
struct MatcherCalls {
    int (*commit_token)(void* matcher, uint32_t token, MatcherCommit*);
    int (*compute_mask)(void* matcher, MatcherMask*);
};

enum MatchStatus : int { kMatches = 0, kMatcherFailed = 1, kNothingAllowed = 2 };

// Where a request stands in its grammar; mirrored in abi.py.
struct MatchedRow {
    void* matcher;
    uint32_t* mask;              // [num_words], of the next token
    const int32_t* stops;        // [num_stops], allowed where the grammar may end
    const int32_t* instead;      // [num_instead], those where it must end and there are no stops
    int num_stops, num_instead;
    int num_words;
    int end;                     // the matcher's own token that ends an answer: no model's
    int64_t min_tokens, num_tokens;
    int is_masked;               // whether the matcher has computed a mask since its last token
    int must_end;                // whether nothing but an end is allowed
    int status;                  // a MatchStatus
};

// Takes the tokens, up to one that isn't drawn (below 0), and computes the mask of the next.
void advance(const MatcherCalls&, MatchedRow&, const int64_t* tokens, int num_tokens);

}  // namespace bitwatt
