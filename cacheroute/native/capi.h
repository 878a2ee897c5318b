// What the files of the C interface share: how arguments become C++ and exceptions sentences.
#pragma once

#include "cacheroute.h"

#include "hook.h"
#include "interrupt.h"
#include "sentence.h"

#include <exception>
#include <memory>
#include <vector>

struct cr_store {
    std::unique_ptr<cacheroute::Store> store;
};

struct cr_interrupt {
    cacheroute::Interrupt interrupt;
};

namespace cacheroute {

// Throws std::runtime_error for a shape or a routing that cannot be.
std::vector<CachedRouter> make_routers(const cr_shape & s, const cr_routing * routing);

void write_error(const char * what, char * error, int32_t error_size);

// What `make` returns, or null and its sentence in `error`.
template <typename F> auto guarded(char * error, int32_t error_size, F make) -> decltype(make()) {
    try {
        return make();
    } catch (const std::exception & e) {
        write_error(sentence(e), error, error_size);
        return nullptr;
    }
}

// Of one layer, or of all of them where it is below 0.
void sum_counters(std::vector<CachedRouter> & layers, int32_t layer, int32_t prefill, cr_counters & out);

void set_policies(std::vector<CachedRouter> & layers, cr_policy policy, void * user);

inline std::vector<int32_t> ids(const int32_t * from, int32_t n) { return {from, from + n}; }

} // namespace cacheroute
