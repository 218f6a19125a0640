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

    // Has another thread than the caller's call function(body) as soon as it has no part to do: jobs
    // go on without it meanwhile. False where there is no other. One at a time.
    bool post(void (*function)(void*), void* body);

private:
    // Each thread has a share of a phase's parts, neighbours in memory; it takes those first, and
    // then what is left of the others'. Two kinds of words say how far a phase is:
    //
    //               63                        32 31          16 15           0
    //   ticket      |      number of the job    |  end of parts |  next part  |   of one share
    //   progress    |      number of the job    |  num of parts |  parts done |   of all shares
    //
    // A thread that is late for one job finds another number in them, and leaves them alone.
    //
    // Memory orders, each release with the acquire that reads it:
    //   job_        run() stores, serve() loads: who sees a job sees the words of its phases.
    //   ticket      run() stores, take_part() loads: who sees a ticket sees its phase's function
    //               and body, which can thus be relaxed. Taking a part is acquire for the same, and
    //               release to come after the reading of those two.
    //   progress    run() stores, walk() loads: who sees a phase of this job sees its tickets.
    //               A part done adds, is_done() loads: who sees a phase done sees what it wrote.

    // A phase as the current job has it.
    struct PhaseState {
        std::atomic<Phase::Function> function{nullptr};
        std::atomic<const void*> body{nullptr};
        alignas(64) std::atomic<uint64_t> progress{0};
    };
    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0};
    };

    void start_threads();
    void serve(int thread);
    void walk(uint32_t job, int thread);
    bool take_part(uint32_t job, int phase, int share_of);
    bool is_done(uint32_t job, int phase) const;
    Share& share(int phase, int thread) const { return shares_[phase * num_threads_ + thread]; }

    const int num_threads_;
    std::mutex turn_;
    std::vector<std::thread> threads_;
    PhaseState states_[kMaxPhases];
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<uint32_t> job_{0};  // what idle threads sleep on
    std::atomic<bool> closing_{false};
    // What was posted: the function is stored last, and taken by the thread that calls it.
    std::atomic<void*> posted_body_{nullptr};
    std::atomic<void (*)(void*)> posted_{nullptr};
};

}  // namespace bitwatt
