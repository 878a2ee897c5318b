#include "store.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

// Older libc headers (Android's among them) lack the names; a kernel without the call answers EINVAL.
#ifdef __linux__
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace cacheroute {

using Clock = std::chrono::steady_clock;

static uint64_t ns_since(Clock::time_point t) {
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - t).count());
}

namespace {

class MmapStore final : public Store {
  public:
    MmapStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors)
        : n_expert_(n_expert), page_(uint64_t(sysconf(_SC_PAGESIZE))), layers_(n_layers), tensors_(tensors) {
        for (const auto & name : files) {
            const int fd = open(name.c_str(), O_RDONLY | O_CLOEXEC);
            if (fd < 0) {
                const std::string why = std::strerror(errno);
                close_all();
                throw std::runtime_error("cannot open " + name + ": " + why);
            }
            fds_.push_back(fd);
            // pages that were just written are dirty, and dirty pages cannot be dropped
            fsync(fd);
        }
        for (size_t t = 0; t < tensors_.size(); t++) {
            layers_.at(tensors_[t].layer).push_back(t);
            // no read-around: a fault next to an expert must not read its neighbours
            const Run whole = pages(tensors_[t], 0, n_expert_);
            madvise(whole.address, whole.bytes, MADV_RANDOM);
        }
    }

    ~MmapStore() override { close_all(); }

    void exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) override {
        const auto start = Clock::now();
        // Pages first: those that a new expert shares with one that goes must be counted before they are dropped.
        uint64_t bytes = 0;
        runs_.clear();
        for (int32_t e : load) {
            for (size_t t : layers_[layer]) bytes += hold(tensors_[t], e);
        }
        // The reads start, and the processor drops pages while the device works.
        for (const Run & r : runs_) read_ahead(r);
        const auto evicting = Clock::now();
        for (int32_t e : evict) {
            for (size_t t : layers_[layer]) release(tensors_[t], e);
        }
        counters_.evict_ns += ns_since(evicting);
        for (const Run & r : runs_) populate(r);
        pace(start, bytes);
        counters_.reads += load.size();
        counters_.read_bytes += bytes;
        counters_.read_ns += ns_since(start);
    }

    void clear() override {
        shared_.clear();
        resident_bytes_ = 0;
        for (const auto & t : tensors_) drop(t, pages(t, 0, n_expert_));
#ifdef __linux__
        // and what llama.cpp read of the dense weights, which it has copied
        for (int fd : fds_) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    }

    uint64_t resident_bytes() const override { return resident_bytes_; }

    uint64_t measure_resident() const override {
        // Tensors that follow each other in the file share a page: count each page once.
        std::vector<Run> all;
        for (const auto & t : tensors_) all.push_back(pages(t, 0, n_expert_));
        std::sort(all.begin(), all.end(), [](const Run & a, const Run & b) { return a.address < b.address; });
        uint64_t  bytes = 0;
        uint8_t * done  = nullptr;
#ifdef __linux__
        std::vector<unsigned char> state;
#else
        std::vector<char> state;
#endif
        for (Run r : all) {
            if (r.address < done) {
                const uint64_t skip = std::min<uint64_t>(done - r.address, r.bytes);
                r.address += skip;
                r.bytes   -= skip;
            }
            if (!r.bytes) continue;
            done = r.address + r.bytes;
            state.resize(r.bytes / page_);
            if (mincore(r.address, r.bytes, state.data()) != 0) continue;
            for (auto s : state) bytes += (s & 1) ? page_ : 0;
        }
        return bytes;
    }

    void set_pace(double bytes_per_second) override { pace_ = bytes_per_second; }

    StoreCounters counters() const override { return counters_; }

  private:
    struct Run { // whole pages
        uint8_t * address;
        uint64_t  bytes;
    };

    // The pages that experts [first, first + n) of a tensor touch.
    Run pages(const ExpertTensor & t, int first, int n) const {
        const auto     from = reinterpret_cast<uintptr_t>(t.address) + first * t.expert_bytes;
        const uint64_t lo   = from & ~(page_ - 1);
        const uint64_t hi   = (from + n * t.expert_bytes + page_ - 1) & ~(page_ - 1);
        return {reinterpret_cast<uint8_t *>(lo), hi - lo};
    }

    // Calls f for the first and the last page of an expert where it has them only in part: those are shared.
    template <typename F> void shared_pages(const ExpertTensor & t, int32_t e, const Run & r, F f) const {
        const auto from = reinterpret_cast<uintptr_t>(t.address) + e * t.expert_bytes;
        const auto lo   = reinterpret_cast<uintptr_t>(r.address);
        const auto last = lo + r.bytes - page_;
        const bool head = from != lo, tail = from + t.expert_bytes != lo + r.bytes;
        if (head) f(lo);
        if (tail && !(head && last == lo)) f(last);
    }

    // Counts the expert into its pages and notes what has to be read. Returns the bytes of pages nobody held.
    uint64_t hold(const ExpertTensor & t, int32_t e) {
        const Run r        = pages(t, e, 1);
        uint64_t  resident = 0;
        shared_pages(t, e, r, [&](uintptr_t page) { resident += shared_[page]++ > 0 ? page_ : 0; });
        runs_.push_back(r);
        resident_bytes_ += r.bytes - resident;
        return r.bytes - resident;
    }

    // Counts the expert out of its pages and drops those that nobody holds any more.
    void release(const ExpertTensor & t, int32_t e) {
        Run r = pages(t, e, 1);
        shared_pages(t, e, r, [&](uintptr_t page) {
            auto it = shared_.find(page);
            if (it != shared_.end() && --it->second == 0) {
                shared_.erase(it);
            } else { // held by a neighbour: cut it off
                r.bytes -= page_;
                if (page == reinterpret_cast<uintptr_t>(r.address)) r.address += page_;
            }
        });
        if (!r.bytes) return;
        resident_bytes_ -= r.bytes;
        drop(t, r);
    }

    void drop(const ExpertTensor & t, const Run & r) {
        const uint64_t offset = t.offset + uint64_t(r.address - t.address);
#ifdef __linux__
        // PAGEOUT alone leaves pages inside large folios, the other two alone fail inside them too.
        madvise(r.address, r.bytes, MADV_PAGEOUT);
        madvise(r.address, r.bytes, MADV_DONTNEED);
        posix_fadvise(fds_[t.file], off_t(offset), off_t(r.bytes), POSIX_FADV_DONTNEED);
#else
        (void) offset;
        madvise(r.address, r.bytes, MADV_DONTNEED);
        msync(r.address, r.bytes, MS_INVALIDATE);
#endif
    }

    static void read_ahead(const Run & r) {
        // The kernel cuts a larger request down to its read-ahead window, 128 KiB on phones.
        constexpr uint64_t PIECE = 128 << 10;
        for (uint64_t at = 0; at < r.bytes; at += PIECE) {
            madvise(r.address + at, std::min(PIECE, r.bytes - at), MADV_WILLNEED);
        }
    }

    void populate(const Run & r) const {
#ifdef __linux__
        if (madvise(r.address, r.bytes, MADV_POPULATE_READ) == 0) return;
#endif
        for (uint64_t at = 0; at < r.bytes; at += page_) {
            (void) *static_cast<volatile uint8_t *>(r.address + at);
        }
    }

    // Against a deadline, so that a late wake-up is not paid for twice.
    void pace(Clock::time_point start, uint64_t bytes) {
        if (pace_ <= 0 || !bytes) return;
        const auto cost = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bytes / pace_));
        deadline_       = std::max(deadline_, start) + cost;
        std::this_thread::sleep_until(deadline_);
    }

    void close_all() {
        for (int fd : fds_) close(fd);
        fds_.clear();
    }

    const int      n_expert_;
    const uint64_t page_;
    std::vector<int>                         fds_;
    std::vector<std::vector<size_t>>         layers_; // tensors of each layer
    const std::vector<ExpertTensor>          tensors_;
    std::unordered_map<uintptr_t, uint32_t>  shared_; // experts that hold a page which is not one's alone
    std::vector<Run>                         runs_;
    std::atomic<uint64_t>                    resident_bytes_{0};
    double                                   pace_ = 0;
    Clock::time_point                        deadline_{};
    StoreCounters                            counters_;
};

} // namespace

std::unique_ptr<Store> make_mmap_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                       const std::vector<ExpertTensor> & tensors) {
    return std::make_unique<MmapStore>(files, n_layers, n_expert, tensors);
}

} // namespace cacheroute
