#include "reading_store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace cacheroute {

ReadingStore::ReadingStore(const std::vector<std::string> & files, int n_layers, int n_expert,
                           const std::vector<ExpertTensor> & tensors)
    : n_expert_(n_expert), page_(uint64_t(sysconf(_SC_PAGESIZE))), layers_(size_t(n_layers)), tensors_(tensors),
      experts_(tensors.size() * size_t(n_expert)) {
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
        by_address_.push_back(t);
        whole.push_back(pages(t, 0, n_expert_));
    }
    std::sort(by_address_.begin(), by_address_.end(), [&](size_t a, size_t b) { return tensors_[a].address < tensors_[b].address; });
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

ReadingStore::~ReadingStore() {
    for (int fd : fds_) close(fd);
}

void ReadingStore::start_readers(int n_threads, uint64_t piece_bytes, Readers::Read read) {
    piece_bytes_ = piece_bytes;
    readers_     = std::make_unique<Readers>(n_threads, std::move(read));
}

void ReadingStore::exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) {
    const auto start = Clock::now();
    readers_->wait_for_all(); // an error of theirs is finish()'s to tell
    for (Expert * e : late_) e->late = false;
    late_.clear();
    const std::vector<size_t> & tensors = layers_[size_t(layer)];
    begin(tensors, load, evict);
    const auto dropping = Clock::now();
    drop(tensors, evict);
    counters_.evict_ns += ns_since(dropping);
    readers_->start(start);
    counters_.reads += load.size();
    counters_.read_ns += ns_since(start);
}

void ReadingStore::read(size_t tensor, int32_t e, const PageRun & run) {
    Expert & expert = state(tensor, e);
    expert.late     = true;
    late_.push_back(&expert);
    readers_->add(run, piece_bytes_, expert.left);
    counters_.read_bytes += run.bytes;
}

void ReadingStore::finish() {
    const auto start = Clock::now();
    readers_->wait_for_all();
    counters_.read_ns += ns_since(start);
    if (const int error = readers_->take_error()) {
        throw std::runtime_error(std::string("reading experts failed: ") + std::strerror(error));
    }
}

const void * ReadingStore::find(const void * expert, bool late) {
    const auto * at = static_cast<const uint8_t *>(expert);
    const auto   after =
        std::upper_bound(by_address_.begin(), by_address_.end(), at, [&](const uint8_t * a, size_t t) { return a < tensors_[t].address; });
    if (after != by_address_.begin()) {
        const size_t   t = *(after - 1);
        const uint64_t e = uint64_t(at - tensors_[t].address) / tensors_[t].expert_bytes;
        if (e < uint64_t(n_expert_)) {
            const Expert & state = this->state(t, int32_t(e));
            if (state.late != late) return nullptr;
            if (late) readers_->wait_for(state.left);
            return address(t, int32_t(e));
        }
    }
    return late ? nullptr : expert; // not ours
}

void ReadingStore::clear() {
    readers_->wait_for_all();
    readers_->take_error(); // of a sequence that is forgotten
    drop_all();
    resident_bytes_ = 0;
#ifdef __linux__
    // and what llama.cpp read of the dense weights, which it has copied
    for (int fd : fds_) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
}

uint64_t ReadingStore::measure_resident() const {
    readers_->wait_for_all();
    return measure();
}

StoreCounters ReadingStore::counters() const {
    StoreCounters c = counters_;
    c.read_ns += readers_->waited_ns();
    return c;
}

PageRun ReadingStore::pages(size_t tensor, int first, int n) const {
    const ExpertTensor & t    = tensors_[tensor];
    const auto           base = reinterpret_cast<uintptr_t>(t.address);
    const auto           from = base + uint64_t(first) * t.expert_bytes;
    const uint64_t       lo   = from & ~(page_ - 1);
    const uint64_t       hi   = (from + uint64_t(n) * t.expert_bytes + page_ - 1) & ~(page_ - 1);
    return {t.file, t.offset + lo - base, reinterpret_cast<uint8_t *>(lo), hi - lo};
}

uint64_t ReadingStore::in_memory(const void * address, uint64_t bytes, uint64_t page) {
#ifdef __linux__
    std::vector<unsigned char> state(bytes / page);
#else
    std::vector<char> state(bytes / page);
#endif
    if (mincore(const_cast<void *>(address), bytes, state.data()) != 0) return UNKNOWN_BYTES;
    uint64_t n = 0;
    for (auto s : state) n += (s & 1) ? page : 0;
    return n;
}

} // namespace cacheroute
