#include "readers.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cacheroute {

// How a thread waits that is not woken: a few looks in a row, for what is nearly read, then one after each nap. With the slack of
// Linux's timers a nap takes 0.1 ms, a tenth of what 1 MB takes at 1 GB/s.
static constexpr int  LOOKS_AWAKE = 20;
static constexpr auto NAP         = std::chrono::microseconds(50);

Readers::Readers(int n_threads, Read read) : read_(std::move(read)) {
    threads_.reserve(size_t(n_threads));
    try {
        for (int i = 0; i < n_threads; i++) threads_.emplace_back([this] { loop(); });
    } catch (const std::exception & e) { // a limit of the system: one reader does, too
        if (threads_.empty()) {
            throw std::runtime_error(
                std::string("no thread can be started to read experts (") + e.what() + "): allow more (ulimit -u, a limit of pids)");
        }
    }
}

Readers::~Readers() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    pace_over_.notify_all();
    for (auto & thread : threads_) thread.join();
}

void Readers::add(const PageRun & run, uint64_t piece_bytes, uint64_t use, PendingPieces & pending) {
    for (uint64_t at = 0; at < run.bytes; at += piece_bytes) {
        added_.push_back({{run.file, run.offset + at, run.address + at, std::min(piece_bytes, run.bytes - at)}, &pending, use, {}});
        pending.fetch_add(1, std::memory_order_relaxed);
    }
}

void Readers::start(Clock::time_point since) {
    if (added_.empty()) return;
    const auto earlier = [](const Piece & a, const Piece & b) { return a.use < b.use; };
    std::stable_sort(added_.begin(), added_.end(), earlier);
    for (Piece & piece : added_) piece.since = since;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto queued = std::ptrdiff_t(queue_.size());
        queue_.insert(queue_.end(), added_.begin(), added_.end());
        std::inplace_merge(queue_.begin(), queue_.begin() + queued, queue_.end(), earlier);
        for (const Piece & piece : added_) asked_bytes_ += piece.run.bytes;
        pending_ += added_.size();
    }
    added_.clear();
    wake_.notify_one();
}

void Readers::drop_added() {
    for (const Piece & piece : added_) piece.pending->fetch_sub(1, std::memory_order_relaxed);
    added_.clear();
}

uint64_t Readers::cancel(PendingPieces & pending) {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t bytes = 0;
    const auto begun = std::remove_if(queue_.begin(), queue_.end(), [&](const Piece & piece) {
        if (piece.pending != &pending) return false;
        bytes += piece.run.bytes;
        pending.fetch_sub(1, std::memory_order_relaxed);
        return true;
    });
    pending_ -= uint64_t(queue_.end() - begun);
    queue_.erase(begun, queue_.end());
    asked_bytes_ -= bytes;
    if (bytes) done_.notify_all();
    return bytes;
}

uint64_t Readers::cancel_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t bytes = 0;
    for (const Piece & piece : queue_) {
        bytes += piece.run.bytes;
        piece.pending->fetch_sub(1, std::memory_order_relaxed);
    }
    pending_ -= queue_.size();
    queue_.clear();
    asked_bytes_ -= bytes;
    cancels_++;
    deadline_ = std::min(deadline_, Clock::now()); // what was cancelled takes no time of a flash
    pace_over_.notify_all();
    done_.notify_all();
    return bytes;
}

void Readers::loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        const Piece piece = queue_.front();
        queue_.pop_front();
        // When a flash of the given pace would deliver it. Deadlines follow each other, so that a late wake-up delays one read only.
        const bool paced = pace_ > 0;
        if (paced) {
            const std::chrono::duration<double> takes(double(piece.run.bytes) / pace_);
            deadline_ = std::max(deadline_, piece.since) + std::chrono::duration_cast<Clock::duration>(takes);
        }
        const auto not_before = deadline_;
        const auto cancels    = cancels_;
        const bool more = !queue_.empty();
        lock.unlock();
        if (more) wake_.notify_one(); // readers wake each other: the thread that starts them has a layer to compute
        const int error = read_(piece.run);
        lock.lock();
        if (paced) pace_over_.wait_until(lock, not_before, [&] { return stop_ || cancels_ != cancels; });
        if (error) error_ = error;
        read_bytes_ += piece.run.bytes;
        const bool last = piece.pending->fetch_sub(1, std::memory_order_release) == 1;
        pending_--;
        if (last || !pending_) done_.notify_all();
    }
}

bool Readers::wait_for(const PendingPieces & pending) {
    const auto there = [&] { return pending.load(std::memory_order_acquire) == 0; };
    const auto over  = [&] { return there() || interrupted(); };
    if (there()) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    if (waiting_++ == 0) waiting_since_ = Clock::now();
    if (!sleeping_) {
        sleeping_ = true;
        while (!done_.wait_for(lock, std::chrono::milliseconds(50), over)) {
            lock.unlock(); // who holds the GIL may want it
            poll_interrupt();
            lock.lock();
        }
        sleeping_ = false;
    } else {
        // Only one thread is woken. Two that are woken together may be put on the same processor, where each spins in ggml's
        // barrier while the other could run: 1.3 instead of 6 tokens/s on two processors. The others look for themselves, and
        // sleep between looks: to yield without end burnt up to half of all processor time while an expert was read.
        lock.unlock();
        for (int looks = 0; !over(); looks++) {
            if (looks < LOOKS_AWAKE) {
                std::this_thread::yield();
            } else {
                std::this_thread::sleep_for(NAP);
            }
            poll_interrupt();
        }
        lock.lock();
    }
    if (--waiting_ == 0) waited_seconds_ += seconds_since(waiting_since_);
    return there();
}

void Readers::wait_for_all() const {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
}

int Readers::take_error() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(error_, 0);
}

void Readers::set_pace(double bytes_per_second) {
    std::lock_guard<std::mutex> lock(mutex_);
    pace_ = bytes_per_second;
}

double Readers::waited_seconds() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return waited_seconds_;
}

} // namespace cacheroute
