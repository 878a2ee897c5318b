// Pages of a mapped file that cannot be read, as the device fails or the file was made shorter: a thread that reads one would die by
// SIGBUS. Instead it reads zeros, and hit() says so.
#pragma once

#include <cstdint>

namespace cacheroute {

class BusGuard {
  public:
    // Watches a range of memory that a file is mapped to, until it is destroyed.
    BusGuard(const void * address, uint64_t bytes);
    ~BusGuard();
    BusGuard(const BusGuard &)             = delete;
    BusGuard & operator=(const BusGuard &) = delete;

    bool hit() const; // since the guard was made

  private:
    int slot_;
};

} // namespace cacheroute
