#include "progress.h"

#include <algorithm>

namespace cacheroute {

void Progress::begin(uint32_t token, const Store * store) {
    for (auto & experts : used_) std::fill(experts.begin(), experts.end(), uint8_t(0));
    first_token_  = token;
    begun_        = 0;
    done_         = 0;
    asked_        = 0;
    layer_asked_  = 0;
    asked_before_ = store ? store->asked_bytes() : 0;
    read_before_  = store ? store->read_bytes() : 0;
}

void Progress::chose(int layer, uint32_t first_token, uint32_t n_tokens, const Store * store) {
    const uint64_t before = uint64_t(first_token - first_token_) * used_.size();
    done_                 = before + uint64_t(layer) * n_tokens;
    begun_                = before + uint64_t(layer + 1) * n_tokens;
    const uint64_t asked  = store ? store->asked_bytes() - asked_before_ : 0;
    layer_asked_          = asked - asked_;
    asked_                = asked;
}

void Progress::computed(uint32_t first_token, uint32_t n_tokens) {
    begun_ = done_ = uint64_t(first_token - first_token_ + n_tokens) * used_.size();
}

uint64_t Progress::use(int layer, const std::vector<uint8_t> & experts, const Store * store) {
    auto & used = used_[size_t(layer)];
    bool   more = false;
    for (size_t e = 0; e < experts.size(); e++) more = more || (experts[e] && !used[e]);
    if (!more) return 0;
    const uint64_t before = store ? store->bytes_of(layer, used) : 0;
    for (size_t e = 0; e < experts.size(); e++) used[e] |= experts[e];
    return store ? store->bytes_of(layer, used) - before : 0;
}

cr_progress Progress::get(const Store * store) const {
    // in this order: what has been read was asked for before
    const uint64_t read = store ? store->read_bytes() - read_before_ : 0;
    return {begun_, done_, asked_, read, layer_asked_};
}

} // namespace cacheroute
