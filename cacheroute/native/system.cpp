#include "system.h"

#include <algorithm>
#include <cerrno>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

// Files of models have more than 2 GiB: a 32-bit off_t would read from the wrong place.
static_assert(sizeof(off_t) >= 8, "build with -D_FILE_OFFSET_BITS=64");

#if defined(POSIX_FADV_DONTNEED) && defined(POSIX_FADV_RANDOM) && !defined(CR_NO_FADVISE)
#define CR_FADVISE 1
#endif
// Elsewhere MADV_DONTNEED is a hint, after which anonymous memory stays as it is.
#if defined(__linux__) && defined(MADV_DONTNEED) && !defined(CR_NO_MADVISE)
#define CR_MADVISE 1
// Older libc headers (Android's among them) lack the name; a kernel without the call answers EINVAL.
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#endif

namespace cacheroute {
namespace os {
namespace {

void * anonymous(void * at, uint64_t bytes, int fixed) {
    // NORESERVE: most of it is never touched. No huge pages: they would reach past the budget.
    void * base = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
#if defined(CR_MADVISE) && defined(MADV_NOHUGEPAGE)
    if (base != MAP_FAILED) madvise(base, bytes, MADV_NOHUGEPAGE);
#endif
    return base;
}

} // namespace

uint32_t abilities() {
    uint32_t can = 0;
#if (defined(O_DIRECT) || defined(F_NOCACHE)) && !defined(CR_NO_DIRECT)
    can |= DIRECT_READS;
#endif
#if defined(CR_FADVISE) && defined(CR_MADVISE)
    can |= DROPS_CACHED;
#endif
#ifndef CR_NO_MINCORE
    can |= MINCORE;
#endif
    return can;
}

uint64_t page_bytes() { return uint64_t(sysconf(_SC_PAGESIZE)); }

int open_direct(const char * name) {
#if defined(O_DIRECT) && !defined(CR_NO_DIRECT)
    return open(name, O_RDONLY | O_CLOEXEC | O_DIRECT);
#elif defined(F_NOCACHE) && !defined(CR_NO_DIRECT)
    const int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fcntl(fd, F_NOCACHE, 1) != -1) return fd;
    const int why = errno;
    close(fd);
    errno = why;
    return -1;
#else
    (void) name;
    errno = EINVAL;
    return -1;
#endif
}

void no_read_ahead(int fd) {
#if defined(CR_FADVISE)
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#elif defined(F_RDAHEAD)
    fcntl(fd, F_RDAHEAD, 0);
#else
    (void) fd;
#endif
}

void drop_cached(int fd, uint64_t offset, uint64_t bytes) {
#ifdef CR_FADVISE
    posix_fadvise(fd, off_t(offset), off_t(bytes), POSIX_FADV_DONTNEED);
#else
    (void) fd, (void) offset, (void) bytes;
#endif
}

void drop_mapped(int fd, uint64_t offset, uint8_t * address, uint64_t bytes) {
#ifdef CR_MADVISE
    // PAGEOUT alone leaves pages inside large folios, the other two alone fail inside them too.
    madvise(address, bytes, MADV_PAGEOUT);
    madvise(address, bytes, MADV_DONTNEED);
#else
    posix_madvise(address, bytes, POSIX_MADV_DONTNEED);
    msync(address, bytes, MS_INVALIDATE);
#endif
    drop_cached(fd, offset, bytes);
}

uint8_t * reserve(uint64_t bytes) {
    void * base = anonymous(nullptr, bytes, 0);
    return base == MAP_FAILED ? nullptr : static_cast<uint8_t *>(base);
}

void release(uint8_t * address, uint64_t bytes) {
#ifdef CR_MADVISE
    if (madvise(address, bytes, MADV_DONTNEED) == 0) return;
#endif
    anonymous(address, bytes, MAP_FIXED); // where it fails all stays in memory
}

uint64_t in_memory(const void * address, uint64_t bytes) {
#ifdef CR_NO_MINCORE
    (void) address, (void) bytes;
    return UNKNOWN_BYTES;
#else
#ifdef __linux__
    unsigned char state[16384]; // of a page each
#else
    char state[16384];
#endif
    uint64_t n = 0;
    for (uint64_t at = 0; at < bytes; at += sizeof(state) * page_bytes()) {
        const uint64_t part = std::min<uint64_t>(bytes - at, sizeof(state) * page_bytes());
        auto * const   from = static_cast<char *>(const_cast<void *>(address)) + at;
        if (mincore(from, part, state) != 0) return UNKNOWN_BYTES;
        n += uint64_t(std::count_if(state, state + part / page_bytes(), [](auto s) { return (s & 1) != 0; }));
    }
    return n * page_bytes();
#endif
}

} // namespace os
} // namespace cacheroute
