// What an exception says to a person.
#pragma once

#include <exception>
#include <new>

namespace cacheroute {

inline const char * sentence(const std::exception & e) {
    return dynamic_cast<const std::bad_alloc *>(&e) ? "there is not enough memory" : e.what();
}

} // namespace cacheroute
