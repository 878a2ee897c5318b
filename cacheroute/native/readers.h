// Threads that read pieces of experts in the order of their use, no faster than a pace. Knows no files.
#pragma once

#include "interrupt.h"

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

// Pieces that have not been read, of one expert of one tensor.
using PendingPieces = std::atomic<uint32_t>;

class Readers {
  public:
    using Read = std::function<int(const PageRun &)>; // 0 or an errno; called by several threads

    // With fewer threads where the system does not allow so many. Throws std::runtime_error when it allows none.
    Readers(int n_threads, Read read);
    ~Readers();

    // Queues the run in pieces of at most `piece_bytes`; `pending` counts them down. What is used earlier is read earlier, whatever
    // was queued first: `use` ascends; among equals the order is that of the calls.
    void add(const PageRun & run, uint64_t piece_bytes, uint64_t use, PendingPieces & pending);
    void start(Clock::time_point since); // what was added; the pace counts from `since`
    void drop_added();                   // what was not started is never read; nobody waits for it any more

    // Cancels those of the pieces that have not begun, and returns their bytes. What has begun is read to its end.
    uint64_t cancel(PendingPieces & pending);

    // Cancels all that have not begun, and returns their bytes; those that have begun end without regard to the pace.
    uint64_t cancel_all();

    bool wait_for(const PendingPieces & pending); // any thread. False: interrupted before they were read
    void wait_for_all() const;        // any thread
    int  take_error();                // of any read since the last call: 0 or an errno

    // Ends wait_for() early, here and in every thread, once it is raised. Null: nothing does. While nobody waits.
    void set_interrupt(Interrupt * interrupt) { interrupt_ = interrupt; }
    bool poll_interrupt() const { return interrupt_ && interrupt_->poll(); } // any thread
    bool interrupted() const { return interrupt_ && interrupt_->raised(); }  // any thread

    uint64_t asked_bytes() const { return asked_bytes_; } // of what was started and not cancelled. Any thread.
    uint64_t read_bytes() const { return read_bytes_; }   // of those, what has been read. Any thread.

    void     set_pace(double bytes_per_second);
    double   waited_seconds() const; // time during which at least one thread was in wait_for()

  private:
    struct Piece {
        PageRun           run;
        PendingPieces *   pending;
        uint64_t          use;
        Clock::time_point since; // when it was asked for
    };

    void loop();

    const Read                      read_;
    mutable std::mutex              mutex_;
    mutable std::condition_variable done_;
    std::condition_variable         wake_;
    std::condition_variable         pace_over_;
    std::vector<Piece>              added_; // by the one thread that adds
    std::deque<Piece>               queue_;
    uint64_t                        pending_ = 0; // pieces that are queued or on their way
    double                          pace_    = 0;
    Clock::time_point               deadline_{};
    uint64_t                        cancels_ = 0; // calls of cancel_all()
    Interrupt *                     interrupt_ = nullptr;
    std::atomic<uint64_t>           asked_bytes_{0}, read_bytes_{0};
    int                             error_   = 0;
    bool                            stop_    = false;
    bool                            sleeping_ = false; // the one thread that is woken
    int                             waiting_  = 0;
    Clock::time_point               waiting_since_{};
    double                          waited_seconds_ = 0;
    std::vector<std::thread>        threads_;
};

inline double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

} // namespace cacheroute
