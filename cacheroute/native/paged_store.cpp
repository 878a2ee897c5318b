#include "paged_store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace cacheroute {

using Clock = std::chrono::steady_clock;

static uint64_t ns_since(Clock::time_point t) {
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - t).count());
}

PagedStore::PagedStore(const std::vector<std::string> & files, int n_layers, int n_expert,
                       const std::vector<ExpertTensor> & tensors)
    : n_expert_(n_expert), page_(uint64_t(sysconf(_SC_PAGESIZE))), layers_(n_layers), tensors_(tensors) {
    for (const auto & name : files) {
        const int fd = open(name.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            const std::string why = std::strerror(errno);
            for (int opened : fds_) close(opened);
            throw std::runtime_error("cannot open " + name + ": " + why);
        }
        fds_.push_back(fd);
        // pages that were just written are dirty, and dirty pages cannot be dropped
        fsync(fd);
    }
    std::vector<PageRun> whole;
    for (size_t t = 0; t < tensors_.size(); t++) {
        layers_.at(size_t(tensors_[t].layer)).push_back(t);
        whole.push_back(pages(tensors_[t], 0, n_expert_));
    }
    // tensors that follow each other in the file share a page
    std::sort(whole.begin(), whole.end(), [](const PageRun & a, const PageRun & b) { return a.address < b.address; });
    for (const PageRun & r : whole) {
        if (!all_.empty() && r.file == all_.back().file && r.address <= all_.back().address + all_.back().bytes) {
            PageRun & last = all_.back();
            last.bytes     = std::max(last.bytes, uint64_t(r.address + r.bytes - last.address));
        } else {
            all_.push_back(r);
        }
    }
}

PagedStore::~PagedStore() {
    for (int fd : fds_) close(fd);
}

void PagedStore::exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) {
    const auto start = Clock::now();
    // Counted in before anything is counted out: a page that a new expert shares with one that goes stays.
    runs_.clear();
    for (size_t t : layers_[size_t(layer)]) {
        for (int32_t e : load) hold(tensors_[t], e);
    }
    uint64_t bytes = 0;
    for (const PageRun & r : runs_) bytes += r.bytes;
    // The reads start, and the processor drops pages while the device works.
    start_reading(runs_);
    const auto evicting = Clock::now();
    for (size_t t : layers_[size_t(layer)]) {
        for (int32_t e : evict) release(tensors_[t], e);
    }
    counters_.evict_ns += ns_since(evicting);
    finish_reading(runs_);
    pace(start, bytes);
    counters_.reads += load.size();
    counters_.read_bytes += bytes;
    counters_.read_ns += ns_since(start);
}

void PagedStore::clear() {
    shared_.clear();
    resident_bytes_ = 0;
    for (const PageRun & r : all_) drop(r);
#ifdef __linux__
    // and what llama.cpp read of the dense weights, which it has copied
    for (int fd : fds_) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
}

uint64_t PagedStore::measure_resident() const {
    if (!mincore_tells()) return UNKNOWN_BYTES;
#ifdef __linux__
    std::vector<unsigned char> state;
#else
    std::vector<char> state;
#endif
    uint64_t bytes = 0;
    for (const PageRun & r : all_) {
        state.resize(r.bytes / page_);
        if (mincore(r.address, r.bytes, state.data()) != 0) return UNKNOWN_BYTES;
        for (auto s : state) bytes += (s & 1) ? page_ : 0;
    }
    return bytes;
}

// The pages that experts [first, first + n) of a tensor touch.
PageRun PagedStore::pages(const ExpertTensor & t, int first, int n) const {
    const auto     base = reinterpret_cast<uintptr_t>(t.address);
    const auto     from = base + uint64_t(first) * t.expert_bytes;
    const uint64_t lo   = from & ~(page_ - 1);
    const uint64_t hi   = (from + uint64_t(n) * t.expert_bytes + page_ - 1) & ~(page_ - 1);
    return {t.file, t.offset + lo - base, reinterpret_cast<uint8_t *>(lo), hi - lo};
}

// Calls f for the first and the last page of an expert where it has them only in part: those are shared.
template <typename F> void PagedStore::shared_pages(const ExpertTensor & t, int32_t e, const PageRun & r, F f) const {
    const auto from = reinterpret_cast<uintptr_t>(t.address) + uint64_t(e) * t.expert_bytes;
    const auto lo   = reinterpret_cast<uintptr_t>(r.address);
    const auto last = lo + r.bytes - page_;
    const bool head = from != lo, tail = from + t.expert_bytes != lo + r.bytes;
    if (head) f(lo);
    if (tail && !(head && last == lo)) f(last);
}

static void cut_page(PageRun & r, uintptr_t page, uint64_t page_bytes) {
    r.bytes -= page_bytes;
    if (page == reinterpret_cast<uintptr_t>(r.address)) {
        r.address += page_bytes;
        r.offset += page_bytes;
    }
}

// Counts the expert into its pages and notes those that nobody held before: they are to be read.
void PagedStore::hold(const ExpertTensor & t, int32_t e) {
    const PageRun r      = pages(t, e, 1);
    PageRun       unread = r;
    shared_pages(t, e, r, [&](uintptr_t page) {
        if (shared_[page]++ > 0) cut_page(unread, page, page_);
    });
    if (!unread.bytes) return;
    resident_bytes_ += unread.bytes;
    runs_.push_back(unread);
}

// Counts the expert out of its pages and drops those that nobody holds any more.
void PagedStore::release(const ExpertTensor & t, int32_t e) {
    const PageRun r    = pages(t, e, 1);
    PageRun       free = r;
    shared_pages(t, e, r, [&](uintptr_t page) {
        auto it = shared_.find(page);
        if (it != shared_.end() && --it->second == 0) {
            shared_.erase(it);
        } else {
            cut_page(free, page, page_);
        }
    });
    if (!free.bytes) return;
    resident_bytes_ -= free.bytes;
    drop(free);
}

// Against a deadline, so that a late wake-up is not paid for twice.
void PagedStore::pace(Clock::time_point start, uint64_t bytes) {
    if (pace_ <= 0 || !bytes) return;
    const auto cost = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(double(bytes) / pace_));
    deadline_       = std::max(deadline_, start) + cost;
    std::this_thread::sleep_until(deadline_);
}

} // namespace cacheroute
