// The C interface of routers, stores and what watches over them: unpacks arguments, turns exceptions into sentences. Decides nothing.
#include "capi.h"

#include "system.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

using namespace cacheroute;

struct cr_router {
    std::vector<CachedRouter> layers;
    PromptRouter              prompt_router;
    Scores                    scores;
};

struct cr_guard {
    BusGuard guard;
};

namespace cacheroute {

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

void sum_counters(std::vector<CachedRouter> & layers, int32_t layer, int32_t prefill, cr_counters & out) {
    const Phase phase = prefill ? Phase::prefill : Phase::decode;
    out               = cr_counters{};
    for (int32_t l = 0; l < int32_t(layers.size()); l++) {
        if (layer < 0 || l == layer) out += layers[size_t(l)].counters(phase);
    }
    if (layer < 0) out.tokens = layers[0].counters(phase).tokens;
}

void set_policies(std::vector<CachedRouter> & layers, cr_policy policy, void * user) {
    for (int32_t l = 0; l < int32_t(layers.size()); l++) {
        layers[size_t(l)].set_policy([=](const Scores & s, const std::vector<uint8_t> & resident, std::vector<int32_t> & chosen) {
            return policy(user, l, s.z.data(), s.mass.data(), resident.data(), chosen.data()) == 0;
        });
    }
}

} // namespace cacheroute

namespace {

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
