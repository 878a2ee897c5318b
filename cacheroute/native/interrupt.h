// Ctrl-C, or a request of another thread, while llama.cpp computes. Python's signal handlers run only when Python does, in its main thread, so that thread asks it now
// and then; the functions of Python's C API come as pointers, as this library is not linked to it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include <pthread.h>

namespace cacheroute {

class Interrupt {
  public:
    struct Python {
        int32_t (*ensure)();      // PyGILState_Ensure
        void (*release)(int32_t); // PyGILState_Release
        int32_t (*check)();       // PyErr_CheckSignals
        void (*clear)();          // PyErr_Clear
    };

    // main_thread: threading.main_thread().ident, which is its pthread_t.
    Interrupt(const Python & python, uint64_t main_thread) : python_(python), main_thread_(main_thread) {}

    // Whether a signal handler has raised, or raise() was called, since take(). In Python's main thread it lets the handlers run, twenty times a second at
    // most, and takes the GIL for it: no lock may be held. In others it is raised().
    bool poll() {
        if (raised()) return true;
        if (uint64_t((uintptr_t) pthread_self()) != main_thread_) return false;
        const auto now = std::chrono::steady_clock::now();
        if (now - asked_ < std::chrono::milliseconds(50)) return false;
        asked_            = now;
        const int32_t gil = python_.ensure();
        if (python_.check() != 0) {
            python_.clear(); // who called llama_decode() raises it again
            raised_.store(true, std::memory_order_relaxed);
        }
        python_.release(gil);
        return raised();
    }

    void raise() { raised_.store(true, std::memory_order_relaxed); } // any thread
    bool raised() const { return raised_.load(std::memory_order_relaxed); } // any thread
    bool take() { return raised_.exchange(false, std::memory_order_relaxed); }

  private:
    const Python                          python_;
    const uint64_t                        main_thread_;
    std::atomic<bool>                     raised_{false};
    std::chrono::steady_clock::time_point asked_{}; // by the main thread alone
};

} // namespace cacheroute
