#include "read_ahead.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace cacheroute {
namespace {

constexpr int    ASKED = 64;   // tokens of a batch that are asked at most: a hundredth of what a layer computes
constexpr double SURE  = 0.98; // of a group that is read ahead: so much of what is read is needed

int power_of_two(double x) { return x < 1 ? 0 : int(std::log2(x)); }

} // namespace

// Named experts: how many of the batch's tokens would choose it. Others: how many tokens nobody asked about.
int ReadAhead::group(uint32_t named, int n_tokens, int n_asked) const {
    const double each = double(n_tokens) / n_asked;
    if (named) return std::min(power_of_two(named * each), GROUPS - 1);
    return GROUPS + std::min(power_of_two(each), GROUPS - 1);
}

// Share of a group that is needed. Before it is known, an expert that several tokens name is taken for needed.
double ReadAhead::trust(int g) const {
    const bool several = g >= 3 && g < GROUPS;
    return (groups_[size_t(g)].needed + (several ? 50.0 : 1.0)) / (groups_[size_t(g)].n + (several ? 50.5 : 2.0));
}

void ReadAhead::learn(int layer, const Mask & needed) {
    if (predicted_ != layer || group_of_.size() != needed.size()) return;
    for (size_t e = 0; e < needed.size(); e++) {
        Group & g = groups_[size_t(group_of_[e])];
        g.n += 1;
        g.needed += needed[e];
    }
}

void ReadAhead::predict(int layer, const ExpertEvent & ev, bool forced) {
    const size_t n_expert = size_t(ev.n_expert);
    int          n_asked  = std::min(ev.n_tokens, ASKED);
    named_.assign(n_expert, 0);
    group_of_.resize(n_expert);
    order_.resize(n_expert);
    for (int i = 0; i < n_asked; i++) {
        const int64_t t      = int64_t(i) * ev.n_tokens / n_asked;
        const auto *  scores = forced || ev.n_embd != prediction_.n_embd()
                                   ? nullptr
                                   : prediction_.scores(layer, ev.hidden + t * ev.n_embd, ev.gating);
        if (!scores) { // nobody can be asked
            n_asked = 1;
            break;
        }
        std::iota(order_.begin(), order_.end(), 0);
        std::nth_element(order_.begin(), order_.begin() + std::ptrdiff_t(n_used_), order_.end(),
                         [&](int32_t a, int32_t b) { return (*scores)[size_t(a)] > (*scores)[size_t(b)]; });
        for (size_t k = 0; k < n_used_; k++) named_[size_t(order_[k])]++;
    }
    for (size_t e = 0; e < n_expert; e++) group_of_[e] = group(named_[e], ev.n_tokens, n_asked);
}

void ReadAhead::after(int layer, const ExpertEvent & ev, const Mask & needed, const ScoreSource & source, Residency & residency,
                      int n_layers) {
    learn(layer, needed);
    const int next = layer + 1;
    predicted_     = -1;
    // llama.cpp computes the last layer only for the tokens whose output is wanted
    if (next >= n_layers - 1) return;
    predict(layer, ev, !source.forced(next).z.empty());
    predicted_ = next;

    experts_.clear();
    for (int32_t e = 0; e < ev.n_expert; e++) {
        if (!residency.in_memory(next, e) && trust(group_of_[size_t(e)]) >= SURE) experts_.push_back(e);
    }
    const uint64_t bytes = residency.expert_bytes(next);
    if (bytes && experts_.size() > limit_ / bytes) { // the surest first
        std::stable_sort(experts_.begin(), experts_.end(), [&](int32_t a, int32_t b) { return named_[size_t(a)] > named_[size_t(b)]; });
        experts_.resize(size_t(limit_ / bytes));
        std::sort(experts_.begin(), experts_.end());
    }
    if (!experts_.empty()) residency.prefetch(next, experts_, Urgency::ahead);
}

} // namespace cacheroute
