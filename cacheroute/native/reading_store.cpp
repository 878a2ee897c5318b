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
    for (Expert * e : late_) {
        readers_->wait_for(e->left); // an error of theirs is finish()'s to tell
        e->late = false;
    }
    late_.clear();
    leaving_ = evict;
    keep_guesses(layer, leaving_);
    bury(layer, load); // before the loads: a page that is shared with a guess which nobody has read is theirs to read
    const std::vector<size_t> & tensors = layers_[size_t(layer)];
    begin(tensors, load, leaving_);
    let_go(tensors, leaving_);
    readers_->start(start);
    counters_.reads += load.size();
    counters_.read_ns += ns_since(start);
}

void ReadingStore::let_go(const std::vector<size_t> & tensors, const std::vector<int32_t> & evict) {
    if (evict.empty()) return;
    const auto start = Clock::now();
    if (drops_in_quiet()) readers_->pause();
    drop(tensors, evict);
    if (drops_in_quiet()) readers_->go_on();
    counters_.evict_ns += ns_since(start);
}

void ReadingStore::prefetch(int layer, const std::vector<int32_t> & experts) {
    bury(layer, experts);
    reading_ahead_ = true;
    begin(layers_[size_t(layer)], experts, {});
    reading_ahead_ = false;
    for (int32_t e : experts) guesses_.push_back({layer, e});
    readers_->start(Clock::now());
    counters_.reads += experts.size();
    counters_.ahead += experts.size();
}

// Of the experts read ahead for this layer: those that stay are waited for like the others; the rest is bury()'s and not of
// `evict` any more, and what of it has not begun is never read.
void ReadingStore::keep_guesses(int layer, std::vector<int32_t> & evict) {
    if (guesses_.empty()) return;
    const auto other = std::partition(guesses_.begin(), guesses_.end(), [&](const Guess & g) { return g.layer != layer; });
    for (auto guess = other; guess != guesses_.end(); ++guess) {
        const auto at    = std::find(evict.begin(), evict.end(), guess->expert);
        const bool stays = at == evict.end();
        for (size_t t : layers_[size_t(layer)]) {
            Expert & expert = state(t, guess->expert);
            if (!stays) counters_.read_bytes -= readers_->cancel(expert.left);
            if (!stays || expert.left.load(std::memory_order_acquire) == 0) continue;
            expert.late = true;
            late_.push_back(&expert);
        }
        counters_.ahead_used += stays;
        if (stays) continue;
        evict.erase(at);
        cancelled_.push_back(*guess);
    }
    guesses_.erase(other, guesses_.end());
}

// Drops the cancelled experts whose reads have ended; those that are wanted again are waited for.
void ReadingStore::bury(int layer, const std::vector<int32_t> & wanted) {
    for (size_t i = cancelled_.size(); i-- > 0;) {
        const Guess                 guess   = cancelled_[i];
        const std::vector<size_t> & tensors = layers_[size_t(guess.layer)];
        const bool wait  = guess.layer == layer && std::find(wanted.begin(), wanted.end(), guess.expert) != wanted.end();
        bool       ended = true;
        for (size_t t : tensors) {
            Expert & expert = state(t, guess.expert);
            if (wait) readers_->wait_for(expert.left);
            ended = ended && expert.left.load(std::memory_order_acquire) == 0;
        }
        if (!ended) continue;
        begin(tensors, {}, {guess.expert});
        let_go(tensors, {guess.expert});
        cancelled_.erase(cancelled_.begin() + std::ptrdiff_t(i));
    }
}

void ReadingStore::read(size_t tensor, int32_t e, const PageRun & run) {
    Expert & expert = state(tensor, e);
    if (!reading_ahead_) {
        expert.late = true;
        late_.push_back(&expert);
    }
    // small pieces of what may be cancelled: those that have begun are in the way of what is needed
    readers_->add(run, reading_ahead_ ? piece_bytes_ / 4 : piece_bytes_, expert.left);
    counters_.read_bytes += run.bytes;
}

void ReadingStore::finish() {
    const auto start = Clock::now();
    readers_->wait_for_all();
    bury(0, {});
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
    guesses_.clear();
    cancelled_.clear();
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
