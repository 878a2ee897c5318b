// The hook: what llama.cpp calls where a MoE layer chooses its experts. Scores -> router -> residency; the layer's matmuls then ask
// the store where each expert is. Holds no policy of its own. Nothing throws into llama.cpp: what fails is in error().
#pragma once

#include "cached_router.h"
#include "expert_event.h"
#include "prefetch.h"
#include "progress.h"
#include "prompt_router.h"
#include "read_ahead.h"
#include "residency.h"
#include "score_source.h"
#include "trace.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace cacheroute {

class Hook {
  public:
    // layer_of[il]: index into `routers` and the store's layers, -1 for a layer that is not managed. `store` null: none.
    // `capacity`: experts of a layer in the budget that the routers' caches share.
    Hook(std::vector<int> layer_of, std::vector<CachedRouter> routers, int capacity, std::unique_ptr<Store> store, bool reweights);

    // llama.cpp keeps the address
    Hook(const Hook &)             = delete;
    Hook & operator=(const Hook &) = delete;

    ExpertHook * address() { return &hook_; }

    void set_phase(Phase phase) { phase_ = phase; }

    // Before a batch: it begins with that token of the sequence. Without a call it follows the last one.
    void begin(uint32_t token) {
        if (token == 0) begin_prompt(token);
        batch_first_ = token;
        batch_size_  = 0;
        asked_.assign(routers_.size(), 0);
        if (store()) store()->set_interrupt(interrupt_);
    }

    // Before the first batch of a prompt that begins with that token; one that begins a sequence needs no call.
    void begin_prompt(uint32_t token) { progress_.begin(token, residency_.store()); }

    cr_progress progress() const { return progress_.get(residency_.store()); } // any thread

    // Once it is raised, from begin() to finish() nothing waits for reads, and finish() is reset(). Null: none.
    void set_interrupt(Interrupt * interrupt) { interrupt_ = interrupt; }

    // What a layer ranks from now on, in place of the model's own scores. Gate weights stay the model's.
    void force(int layer, ForcedScores scores) { source_.force(layer, std::move(scores)); }

    // After the last layer of a batch: waits for reads, and brings the layer back into the budget. `complete`: the batch was not
    // broken off, so each layer must have asked for its experts since begin(). After an interrupted one it is reset(): what was
    // being read is not read.
    void finish(bool complete);

    // Forgets the sequence and drops every expert; counters stay.
    void reset();

    // The caches and the running means as they are now; resume() brings them back, and memory after them, also into another
    // hook. Counters stay. False: the caches are of another size or eviction.
    std::vector<CachedRouter> save();
    bool                      resume(const std::vector<CachedRouter> & saved);

    // Starts (or ends) a trace, from an empty cache. The caller takes records from trace_buffer().
    void          trace(bool on);
    TraceBuffer * trace_buffer() { return trace_.get(); }

    // From now on up to `n` experts are read before their layer chooses, and layers that speculate do; n = 0: only those.
    void prefetch(int n, Prediction prediction);

    // From now on, while a layer computes on a prompt, the experts that the next one will surely need are read, up to `limit` bytes
    // of them; 0: none.
    void read_ahead(uint64_t limit, const Prediction & prediction);

    // From now on every sequence starts with all experts in the caches: they are in memory as long as the model is. False, and nothing
    // has changed: there is a store, or a cache has no room for all.
    bool hold_all();

    // From now on the caches hold `capacity` experts of each layer, at least K, or as much more or less in each as they had at the
    // beginning. What no longer fits leaves before the next layer chooses, or with settle_capacity(). Any thread.
    void set_capacity(int capacity) { wanted_capacity_.store(capacity, std::memory_order_relaxed); }
    void settle_capacity(); // at once; while nothing computes

    // Brings experts of a layer, at most its capacity, into memory before a sequence starts; the last is the most recent.
    void warm(int layer, const std::vector<int32_t> & ids);

    std::vector<CachedRouter> & routers() { return routers_; }
    Store *                     store() { return residency_.store(); }
    const Store *               store() const { return residency_.store(); }
    const Counters &            counters(Phase phase) const { return counters_[int(phase)]; } // of the store and the hook itself
    const std::string &         error() const { return error_.empty() ? source_.error() : error_; }

  private:
    void guarded_select(const ExpertEvent & event);
    void select(const ExpertEvent & event);
    int  layer_of(const ExpertEvent & event);
    uint32_t token_of(const ExpertEvent & event, int t) const;
    const Mask * allowed(int layer, const ExpertEvent & event);
    void choose(int layer, const ExpertEvent & event, int t, const Mask * allowed, const std::vector<int32_t> * speculated);
    void reweight(const ExpertEvent & event);
    void apply_capacity(int computing);
    void end_reads();             // waits for them, and brings the layer back into the budget
    void fill();                  // the caches, where hold_all() was called
    void count();                 // what the store did since the last call, for the phase
    template <typename F> void keep_error(F f);

    ExpertHook                   hook_;
    std::vector<int>             layer_of_;
    std::vector<CachedRouter>    routers_;
    ScoreSource                  source_;
    PromptRouter                 prompt_router_;
    Residency                    residency_;
    Progress                     progress_;
    Interrupt *                  interrupt_ = nullptr;
    std::unique_ptr<Prefetch>    prefetch_; // null: off
    std::unique_ptr<ReadAhead>   ahead_;    // null: off
    std::unique_ptr<TraceBuffer> trace_;    // null: off
    Phase                        phase_ = Phase::prefill;
    Counters                     counters_[2] = {};
    Counters                     counted_{}; // of the store, by now
    std::string                  error_;
    bool                         holds_all_ = false;
    const std::vector<int>       capacities_; // [layer] at the beginning
    const int                    first_capacity_; // of the budget they were made for
    int                          capacity_; // as it was asked for last
    std::atomic<int>             wanted_capacity_;

    uint32_t sequence_    = 0;
    uint32_t batch_first_ = 0, batch_size_ = 0; // tokens of the sequence before this micro-batch, and in it

    Mask                 needed_, before_;
    std::vector<uint8_t> n_run_; // of the last event, per token: slots that run
    std::vector<uint8_t> asked_; // [layer] 0/1 since begin(); empty before
};

} // namespace cacheroute
