#include "bus_guard.h"

#include <atomic>
#include <csignal>
#include <mutex>

#include <sys/mman.h>
#include <unistd.h>

namespace cacheroute {
namespace {

constexpr int MOST = 1024; // ranges at once; more are not watched

// Plain memory that a signal handler may read.
struct Range {
    std::atomic<uintptr_t> begin{0}, end{0}; // end 0: free
    std::atomic<bool>      hit{false};
};

Range            ranges[MOST];
std::mutex       mutex; // of those who make and destroy guards
int              n_guards = 0;
struct sigaction before;

void on_bus_error(int number, siginfo_t * info, void * context) {
    const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Range & range : ranges) {
        if (at < range.begin.load(std::memory_order_relaxed) || at >= range.end.load(std::memory_order_acquire)) continue;
        const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
        void * const    zero = reinterpret_cast<void *>(at & ~(page - 1));
        range.hit            = true;
        if (mmap(zero, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) return;
    }
    // not in a watched range: as without this handler
    if (before.sa_flags & SA_SIGINFO && before.sa_sigaction) return before.sa_sigaction(number, info, context);
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
    signal(number, SIG_DFL); // and the access is tried again
}

} // namespace

BusGuard::BusGuard(const void * address, uint64_t bytes) : slot_(-1) {
    std::lock_guard<std::mutex> lock(mutex);
    for (int i = 0; i < MOST && slot_ < 0; i++) {
        if (ranges[i].end.load() == 0) slot_ = i;
    }
    if (slot_ < 0) return;
    Range & range = ranges[slot_];
    range.hit     = false;
    range.begin   = reinterpret_cast<uintptr_t>(address);
    range.end.store(reinterpret_cast<uintptr_t>(address) + bytes, std::memory_order_release);
    if (n_guards++ > 0) return;
    struct sigaction ours {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags     = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &before);
}

BusGuard::~BusGuard() {
    std::lock_guard<std::mutex> lock(mutex);
    if (slot_ < 0) return;
    ranges[slot_].end = 0;
    if (--n_guards > 0) return;
    struct sigaction now {};
    // a handler that was installed after ours stays
    if (sigaction(SIGBUS, nullptr, &now) == 0 && now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error) {
        sigaction(SIGBUS, &before, nullptr);
    }
}

bool BusGuard::hit() const { return slot_ >= 0 && ranges[slot_].hit.load(); }

} // namespace cacheroute
