// The order of events for one token in one layer: mask, choice, count, touch, evict. This is the one piece of
// code that chooses experts; the live hook, the simulator and the tests all call it.
#pragma once

#include "cache.h"
#include "counters.h"
#include "router.h"

#include <cstdint>
#include <vector>

namespace cacheroute {

enum class Phase : int32_t { prefill = 0, decode = 1 };

// What one event did; valid until the next call.
struct Event {
    Selection            selection;
    std::vector<int32_t> missed;  // ids that must be read
    std::vector<int32_t> evicted; // ids that left the cache
};

// Router and cache of one layer. Not thread-safe.
class CachedRouter {
  public:
    // capacity >= n_used, else the caller has made a mistake.
    CachedRouter(int n_expert, int n_used, int capacity, const Routing & routing, Eviction eviction);

    // One token. In prefill the choice is `original` among the `allowed` ([E] 0/1; null: all), and the eviction is by recency.
    // `model_ids`, if not null, are the ids [K] that the model itself would run, best first; `prescribed`: they run under any
    // routing. `speculated`: see Router::select().
    const Event & step(const Scores & scores, Phase phase, const int32_t * model_ids = nullptr, bool prescribed = false,
                       const std::vector<uint8_t> * allowed = nullptr, const std::vector<int32_t> * speculated = nullptr);

    // What a decoded token of these scores would miss, best first. Changes nothing: a custom policy is not asked, `original` is.
    const std::vector<int32_t> & predict(const Scores & scores);

    // Router::speculate() by these predicted scores, for the next step(). Returns those of `ids` that are missing and will run: not
    // the last J, which the J best of the layer's own scores may replace. Only a masked expert and the guard can make that wrong.
    const std::vector<int32_t> & speculate(const Scores & predicted, std::vector<int32_t> & ids);

    // Puts experts into the cache, the last of them most recent: what a sequence starts with. At most `capacity` of them.
    void warm(const std::vector<int32_t> & ids);

    // Forgets the sequence: cache, running means. Counters stay.
    void reset();

    // Continues from the state of another: its cache and running means, under this one's routing and capacity. Counters stay.
    // false, and nothing has changed: it is of another E, K or eviction.
    bool resume(const CachedRouter & other);
    bool can_resume(const CachedRouter & other) const;

    // From now on at most so many experts stay in the cache; those above it leave at once, in a prompt by recency.
    void set_capacity(int capacity, Phase phase);

    // That state as bytes, and back into a router of the same sizes and eviction; read() throws std::runtime_error for a state
    // that cannot be.
    void write(ByteWriter & out) const;
    void read(ByteReader & in);

    const ExpertCache & cache() const { return cache_; }
    ExpertCache &       cache() { return cache_; }
    void                set_policy(Policy policy) { router_.set_policy(std::move(policy)); }
    Counters &          counters(Phase phase) { return counters_[int(phase)]; }
    int                 n_used() const { return n_used_; }
    bool                speculates() const { return router_.speculates(); }
    double              mean_range() const { return router_.mean_range(); }
    const Routing &     routing() const { return router_.routing(); }

  private:
    const std::vector<int32_t> & missing(const std::vector<int32_t> & ids, int n);

    const int   n_used_;
    Router      router_;
    ExpertCache cache_;
    Counters    counters_[2] = {};
    Event       event_;
    std::vector<int32_t> run_;
};

} // namespace cacheroute
