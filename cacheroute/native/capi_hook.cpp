// The C interface of the live hook and of what is saved of it: unpacks arguments, turns exceptions into sentences. Decides nothing.
#include "capi.h"

#include "checkpoint.h"
#include "progress.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

using namespace cacheroute;

struct cr_hook {
    Hook        hook;
    std::string error = {}; // of a call, not of a batch
};

struct cr_checkpoint {
    std::vector<CachedRouter> routers;
};

namespace {

// Whether f ran to its end; what stopped it is then the hook's error.
template <typename F> bool attempt(cr_hook * hook, F f) {
    try {
        f(hook->hook);
        return true;
    } catch (const std::exception & e) {
        hook->error = sentence(e);
        return false;
    }
}

} // namespace

cr_hook * cr_hook_new(const cr_shape * shape, const cr_routing * routing, const int32_t * layer_of, int32_t n_il, cr_store * store,
                      char * error, int32_t error_size) {
    std::unique_ptr<Store> owned;
    if (store) owned = std::move(store->store);
    delete store;
    return guarded(error, error_size, [&] {
        if (shape->eviction == int32_t(Eviction::belady)) throw std::runtime_error("belady needs the future, it cannot run live");
        bool reweights = false;
        for (int32_t l = 0; l < shape->n_layers; l++) {
            const auto s = Strategy(routing[l].strategy);
            reweights    = reweights || s == Strategy::pruning || s == Strategy::drop_cold || s == Strategy::dynamic_k;
        }
        return new cr_hook{Hook({layer_of, layer_of + n_il}, make_routers(*shape, routing), shape->capacity, std::move(owned), reweights)};
    });
}

void         cr_hook_free(cr_hook * hook) { delete hook; }
const void * cr_hook_address(cr_hook * hook) { return hook->hook.address(); }
void         cr_hook_set_phase(cr_hook * hook, int32_t decode) { hook->hook.set_phase(decode ? Phase::decode : Phase::prefill); }
void         cr_hook_begin(cr_hook * hook, int64_t token) { hook->hook.begin(uint32_t(token)); }
void         cr_hook_begin_prompt(cr_hook * hook, int64_t token) { hook->hook.begin_prompt(uint32_t(token)); }
void         cr_hook_progress(const cr_hook * hook, cr_progress * out) { *out = hook->hook.progress(); }
void         cr_hook_set_policy(cr_hook * hook, cr_policy policy, void * user) { set_policies(hook->hook.routers(), policy, user); }

void cr_hook_set_interrupt(cr_hook * hook, cr_interrupt * interrupt) {
    hook->hook.set_interrupt(interrupt ? &interrupt->interrupt : nullptr);
}

void cr_hook_finish(cr_hook * hook, int32_t complete) {
    attempt(hook, [complete](Hook & h) { h.finish(complete != 0); });
}

void cr_hook_reset(cr_hook * hook) {
    hook->error.clear();
    attempt(hook, [](Hook & h) { h.reset(); });
}

void cr_hook_trace(cr_hook * hook, int32_t on) {
    attempt(hook, [on](Hook & h) { h.trace(on != 0); });
}

int32_t cr_hook_hold_all(cr_hook * hook) {
    bool held = false;
    return attempt(hook, [&](Hook & h) { held = h.hold_all(); }) && held ? 0 : -1;
}

void cr_hook_set_capacity(cr_hook * hook, int32_t capacity) { hook->hook.set_capacity(capacity); }

void cr_hook_settle_capacity(cr_hook * hook) {
    attempt(hook, [](Hook & h) { h.settle_capacity(); });
}

void cr_hook_warm(cr_hook * hook, int32_t layer, const int32_t * experts, int32_t n) {
    attempt(hook, [=](Hook & h) { h.warm(layer, ids(experts, n)); });
}

cr_checkpoint * cr_hook_save(cr_hook * hook) {
    cr_checkpoint * saved = nullptr;
    attempt(hook, [&](Hook & h) { saved = new cr_checkpoint{h.save()}; });
    return saved;
}

int32_t cr_hook_resume(cr_hook * hook, const cr_checkpoint * checkpoint) {
    bool fits = false;
    return attempt(hook, [&](Hook & h) { fits = h.resume(checkpoint->routers); }) && fits;
}

void cr_checkpoint_free(cr_checkpoint * checkpoint) { delete checkpoint; }

uint64_t cr_checkpoint_bytes(const cr_checkpoint * checkpoint, uint8_t * out, uint64_t size) try {
    const std::vector<uint8_t> bytes = to_bytes(checkpoint->routers);
    if (out && size >= bytes.size()) std::copy(bytes.begin(), bytes.end(), out);
    return bytes.size();
} catch (const std::exception &) {
    return 0;
}

cr_checkpoint * cr_checkpoint_from(const uint8_t * bytes, uint64_t size, char * error, int32_t error_size) {
    return guarded(error, error_size, [&] { return new cr_checkpoint{from_bytes(bytes, size_t(size))}; });
}

void cr_hook_force(cr_hook * hook, int32_t layer, int64_t n_tokens, const uint16_t * z, const uint16_t * mass,
                   const uint16_t * predicted) {
    attempt(hook, [=](Hook & h) {
        ForcedScores forced;
        forced.n_expert = h.routers()[size_t(layer)].cache().resident().size();
        const size_t n  = size_t(n_tokens) * forced.n_expert;
        if (n) forced.z.assign(z, z + n);
        if (n && mass) forced.mass.assign(mass, mass + n);
        if (n && predicted) forced.predicted.assign(predicted, predicted + n);
        h.force(layer, std::move(forced));
    });
}

static Prediction make_prediction(Hook & h, int32_t n_embd, const cr_router_weights * layers) {
    std::vector<RouterWeights> weights;
    for (size_t l = 0; l < h.routers().size(); l++) weights.push_back({layers[l].weight, layers[l].bias, layers[l].norm, layers[l].selection_bias});
    return Prediction(int(h.routers()[0].cache().resident().size()), n_embd, std::move(weights));
}

void cr_hook_prefetch(cr_hook * hook, int32_t n, int32_t n_embd, const cr_router_weights * layers) {
    attempt(hook, [=](Hook & h) { h.prefetch(n, make_prediction(h, n_embd, layers)); });
}

void cr_hook_read_ahead(cr_hook * hook, uint64_t limit, int32_t n_embd, const cr_router_weights * layers) {
    attempt(hook, [=](Hook & h) { h.read_ahead(limit, make_prediction(h, n_embd, layers)); });
}

uint64_t cr_hook_trace_take(cr_hook * hook, uint8_t * out, uint64_t size) {
    TraceBuffer * trace = hook->hook.trace_buffer();
    if (!trace) return 0;
    const uint64_t n = trace->bytes.size();
    if (out && size >= n) {
        std::copy(trace->bytes.begin(), trace->bytes.end(), out);
        trace->bytes.clear();
    }
    return n;
}

const char * cr_hook_error(const cr_hook * hook) { return (hook->error.empty() ? hook->hook.error() : hook->error).c_str(); }

void cr_hook_set_pace(cr_hook * hook, double bytes_per_second) {
    if (hook->hook.store()) hook->hook.store()->set_pace(bytes_per_second);
}

void cr_hook_counters(cr_hook * hook, int32_t layer, int32_t prefill, cr_counters * out) {
    sum_counters(hook->hook.routers(), layer, prefill, *out);
    if (layer < 0) *out += hook->hook.counters(prefill ? Phase::prefill : Phase::decode); // the store does not count by layer
}

void cr_hook_resident(cr_hook * hook, int32_t layer, uint8_t * mask) {
    const auto & resident = hook->hook.routers()[size_t(layer)].cache().resident();
    std::copy(resident.begin(), resident.end(), mask);
}

uint64_t cr_hook_resident_bytes(const cr_hook * hook) {
    auto * store = const_cast<cr_hook *>(hook)->hook.store();
    return store ? store->resident_bytes() : 0;
}

uint64_t cr_hook_peak_bytes(const cr_hook * hook) {
    auto * store = const_cast<cr_hook *>(hook)->hook.store();
    return store ? store->peak_bytes() : 0;
}

uint64_t cr_hook_measure_resident(const cr_hook * hook) {
    auto * store = const_cast<cr_hook *>(hook)->hook.store();
    return store ? store->measure_resident() : 0;
}
