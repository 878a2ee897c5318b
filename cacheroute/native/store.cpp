#include "store.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace cacheroute {

Store::Store(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors,
             Reading reading)
    : files_(files, n_layers, n_expert, tensors), slots_(files_, reading), states_(tensors.size() * size_t(n_expert)),
      readers_(std::make_unique<Readers>(Slots::N_READERS, [this](const PageRun & run) { return slots_.read(run); })) {}

void Store::exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evicted, bool more) try {
    const auto start = Clock::now();
    turn_++;
    wait_for_late();
    leaving_ = evicted;
    resolve_prefetch(layer, leaving_);
    evict_cancelled(layer, load);
    if (readers_->interrupted()) return; // experts that are still being read must not be evicted
    evict(layer, leaving_);
    admit(layer, load, Urgency::needed);
    if (!more) trim();
    readers_->start(start);
    counters_.read_seconds += seconds_since(start);
} catch (...) { // no memory
    readers_->drop_added();
    throw;
}

void Store::wait_for_late() {
    for (State * s : late_) {
        readers_->wait_for(s->pending); // finish() reports an error of the readers
        s->late = false;
    }
    late_.clear();
}

void Store::release(int layer, const std::vector<int32_t> & experts) {
    wait_for_late();
    if (!readers_->interrupted()) evict(layer, experts); // else clear() follows
}

void Store::admit(int layer, const std::vector<int32_t> & experts, Urgency urgency) {
    for (size_t t : files_.tensors_of(layer)) {
        for (int32_t e : experts) {
            read(t, e, slots_.admit(t, e, urgency), urgency);
        }
    }
    counters_.reads += experts.size();
    peak_bytes_ = std::max<uint64_t>(peak_bytes_, slots_.resident_bytes());
}

void Store::read(size_t tensor, int32_t e, const PageRun & run, Urgency urgency) {
    State &        s    = state(tensor, e);
    const uint64_t turn = turn_ + (urgency != Urgency::needed);
    if (urgency == Urgency::needed) make_late(s);
    // what a prompt reads a layer early in larger pieces: nobody waits for its first part, and the readers take less time from the
    // threads that compute
    const uint64_t piece = urgency == Urgency::ahead ? 4 * Slots::PIECE : Slots::PIECE;
    // a layer computes tensor by tensor, and on a tensor expert by expert
    readers_->add(run, piece, turn * states_.size() + files_.index(tensor, e), s.pending);
    counters_.read_bytes += run.bytes;
}

void Store::make_late(State & s) {
    s.late = true;
    late_.push_back(&s);
}

void Store::evict(int layer, const std::vector<int32_t> & experts, bool complete) {
    const auto & tensors = files_.tensors_of(layer);
    untrimmed_           = untrimmed_ || !experts.empty();
    // from the last one on: what is freed last is taken first, by the same tensor
    for (auto t = tensors.rbegin(); t != tensors.rend(); ++t) {
        for (int32_t e : experts) slots_.evict(*t, e, complete);
    }
}

void Store::trim() {
    if (!std::exchange(untrimmed_, false)) return;
    const auto start = Clock::now();
    slots_.trim();
    counters_.evict_seconds += seconds_since(start);
}

void Store::keep_no_room() {
    slots_.keep_no_room();
    untrimmed_ = true;
}

void Store::prefetch(int layer, const std::vector<int32_t> & experts, Urgency urgency) try {
    evict_cancelled(layer, experts);
    admit(layer, experts, urgency);
    if (urgency == Urgency::prefetch) { // else the caller trims, when all is admitted
        slots_.keep_room(files_.tensors_of(layer), prefetched_.size() + cancelled_.size() + experts.size());
        trim();
    }
    for (int32_t e : experts) prefetched_.push_back({layer, e, urgency});
    readers_->start(Clock::now());
    counters_.prefetched += experts.size();
} catch (...) {
    readers_->drop_added();
    throw;
}

// Of the experts that were prefetched for this layer: those that stay are waited for like the others; of the rest, which is taken
// out of `evict`, what has not begun is never read, and what has begun leaves when it ends.
void Store::resolve_prefetch(int layer, std::vector<int32_t> & evict) {
    if (prefetched_.empty()) return;
    const auto own = std::partition(prefetched_.begin(), prefetched_.end(), [&](const Expert & x) { return x.layer != layer; });
    for (auto x = own; x != prefetched_.end(); ++x) {
        const auto at    = std::find(evict.begin(), evict.end(), x->id);
        const bool stays = at == evict.end();
        for (size_t t : files_.tensors_of(layer)) {
            State & s = state(t, x->id);
            if (!stays) {
                counters_.read_bytes -= readers_->cancel(s.pending);
            } else if (s.pending.load(std::memory_order_acquire) != 0) {
                make_late(s);
            }
        }
        counters_.prefetch_used += stays;
        if (stays) continue;
        evict.erase(at);
        cancelled_.push_back(*x);
    }
    prefetched_.erase(own, prefetched_.end());
}

// Evicts the cancelled experts whose reads have ended; those of `layer` that are `wanted` again are waited for.
void Store::evict_cancelled(int layer, const std::vector<int32_t> & wanted) {
    for (size_t i = cancelled_.size(); i-- > 0;) {
        const Expert x     = cancelled_[i];
        const bool   wait  = x.layer == layer && std::find(wanted.begin(), wanted.end(), x.id) != wanted.end();
        bool         ended = true;
        for (size_t t : files_.tensors_of(x.layer)) {
            State & s = state(t, x.id);
            if (wait) readers_->wait_for(s.pending);
            ended = ended && s.pending.load(std::memory_order_acquire) == 0;
        }
        if (!ended) continue;
        evict(x.layer, {x.id}, x.urgency == Urgency::prefetch);
        if (wait) trim(); // or what is read again would be dropped with what leaves
        cancelled_.erase(cancelled_.begin() + std::ptrdiff_t(i));
    }
}

void Store::finish() {
    const auto start = Clock::now();
    readers_->wait_for_all();
    evict_cancelled(-1, {});
    trim();
    counters_.read_seconds += seconds_since(start);
    const int error = readers_->take_error();
    if (!error && !files_.bus_error()) return;
    const char * why = error ? std::strerror(error) : "a page of the file cannot be read";
    if (files_.shorter()) why = "the file has become shorter since it was loaded";
    throw std::runtime_error(std::string("reading experts failed: ") + why);
}

const void * Store::find(const void * expert, bool late) {
    size_t  t;
    int32_t e;
    if (readers_->poll_interrupt()) return nullptr; // the batch is broken off: nothing of it is needed
    if (!files_.locate(expert, t, e)) return late ? nullptr : expert; // not an expert of this store
    const State & s = state(t, e);
    if (s.late != late || (late && !readers_->wait_for(s.pending))) return nullptr;
    return slots_.address(t, e);
}

void Store::clear() {
    counters_.read_bytes -= readers_->cancel_all();
    readers_->wait_for_all();
    for (State * s : late_) s->late = false;
    late_.clear();
    readers_->take_error(); // of a sequence that has been reset
    prefetched_.clear();
    cancelled_.clear();
    slots_.clear();
    peak_bytes_ = 0;
    files_.drop_unmapped(); // what llama.cpp read of the dense weights, which it has copied
}

uint64_t Store::bytes_of(int layer, const std::vector<uint8_t> & experts) const {
    uint64_t bytes = 0;
    for (size_t t : files_.tensors_of(layer)) {
        for (size_t e = 0; e < experts.size(); e++) bytes += experts[e] ? files_.pages(t, int(e), 1).bytes : 0;
    }
    return bytes;
}

uint64_t Store::measure_resident() const {
    readers_->wait_for_all();
    return slots_.measure();
}

Counters Store::counters() const {
    Counters c = counters_;
    c.read_seconds += readers_->waited_seconds();
    return c;
}

} // namespace cacheroute
