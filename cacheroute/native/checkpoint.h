// The routing state of all layers as bytes, and back: what outlives the process.
#pragma once

#include "cached_router.h"

#include <cstdint>
#include <vector>

namespace cacheroute {

std::vector<uint8_t> to_bytes(const std::vector<CachedRouter> & layers);

// The state alone: these routers choose by `original`, and CachedRouter::resume() takes the state over. Throws std::runtime_error
// for bytes that to_bytes() of this version cannot have written.
std::vector<CachedRouter> from_bytes(const uint8_t * bytes, size_t size);

} // namespace cacheroute
