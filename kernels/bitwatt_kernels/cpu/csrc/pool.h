// A few threads that share out the parts of one call, and wait for the next one cheaply.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace bitwatt {

class Pool {
public:
    // num_threads counts the caller's own; the others start with the first run that needs them.
    explicit Pool(int num_threads) : num_threads_(num_threads) {}
    ~Pool();

    int num_threads() const { return num_threads_; }

    // Calls body(part) once for each part in [0, num_parts), on any of the threads; returns when
    // all are done. num_parts < 65536. Safe from several threads: calls take turns.
    template <class Body>
    void run(int num_parts, const Body& body) {
        if (num_parts <= 1 || num_threads_ == 1) {
            for (int part = 0; part < num_parts; ++part) body(part);
            return;
        }
        run_shared(num_parts, [](const void* b, int part) { (*static_cast<const Body*>(b))(part); },
                   &body);
    }

private:
    using Function = void (*)(const void* body, int part);

    void run_shared(int num_parts, Function function, const void* body);
    void start_threads();
    bool take_part();
    void serve();

    const int num_threads_;
    std::mutex turn_;
    std::vector<std::thread> threads_;

    // The current job: its number, its parts and the next of them to claim, 32, 16 and 16 bits.
    // function_ and body_ are that job's for as long as a part of it is unclaimed.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    std::atomic<Function> function_{nullptr};
    std::atomic<const void*> body_{nullptr};
    alignas(64) std::atomic<int> num_done_{0};
    alignas(64) std::atomic<uint32_t> job_{0};  // what idle threads sleep on
    std::atomic<bool> closing_{false};
};

}  // namespace bitwatt
