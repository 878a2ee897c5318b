// Threads that read pieces of experts in the order in which they were queued, no faster than a pace. Knows no files.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cacheroute {

using Clock = std::chrono::steady_clock;

// Whole pages of one file and where they go in memory.
struct PageRun {
    int       file;
    uint64_t  offset; // in the file, a multiple of the page size
    uint8_t * address;
    uint64_t  bytes;
};

// What waits for its pieces: one expert of one tensor.
using Left = std::atomic<uint32_t>; // pieces that have not been read

class Readers {
  public:
    using Read = std::function<int(const PageRun &)>; // 0 or an errno; called by several threads

    Readers(int n_threads, Read read);
    ~Readers();

    // Queues the run in pieces of at most `piece_bytes`; `left` counts them down.
    void add(const PageRun & run, uint64_t piece_bytes, Left & left);
    void start(Clock::time_point since); // what was added; the pace counts from `since`

    // Takes back what has not begun of those pieces, and returns its bytes. What has begun goes on.
    uint64_t cancel(Left & left);

    // Between the two no piece is being read; what has begun is read to its end first.
    void pause();
    void go_on();

    void wait_for(const Left & left); // any thread
    void wait_for_all() const;        // any thread
    int  take_error();                // of any read since the last call: 0 or an errno

    void     set_pace(double bytes_per_second);
    uint64_t waited_ns() const; // time during which at least one thread was in wait_for()

  private:
    struct Piece {
        PageRun           run;
        Left *            left;
        Clock::time_point since; // when it was asked for
    };

    void loop();

    const Read                      read_;
    mutable std::mutex              mutex_;
    mutable std::condition_variable done_;
    std::condition_variable         wake_;
    std::vector<Piece>              added_; // by the one thread that adds
    std::deque<Piece>               queue_;
    uint64_t                        pending_ = 0; // pieces that are queued or on their way
    int                             reading_ = 0;
    bool                            paused_  = false;
    double                          pace_    = 0;
    Clock::time_point               deadline_{};
    int                             error_   = 0;
    bool                            stop_    = false;
    int                             waiting_ = 0;
    Clock::time_point               waiting_since_{};
    uint64_t                        waited_ns_ = 0;
    std::vector<std::thread>        threads_;
};

inline uint64_t ns_since(Clock::time_point t) {
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - t).count());
}

} // namespace cacheroute
