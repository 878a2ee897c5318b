#include "prompt_router.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace cacheroute {

PromptRouter::PromptRouter(int n_expert, int n_used)
    : n_used_(n_used), mass_(n_expert), spared_(n_expert), allowed_(n_expert), order_(n_expert) {}

void PromptRouter::begin() {
    std::fill(mass_.begin(), mass_.end(), 0.0);
    std::fill(spared_.begin(), spared_.end(), 0);
}

void PromptRouter::add(const Scores & scores, const int32_t * model_ids, bool spared) {
    const auto &    z   = scores.z;
    const int32_t * top = model_ids;
    if (!top) {
        std::iota(order_.begin(), order_.end(), 0);
        std::partial_sort(order_.begin(), order_.begin() + n_used_, order_.end(),
                          [&](int32_t a, int32_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); });
        top = order_.data();
    }
    double sum = 0.0;
    for (int i = 0; i < n_used_; i++) {
        sum += scores.mass[top[i]];
        if (spared && std::isfinite(z[top[i]])) spared_[top[i]] = 1;
    }
    if (!(sum > 0)) return;
    for (int i = 0; i < n_used_; i++) mass_[top[i]] += scores.mass[top[i]] / sum;
}

const std::vector<uint8_t> & PromptRouter::allowed(const std::vector<uint8_t> & resident, double cover) {
    allowed_   = resident;
    int    n   = 0;
    double all = 0.0, carried = 0.0;
    for (size_t e = 0; e < mass_.size(); e++) {
        all += mass_[e];
        allowed_[e] |= spared_[e];
        if (!allowed_[e]) continue;
        carried += mass_[e];
        n++;
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return mass_[a] > mass_[b] || (mass_[a] == mass_[b] && a < b); });
    for (int32_t e : order_) {
        if (carried >= cover * all && n >= n_used_) break;
        if (allowed_[e]) continue;
        allowed_[e] = 1;
        carried += mass_[e];
        n++;
    }
    return allowed_;
}

} // namespace cacheroute
