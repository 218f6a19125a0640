#include "token_masks.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "ops.h"

namespace bitwatt {

namespace {

bool has_bit(const MatchedRow& row, int token) { return row.mask[token / 32] >> token % 32 & 1; }
void set_bit(MatchedRow& row, int token) { row.mask[token / 32] |= 1u << token % 32; }
void clear_bit(MatchedRow& row, int token) { row.mask[token / 32] &= ~(1u << token % 32); }

bool is_empty(const MatchedRow& row) {
    return std::all_of(row.mask, row.mask + row.num_words, [](uint32_t word) { return !word; });
}

// The tokens that end the answer are allowed where it may end and nowhere else; before min_tokens
// only where the grammar allows nothing else.
void set_ends(MatchedRow& row) {
    const bool may_end = has_bit(row, row.end);
    clear_bit(row, row.end);
    for (int i = 0; i < row.num_stops; ++i) clear_bit(row, row.stops[i]);
    const bool is_end = is_empty(row);
    row.must_end = may_end && is_end;
    if (row.must_end && !row.num_stops)
        for (int i = 0; i < row.num_instead; ++i) set_bit(row, row.instead[i]);
    else if (row.must_end || (may_end && row.num_tokens >= row.min_tokens))
        for (int i = 0; i < row.num_stops; ++i) set_bit(row, row.stops[i]);
    if (is_end && is_empty(row)) row.status = kNothingAllowed;
}

// Has the mask of the next token computed. Returns whether the row can go on.
bool mask_next(const MatcherCalls& calls, MatchedRow& row) {
    MatcherMask mask{};
    if (calls.compute_mask(row.matcher, &mask)) {
        row.status = kMatcherFailed;
        return false;
    }
    row.is_masked = true;
    if (mask.bits && !mask.is_stop) {
        std::copy(mask.bits, mask.bits + row.num_words, row.mask);
    } else {
        std::fill(row.mask, row.mask + row.num_words, 0);
        set_bit(row, row.end);
    }
    set_ends(row);
    return row.status == kMatches;
}

}  // namespace

void advance(const MatcherCalls& calls, MatchedRow& row, const int64_t* tokens, int num_tokens) {
    if (row.status != kMatches) return;
    MatcherCommit commit{};
    for (int i = 0; i < num_tokens && tokens[i] >= 0; ++i) {
        if (!row.is_masked && !mask_next(calls, row)) return;  // the library wants it before a token
        ++row.num_tokens;
        if (row.must_end) continue;  // what an ended one is told is its end again
        if (calls.commit_token(row.matcher, static_cast<uint32_t>(tokens[i]), &commit)) {
            row.status = kMatcherFailed;
            return;
        }
        row.is_masked = false;
    }
    if (!row.is_masked) mask_next(calls, row);
}

// Advances batches of rows beside its caller: on a thread of the pool that has nothing else to do, or
// where there is none on one of its own. Python waits for it with a time limit, and gives a row that
// takes too long up: its thread begins no other.
class MaskLane {
public:
    MaskLane(const MatcherCalls& calls, Pool* pool) : calls_(calls), pool_(pool) {}

    // What it points at stays until the lane is idle, or forever where it is given up.
    void start(MatchedRow* const* rows, const int32_t* where, const int64_t* tokens, int num_rows) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            rows_ = rows, where_ = where, tokens_ = tokens, num_rows_ = num_rows;
            num_failed_ = 0;
            is_idle_ = is_taken_ = false;
        }
        const auto work = [](void* lane) { static_cast<MaskLane*>(lane)->work(); };
        if (pool_ && pool_->post(work, this)) return;
        try {
            if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
        } catch (const std::system_error&) {
            return this->work();  // no thread is left to be had
        }
        woken_.notify_one();
    }

    // The number of rows that can't go on; -1 where it isn't idle by then.
    int wait(double seconds) {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto is_idle = [this] { return is_idle_; };
        return idle_.wait_for(lock, std::chrono::duration<double>(seconds), is_idle) ? num_failed_
                                                                                     : -1;
    }

    // How many rows were ever begun, one more a batch that is done; and the thread's processor time.
    int64_t look(double* cpu_s) {
        const std::lock_guard<std::mutex> lock(mutex_);
        timespec t{};
#if defined(__linux__)
        clockid_t clock;
        if (is_taken_ && !pthread_getcpuclockid(worker_, &clock)) clock_gettime(clock, &t);
#endif
        *cpu_s = static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
        return num_begun_.load();
    }

    // Whether the row that was the begun'th is still under way; then no other is begun here.
    bool give_up(int64_t begun) { return num_begun_.compare_exchange_strong(begun, kGivenUp); }

    // Lets the thread go once it is idle; of a batch that was given up, with what it may yet touch.
    static void end(MaskLane* lane) {
        const bool is_given_up = lane->num_begun_.load() == kGivenUp;
        {
            std::unique_lock<std::mutex> lock(lane->mutex_);
            if (!is_given_up) lane->idle_.wait(lock, [lane] { return lane->is_idle_; });
            lane->is_closing_ = true;
        }
        lane->woken_.notify_one();
        if (is_given_up) {
            if (lane->thread_.joinable()) lane->thread_.detach();
            return;
        }
        if (lane->thread_.joinable()) lane->thread_.join();
        delete lane;
    }

private:
    static constexpr int64_t kGivenUp = -1;

    void serve() {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                woken_.wait(lock, [this] { return (!is_idle_ && !is_taken_) || is_closing_; });
                if (is_closing_) return;
            }
            work();
        }
    }

    void work() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            worker_ = pthread_self();
            is_taken_ = true;
        }
        int num_failed = 0;
        for (int i = 0; i < num_rows_; ++i) {
            if (!begin()) return;
            advance(calls_, *rows_[i], tokens_ + where_[i], 1);
            num_failed += rows_[i]->status != kMatches;
        }
        if (!begin()) return;  // what comes behind the last row
        // All under the lock: who sees the lane idle may delete it.
        const std::lock_guard<std::mutex> lock(mutex_);
        num_failed_ = num_failed;
        is_idle_ = true;
        idle_.notify_all();
    }

    bool begin() {
        int64_t begun = num_begun_.load();
        return begun != kGivenUp && num_begun_.compare_exchange_strong(begun, begun + 1);
    }

    const MatcherCalls calls_;
    Pool* const pool_;  // or null
    std::mutex mutex_;
    std::condition_variable woken_, idle_;
    bool is_idle_ = true, is_taken_ = false, is_closing_ = false;
    pthread_t worker_{};
    MatchedRow* const* rows_ = nullptr;
    const int32_t* where_ = nullptr;
    const int64_t* tokens_ = nullptr;
    int num_rows_ = 0, num_failed_ = 0;
    std::atomic<int64_t> num_begun_{0};
    std::thread thread_;
};

}  // namespace bitwatt

using namespace bitwatt;

BW_API void bw_advance(const MatcherCalls* calls, MatchedRow* row, const int64_t* tokens,
                       int num_tokens) {
    advance(*calls, *row, tokens, num_tokens);
}

// context: whose threads advance rows when they have nothing else to do, or null
BW_API MaskLane* bw_lane_create(const MatcherCalls* calls, Context* context) {
    return new MaskLane(*calls, context ? &context->pool : nullptr);
}

// Row i takes tokens[where[i]].
BW_API void bw_lane_start(MaskLane* lane, MatchedRow* const* rows, const int32_t* where,
                          const int64_t* tokens, int num_rows) {
    lane->start(rows, where, tokens, num_rows);
}

BW_API int bw_lane_wait(MaskLane* lane, double seconds) { return lane->wait(seconds); }

BW_API int64_t bw_lane_look(MaskLane* lane, double* cpu_s) { return lane->look(cpu_s); }

BW_API int bw_lane_give_up(MaskLane* lane, int64_t begun) { return lane->give_up(begun); }

BW_API void bw_lane_end(MaskLane* lane) { MaskLane::end(lane); }
