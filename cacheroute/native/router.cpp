#include "router.h"

#include "half.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace cacheroute {

static constexpr double NEG_INF = -std::numeric_limits<double>::infinity();

void Scores::fill(const float * scores, const float * probs, int n_expert, bool log_space, bool mass_from_logits) {
    z.resize(n_expert);
    mass.resize(n_expert);
    double max_prob = NEG_INF;
    for (int e = 0; e < n_expert; e++) {
        const double s = scores[e];
        // doubles, so that two different floats stay different under the logarithm and the bonus;
        // NaN must not reach a comparison
        z[e]    = std::isnan(s) ? NEG_INF : log_space ? (s > 0 ? std::log(s) : NEG_INF) : s;
        mass[e] = std::isnan(probs[e]) ? (mass_from_logits ? NEG_INF : 0.0) : probs[e];
        max_prob = std::max(max_prob, mass[e]);
    }
    for (int e = 0; e < n_expert; e++) {
        if (mass_from_logits) {
            mass[e] = std::isfinite(max_prob) ? std::exp(mass[e] - max_prob) : 0.0;
        } else {
            mass[e] = std::max(mass[e], 0.0);
        }
    }
}

void Scores::read_back(const uint16_t * recorded_z, const uint16_t * recorded_mass, int n_expert) {
    z.resize(n_expert);
    mass.resize(n_expert);
    for (int e = 0; e < n_expert; e++) {
        z[e]    = from_half(recorded_z[e]);
        mass[e] = recorded_mass ? from_half(recorded_mass[e]) : std::exp(z[e]);
        if (std::isnan(z[e])) z[e] = NEG_INF; // as in fill()
        if (std::isnan(mass[e])) mass[e] = 0.0;
    }
}

// Lowers values until order[0], order[1], ... are ranked so, ties to the lower index, and, if asked, all others behind them.
static void keep_order(std::vector<double> & values, const std::vector<int32_t> & order, bool others_behind) {
    auto at_most = [&](int32_t e, int32_t ahead) {
        double most = values[ahead];
        if (e < ahead) most = from_half(half_below(to_half(most)));
        values[e] = std::min(values[e], most);
    };
    for (size_t i = 1; i < order.size(); i++) at_most(order[i], order[i - 1]);
    if (!others_behind) return;
    for (int32_t e = 0; e < int32_t(values.size()); e++) {
        if (std::find(order.begin(), order.end(), e) == order.end()) at_most(e, order.back());
    }
}

void Scores::round_for_trace(int n_used, const int32_t * model_ids, bool prescribed) {
    const double top = *std::max_element(z.begin(), z.end());
    traced.resize(z.size());
    traced_mass.resize(z.size());
    for (size_t e = 0; e < z.size(); e++) {
        traced[e]      = from_half(to_half(std::isfinite(top) ? z[e] - top : z[e]));
        traced_mass[e] = from_half(to_half(mass[e]));
    }
    std::vector<int32_t> order(z.size());
    std::iota(order.begin(), order.end(), 0);
    auto by = [&](const std::vector<double> & key) {
        return [&key](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); };
    };
    if (model_ids) {
        order.assign(model_ids, model_ids + n_used);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return z[a] > z[b]; });
    } else {
        std::partial_sort(order.begin(), order.begin() + n_used, order.end(), by(z));
        order.resize(n_used);
    }
    keep_order(traced, order, !prescribed);
    std::sort(order.begin(), order.end(), by(mass));
    keep_order(traced_mass, order, false);
}

Router::Router(int n_expert, int n_used, const Routing & routing)
    : n_expert_(n_expert), n_used_(n_used), routing_(routing), index_(n_expert), place_(n_expert), biased_(n_expert),
      in_top_(n_expert), in_chosen_(n_expert) {}

void Router::reset() {
    mean_range_ = 0.0;
    n_seen_     = 0;
}

void Router::write(ByteWriter & out) const {
    out.put(mean_range_);
    out.put(n_seen_);
}

void Router::read(ByteReader & in) {
    mean_range_ = in.get<double>();
    n_seen_     = in.get<uint64_t>();
    if (!std::isfinite(mean_range_) || mean_range_ < 0) throw std::runtime_error("a saved routing state has a mean that cannot be");
}

// max - min of the finite entries
static double finite_range(const std::vector<double> & z) {
    double lo = std::numeric_limits<double>::infinity(), hi = NEG_INF;
    for (double v : z) {
        if (std::isfinite(v)) {
            lo = std::min(lo, v);
            hi = std::max(hi, v);
        }
    }
    return hi >= lo ? hi - lo : 0.0;
}

void Router::observe(const std::vector<double> & z) {
    n_seen_++;
    mean_range_ += (finite_range(z) - mean_range_) / double(n_seen_);
}

// order: the n best by key, ties by place_
void Router::rank(const std::vector<double> & key, int n, std::vector<int32_t> & order) const {
    std::iota(index_.begin(), index_.end(), 0);
    auto better = [&](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && place_[a] < place_[b]); };
    if (n < n_expert_) {
        std::nth_element(index_.begin(), index_.begin() + (n - 1), index_.end(), better);
    }
    std::sort(index_.begin(), index_.begin() + n, better);
    order.assign(index_.begin(), index_.begin() + n);
}

// order_ (all ranks) -> chosen_: ranks below J, then the cached below M, then the rest, first K
void Router::max_rank(int m, const std::vector<double> & z, const std::vector<uint8_t> & resident) {
    const int j = n_always();
    m           = std::min(std::max(m, n_used_), n_expert_);
    while (m > n_used_ && z[order_[m - 1]] == NEG_INF) m--; // masked experts are no candidates
    chosen_.assign(order_.begin(), order_.begin() + j);
    for (int r = j; r < m && int(chosen_.size()) < n_used_; r++) {
        if (resident[order_[r]]) chosen_.push_back(order_[r]);
    }
    for (int r = j; r < n_expert_ && int(chosen_.size()) < n_used_; r++) {
        if (r >= m || !resident[order_[r]]) chosen_.push_back(order_[r]);
    }
}

// order_ (all ranks) -> the least n whose n largest softmax(z) sum to p or more
int Router::cumsum_candidates(const std::vector<double> & z) {
    const double top = z[order_[0]];
    if (!std::isfinite(top)) return n_used_;
    double total = 0.0;
    for (double v : z) total += std::exp(v - top);
    double sum = 0.0;
    for (int n = 0; n < n_expert_; n++) {
        sum += std::exp(z[order_[n]] - top);
        if (sum >= routing_.p * total) return n + 1;
    }
    return n_expert_;
}

// order_ (the K best) -> chosen_: the K best of the allowed, then the best of the others, those that may not be chosen last.
void Router::keep_to(const std::vector<uint8_t> & allowed, const std::vector<double> & z) {
    if (std::all_of(chosen_.begin(), chosen_.end(), [&](int32_t e) { return allowed[e] != 0; })) return;
    auto turn = [&](int32_t e) { return z[e] == NEG_INF ? 2 : allowed[e] ? 0 : 1; };
    std::iota(index_.begin(), index_.end(), 0);
    std::partial_sort(index_.begin(), index_.begin() + n_used_, index_.end(), [&](int32_t a, int32_t b) {
        if (turn(a) != turn(b)) return turn(a) < turn(b);
        return z[a] > z[b] || (z[a] == z[b] && place_[a] < place_[b]);
    });
    chosen_.assign(index_.begin(), index_.begin() + n_used_);
}

void Router::speculate(const std::vector<double> & predicted, const std::vector<uint8_t> & resident, std::vector<int32_t> & ids) {
    const double bonus = routing_.lambda * finite_range(predicted);
    for (int e = 0; e < n_expert_; e++) biased_[e] = resident[e] ? predicted[e] + bonus : predicted[e];
    std::iota(place_.begin(), place_.end(), 0);
    rank(biased_, n_used_, ids);
}

// order_ (the K best) -> chosen_: its J best, then the best of the cached and of what was read early.
void Router::keep_speculated(const std::vector<int32_t> & speculated, const std::vector<uint8_t> & resident,
                             const std::vector<double> & z) {
    there_ = resident;
    for (int i = 0; i < n_used_ - n_always(); i++) there_[speculated[i]] = 1;
    for (int r = 0; r < n_always(); r++) there_[order_[r]] = 1;
    keep_to(there_, z);
}

// order_ (the K best) -> k where these carry the share p of its mass, else K.
int Router::enough(const std::vector<double> & mass) const {
    const int k = std::min(std::max(routing_.k, 1), n_used_);
    double    few = 0.0, all = 0.0;
    for (int r = 0; r < n_used_; r++) {
        all += mass[order_[r]];
        if (r < k) few = all;
    }
    return few >= routing_.p * all ? k : n_used_;
}

// Undoes swaps and skips, those that lose most mass first, until the token loses no more than its share.
void Router::guard(const std::vector<double> & mass) {
    if (routing_.max_loss < 0) return;
    std::vector<int32_t> lost, won; // of the top-K and not chosen; chosen and not of the top-K
    double top = 0.0, kept = 0.0;
    for (int r = 0; r < n_used_; r++) {
        top += mass[order_[r]];
        if (!in_chosen_[order_[r]]) lost.push_back(order_[r]);
    }
    for (int32_t e : chosen_) {
        kept += mass[e];
        if (!in_top_[e]) won.push_back(e);
    }
    auto heavier = [&](int32_t a, int32_t b) { return mass[a] > mass[b] || (mass[a] == mass[b] && a < b); };
    std::sort(lost.begin(), lost.end(), heavier);
    std::sort(won.begin(), won.end(), heavier);
    for (int32_t e : lost) {
        // at 0 nothing may differ from the top-K, not even a swap that happens to lose nothing
        if (routing_.max_loss > 0 && top - kept <= routing_.max_loss * top) break;
        if (!won.empty()) {
            const int32_t back = won.back();
            won.pop_back();
            kept -= mass[back];
            in_chosen_[back] = 0;
            chosen_.erase(std::find(chosen_.begin(), chosen_.end(), back));
        }
        kept += mass[e];
        in_chosen_[e] = 1;
        chosen_.push_back(e);
    }
}

void Router::select(const Scores & scores, const std::vector<uint8_t> & resident, bool plain, const int32_t * model_ids,
                    Selection & out, const std::vector<uint8_t> * allowed, const std::vector<int32_t> * speculated) {
    const auto &   z    = scores.z;
    const auto &   mass = scores.mass;
    const Strategy s    = plain ? Strategy::original : routing_.strategy;
    const bool     all  = s == Strategy::max_rank || s == Strategy::cumsum;

    // among equals the model's own choice comes first, in its order: what changes nothing changes no bit
    std::iota(place_.begin(), place_.end(), model_ids ? n_used_ : 0);
    for (int i = 0; model_ids && i < n_used_; i++) place_[model_ids[i]] = i;
    if (model_ids && !all) {
        order_.assign(model_ids, model_ids + n_used_);
    } else {
        rank(z, all ? n_expert_ : n_used_, order_);
    }
    chosen_.assign(order_.begin(), order_.begin() + n_used_);

    switch (s) {
        case Strategy::original:
            if (plain && allowed) keep_to(*allowed, z);
            break;
        case Strategy::custom:
            custom_ids_.resize(n_used_);
            if (policy_ && policy_(scores, resident, custom_ids_)) chosen_ = custom_ids_;
            break;
        case Strategy::pruning:
            chosen_.resize(std::min(std::max(routing_.k, 1), n_used_));
            break;
        case Strategy::max_rank:
            max_rank(routing_.m, z, resident);
            break;
        case Strategy::cumsum:
            max_rank(cumsum_candidates(z), z, resident);
            break;
        case Strategy::cache_prior: {
            const double bonus = routing_.lambda * mean_range_;
            for (int e = 0; e < n_expert_; e++) biased_[e] = resident[e] ? z[e] + bonus : z[e];
            // the best J always run; ranked by z + bonus they could fall behind by rounding
            for (int r = 0; r < n_always(); r++) biased_[order_[r]] = -NEG_INF;
            rank(biased_, n_used_, chosen_);
            break;
        }
        case Strategy::drop_cold: {
            double sum = 0.0;
            for (int32_t e : chosen_) sum += mass[e];
            const double least = routing_.f / n_used_ * sum;
            // the best one always runs: a token without any expert is no token of this model
            chosen_.erase(std::remove_if(chosen_.begin() + 1, chosen_.end(),
                                         [&](int32_t e) { return !resident[e] && mass[e] < least; }),
                          chosen_.end());
            break;
        }
        case Strategy::dynamic_k:
            chosen_.resize(enough(mass));
            break;
        case Strategy::speculate:
            if (speculated) keep_speculated(*speculated, resident, z);
            break;
    }

    std::fill(in_top_.begin(), in_top_.end(), 0);
    std::fill(in_chosen_.begin(), in_chosen_.end(), 0);
    for (int r = 0; r < n_used_; r++) in_top_[order_[r]] = 1;
    for (int32_t e : chosen_) in_chosen_[e] = 1;
    if (!plain) guard(mass);

    // Router order under every strategy: where the same experts run, the same sums are formed in the same
    // order, and the logits are the same bits.
    std::sort(chosen_.begin(), chosen_.end(), [&](int32_t a, int32_t b) { return z[a] > z[b] || (z[a] == z[b] && place_[a] < place_[b]); });
    out.n_run   = int(chosen_.size());
    out.swapped = 0;
    double top = 0.0, kept = 0.0;
    for (int r = 0; r < n_used_; r++) top += mass[order_[r]];
    for (int32_t e : chosen_) {
        kept += mass[e];
        out.swapped += !in_top_[e];
    }
    out.lost_mass = top > 0 ? std::max(0.0, 1.0 - kept / top) : 0.0;
    // slots that do not run repeat the best expert, which is resident; their gate weight becomes zero
    out.ids = chosen_;
    out.ids.resize(n_used_, chosen_[0]);
}

} // namespace cacheroute
