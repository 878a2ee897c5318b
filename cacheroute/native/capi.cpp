// The C interface: unpacks arguments, turns exceptions into sentences. Decides nothing.
#include "cacheroute.h"

#include "hook.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>

using namespace cacheroute;

struct cr_router {
    std::vector<CachedRouter> layers;
    Scores                    scores;
};

struct cr_store {
    std::unique_ptr<Store> store;
};

struct cr_hook {
    Hook hook;
};

namespace {

std::vector<CachedRouter> make_routers(const cr_shape & s, const cr_routing * routing) {
    if (s.n_layers < 1 || s.n_used < 1 || s.n_used > s.n_expert) throw std::runtime_error("the model's expert counts make no sense");
    if (s.capacity < s.n_used || s.capacity > s.n_expert) {
        throw std::runtime_error("a cache of " + std::to_string(s.capacity) + " experts per layer is not within " +
                                 std::to_string(s.n_used) + ".." + std::to_string(s.n_expert));
    }
    if (s.eviction < 0 || s.eviction > int32_t(Eviction::score)) throw std::runtime_error("there is no such eviction");
    std::vector<CachedRouter> layers;
    layers.reserve(size_t(s.n_layers));
    for (int32_t l = 0; l < s.n_layers; l++) {
        const cr_routing & r = routing[l];
        if (r.strategy < 0 || r.strategy > int32_t(Strategy::drop_cold)) throw std::runtime_error("there is no such routing");
        const Routing as{Strategy(r.strategy), r.k, r.m, std::max(r.j, 0), r.p, r.lambda, r.f, r.max_loss};
        layers.emplace_back(s.n_expert, s.n_used, s.capacity, as, Eviction(s.eviction));
    }
    return layers;
}

template <typename F> auto guarded(char * error, int32_t error_size, F make) -> decltype(make()) {
    try {
        return make();
    } catch (const std::exception & e) {
        if (error && error_size > 0) std::snprintf(error, size_t(error_size), "%s", e.what());
        return nullptr;
    }
}

void sum_counters(std::vector<CachedRouter> & layers, int32_t layer, int32_t prefill, cr_counters & out) {
    out = cr_counters{};
    for (int32_t l = 0; l < int32_t(layers.size()); l++) {
        if (layer >= 0 && l != layer) continue;
        const Counters & c = layers[size_t(l)].counters(prefill ? Phase::prefill : Phase::decode);
        out.tokens    += c.tokens;
        out.examined  += c.examined;
        out.hits      += c.hits;
        out.misses    += c.misses;
        out.swapped   += c.swapped;
        out.dropped   += c.dropped;
        out.evictions += c.evictions;
        out.lost_mass += c.lost_mass;
    }
}

void copy_ids(const std::vector<int32_t> & from, int32_t * to, int32_t * n) {
    if (to) std::copy(from.begin(), from.end(), to);
    if (n) *n = int32_t(from.size());
}

std::vector<int32_t> ids(const int32_t * from, int32_t n) { return {from, from + n}; }

} // namespace

cr_router * cr_router_new(const cr_shape * shape, const cr_routing * routing, char * error, int32_t error_size) {
    return guarded(error, error_size, [&] { return new cr_router{make_routers(*shape, routing), {}}; });
}

void cr_router_free(cr_router * router) { delete router; }

int32_t cr_router_step(cr_router * router, int32_t layer, const double * z, const double * mass, int32_t prefill,
                       const int32_t * dictated, int32_t * out_ids, int32_t * missed, int32_t * n_missed, int32_t * evicted,
                       int32_t * n_evicted) {
    CachedRouter & r = router->layers[size_t(layer)];
    const size_t   n = r.cache().resident().size();
    router->scores.z.assign(z, z + n);
    router->scores.mass.assign(mass, mass + n);
    const Event & event = r.step(router->scores, prefill ? Phase::prefill : Phase::decode, dictated);
    copy_ids(event.selection.ids, out_ids, nullptr);
    copy_ids(event.missed, missed, n_missed);
    copy_ids(event.evicted, evicted, n_evicted);
    return event.selection.n_run;
}

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
                        int32_t n_layers, int32_t n_expert, char * error, int32_t error_size) {
    return guarded(error, error_size, [&] {
        std::vector<ExpertTensor> all;
        for (int32_t i = 0; i < n_tensors; i++) {
            const cr_tensor & t = tensors[i];
            all.push_back({t.layer, t.file, t.offset, t.expert_bytes, static_cast<uint8_t *>(const_cast<void *>(t.address))});
        }
        return new cr_store{make_mmap_store({files, files + n_files}, n_layers, n_expert, all)};
    });
}

void cr_store_free(cr_store * store) { delete store; }

void cr_store_exchange(cr_store * store, int32_t layer, const int32_t * load, int32_t n_load, const int32_t * evict,
                       int32_t n_evict) {
    store->store->exchange(layer, ids(load, n_load), ids(evict, n_evict));
}

void     cr_store_clear(cr_store * store) { store->store->clear(); }
void     cr_store_set_pace(cr_store * store, double bytes_per_second) { store->store->set_pace(bytes_per_second); }
uint64_t cr_store_resident_bytes(const cr_store * store) { return store->store->resident_bytes(); }
uint64_t cr_store_measure_resident(const cr_store * store) { return store->store->measure_resident(); }
uint64_t cr_store_read_bytes(const cr_store * store) { return store->store->counters().read_bytes; }

cr_hook * cr_hook_new(const cr_shape * shape, const cr_routing * routing, const int32_t * layer_of, int32_t n_il, cr_store * store,
                      char * error, int32_t error_size) {
    std::unique_ptr<Store> owned;
    if (store) owned = std::move(store->store);
    delete store;
    return guarded(error, error_size, [&] {
        bool reweights = false;
        for (int32_t l = 0; l < shape->n_layers; l++) {
            const auto s = Strategy(routing[l].strategy);
            reweights    = reweights || s == Strategy::pruning || s == Strategy::drop_cold;
        }
        return new cr_hook{Hook({layer_of, layer_of + n_il}, make_routers(*shape, routing), std::move(owned), reweights)};
    });
}

void         cr_hook_free(cr_hook * hook) { delete hook; }
const void * cr_hook_address(cr_hook * hook) { return hook->hook.address(); }
void         cr_hook_set_phase(cr_hook * hook, int32_t decode) { hook->hook.set_phase(decode ? Phase::decode : Phase::prefill); }
void         cr_hook_finish(cr_hook * hook) { hook->hook.finish(); }
void         cr_hook_reset(cr_hook * hook) { hook->hook.reset(); }
const char * cr_hook_error(const cr_hook * hook) { return hook->hook.error().c_str(); }

void cr_hook_set_pace(cr_hook * hook, double bytes_per_second) {
    if (hook->hook.store()) hook->hook.store()->set_pace(bytes_per_second);
}

void cr_hook_counters(cr_hook * hook, int32_t layer, int32_t prefill, cr_counters * out) {
    sum_counters(hook->hook.routers(), layer, prefill, *out);
    const StoreCounters & s = hook->hook.reads(prefill ? Phase::prefill : Phase::decode);
    if (layer >= 0) return; // the store does not count by layer
    out->read_bytes = s.read_bytes;
    out->reads      = s.reads;
    out->read_ns    = s.read_ns;
    out->evict_ns   = s.evict_ns;
}

void cr_hook_resident(cr_hook * hook, int32_t layer, uint8_t * mask) {
    const auto & resident = hook->hook.routers()[size_t(layer)].cache().resident();
    std::copy(resident.begin(), resident.end(), mask);
}

uint64_t cr_hook_resident_bytes(const cr_hook * hook) {
    auto * store = const_cast<cr_hook *>(hook)->hook.store();
    return store ? store->resident_bytes() : 0;
}

uint64_t cr_hook_measure_resident(const cr_hook * hook) {
    auto * store = const_cast<cr_hook *>(hook)->hook.store();
    return store ? store->measure_resident() : 0;
}
