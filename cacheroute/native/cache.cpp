#include "cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace cacheroute {

static constexpr double SCORE_RATE = 0.1; // a of the running mean

ExpertCache::ExpertCache(int n_expert, int capacity, Eviction eviction)
    : capacity_(capacity), eviction_(eviction), resident_(n_expert), last_use_(n_expert), n_uses_(n_expert),
      score_(n_expert), next_use_(n_expert) {}

void ExpertCache::reset() {
    std::fill(resident_.begin(), resident_.end(), 0);
    std::fill(last_use_.begin(), last_use_.end(), 0);
    std::fill(n_uses_.begin(), n_uses_.end(), 0);
    std::fill(score_.begin(), score_.end(), 0.0);
    clock_ = 0;
    size_  = 0;
}

void ExpertCache::observe(const std::vector<double> & z) {
    if (eviction_ != Eviction::score) return;
    double lo = std::numeric_limits<double>::infinity(), hi = -lo;
    for (double v : z) {
        if (std::isfinite(v)) {
            lo = std::min(lo, v);
            hi = std::max(hi, v);
        }
    }
    if (!(hi > lo)) return;
    for (size_t e = 0; e < z.size(); e++) {
        const double normalised = std::isfinite(z[e]) ? (z[e] - lo) / (hi - lo) : 0.0;
        score_[e] += SCORE_RATE * (normalised - score_[e]);
    }
}

void ExpertCache::touch(int32_t expert) {
    last_use_[expert] = ++clock_;
    n_uses_[expert]++;
    size_ += !resident_[expert];
    resident_[expert] = 1;
}

bool ExpertCache::goes_before(int32_t a, int32_t b, bool by_recency) const {
    if (eviction_ == Eviction::belady && next_use_[a] != next_use_[b]) return next_use_[a] > next_use_[b];
    if (!by_recency && eviction_ == Eviction::score && score_[a] != score_[b]) return score_[a] < score_[b];
    if (!by_recency && eviction_ == Eviction::lfu && n_uses_[a] != n_uses_[b]) return n_uses_[a] < n_uses_[b];
    return last_use_[a] < last_use_[b]; // distinct: every touch has its own time
}

void ExpertCache::trim(const std::vector<int32_t> & keep, bool by_recency, std::vector<int32_t> & out) {
    while (size_ > capacity_) {
        int32_t victim = -1;
        for (int32_t e = 0; e < int32_t(resident_.size()); e++) {
            if (!resident_[e] || std::find(keep.begin(), keep.end(), e) != keep.end()) continue;
            if (victim < 0 || goes_before(e, victim, by_recency)) victim = e;
        }
        if (victim < 0) return; // capacity >= K is checked where caches are made
        resident_[victim] = 0;
        size_--;
        out.push_back(victim);
    }
}

} // namespace cacheroute
