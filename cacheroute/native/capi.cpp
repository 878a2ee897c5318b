// The C interface: unpacks arguments, turns exceptions into sentences. Decides nothing.
#include "cacheroute.h"

#include "checkpoint.h"
#include "hook.h"
#include "interrupt.h"
#include "progress.h"
#include "sentence.h"
#include "system.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <utility>

using namespace cacheroute;

struct cr_router {
    std::vector<CachedRouter> layers;
    PromptRouter              prompt_router;
    Scores                    scores;
};

struct cr_store {
    std::unique_ptr<Store> store;
};

struct cr_hook {
    Hook        hook;
    std::string error = {}; // of a call, not of a batch
};

struct cr_guard {
    BusGuard guard;
};

struct cr_interrupt {
    Interrupt interrupt;
};

struct cr_checkpoint {
    std::vector<CachedRouter> routers;
};

namespace {

std::vector<CachedRouter> make_routers(const cr_shape & s, const cr_routing * routing) {
    if (s.n_layers < 1 || s.n_used < 1 || s.n_used > s.n_expert) throw std::runtime_error("the model's expert counts make no sense");
    if (s.eviction < 0 || s.eviction > int32_t(Eviction::soft_lfu)) throw std::runtime_error("there is no such eviction");
    std::vector<CachedRouter> layers;
    layers.reserve(size_t(s.n_layers));
    for (int32_t l = 0; l < s.n_layers; l++) {
        const cr_routing & r = routing[l];
        if (r.strategy < 0 || r.strategy > int32_t(Strategy::speculate)) throw std::runtime_error("there is no such routing");
        const Routing as{Strategy(r.strategy), r.k, r.m, std::max(r.j, 0), r.p, r.lambda, r.f, r.max_loss,
                         r.prompt_cover > 0 ? r.prompt_cover : 1.0, std::max(r.prompt_last, 0)};
        const int32_t capacity = r.experts ? r.experts : s.capacity;
        if (capacity < s.n_used || capacity > s.n_expert) {
            throw std::runtime_error("a cache of " + std::to_string(capacity) + " experts per layer is not within " +
                                     std::to_string(s.n_used) + ".." + std::to_string(s.n_expert));
        }
        layers.emplace_back(s.n_expert, s.n_used, capacity, as, Eviction(s.eviction));
    }
    return layers;
}

void write_error(const char * what, char * error, int32_t error_size) {
    if (error && error_size > 0) std::snprintf(error, size_t(error_size), "%s", what);
}

// What `make` returns, or null and its sentence in `error`.
template <typename F> auto guarded(char * error, int32_t error_size, F make) -> decltype(make()) {
    try {
        return make();
    } catch (const std::exception & e) {
        write_error(sentence(e), error, error_size);
        return nullptr;
    }
}

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

void sum_counters(std::vector<CachedRouter> & layers, int32_t layer, int32_t prefill, cr_counters & out) {
    const Phase phase = prefill ? Phase::prefill : Phase::decode;
    out               = cr_counters{};
    for (int32_t l = 0; l < int32_t(layers.size()); l++) {
        if (layer < 0 || l == layer) out += layers[size_t(l)].counters(phase);
    }
    if (layer < 0) out.tokens = layers[0].counters(phase).tokens;
}

void copy_ids(const std::vector<int32_t> & from, int32_t * to, int32_t * n) {
    if (to) std::copy(from.begin(), from.end(), to);
    if (n) *n = int32_t(from.size());
}

std::vector<ExpertTensor> expert_tensors(const cr_tensor * tensors, int32_t n_tensors) {
    std::vector<ExpertTensor> all;
    for (int32_t i = 0; i < n_tensors; i++) {
        const cr_tensor & t = tensors[i];
        all.push_back({t.layer, t.file, t.offset, t.expert_bytes, static_cast<uint8_t *>(const_cast<void *>(t.address))});
    }
    return all;
}

std::vector<int32_t> ids(const int32_t * from, int32_t n) { return {from, from + n}; }

// The experts that the prompt's batch that begins with row `first` may run; null: all.
const Mask * allowed(cr_router & router, const CachedRouter & layer, const ScoreRows & rows, const uint8_t * flags,
                     const int32_t * prescribed, size_t first) {
    const Routing & routing = layer.routing();
    if (routing.prompt_cover >= 1.0) return nullptr;
    size_t end = first + 1;
    while (end < rows.n && !(flags[end] & (TRACE_DECODE | TRACE_BATCH))) end++;
    router.prompt_router.begin();
    for (size_t i = first; i < end; i++) {
        if (prescribed && prescribed[i * size_t(layer.n_used())] >= 0) return nullptr;
        rows.read(i, router.scores);
        router.prompt_router.add(router.scores, nullptr, i + size_t(routing.prompt_last) >= end);
    }
    return &router.prompt_router.allowed(layer.cache().resident(), routing.prompt_cover);
}

void set_policies(std::vector<CachedRouter> & layers, cr_policy policy, void * user) {
    for (int32_t l = 0; l < int32_t(layers.size()); l++) {
        layers[size_t(l)].set_policy([=](const Scores & s, const std::vector<uint8_t> & resident, std::vector<int32_t> & chosen) {
            return policy(user, l, s.z.data(), s.mass.data(), resident.data(), chosen.data()) == 0;
        });
    }
}

// The cache of a layer as bits.
void pack(const Mask & mask, uint8_t * bits) {
    std::fill(bits, bits + (mask.size() + 7) / 8, uint8_t(0));
    for (size_t e = 0; e < mask.size(); e++) bits[e / 8] |= uint8_t(mask[e] << (e % 8));
}

} // namespace

int32_t cr_abi_matches(uint32_t version, uint32_t routing_bytes, uint32_t shape_bytes, uint32_t router_weights_bytes,
                       uint32_t counters_bytes, uint32_t tensor_bytes, uint32_t progress_bytes) {
    return version == CR_ABI_VERSION && routing_bytes == sizeof(cr_routing) && shape_bytes == sizeof(cr_shape) &&
           router_weights_bytes == sizeof(cr_router_weights) && counters_bytes == sizeof(cr_counters) &&
           tensor_bytes == sizeof(cr_tensor) && progress_bytes == sizeof(cr_progress);
}

static_assert(int(CR_DIRECT_READS) == int(os::DIRECT_READS) && int(CR_DROPS_CACHED) == int(os::DROPS_CACHED) && int(CR_MINCORE) == int(os::MINCORE),
              "cacheroute.h and system.h count alike");
uint32_t cr_system(void) { return os::abilities(); }

cr_router * cr_router_new(const cr_shape * shape, const cr_routing * routing, char * error, int32_t error_size) {
    return guarded(error, error_size, [&] { 
        return new cr_router{make_routers(*shape, routing), PromptRouter(shape->n_expert, shape->n_used), {}};
    });
}

void cr_router_free(cr_router * router) { delete router; }

int32_t cr_router_step(cr_router * router, int32_t layer, const double * z, const double * mass, int32_t prefill,
                       const int32_t * model_ids, int32_t prescribed, const double * predicted, int32_t * out_ids, int32_t * missed,
                       int32_t * n_missed, int32_t * evicted, int32_t * n_evicted) try {
    CachedRouter & r = router->layers[size_t(layer)];
    const size_t   n = r.cache().resident().size();
    router->scores.z.assign(z, z + n);
    router->scores.mass.assign(mass, mass + n);
    std::vector<int32_t> speculated;
    if (predicted) {
        Scores prediction;
        prediction.z.assign(predicted, predicted + n);
        r.speculate(prediction, speculated);
    }
    const Event & event = r.step(router->scores, prefill ? Phase::prefill : Phase::decode, model_ids, prescribed != 0, nullptr,
                                 predicted ? &speculated : nullptr);
    copy_ids(event.selection.ids, out_ids, nullptr);
    copy_ids(event.missed, missed, n_missed);
    copy_ids(event.evicted, evicted, n_evicted);
    return event.selection.n_run;
} catch (const std::exception &) {
    return -1;
}

int32_t cr_router_replay(cr_router * router, int32_t layer, int64_t n_events, const uint16_t * z, const uint16_t * mass,
                         const uint8_t * flags, const int32_t * prescribed, const int32_t * next_use, int32_t * out_ids,
                         uint8_t * out_resident) try {
    CachedRouter &  r = router->layers[size_t(layer)];
    const size_t    n = r.cache().resident().size(), k = size_t(r.n_used());
    const ScoreRows rows{z, mass, size_t(n_events), n};
    const Mask *    keep_to = nullptr;
    for (size_t i = 0; i < size_t(n_events); i++) {
        const bool decode = flags[i] & TRACE_DECODE;
        if (decode || (flags[i] & TRACE_BATCH) || i == 0) keep_to = decode ? nullptr : allowed(*router, r, rows, flags, prescribed, i);
        rows.read(i, router->scores);
        const int32_t * own = prescribed && prescribed[i * k] >= 0 ? prescribed + i * k : nullptr;
        for (size_t j = 0; own && next_use && j < k; j++) r.cache().set_next_use(own[j], next_use[i * k + j]);
        if (out_resident) pack(r.cache().resident(), out_resident + i * ((n + 7) / 8));
        const Event & event = r.step(router->scores, decode ? Phase::decode : Phase::prefill, own, own != nullptr, keep_to);
        if (out_ids) std::copy(event.selection.ids.begin(), event.selection.ids.end(), out_ids + i * k);
    }
    return 0;
} catch (const std::exception &) {
    return -1;
}

void cr_router_set_policy(cr_router * router, cr_policy policy, void * user) { set_policies(router->layers, policy, user); }

void cr_router_resident(const cr_router * router, int32_t layer, uint8_t * mask) {
    const auto & resident = router->layers[size_t(layer)].cache().resident();
    std::copy(resident.begin(), resident.end(), mask);
}

double cr_router_mean_range(const cr_router * router, int32_t layer) { return router->layers[size_t(layer)].mean_range(); }

void cr_router_counters(cr_router * router, int32_t layer, int32_t prefill, cr_counters * out) {
    sum_counters(router->layers, layer, prefill, *out);
}

void cr_router_reset(cr_router * router) {
    for (auto & layer : router->layers) layer.reset();
}

cr_store * cr_store_new(const char * const * files, int32_t n_files, const cr_tensor * tensors, int32_t n_tensors,
                        int32_t n_layers, int32_t n_expert, int32_t direct, char * error, int32_t error_size) {
    return guarded(error, error_size, [&] {
        const std::vector<std::string> names(files, files + n_files);
        const auto reading = direct ? Reading::direct : Reading::buffered;
        return new cr_store{std::make_unique<Store>(names, n_layers, n_expert, expert_tensors(tensors, n_tensors), reading)};
    });
}

void cr_store_free(cr_store * store) { delete store; }

int32_t cr_store_exchange(cr_store * store, int32_t layer, const int32_t * load, int32_t n_load, const int32_t * evict,
                          int32_t n_evict, char * error, int32_t error_size) try {
    store->store->exchange(layer, ids(load, n_load), ids(evict, n_evict));
    store->store->finish();
    return 0;
} catch (const std::exception & e) {
    write_error(sentence(e), error, error_size);
    return -1;
}

const void * cr_store_find(cr_store * store, const void * expert) {
    const void * there = store->store->find(expert, false);
    return there ? there : store->store->find(expert, true);
}

void     cr_store_clear(cr_store * store) { store->store->clear(); }
void     cr_store_set_pace(cr_store * store, double bytes_per_second) { store->store->set_pace(bytes_per_second); }
uint64_t cr_store_resident_bytes(const cr_store * store) { return store->store->resident_bytes(); }
uint64_t cr_store_measure_resident(const cr_store * store) { return store->store->measure_resident(); }
uint64_t cr_store_read_bytes(const cr_store * store) { return store->store->counters().read_bytes; }

cr_guard * cr_guard_new(const void * address, uint64_t bytes) { return new cr_guard{{address, bytes}}; }
int32_t    cr_guard_hit(const cr_guard * guard) { return guard->guard.hit(); }
void       cr_guard_free(cr_guard * guard) { delete guard; }

cr_interrupt * cr_interrupt_new(const void * ensure, const void * release, const void * check, const void * clear,
                                uint64_t main_thread) {
    const Interrupt::Python python{reinterpret_cast<int32_t (*)()>(reinterpret_cast<uintptr_t>(ensure)),
                                   reinterpret_cast<void (*)(int32_t)>(reinterpret_cast<uintptr_t>(release)),
                                   reinterpret_cast<int32_t (*)()>(reinterpret_cast<uintptr_t>(check)),
                                   reinterpret_cast<void (*)()>(reinterpret_cast<uintptr_t>(clear))};
    return new cr_interrupt{{python, main_thread}};
}

void cr_interrupt_free(cr_interrupt * interrupt) { delete interrupt; }

int32_t cr_interrupt_poll(void * interrupt) { return static_cast<cr_interrupt *>(interrupt)->interrupt.poll(); }

void cr_interrupt_raise(cr_interrupt * interrupt) { interrupt->interrupt.raise(); }

int32_t cr_interrupt_seen(const cr_interrupt * interrupt) { return interrupt->interrupt.raised(); }

int32_t cr_interrupt_take(cr_interrupt * interrupt) { return interrupt->interrupt.take(); }

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
