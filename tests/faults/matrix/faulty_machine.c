/* Preloaded into a process (LD_PRELOAD): its wall clock, and the disk that some of its files
 * lie on, go wrong as a file says that machine.py writes.
 *
 * Only what asks the C library is reached: the process's own files, SQLite's and Redis's
 * are. The file is mapped, so that a change counts at once.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* As in machine.py. */
enum trouble { WELL, GONE, SLOW, HANGING, TORN, READ_ONLY };

struct orders {
    int64_t clock_ahead_seconds;
    int32_t trouble;
    int32_t struck; /* how often there was trouble */
    char files[PATH_MAX];
};

static struct orders *orders;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTY_MACHINE");
    int file = path ? REAL(open)(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) orders = found;
    close(file);
}

static void rest(long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void strike(void) { __atomic_add_fetch(&orders->struck, 1, __ATOMIC_RELEASE); }

static enum trouble trouble_now(void) {
    return __atomic_load_n(&orders->trouble, __ATOMIC_ACQUIRE);
}

static int is_concerned(const char *path) {
    return !strncmp(path, orders->files, strlen(orders->files));
}

/* The trouble with a file that is open. Waits where the trouble is that it takes long. */
static enum trouble trouble_of(int file) {
    char place[64], path[PATH_MAX];
    if (!orders || trouble_now() == WELL) return WELL;
    snprintf(place, sizeof place, "/proc/self/fd/%d", file);
    int saved = errno;
    ssize_t end = readlink(place, path, sizeof path - 1);
    errno = saved;
    if (end < 0) return WELL;
    path[end] = 0;
    if (!is_concerned(path)) return WELL;
    strike();
    enum trouble trouble = trouble_now();
    if (trouble == SLOW) rest(50);
    while (trouble == HANGING) {
        rest(5);
        trouble = trouble_now();
    }
    return trouble;
}

static int fails_to_open(const char *path, int flags) {
    if (!orders || trouble_now() == WELL || path[0] != '/' || !is_concerned(path)) return 0;
    strike();
    while (trouble_now() == HANGING) rest(5);
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT;
    enum trouble trouble = trouble_now();
    if (trouble == GONE) errno = EIO;
    else if (trouble == READ_ONLY && writes) errno = EROFS;
    else return 0;
    return 1;
}

#define OPENED(name, call, path, flags)         \
    mode_t mode = 0;                            \
    if ((flags) & (O_CREAT | O_TMPFILE)) {      \
        va_list values;                         \
        va_start(values, flags);                \
        mode = (mode_t)va_arg(values, int);     \
        va_end(values);                         \
    }                                           \
    if (fails_to_open(path, flags)) return -1;  \
    return call;

int open(const char *path, int flags, ...) {
    OPENED(open, REAL(open)(path, flags, mode), path, flags)
}

int open64(const char *path, int flags, ...) {
    OPENED(open64, REAL(open64)(path, flags, mode), path, flags)
}

int openat(int folder, const char *path, int flags, ...) {
    OPENED(openat, REAL(openat)(folder, path, flags, mode), path, flags)
}

/* How much of a write is done; -1 with errno where none is. Half of what is torn is
 * written, and nothing of the rest. */
static ssize_t writable(int file, size_t size) {
    switch (trouble_of(file)) {
    case GONE:
        errno = EIO;
        return -1;
    case READ_ONLY:
        errno = EROFS;
        return -1;
    case TORN:
        if (size < 32) {
            errno = EIO;
            return -1;
        }
        return (ssize_t)(size / 2);
    default:
        return (ssize_t)size;
    }
}

ssize_t write(int file, const void *data, size_t size) {
    ssize_t most = writable(file, size);
    return most < 0 ? -1 : REAL(write)(file, data, (size_t)most);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    ssize_t most = writable(file, size);
    return most < 0 ? -1 : REAL(pwrite)(file, data, (size_t)most, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    return pwrite(file, data, size, offset);
}

static int fails_to_cut(int file) {
    enum trouble trouble = trouble_of(file);
    if (trouble != GONE && trouble != READ_ONLY) return 0;
    errno = trouble == GONE ? EIO : EROFS;
    return 1;
}

int ftruncate(int file, off_t size) {
    return fails_to_cut(file) ? -1 : REAL(ftruncate)(file, size);
}

int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

static int fails_to_sync(int file) {
    if (trouble_of(file) != GONE) return 0;
    errno = EIO;
    return 1;
}

int fsync(int file) { return fails_to_sync(file) ? -1 : REAL(fsync)(file); }

int fdatasync(int file) { return fails_to_sync(file) ? -1 : REAL(fdatasync)(file); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (orders && !result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += __atomic_load_n(&orders->clock_ahead_seconds, __ATOMIC_ACQUIRE);
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = REAL(gettimeofday)(now, zone);
    if (orders && !result)
        now->tv_sec += __atomic_load_n(&orders->clock_ahead_seconds, __ATOMIC_ACQUIRE);
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
