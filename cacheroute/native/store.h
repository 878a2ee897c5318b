// The store: reads experts into memory and evicts them. Knows bytes and pages; knows no probabilities and no llama.cpp.
#pragma once

#include "slots.h"
#include "counters.h"

#include <atomic>
#include <memory>
#include <vector>

namespace cacheroute {

class Store {
  public:
    // Throws std::runtime_error when a file cannot be opened or read as asked, or there is no thread to read with.
    Store(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors,
          Reading reading);
    ~Store() { clear(); } // what it brought into memory does not outlive it

    // Begins to make `load` resident, tensor by tensor as the layer computes on them, and drops `evict` (experts of one layer).
    // Returns when the reads are on their way; those of the exchange before it have ended. Called, like finish() and clear(),
    // from one thread at a time, and not while others are in find(). Interrupted, it returns early, and clear() must follow.
    // `more`: other experts take the memory of the evicted ones at once; what they leave of it is freed by trim().
    void exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict, bool more = false);

    // Drops experts of a layer that has been computed. Their memory is taken by what is loaded next; trim() frees the rest.
    void release(int layer, const std::vector<int32_t> & experts);
    void trim();

    // The next trim() frees the room of earlier prefetches, too.
    void keep_no_room();

    // Begins to read experts of a layer before its next exchange(), behind the reads under way. They take memory until that
    // exchange, which neither loads those that stay nor waits for those that it evicts. Called as exchange() is.
    // Urgency::prefetch keeps room for as many when they leave again; Urgency::ahead does not: a prompt comes to its end.
    void prefetch(int layer, const std::vector<int32_t> & experts, Urgency urgency = Urgency::prefetch);
    bool prefetching() const { return !prefetched_.empty(); } // experts whose layer has had no exchange since

    // Blocks until all reads have ended. Throws std::runtime_error when one has failed.
    void finish();

    // Where the bytes of an expert are; `expert`: its place in the mapping. Any thread that computes, after exchange() and
    // before the next one, asks twice: with late = false for the experts that were resident at the exchange, with
    // late = true for those that are on their way. Null: the answer comes in the other round. Blocks, in the second, until the
    // bytes are there; after a read that failed they are not, and finish() says so. Interrupted, it returns null at once.
    const void * find(const void * expert, bool late);

    void clear(); // drops everything, from the page cache too; what has not been read yet is not read

    // Once it is raised no call waits for reads any more. Null: none. While nothing computes.
    void set_interrupt(Interrupt * interrupt) { readers_->set_interrupt(interrupt); }

    // Bytes that are read for these experts [E] 0/1 of a layer when none of them is resident, whole pages.
    uint64_t bytes_of(int layer, const std::vector<uint8_t> & experts) const;

    // Bytes that were asked of the device so far, and of those what it has delivered. Any thread.
    uint64_t asked_bytes() const { return readers_->asked_bytes(); }
    uint64_t read_bytes() const { return readers_->read_bytes(); }

    uint64_t resident_bytes() const { return slots_.resident_bytes(); } // as counted, whole pages. Any thread.

    uint64_t peak_bytes() const { return peak_bytes_; } // the most of them since the last clear()

    // Bytes of all experts that are in memory as the kernel says (mincore), after the reads under way: of slots alone where it does
    // not tell of the file's pages (one of another user), UNKNOWN_BYTES where it tells of neither. Slow: any thread, not during a token.
    uint64_t measure_resident() const;

    // Paces reads to a slower flash: a read of n bytes takes at least n / bytes_per_second. 0: as fast as it goes.
    void set_pace(double bytes_per_second) { readers_->set_pace(bytes_per_second); }

    // Since the beginning. Of the reads: experts made resident, bytes asked of the device (whole pages), time that callers waited.
    Counters counters() const;

  private:
    struct State {
        PendingPieces pending{0};
        bool          late = false; // on its way at the last exchange
    };
    struct Expert {
        int     layer;
        int32_t id;
        Urgency urgency;
    };
    State & state(size_t tensor, int32_t e) { return states_[files_.index(tensor, e)]; }
    void    admit(int layer, const std::vector<int32_t> & experts, Urgency urgency);
    void    evict(int layer, const std::vector<int32_t> & experts, bool complete = true);
    void    read(size_t tensor, int32_t e, const PageRun & run, Urgency urgency);
    void    wait_for_late();
    void    make_late(State & state);
    void    resolve_prefetch(int layer, std::vector<int32_t> & evict);
    void    evict_cancelled(int layer, const std::vector<int32_t> & wanted);

    ExpertFiles              files_;
    Slots                    slots_;
    std::vector<State>       states_;     // [tensor][E]
    std::vector<State *>     late_;
    std::vector<Expert>      prefetched_; // no exchange of their layer since
    std::vector<Expert>      cancelled_;  // evicted while a part of them is still being read
    std::vector<int32_t>     leaving_;
    bool                     untrimmed_ = false; // evicted since the last trim()
    std::atomic<uint64_t>    peak_bytes_{0};
    uint64_t                 turn_      = 0;     // exchanges: what is read for a later one is read later
    Counters                 counters_{};
    std::unique_ptr<Readers> readers_; // last: they use the slots until they are joined
};

} // namespace cacheroute
