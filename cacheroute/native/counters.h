// The one type of counters, cacheroute.h's, and its arithmetic.
#pragma once

#include "cacheroute.h"

namespace cacheroute {

using Counters = cr_counters;

// Calls f with each field of both.
template <typename F> void each_field(Counters & a, const Counters & b, F f) {
    f(a.tokens, b.tokens);
    f(a.examined, b.examined);
    f(a.hits, b.hits);
    f(a.misses, b.misses);
    f(a.swapped, b.swapped);
    f(a.dropped, b.dropped);
    f(a.evictions, b.evictions);
    f(a.held, b.held);
    f(a.lost_mass, b.lost_mass);
    f(a.reads, b.reads);
    f(a.read_bytes, b.read_bytes);
    f(a.distinct_bytes, b.distinct_bytes);
    f(a.read_seconds, b.read_seconds);
    f(a.evict_seconds, b.evict_seconds);
    f(a.prefetched, b.prefetched);
    f(a.prefetch_used, b.prefetch_used);
    f(a.hook_seconds, b.hook_seconds);
}

inline Counters & operator+=(Counters & sum, const Counters & c) {
    each_field(sum, c, [](auto & x, auto y) { x += y; });
    return sum;
}

inline Counters & operator-=(Counters & difference, const Counters & c) {
    each_field(difference, c, [](auto & x, auto y) { x -= y; });
    return difference;
}

} // namespace cacheroute
