#include "hook.h"

#include "sentence.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <numeric>
#include <utility>

namespace cacheroute {

static std::vector<int> capacities(const std::vector<CachedRouter> & routers) {
    std::vector<int> each;
    for (const CachedRouter & r : routers) each.push_back(r.cache().capacity());
    return each;
}

Hook::Hook(std::vector<int> layer_of, std::vector<CachedRouter> routers, int capacity, std::unique_ptr<Store> store, bool reweights)
    : layer_of_(std::move(layer_of)), routers_(std::move(routers)), source_(routers_.size()),
      prompt_router_(int(routers_.front().cache().resident().size()), routers_.front().n_used()),
      residency_(std::move(store), int(routers_.size()), int(routers_.front().cache().resident().size())),
      progress_(routers_.size(), routers_.front().cache().resident().size()), capacities_(capacities(routers_)),
      first_capacity_(capacity), capacity_(capacity), wanted_capacity_(capacity) {
    counted_ = residency_.counters(); // a store that was measured before has read already
    hook_ = {HOOK_VERSION, sizeof(ExpertHook), sizeof(ExpertEvent), nullptr, nullptr, this, {nullptr, residency_.store()}};
    hook_.select = [](void * self, const ExpertEvent * event) { static_cast<Hook *>(self)->guarded_select(*event); };
    if (residency_.store()) {
        hook_.source.find = [](void * store, const void * expert, bool late) { return static_cast<Store *>(store)->find(expert, late); };
    }
    if (reweights) {
        hook_.reweight = [](void * self, const ExpertEvent * event) { static_cast<Hook *>(self)->reweight(*event); };
    }
}

// llama.cpp is C on the way up: no exception may pass through it.
template <typename F> void Hook::keep_error(F f) {
    try {
        f();
    } catch (const std::exception & e) {
        if (error_.empty()) error_ = sentence(e);
    }
}

void Hook::guarded_select(const ExpertEvent & ev) {
    const auto   start  = Clock::now();
    const double waited = residency_.counters().read_seconds;
    keep_error([&] { select(ev); });
    counters_[int(phase_)].hook_seconds += std::max(0.0, seconds_since(start) - (residency_.counters().read_seconds - waited));
}

void Hook::select(const ExpertEvent & ev) {
    const int layer = layer_of(ev);
    n_run_.assign(size_t(ev.n_tokens), uint8_t(std::min(ev.n_used, 255)));
    if (layer < 0) return; // a layer that is not managed: the ids are the model's own
    if (!asked_.empty()) asked_[size_t(layer)] = 1;
    if (layer == 0) {      // every token passes the first layer; of a prompt only the last ones pass the last
        batch_first_ += batch_size_;
        batch_size_   = uint32_t(ev.n_tokens);
    }
    apply_capacity(layer);
    needed_.assign(size_t(ev.n_expert), 0);
    const Mask * keep_to = allowed(layer, ev);
    const bool prefetch   = prefetch_ && phase_ == Phase::decode && ev.n_tokens == 1;
    const auto speculated = prefetch ? prefetch_->speculated(layer) : nullptr;
    for (int t = 0; t < ev.n_tokens; t++) choose(layer, ev, t, keep_to, speculated);

    const bool ahead    = ahead_ && phase_ == Phase::prefill && ev.n_tokens > 1 && !keep_to; // else what is named is not what runs
    residency_.require(layer, needed_, routers_[size_t(layer)].cache().resident(), prefetch || ahead);
    if (interrupt_ && interrupt_->raised()) return; // finish() clears what is half done
    if (phase_ == Phase::prefill) counters_[int(phase_)].distinct_bytes += progress_.use(layer, needed_, store());
    progress_.chose(layer, batch_first_, batch_size_, store());
    if (prefetch) prefetch_->after(layer, batch_first_, ev, source_, routers_, residency_);
    if (ahead) ahead_->after(layer, ev, needed_, source_, residency_, int(routers_.size()));
    residency_.settle();
    count();
}

int Hook::layer_of(const ExpertEvent & ev) {
    const int layer = ev.il >= 0 && ev.il < int(layer_of_.size()) ? layer_of_[size_t(ev.il)] : -1;
    if (layer < 0) return -1;
    const CachedRouter & router = routers_[size_t(layer)];
    if (router.cache().resident().size() == size_t(ev.n_expert) && router.n_used() == ev.n_used) return layer;
    if (error_.empty()) {
        error_ = "layer " + std::to_string(ev.il) + " chose " + std::to_string(ev.n_used) + " of " + std::to_string(ev.n_expert) +
                 " experts, which is not what the file says";
    }
    return -1;
}

// The t-th token of an event as a token of its sequence.
uint32_t Hook::token_of(const ExpertEvent & ev, int t) const { return batch_first_ + batch_size_ - uint32_t(ev.n_tokens - t); }

// The experts that the tokens of a prompt's batch may run in a layer; null: all, which costs no look at the batch.
const Mask * Hook::allowed(int layer, const ExpertEvent & ev) {
    const CachedRouter & router  = routers_[size_t(layer)];
    const Routing &      routing = router.routing();
    if (phase_ == Phase::decode || routing.prompt_cover >= 1.0) return nullptr;
    prompt_router_.begin();
    for (int t = 0; t < ev.n_tokens; t++) {
        const auto from = source_.get(layer, token_of(ev, t), ev, t);
        if (from.prescribed) return nullptr;
        prompt_router_.add(from.scores, from.model_ids, t >= ev.n_tokens - routing.prompt_last);
    }
    return &prompt_router_.allowed(router.cache().resident(), routing.prompt_cover);
}

// Chooses for the t-th token of an event, and notes what must be in memory.
void Hook::choose(int layer, const ExpertEvent & ev, int t, const Mask * allowed, const std::vector<int32_t> * speculated) {
    const uint32_t token  = token_of(ev, t);
    CachedRouter & router = routers_[size_t(layer)];
    const auto     from   = source_.get(layer, token, ev, t);
    if (trace_) before_ = router.cache().resident();
    if (trace_ || router.cache().goes_by_score()) source_.scores().round_for_trace(ev.n_used, from.model_ids, from.prescribed);

    const Selection & chosen = router.step(from.scores, phase_, from.model_ids, from.prescribed, allowed, speculated).selection;
    if (trace_) {
        const int flags = (phase_ == Phase::decode ? TRACE_DECODE : 0) | (from.prescribed ? TRACE_PRESCRIBED : 0) |
                          (from.softmax_mass ? TRACE_SOFTMAX_MASS : 0) | (t == 0 ? TRACE_BATCH : 0);
        trace_->add(sequence_, token, layer, uint8_t(flags), from.scores, before_, chosen);
    }
    std::copy(chosen.ids.begin(), chosen.ids.end(), ev.ids + size_t(t) * size_t(ev.n_used));
    n_run_[size_t(t)] = uint8_t(chosen.n_run);
    for (int32_t e : chosen.ids) needed_[size_t(e)] = 1;
}

void Hook::count() {
    const Counters now = residency_.counters();
    Counters &     sum = counters_[int(phase_)];
    sum += now;
    sum -= counted_;
    counted_ = now;
}

void Hook::reweight(const ExpertEvent & ev) {
    const float none = ev.gating == GATING_SOFTMAX_WEIGHT ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (size_t t = 0; t < size_t(ev.n_tokens) && t < n_run_.size(); t++) {
        for (int i = n_run_[t]; i < ev.n_used; i++) ev.weights[t * size_t(ev.n_used) + size_t(i)] = none;
    }
}

void Hook::finish(bool complete) {
    if (store()) store()->set_interrupt(nullptr);
    if (interrupt_ && interrupt_->raised()) return reset();
    end_reads();
    if (complete) progress_.computed(batch_first_, batch_size_);
    // of a batch that wants no output the last layer may have nothing to do
    const auto last   = asked_.empty() ? asked_.end() : asked_.end() - (asked_.size() > 1);
    const auto silent = std::find(asked_.begin(), last, 0);
    if (complete && silent != last && error_.empty()) {
        error_ = "MoE layer " + std::to_string(silent - asked_.begin()) +
                 " computed without asking which experts to run; models of this architecture cannot be routed";
    }
}

void Hook::trace(bool on) {
    reset();
    sequence_ = 0;
    trace_.reset(on ? new TraceBuffer : nullptr);
}

void Hook::prefetch(int n, Prediction prediction) {
    const bool speculates = std::any_of(routers_.begin(), routers_.end(), [](const CachedRouter & r) { return r.speculates(); });
    prefetch_.reset(n || speculates ? new Prefetch(n, std::move(prediction)) : nullptr);
}

void Hook::read_ahead(uint64_t limit, const Prediction & prediction) {
    if (!limit) return ahead_.reset();
    if (!ahead_) ahead_.reset(new ReadAhead(prediction, routers_.front().n_used()));
    ahead_->set_limit(limit);
}

// `computing`: the layer that chooses now, whose memory follows its cache in require(); -1: none.
void Hook::apply_capacity(int computing) {
    const int wanted = wanted_capacity_.load(std::memory_order_relaxed);
    if (wanted == capacity_ || holds_all_) return;
    capacity_ = wanted;
    std::vector<int>     own;
    std::vector<int64_t> bytes; // of an expert; layers may have experts of several sizes
    int64_t              over = 0;
    for (size_t l = 0; l < routers_.size(); l++) {
        bytes.push_back(int64_t(std::max<uint64_t>(residency_.expert_bytes(int(l)), 1)));
        const int64_t n_expert = int64_t(routers_[l].cache().resident().size());
        const int64_t scaled   = int64_t(capacities_[l]) * wanted / first_capacity_;
        own.push_back(int(std::min(std::max<int64_t>(scaled, routers_[l].n_used()), n_expert)));
        over += (own.back() - wanted) * bytes.back();
    }
    while (over > 0) { // layers that cannot have fewer than K take from the largest
        const size_t most = size_t(std::max_element(own.begin(), own.end()) - own.begin());
        if (own[most] <= routers_[most].n_used()) break;
        own[most]--;
        over -= bytes[most];
    }
    for (size_t l = 0; l < routers_.size(); l++) {
        routers_[l].set_capacity(own[l], phase_);
        if (int(l) != computing) residency_.shrink(int(l), routers_[l].cache().resident());
    }
}

void Hook::settle_capacity() {
    apply_capacity(-1);
    end_reads();
}

void Hook::end_reads() {
    keep_error([&] { residency_.finish(); });
    count();
}

bool Hook::hold_all() {
    for (const CachedRouter & r : routers_) {
        if (store() || r.cache().capacity() != int(r.cache().resident().size())) return false;
    }
    holds_all_ = true;
    fill();
    return true;
}

void Hook::fill() {
    if (!holds_all_) return;
    std::vector<int32_t> all(routers_.front().cache().resident().size());
    std::iota(all.begin(), all.end(), 0);
    for (CachedRouter & r : routers_) r.warm(all);
}

void Hook::warm(int layer, const std::vector<int32_t> & ids) {
    routers_[size_t(layer)].warm(ids);
    keep_error([&] { residency_.follow(layer, routers_[size_t(layer)].cache().resident()); });
    count();
}

std::vector<CachedRouter> Hook::save() {
    end_reads(); // not finish(): an interrupt may be raised for the next batch, and this one is whole
    return routers_;
}

bool Hook::resume(const std::vector<CachedRouter> & saved) {
    if (saved.size() != routers_.size()) return false;
    for (size_t i = 0; i < routers_.size(); i++) {
        if (!routers_[i].can_resume(saved[i])) return false;
    }
    finish(false);
    for (size_t i = 0; i < routers_.size(); i++) routers_[i].resume(saved[i]);
    fill();
    for (size_t i = 0; i < routers_.size(); i++) {
        keep_error([&] { residency_.follow(int(i), routers_[i].cache().resident()); });
    }
    count();
    return true;
}

void Hook::reset() {
    sequence_ += batch_first_ + batch_size_ > 0;
    batch_first_ = batch_size_ = 0;
    for (auto & r : routers_) r.reset();
    fill();
    residency_.clear();
    count();
    error_.clear();
    source_.clear_error();
}

} // namespace cacheroute
