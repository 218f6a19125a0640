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
    void* memory[kNumScratchSlots] = {};
    size_t bytes[kNumScratchSlots] = {};
    ~Scratch() {
        for (void* p : memory) std::free(p);
    }
};

}  // namespace

float* scratch(ScratchSlot slot, size_t num_floats) {
    thread_local Scratch own;
    const size_t bytes = (num_floats * sizeof(float) + 63) / 64 * 64;
    if (bytes > own.bytes[slot]) {
        std::free(own.memory[slot]);
        own.memory[slot] = std::aligned_alloc(64, bytes);
        if (!own.memory[slot]) std::abort();
        own.bytes[slot] = bytes;
    }
    return static_cast<float*>(own.memory[slot]);
}

Pool::~Pool() {
    closing_ = true;
    job_.fetch_add(1);
    job_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

// Runs one part of the current job; false if none is left to claim.
bool Pool::take_part() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
        const uint64_t num_parts = ticket >> 16 & 0xFFFF, part = ticket & 0xFFFF;
        if (part >= num_parts) return false;
        // Read before the claim: if it succeeds, a part was unclaimed, so these were this job's.
        const Function function = function_.load(std::memory_order_relaxed);
        const void* body = body_.load(std::memory_order_relaxed);
        if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
            function(body, static_cast<int>(part));
            num_done_.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
}

void Pool::serve() {
    uint32_t seen = 0;
    while (!closing_) {
        while (take_part()) {
        }
        const auto called = [&] { return job_.load(std::memory_order_acquire) != seen; };
        if (!spin_until(called)) job_.wait(seen);
        seen = job_.load(std::memory_order_acquire);
    }
}

void Pool::start_threads() {
    while (static_cast<int>(threads_.size()) + 1 < num_threads_) {
        try {
            threads_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            return;  // the threads there are do the work; the next run tries again
        }
    }
}

void Pool::run_shared(int num_parts, Function function, const void* body) {
    const std::lock_guard<std::mutex> lock(turn_);
    start_threads();
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    function_.store(function, std::memory_order_relaxed);
    body_.store(body, std::memory_order_relaxed);
    num_done_.store(0, std::memory_order_relaxed);
    ticket_.store(job << 32 | static_cast<uint64_t>(num_parts) << 16, std::memory_order_release);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();

    while (take_part()) {
    }
    const auto done = [&] { return num_done_.load(std::memory_order_acquire) == num_parts; };
    // Only a thread that the system took off its core in the middle of a part is slower than this.
    while (!spin_until(done)) std::this_thread::yield();
}

}  // namespace bitwatt
