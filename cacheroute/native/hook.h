// The hook: what llama.cpp calls where a MoE layer chooses its experts. Asks the router, has the store begin to make the
// chosen experts resident, returns the ids; the layer's matmuls then ask the store itself. Holds no policy of its own.
#pragma once

#include "cached_router.h"
#include "next_router.h"
#include "store.h"
#include "trace.h"

#include <memory>
#include <string>
#include <vector>

namespace cacheroute {

// Mirrors llama_expert_event of patches/0001-expert-selection-hook.patch, member for member.
struct ExpertEvent {
    int32_t       il;
    int32_t       gating;
    int32_t       n_expert;
    int32_t       n_used;
    int32_t       n_tokens;
    const float * scores;
    const float * probs;
    int32_t     * ids;
    float       * weights;
    const float * hidden;
    int32_t       n_embd;
};

// Mirrors ggml_expert_source of patches/0005-wait-for-experts.patch.
struct ExpertSource {
    const void * (*find)(void * user_data, const void * expert, bool late);
    void * user_data;
};

// Mirrors llama_expert_hook.
struct ExpertHook {
    void (*select)(void * user_data, const ExpertEvent * event);
    void (*reweight)(void * user_data, const ExpertEvent * event);
    void * user_data;
    ExpertSource source;
};

// Scores that stand for a model's own, half precision, one row of E for each token of a sequence; none: the model's are used.
struct ForcedScores {
    std::vector<uint16_t> z, mass; // mass empty: softmax(z)
    std::vector<uint16_t> guess;   // what stands for the next router's opinion of them; empty: nothing is read ahead
};

class Hook {
  public:
    // layer_of[il]: index into `routers` and the store's layers, -1 for a layer without experts of ours.
    Hook(std::vector<int> layer_of, std::vector<CachedRouter> routers, std::unique_ptr<Store> store, bool reweights);

    // llama.cpp keeps the address
    Hook(const Hook &)             = delete;
    Hook & operator=(const Hook &) = delete;

    ExpertHook * address() { return &hook_; }

    void set_phase(Phase phase) { phase_ = phase; }

    // The next batch begins with that token of the sequence; without a word it goes on where the last one ended.
    void set_position(uint32_t token) {
        batch_first_ = token;
        batch_size_  = 0;
    }

    // What a layer ranks from now on, in place of the model's own scores. Gate weights stay the model's.
    void force(int layer, ForcedScores scores) { forced_[layer] = std::move(scores); }

    // After the last layer of a batch: waits for reads, and brings the layer back into the budget.
    void finish();

    // Forgets the sequence and drops every expert; counters stay.
    void reset();

    // The caches and the running means as they are now; resume() brings them back, and memory after them, also into another
    // hook. Counters go on. False: the caches are of another size or eviction.
    std::vector<CachedRouter> save();
    bool                      resume(const std::vector<CachedRouter> & saved);

    // Starts (or ends) a trace, from an empty cache. Records are the caller's to take from trace_buffer().
    void          trace(bool on);
    TraceBuffer * trace_buffer() { return trace_.get(); }

    // From now on, while a layer computes on a decoded token, up to n experts are read that the next layer would miss if its
    // router were given this layer's hidden state. What is chosen is the same with and without. n = 0: none.
    void prefetch(int n, NextRouter routers) {
        n_ahead_ = n;
        next_    = std::make_unique<NextRouter>(std::move(routers));
    }

    // Brings experts of a layer, at most its capacity, into memory before a sequence starts; the last is the most recent.
    void warm(int layer, const std::vector<int32_t> & ids);

    std::vector<CachedRouter> & routers() { return routers_; }
    Store *                     store() { return store_.get(); }
    const StoreCounters &       reads(Phase phase) const { return reads_[int(phase)]; }
    uint64_t                    own_ns(Phase phase) const { return own_ns_[int(phase)]; } // in select(), without waits for the store
    const std::string &         error() const { return error_; }

  private:
    void timed_select(const ExpertEvent & event);
    void select(const ExpertEvent & event);
    void reweight(const ExpertEvent & event);
    bool read_forced(int layer, uint32_t token); // fills scores_; false: there is no such row
    void look_ahead(int layer, uint32_t token, const ExpertEvent & event);
    void wait();
    void count();             // what the store did since the last call, for the phase
    void follow_cache(int layer); // memory holds what the cache says

    ExpertHook                        hook_;
    std::vector<int>                  layer_of_;
    std::vector<CachedRouter>         routers_;
    std::unique_ptr<Store>            store_;
    std::vector<std::vector<uint8_t>> in_memory_; // [layer][E] what the store holds: the cache, and a batch's overflow
    std::vector<ForcedScores>         forced_;    // [layer]
    std::vector<uint8_t>              n_run_;     // of the last event, per token: slots that run
    Phase                             phase_      = Phase::prefill;
    int                               over_layer_ = -1; // layer whose batch needed more experts than its budget
    StoreCounters                     reads_[2], seen_;
    uint64_t                          own_ns_[2] = {};
    std::string                       error_;

    Scores               scores_;
    std::vector<uint8_t> needed_, before_;

    std::unique_ptr<TraceBuffer> trace_; // null: nobody traces
    uint32_t sequence_    = 0;
    uint32_t batch_first_ = 0, batch_size_ = 0; // tokens of the sequence before this micro-batch, and in it
    std::vector<int32_t> load_, evict_;

    int                         n_ahead_     = 0;
    int                         ahead_layer_ = -1; // whose experts are being read ahead
    std::unique_ptr<NextRouter> next_;
    Scores                      guess_;
};

} // namespace cacheroute
