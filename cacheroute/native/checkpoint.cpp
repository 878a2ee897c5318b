#include "checkpoint.h"

#include "bytes.h"

#include <stdexcept>

namespace cacheroute {

static constexpr uint32_t MAGIC = 0x53525243, VERSION = 1; // "CRRS"
static constexpr size_t EXPERT_BYTES = 25; // that an expert takes at least

std::vector<uint8_t> to_bytes(const std::vector<CachedRouter> & layers) {
    ByteWriter out;
    out.put(MAGIC);
    out.put(VERSION);
    out.put(uint32_t(layers.size()));
    for (const CachedRouter & layer : layers) {
        const ExpertCache & cache = layer.cache();
        out.put(uint32_t(cache.resident().size()));
        out.put(int32_t(layer.n_used()));
        out.put(int32_t(cache.capacity()));
        out.put(int32_t(cache.eviction()));
        layer.write(out);
    }
    return out.bytes;
}

std::vector<CachedRouter> from_bytes(const uint8_t * bytes, size_t size) {
    ByteReader in(bytes, size);
    if (in.get<uint32_t>() != MAGIC) throw std::runtime_error("this is no saved routing state");
    if (in.get<uint32_t>() != VERSION) throw std::runtime_error("a saved routing state is of another version");
    const auto n_layers = in.get<uint32_t>();
    std::vector<CachedRouter> layers;
    for (uint32_t l = 0; l < n_layers; l++) { // not reserved: a number that is wrong ends with the bytes
        const auto n_expert = in.get<uint32_t>();
        const auto n_used   = in.get<int32_t>();
        const auto capacity = in.get<int32_t>();
        const auto eviction = in.get<int32_t>();
        const bool possible = n_expert <= in.left() / EXPERT_BYTES && n_used >= 1 && n_used <= capacity && capacity <= int64_t(n_expert) &&
                              eviction >= 0 && eviction <= int32_t(Eviction::soft_lfu) && eviction != int32_t(Eviction::belady);
        if (!possible) throw std::runtime_error("a saved routing state has sizes that cannot be");
        layers.emplace_back(int(n_expert), n_used, capacity, Routing{}, Eviction(eviction));
        layers.back().read(in);
    }
    if (in.left() || layers.empty()) throw std::runtime_error("a saved routing state is not as long as it says");
    return layers;
}

} // namespace cacheroute
