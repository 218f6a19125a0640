// A few threads that share out the parts of a job's phases, and wait for the next job cheaply.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bitwatt {

// Work in num_parts independent parts, [0, num_parts) in any order on any threads. What body points
// at must outlive the job.
struct Phase {
    using Function = void (*)(const void* body, int part);
    Function function;
    const void* body;
    int num_parts;  // < 65536

    template <class Body>
    static Phase of(const Body& body, int num_parts) {
        return {[](const void* b, int part) { (*static_cast<const Body*>(b))(part); }, &body,
                num_parts};
    }
};

class Pool {
public:
    static constexpr int kMaxPhases = 16;

    // num_threads counts the caller's own; the others start with the first job that needs them.
    explicit Pool(int num_threads);
    ~Pool();

    int num_threads() const { return num_threads_; }

    // Runs the phases in order: a phase's parts start when all parts of the one before are done.
    // Safe from several threads: jobs take turns.
    void run(const Phase* phases, int num_phases);

private:
    // A phase of the current job. A thread takes parts of its own lane first, neighbours in memory,
    // and then of the others'. Tickets and progress carry the job's number, so that a thread late
    // for one job never touches the next: the upper 32 bits; 16 bits each for an end and a count.
    struct Slot {
        std::atomic<Phase::Function> function{nullptr};
        std::atomic<const void*> body{nullptr};
        alignas(64) std::atomic<uint64_t> progress{0};  // parts there are, parts done
    };
    struct alignas(64) Lane {
        std::atomic<uint64_t> ticket{0};  // end of the lane, next part to take
    };

    void start_threads();
    void serve(int thread);
    void walk(uint32_t job, int thread);
    bool take_part(uint32_t job, int phase, int lane);
    bool is_done(uint32_t job, int phase) const;
    Lane& lane(int phase, int thread) const { return lanes_[phase * num_threads_ + thread]; }

    const int num_threads_;
    std::mutex turn_;
    std::vector<std::thread> threads_;
    Slot slots_[kMaxPhases];
    std::unique_ptr<Lane[]> lanes_;
    alignas(64) std::atomic<uint32_t> job_{0};  // what idle threads sleep on
    std::atomic<bool> closing_{false};
};

}  // namespace bitwatt
