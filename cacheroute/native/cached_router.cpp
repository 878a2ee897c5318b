#include "cached_router.h"

#include <algorithm>

namespace cacheroute {

CachedRouter::CachedRouter(int n_expert, int n_used, int capacity, const Routing & routing, Eviction eviction)
    : n_used_(n_used), router_(n_expert, n_used, routing), cache_(n_expert, n_used, capacity, eviction) {}

void CachedRouter::reset() {
    router_.reset();
    cache_.reset();
}

const std::vector<int32_t> & CachedRouter::predict(const Scores & scores) {
    Selection & sel = event_.selection;
    router_.select(scores, cache_.resident(), router_.custom(), nullptr, sel);
    return missing(sel.ids, sel.n_run);
}

const std::vector<int32_t> & CachedRouter::speculate(const Scores & predicted, std::vector<int32_t> & ids) {
    router_.speculate(predicted.z, cache_.resident(), ids);
    return missing(ids, n_used_ - router_.n_always());
}

// The first n of `ids` that are not in the cache.
const std::vector<int32_t> & CachedRouter::missing(const std::vector<int32_t> & ids, int n) {
    event_.missed.clear();
    for (int i = 0; i < n; i++) {
        if (!cache_.resident()[ids[i]]) event_.missed.push_back(ids[i]);
    }
    return event_.missed;
}

bool CachedRouter::can_resume(const CachedRouter & other) const {
    const ExpertCache & from = other.cache_;
    return from.eviction() == cache_.eviction() && from.resident().size() == cache_.resident().size() && other.n_used_ == n_used_;
}

bool CachedRouter::resume(const CachedRouter & other) {
    if (!can_resume(other)) return false;
    router_.resume(other.router_);
    cache_.resume(other.cache_);
    return true;
}

void CachedRouter::set_capacity(int capacity, Phase phase) {
    cache_.set_capacity(capacity);
    event_.evicted.clear();
    cache_.trim({}, phase == Phase::prefill, event_.evicted);
}

void CachedRouter::write(ByteWriter & out) const {
    router_.write(out);
    cache_.write(out);
}

void CachedRouter::read(ByteReader & in) {
    router_.read(in);
    cache_.read(in);
}

void CachedRouter::warm(const std::vector<int32_t> & ids) {
    for (int32_t e : ids) cache_.touch(e);
    event_.evicted.clear();
    cache_.trim({}, true, event_.evicted);
}

const Event & CachedRouter::step(const Scores & scores, Phase phase, const int32_t * model_ids, bool prescribed,
                                 const std::vector<uint8_t> * allowed, const std::vector<int32_t> * speculated) {
    const bool  prefill = phase == Phase::prefill;
    Selection & sel     = event_.selection;

    router_.observe(scores.z);
    cache_.observe(scores.traced.empty() ? scores.z : scores.traced);

    // 1, 2: choose by the cache before this token
    if (prescribed) {
        sel = Selection{{model_ids, model_ids + n_used_}, n_used_, 0, 0.0};
    } else {
        router_.select(scores, cache_.resident(), prefill, model_ids, sel, allowed, speculated);
    }

    // 3: count against that same cache
    run_.assign(sel.ids.begin(), sel.ids.begin() + sel.n_run);
    event_.missed.clear();
    for (int32_t e : run_) {
        if (!cache_.resident()[e]) event_.missed.push_back(e);
    }

    // 4: touch in ascending gate weight, so that the strongest is the most recent
    std::stable_sort(run_.begin(), run_.end(), [&](int32_t a, int32_t b) {
        return scores.mass[a] < scores.mass[b] || (scores.mass[a] == scores.mass[b] && a > b);
    });
    for (int32_t e : run_) cache_.touch(e);

    // 5: evict down to the capacity, never one of this token's
    event_.evicted.clear();
    cache_.trim(run_, prefill, event_.evicted);

    Counters & c = counters_[int(phase)];
    c.tokens++;
    c.examined  += n_used_;
    c.misses    += event_.missed.size();
    c.hits      += run_.size() - event_.missed.size();
    c.swapped   += sel.swapped;
    c.dropped   += n_used_ - sel.n_run;
    c.evictions += event_.evicted.size();
    c.held      += uint64_t(cache_.size());
    c.lost_mass += sel.lost_mass;
    return event_;
}

} // namespace cacheroute
