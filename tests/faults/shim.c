// Makes calls of libcacheroute to the C library fail, as the variable FAULTS says; for LD_PRELOAD.
//
// FAULTS: rules with commas between them, CALL[/WHICH]:WHAT[:after=N][:every=N][:path=PART]
//   CALL   pread, madvise, mincore, posix_fadvise, posix_memalign, mmap, open, fsync, pthread_create, write
//   WHICH  of madvise and posix_fadvise: the number of the advice; of open and pread: "direct", with O_DIRECT alone
//   WHAT   the name of an error; of pread "half" (of what was asked) or "wrong" (bytes); of open "buffered" (O_DIRECT is ignored);
//          of mincore "there": every page is in memory, as where another process has just read it;
//          of posix_fadvise "alone": it takes a moment, and meanwhile another one does nothing, as where both lock the same page
//   after  so many calls are left alone first; every: from then on each Nth call fails
//   path   only on a file with that in its name. `write` must have it: it is the one call that matters whoever makes it
// FAULTS_SEEN: the Nth rule makes the file FAULTS_SEEN.N when it first acts.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST = 8, NOTHING = 0, HALF = -1, WRONG = -2, BUFFERED = -3, ALONE = -4, THERE = -5 };

struct rule {
    char       call[24], which[16], path[64];
    int        what; // an errno, or one of the above
    long       after, every;
    atomic_int calls, seen;
};

static struct rule rules[MOST];
static int         n_rules;

static int what_of(const char * word) {
    static const struct {
        const char * name;
        int          what;
    } words[] = {{"EIO", EIO},       {"EINTR", EINTR},   {"EAGAIN", EAGAIN}, {"ENOSYS", ENOSYS}, {"EINVAL", EINVAL},
                 {"ENOMEM", ENOMEM}, {"EMFILE", EMFILE}, {"ENOSPC", ENOSPC}, {"EFAULT", EFAULT}, {"EHWPOISON", EHWPOISON},
                 {"EPERM", EPERM},   {"half", HALF},     {"wrong", WRONG},   {"buffered", BUFFERED},
                 {"alone", ALONE},   {"there", THERE}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcmp(words[i].name, word) == 0) return words[i].what;
    }
    fprintf(stderr, "shim: there is no fault %s\n", word);
    abort();
}

__attribute__((constructor)) static void parse(void) {
    const char * given = getenv("FAULTS");
    if (!given) return;
    char * all = strdup(given), *rest = all, *one;
    while ((one = strsep(&rest, ",")) && n_rules < MOST) {
        struct rule * r = &rules[n_rules++];
        char *        call = strsep(&one, ":"), *word = strsep(&one, ":"), *more;
        snprintf(r->call, sizeof r->call, "%s", strsep(&call, "/"));
        if (call) snprintf(r->which, sizeof r->which, "%s", call);
        r->what  = what_of(word ? word : "");
        r->every = 1;
        while ((more = strsep(&one, ":"))) {
            if (strncmp(more, "after=", 6) == 0) r->after = atol(more + 6);
            if (strncmp(more, "every=", 6) == 0) r->every = atol(more + 6);
            if (strncmp(more, "path=", 5) == 0) snprintf(r->path, sizeof r->path, "%s", more + 5);
        }
    }
    free(all);
}

// Whether one of the innermost callers is in libcacheroute: of pthread_create the caller is the C++ library.
static int ours(void) {
    void *    frames[8];
    const int n = backtrace(frames, 8);
    for (int i = 1; i < n; i++) {
        Dl_info at;
        if (dladdr(frames[i], &at) && at.dli_fname && strstr(at.dli_fname, "libcacheroute")) return 1;
    }
    return 0;
}

static int has_in_name(int fd, const char * part) {
    char link[32], name[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, name, sizeof name - 1);
    if (n < 0) return 0;
    name[n] = 0;
    return strstr(name, part) != NULL;
}

// What this call is to do: 0, or the `what` of a rule. fd: -1 if it has none.
static int fault(const char * call, const char * which, int fd) {
    for (int i = 0; i < n_rules; i++) {
        struct rule * r = &rules[i];
        if (strcmp(r->call, call) != 0 || (*r->which && strcmp(r->which, which) != 0)) continue;
        if (*r->path && !has_in_name(fd, r->path)) continue;
        if (strcmp(call, "write") != 0 && !ours()) continue;
        const long n = atomic_fetch_add(&r->calls, 1) - r->after;
        if (n < 0 || n % r->every != 0) continue;
        const char * told = getenv("FAULTS_SEEN");
        if (told && !atomic_exchange(&r->seen, 1)) {
            char name[1024];
            snprintf(name, sizeof name, "%s.%d", told, i);
            const long made = syscall(SYS_openat, AT_FDCWD, name, O_CREAT | O_WRONLY, 0600);
            if (made >= 0) close((int) made);
        }
        return r->what;
    }
    return NOTHING;
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

static const char * number(int n, char * to) {
    sprintf(to, "%d", n);
    return to;
}

static int failed(int error) {
    errno = error;
    return -1;
}

ssize_t pread(int fd, void * to, size_t bytes, off_t at) {
    const int direct = fcntl(fd, F_GETFL) & O_DIRECT, what = fault("pread", direct ? "direct" : "", fd);
    if (what > 0) return failed(what);
    // a direct read ends at a sector
    const size_t  half = (bytes / 2 + 511) / 512 * 512;
    const ssize_t n    = REAL(pread)(fd, to, what == HALF && half < bytes ? half : bytes, at);
    if (what == WRONG && n > 0) ((unsigned char *) to)[n / 2] ^= 1;
    return n;
}

int madvise(void * at, size_t bytes, int advice) {
    char      word[16];
    const int what = fault("madvise", number(advice, word), -1);
    return what ? failed(what) : REAL(madvise)(at, bytes, advice);
}

int mincore(void * at, size_t bytes, unsigned char * state) {
    const int what = fault("mincore", "", -1);
    if (what != THERE) return what ? failed(what) : REAL(mincore)(at, bytes, state);
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    memset(state, 1, (bytes + page - 1) / page);
    return 0;
}

int posix_fadvise(int fd, off_t at, off_t bytes, int advice) {
    char      word[16];
    const int what = fault("posix_fadvise", number(advice, word), fd);
    if (what != ALONE) return what ? what : REAL(posix_fadvise)(fd, at, bytes, advice);
    static atomic_int inside;
    const int         others = atomic_fetch_add(&inside, 1);
    usleep(500);
    const int error = others ? 0 : REAL(posix_fadvise)(fd, at, bytes, advice);
    atomic_fetch_sub(&inside, 1);
    return error;
}

int posix_memalign(void ** to, size_t alignment, size_t bytes) {
    const int what = n_rules ? fault("posix_memalign", "", -1) : NOTHING;
    return what ? what : REAL(posix_memalign)(to, alignment, bytes);
}

void * mmap(void * at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (fault("mmap", "", fd)) return errno = ENOMEM, MAP_FAILED;
    return (void *) syscall(SYS_mmap, at, bytes, protection, flags, fd, offset); // dlsym itself may map
}

int open(const char * name, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    const int what = fault("open", flags & O_DIRECT ? "direct" : "", -1);
    if (what > 0) return failed(what);
    return REAL(open)(name, what == BUFFERED ? flags & ~O_DIRECT : flags, mode);
}

int fsync(int fd) {
    const int what = fault("fsync", "", fd);
    return what ? failed(what) : REAL(fsync)(fd);
}

int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*f)(void *), void * argument) {
    const int what = fault("pthread_create", "", -1);
    return what ? what : REAL(pthread_create)(thread, attributes, f, argument);
}

ssize_t write(int fd, const void * from, size_t bytes) {
    const int what = fault("write", "", fd);
    return what ? failed(what) : REAL(write)(fd, from, bytes);
}
