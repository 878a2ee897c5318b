// Ctrl-C while llama.cpp computes: what llama_set_abort_callback() is given. Python's signal handlers run only when Python does, so
// it is asked now and then; the functions of Python's C API come as pointers, as this library is not linked to it.
#pragma once

#include "cacheroute.h"

#include <chrono>

struct cr_interrupt {
    int32_t (*ensure)();        // PyGILState_Ensure
    void (*release)(int32_t);   // PyGILState_Release
    int32_t (*check)();         // PyErr_CheckSignals
    void (*clear)();            // PyErr_Clear
    bool                                  interrupted = false;
    std::chrono::steady_clock::time_point asked{};
};
