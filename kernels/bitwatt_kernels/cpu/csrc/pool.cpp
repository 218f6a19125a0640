#include "pool.h"

#include <chrono>
#include <cstdlib>
#include <system_error>

#include "calls.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitwatt {

namespace {

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

// Long enough to bridge Python's work between two operations of a step, short enough not to be
// seen when the server is idle.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kPausesPerLook = 32;

// Whether done() came true within kSpin.
template <class Done>
bool spin_until(const Done& done) {
    if (done()) return true;
    const Clock::time_point end = Clock::now() + kSpin;
    do {
        for (int i = 0; i < kPausesPerLook; ++i) {
            relax();
            if (done()) return true;
        }
    } while (Clock::now() < end);
    return false;
}

struct Scratch {
    void* memory[kNumScratchUses] = {};
    size_t bytes[kNumScratchUses] = {};
    ~Scratch() {
        for (void* p : memory) std::free(p);
    }
};

}  // namespace

float* scratch(ScratchUse use, size_t num_floats) {
    thread_local Scratch own;
    const size_t bytes = (num_floats * sizeof(float) + 63) / 64 * 64;
    if (bytes > own.bytes[use]) {
        std::free(own.memory[use]);
        own.memory[use] = std::aligned_alloc(64, bytes);
        if (!own.memory[use]) std::abort();
        own.bytes[use] = bytes;
    }
    return static_cast<float*>(own.memory[use]);
}

namespace {

uint64_t pack(uint32_t job, int end, int count) {
    return static_cast<uint64_t>(job) << 32 | static_cast<uint64_t>(end) << 16 |
           static_cast<uint64_t>(count);
}
uint32_t job_of(uint64_t packed) { return static_cast<uint32_t>(packed >> 32); }
int end_of(uint64_t packed) { return static_cast<int>(packed >> 16 & 0xFFFF); }
int count_of(uint64_t packed) { return static_cast<int>(packed & 0xFFFF); }

}  // namespace

Pool::Pool(int num_threads)
    : num_threads_(num_threads),
      shares_(new Share[static_cast<size_t>(num_threads) * kMaxPhases]) {}

Pool::~Pool() {
    closing_ = true;
    job_.fetch_add(1);
    job_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

// Runs one part of a phase; false if this thread's share has none left to take, or the job is over.
bool Pool::take_part(uint32_t job, int phase, int share_of) {
    PhaseState& state = states_[phase];
    std::atomic<uint64_t>& tickets = share(phase, share_of).ticket;
    uint64_t ticket = tickets.load(std::memory_order_acquire);
    for (;;) {
        if (job_of(ticket) != job || count_of(ticket) >= end_of(ticket)) return false;
        // Read before the part is taken: if it then is, the job was not over, and these are its.
        const Phase::Function function = state.function.load(std::memory_order_relaxed);
        const void* body = state.body.load(std::memory_order_relaxed);
        if (tickets.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
            function(body, count_of(ticket));
            state.progress.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
}

// Whether all parts of a phase are done, as they are of a job that is over.
bool Pool::is_done(uint32_t job, int phase) const {
    const uint64_t progress = states_[phase].progress.load(std::memory_order_acquire);
    return job_of(progress) != job || count_of(progress) == end_of(progress);
}

void Pool::walk(uint32_t job, int thread) {
    for (int phase = 0; phase < kMaxPhases; ++phase) {
        if (job_of(states_[phase].progress.load(std::memory_order_acquire)) != job) return;
        for (int i = 0; i < num_threads_; ++i)
            while (take_part(job, phase, (thread + i) % num_threads_)) {
            }
        const auto done = [&] { return is_done(job, phase); };
        // Only a thread that the system took off its core in the middle of a part is slower.
        while (!spin_until(done)) std::this_thread::yield();
    }
}

void Pool::serve(int thread) {
    uint32_t seen = 0;
    while (!closing_) {
        const auto called = [&] { return job_.load(std::memory_order_acquire) != seen; };
        if (!spin_until(called)) job_.wait(seen);
        seen = job_.load(std::memory_order_acquire);
        if (const auto posted = posted_.exchange(nullptr, std::memory_order_acquire))
            posted(posted_body_.load(std::memory_order_relaxed));
        walk(seen, thread);
    }
}

void Pool::start_threads() {
    while (static_cast<int>(threads_.size()) + 1 < num_threads_) {
        const int thread = static_cast<int>(threads_.size()) + 1;
        try {
            threads_.emplace_back([this, thread] { serve(thread); });
        } catch (const std::system_error&) {
            return;  // the threads there are do the work; the next job tries again
        }
    }
}

bool Pool::post(void (*function)(void*), void* body) {
    if (num_threads_ == 1) return false;
    const std::lock_guard<std::mutex> turn(turn_);
    start_threads();
    if (threads_.empty()) return false;
    posted_body_.store(body, std::memory_order_relaxed);
    posted_.store(function, std::memory_order_release);
    // The number of a job without a part, so that threads look.
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    return true;
}

void Pool::run(const Phase* phases, int num_phases) {
    bool is_shared = false;
    for (int p = 0; p < num_phases; ++p) is_shared |= phases[p].num_parts > 1;
    if (!is_shared || num_threads_ == 1) {
        for (int p = 0; p < num_phases; ++p)
            for (int part = 0; part < phases[p].num_parts; ++part)
                phases[p].function(phases[p].body, part);
        return;
    }
    const std::lock_guard<std::mutex> turn(turn_);
    start_threads();
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    for (int p = 0; p < num_phases; ++p) {
        PhaseState& state = states_[p];
        const int64_t parts = phases[p].num_parts;
        state.function.store(phases[p].function, std::memory_order_relaxed);
        state.body.store(phases[p].body, std::memory_order_relaxed);
        for (int t = 0; t < num_threads_; ++t) {
            const int first = static_cast<int>(parts * t / num_threads_);
            const int end = static_cast<int>(parts * (t + 1) / num_threads_);
            share(p, t).ticket.store(pack(job, end, first), std::memory_order_release);
        }
        state.progress.store(pack(job, phases[p].num_parts, 0), std::memory_order_release);
    }
    job_.store(job, std::memory_order_release);
    job_.notify_all();
    walk(job, 0);
}

}  // namespace bitwatt
