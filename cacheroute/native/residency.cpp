#include "residency.h"

#include <algorithm>
#include <utility>

namespace cacheroute {

Residency::Residency(std::unique_ptr<Store> store, int n_layers, int n_expert)
    : store_(std::move(store)), in_memory_(size_t(n_layers), Mask(size_t(n_expert), 0)) {}

void Residency::require(int layer, const Mask & needed, const Mask & cached, bool more) {
    if (!store_) return;
    if (over_ >= 0 && over_ != layer) release(over_, over_cached_);
    if (ahead_ == layer) ahead_ = -1;
    over_   = -1;
    wanted_ = cached;
    for (size_t e = 0; e < needed.size(); e++) {
        if (needed[e] && !cached[e]) {
            wanted_[e] = 1;
            over_      = layer;
        }
    }
    if (over_ >= 0) over_cached_ = cached;
    exchange(layer, wanted_, more);
}

void Residency::settle() {
    if (store_) store_->trim();
}

// Of a layer that has been computed; what takes its memory is admitted before settle().
void Residency::release(int layer, const Mask & cached) {
    Mask & in_memory = in_memory_[size_t(layer)];
    evict_.clear();
    for (int32_t e = 0; e < int32_t(cached.size()); e++) {
        if (in_memory[size_t(e)] && !cached[size_t(e)]) evict_.push_back(e);
    }
    in_memory = cached;
    store_->release(layer, evict_);
}

void Residency::exchange(int layer, const Mask & wanted, bool more) {
    Mask & in_memory = in_memory_[size_t(layer)];
    load_.clear();
    evict_.clear();
    for (int32_t e = 0; e < int32_t(wanted.size()); e++) {
        if (wanted[size_t(e)] && !in_memory[size_t(e)]) load_.push_back(e);
        if (!wanted[size_t(e)] && in_memory[size_t(e)]) evict_.push_back(e);
    }
    in_memory = wanted;
    if (load_.empty() && evict_.empty() && !store_->prefetching()) return;
    store_->exchange(layer, load_, evict_, more);
}

void Residency::prefetch(int layer, const std::vector<int32_t> & experts, Urgency urgency) {
    if (!store_) return;
    if (ahead_ != layer) {
        ahead_        = layer;
        ahead_cached_ = in_memory_[size_t(layer)];
    }
    load_.clear();
    for (int32_t e : experts) {
        if (!std::exchange(in_memory_[size_t(layer)][size_t(e)], uint8_t(1))) load_.push_back(e);
    }
    if (!load_.empty()) store_->prefetch(layer, load_, urgency);
}

void Residency::shrink(int layer, const Mask & cached) {
    if (!store_) return;
    store_->keep_no_room();
    if (layer == over_) {
        over_cached_ = cached;
    } else if (layer == ahead_) {
        for (size_t e = 0; e < cached.size(); e++) ahead_cached_[e] = ahead_cached_[e] && cached[e];
    } else {
        release(layer, cached);
    }
}

void Residency::finish() {
    if (!store_) return;
    if (ahead_ >= 0) exchange(std::exchange(ahead_, -1), ahead_cached_);
    if (over_ >= 0) exchange(std::exchange(over_, -1), over_cached_);
    store_->finish();
}

void Residency::follow(int layer, const Mask & cached) {
    if (!store_) return;
    exchange(layer, cached);
    store_->finish();
}

void Residency::clear() {
    for (Mask & m : in_memory_) std::fill(m.begin(), m.end(), uint8_t(0));
    over_ = ahead_ = -1;
    if (store_) store_->clear();
}

} // namespace cacheroute
