#include "hook.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>
#include <utility>

namespace cacheroute {

// llama_expert_gating_func_type of llama.cpp
static constexpr int32_t GATING_SOFTMAX        = 1;
static constexpr int32_t GATING_SOFTMAX_WEIGHT = 3; // softmax over the logits of the chosen

Hook::Hook(std::vector<int> layer_of, std::vector<CachedRouter> routers, std::unique_ptr<Store> store, bool reweights)
    : layer_of_(std::move(layer_of)), routers_(std::move(routers)), store_(std::move(store)) {
    for (const auto & r : routers_) in_memory_.emplace_back(r.cache().resident().size(), 0);
    forced_.resize(routers_.size());
    hook_.user_data = this;
    hook_.select    = [](void * self, const ExpertEvent * event) { static_cast<Hook *>(self)->timed_select(*event); };
    hook_.reweight  = nullptr;
    hook_.source    = {nullptr, store_.get()};
    if (store_) {
        hook_.source.find = [](void * store, const void * expert, bool late) { return static_cast<Store *>(store)->find(expert, late); };
    }
    if (reweights) {
        hook_.reweight = [](void * self, const ExpertEvent * event) { static_cast<Hook *>(self)->reweight(*event); };
    }
}

// A softmax that nothing was added to: its logarithm is the router logits up to a constant. Masked experts are -inf.
static bool ranks_probabilities(const ExpertEvent & ev, const float * scores, const float * probs) {
    if (ev.gating != GATING_SOFTMAX) return false;
    if (ev.scores == ev.probs) return true;
    for (int e = 0; e < ev.n_expert; e++) {
        if (scores[e] != probs[e] && scores[e] != -std::numeric_limits<float>::infinity()) return false;
    }
    return true;
}

void Hook::timed_select(const ExpertEvent & ev) {
    using clock = std::chrono::steady_clock;
    const auto waited = [&] { return store_ ? store_->counters().read_ns : 0; };
    const auto start  = clock::now();
    const auto before = waited();
    select(ev);
    const auto all = std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - start).count();
    own_ns_[int(phase_)] += uint64_t(all) - std::min(uint64_t(all), waited() - before);
}

void Hook::select(const ExpertEvent & ev) {
    const int layer = ev.il >= 0 && ev.il < int(layer_of_.size()) ? layer_of_[ev.il] : -1;
    const bool ours = layer >= 0 && in_memory_[layer].size() == size_t(ev.n_expert) && routers_[layer].n_used() == ev.n_used;
    if (layer >= 0 && !ours && error_.empty()) {
        error_ = "layer " + std::to_string(ev.il) + " chose " + std::to_string(ev.n_used) + " of " +
                 std::to_string(ev.n_expert) + " experts, which is not what the file says";
    }
    n_run_.assign(ev.n_tokens, uint8_t(std::min(ev.n_used, 255)));
    if (ours) needed_.assign(ev.n_expert, 0);
    if (layer == 0) { // every token passes the first layer; of a prompt only the last ones pass the last
        batch_first_ += batch_size_;
        batch_size_   = uint32_t(ev.n_tokens);
    }

    for (int t = 0; t < ev.n_tokens; t++) {
        const float * probs  = ev.probs + size_t(t) * ev.n_expert;
        const float * scores = ev.scores ? ev.scores + size_t(t) * ev.n_expert : probs;
        int32_t *     ids    = ev.ids + size_t(t) * ev.n_used;
        scores_.fill(scores, probs, ev.n_expert, ranks_probabilities(ev, scores, probs), ev.gating == GATING_SOFTMAX_WEIGHT);
        if (!ours) { // a layer whose experts are not in the store: upstream's choice
            if (!ev.scores) continue;
            Selection top;
            Router(ev.n_expert, ev.n_used, Routing{}).select(scores_, std::vector<uint8_t>(ev.n_expert), true, top);
            std::copy(top.ids.begin(), top.ids.end(), ids);
            continue;
        }
        const uint32_t  token    = batch_first_ + batch_size_ - uint32_t(ev.n_tokens - t);
        const bool      forced   = !forced_[layer].z.empty() && read_forced(layer, token);
        const int32_t * dictated = ev.scores || forced ? nullptr : ids;
        if (trace_) {
            before_ = routers_[layer].cache().resident();
        }
        if (trace_ || routers_[layer].cache().goes_by_score()) {
            scores_.round_for_trace(ev.n_used, dictated);
        }
        const Event & event = routers_[layer].step(scores_, phase_, dictated);
        if (trace_) {
            const bool softmax = scores == probs && (ev.gating == GATING_SOFTMAX || ev.gating == GATING_SOFTMAX_WEIGHT);
            uint8_t    flags   = phase_ == Phase::decode ? TRACE_DECODE : 0;
            if (dictated) flags |= TRACE_DICTATED;
            if (forced ? forced_[layer].mass.empty() : softmax) flags |= TRACE_SOFTMAX_MASS;
            trace_->add(sequence_, token, layer, flags, scores_, before_, event.selection);
        }
        std::copy(event.selection.ids.begin(), event.selection.ids.end(), ids);
        n_run_[t] = uint8_t(event.selection.n_run);
        for (int32_t e : event.selection.ids) needed_[e] = 1;
    }
    if (!ours || !store_) return;

    if (over_layer_ >= 0 && over_layer_ != layer) finish();
    over_layer_ = -1;

    auto &       in_memory = in_memory_[layer];
    const auto & cached    = routers_[layer].cache().resident();
    load_.clear();
    evict_.clear();
    for (int32_t e = 0; e < ev.n_expert; e++) {
        if (needed_[e] && !in_memory[e]) load_.push_back(e);
        if (!needed_[e] && in_memory[e] && !cached[e]) evict_.push_back(e);
        if (needed_[e] && !cached[e]) over_layer_ = layer;
        in_memory[e] = needed_[e] || cached[e];
    }
    const bool guessed = std::exchange(ahead_layer_, -1) == layer;
    if (guessed || !load_.empty() || !evict_.empty()) store_->exchange(layer, load_, evict_);
    if (n_ahead_ && phase_ == Phase::decode && ev.n_tokens == 1) look_ahead(layer, batch_first_, ev);
    count();
}

void Hook::look_ahead(int layer, uint32_t token, const ExpertEvent & ev) {
    const size_t next = size_t(layer) + 1;
    if (next >= routers_.size() || ev.n_embd != next_->n_embd()) return;
    const ForcedScores & forced = forced_[next];
    const size_t         n = in_memory_[next].size(), row = size_t(token) * n;
    if (!forced.z.empty()) {
        if (row + n > forced.guess.size()) return;
        guess_.read_back(&forced.guess[row], nullptr, int(n));
    } else if (const auto * scores = next_->scores(layer, ev.hidden)) {
        guess_.fill(scores->data(), scores->data(), int(n), false, true);
    } else {
        return;
    }
    load_.clear();
    for (int32_t e : routers_[next].foresee(guess_)) {
        if (int(load_.size()) < n_ahead_) load_.push_back(e);
    }
    if (load_.empty()) return;
    ahead_layer_ = int(next);
    for (int32_t e : load_) in_memory_[next][e] = 1;
    store_->prefetch(int(next), load_);
}

bool Hook::read_forced(int layer, uint32_t token) {
    const ForcedScores & forced = forced_[layer];
    const size_t         n = in_memory_[layer].size(), row = size_t(token) * n;
    if (row >= forced.z.size() || std::isnan(from_half(forced.z[row]))) {
        if (error_.empty()) {
            error_ = "the scores to replay have no token " + std::to_string(token + 1) + " in layer " + std::to_string(layer);
        }
        return false;
    }
    scores_.read_back(&forced.z[row], forced.mass.empty() ? nullptr : &forced.mass[row], int(n));
    return true;
}

void Hook::count() {
    const StoreCounters now = store_->counters();
    StoreCounters &     sum = reads_[int(phase_)];
    sum.read_bytes += now.read_bytes - seen_.read_bytes;
    sum.reads      += now.reads - seen_.reads;
    sum.read_ns    += now.read_ns - seen_.read_ns;
    sum.evict_ns   += now.evict_ns - seen_.evict_ns;
    sum.ahead      += now.ahead - seen_.ahead;
    sum.ahead_used += now.ahead_used - seen_.ahead_used;
    seen_ = now;
}

void Hook::reweight(const ExpertEvent & ev) {
    const float none = ev.gating == GATING_SOFTMAX_WEIGHT ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (int t = 0; t < ev.n_tokens && t < int(n_run_.size()); t++) {
        for (int i = n_run_[t]; i < ev.n_used; i++) ev.weights[size_t(t) * ev.n_used + i] = none;
    }
}

void Hook::finish() {
    if (!store_) return;
    if (over_layer_ >= 0) return follow_cache(std::exchange(over_layer_, -1));
    wait();
    count();
}

// llama.cpp is C on the way up: no exception may pass through it.
void Hook::wait() {
    try {
        store_->finish();
    } catch (const std::exception & e) {
        if (error_.empty()) error_ = e.what();
    }
}

void Hook::trace(bool on) {
    reset();
    sequence_ = 0;
    trace_.reset(on ? new TraceBuffer : nullptr);
}

void Hook::warm(int layer, const std::vector<int32_t> & ids) {
    routers_[layer].warm(ids);
    follow_cache(layer);
}

void Hook::follow_cache(int layer) {
    const auto & cached    = routers_[layer].cache().resident();
    auto &       in_memory = in_memory_[layer];
    load_.clear();
    evict_.clear();
    for (int32_t e = 0; e < int32_t(cached.size()); e++) {
        if (cached[e] && !in_memory[e]) load_.push_back(e);
        if (!cached[e] && in_memory[e]) evict_.push_back(e);
        in_memory[e] = cached[e];
    }
    if (!store_) return;
    if (!load_.empty() || !evict_.empty()) store_->exchange(layer, load_, evict_);
    wait();
    count();
}

std::vector<CachedRouter> Hook::save() {
    finish();
    return routers_;
}

bool Hook::resume(const std::vector<CachedRouter> & saved) {
    if (saved.size() != routers_.size()) return false;
    finish();
    for (size_t i = 0; i < routers_.size(); i++) {
        if (!routers_[i].resume(saved[i])) return false;
    }
    for (size_t i = 0; i < routers_.size(); i++) follow_cache(int(i));
    return true;
}

void Hook::reset() {
    sequence_ += batch_first_ + batch_size_ > 0;
    batch_first_ = batch_size_ = 0;
    for (auto & r : routers_) r.reset();
    for (auto & m : in_memory_) std::fill(m.begin(), m.end(), 0);
    over_layer_ = ahead_layer_ = -1;
    if (store_) store_->clear();
}

} // namespace cacheroute
