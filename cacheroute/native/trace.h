// A trace: what the router saw and did, one record of fixed size per (token, layer). Its format is in cacheroute/trace/trace_file.py.
#pragma once

#include "cached_router.h"
#include "half.h"

#include <cstdint>
#include <vector>

namespace cacheroute {

enum TraceFlags : uint8_t {
    TRACE_DECODE       = 1, // not of a prompt
    TRACE_PRESCRIBED   = 2, // the model prescribed the ids
    TRACE_SOFTMAX_MASS = 4, // the mass is softmax(z)
    TRACE_BATCH        = 8, // the first token of a micro-batch in its layer
};

// Records in the order in which the graph ran, little-endian, until they are taken. Not thread-safe.
class TraceBuffer {
  public:
    // `before`: [E] the cache before the token. `scores.traced` must be filled.
    void add(uint32_t sequence, uint32_t token, int layer, uint8_t flags, const Scores & scores,
             const std::vector<uint8_t> & before, const Selection & selection) {
        put(sequence, 4);
        put(token, 4);
        put(uint32_t(layer), 2);
        put(flags, 1);
        put(uint32_t(selection.n_run), 1);
        for (int32_t id : selection.ids) put(uint32_t(id), 2);
        for (size_t e = 0; e < before.size(); e += 8) {
            uint32_t bits = 0;
            for (size_t i = e; i < e + 8 && i < before.size(); i++) bits |= uint32_t(before[i]) << (i - e);
            put(bits, 1);
        }
        for (double z : scores.traced) put(to_half(z), 2);
        for (double m : scores.traced_mass) put(to_half(m), 2);
    }

    std::vector<uint8_t> bytes;

  private:
    void put(uint32_t value, int n) {
        for (int i = 0; i < n; i++) bytes.push_back(uint8_t(value >> (8 * i)));
    }
};

} // namespace cacheroute
