#include "residency.h"

#include <algorithm>
#include <utility>

namespace cacheroute {

Residency::Residency(std::unique_ptr<Store> store, int n_layers, int n_expert)
    : store_(std::move(store)), in_memory_(size_t(n_layers), Mask(size_t(n_expert), 0)) {}

void Residency::require(int layer, const Mask & needed, const Mask & cached) {
    if (!store_) return;
    if (over_ >= 0 && over_ != layer) finish();
    over_   = -1;
    wanted_ = cached;
    for (size_t e = 0; e < needed.size(); e++) {
        if (needed[e] && !cached[e]) {
            wanted_[e] = 1;
            over_      = layer;
        }
    }
    if (over_ >= 0) over_cached_ = cached;
    exchange(layer, wanted_, &needed);
}

// `needed`: what is computed on next, or null.
void Residency::exchange(int layer, const Mask & wanted, const Mask * needed) {
    Mask & in_memory = in_memory_[size_t(layer)];
    const bool look = needed && store_->under_pressure();
    load_.clear();
    evict_.clear();
    hits_.clear();
    for (int32_t e = 0; e < int32_t(wanted.size()); e++) {
        if (wanted[size_t(e)] && !in_memory[size_t(e)]) load_.push_back(e);
        if (!wanted[size_t(e)] && in_memory[size_t(e)]) evict_.push_back(e);
        if (look && (*needed)[size_t(e)] && in_memory[size_t(e)]) hits_.push_back(e);
    }
    in_memory = wanted;
    if (load_.empty() && evict_.empty() && hits_.empty() && !store_->prefetching()) return;
    store_->exchange(layer, load_, evict_, hits_);
}

void Residency::prefetch(int layer, const std::vector<int32_t> & experts) {
    if (!store_) return;
    load_.clear();
    for (int32_t e : experts) { // one may be on its way already: a batch was broken off before its layer's turn
        if (!std::exchange(in_memory_[size_t(layer)][size_t(e)], uint8_t(1))) load_.push_back(e);
    }
    if (!load_.empty()) store_->prefetch(layer, load_);
}

void Residency::finish() {
    if (!store_) return;
    if (over_ >= 0) return follow(std::exchange(over_, -1), over_cached_);
    store_->finish();
}

void Residency::follow(int layer, const Mask & cached) {
    if (!store_) return;
    exchange(layer, cached, nullptr);
    store_->finish();
}

void Residency::clear() {
    for (Mask & m : in_memory_) std::fill(m.begin(), m.end(), uint8_t(0));
    over_ = -1;
    if (store_) store_->clear();
}

} // namespace cacheroute
