/* Preloaded into a process (LD_PRELOAD): writes down, in one log for all processes, what
 * they do to the files below a folder, and what they sync. disk.py reads the log.
 *
 * A change is logged once it is made, a sync when it begins and when it has ended: so a
 * change counts as synced only where it was made before the sync began. Each record is one
 * write to a file opened with O_APPEND, which is whole and in order.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FILES 65536
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int log_file = -1;
static const char *root;
static char watched[MAX_FILES];

__attribute__((constructor)) static void begin(void) {
    root = getenv("DISK_RECORDER_ROOT");
    const char *path = getenv("DISK_RECORDER_LOG");
    if (root && path) log_file = REAL(open)(path, O_WRONLY | O_APPEND | O_CLOEXEC);
}

static void note(const void *data, size_t size, const char *format, ...) {
    struct iovec parts[3];
    char head[PATH_MAX + 256];
    int saved = errno;
    va_list values;
    va_start(values, format);
    parts[0].iov_len = (size_t)vsnprintf(head, sizeof head, format, values);
    va_end(values);
    parts[0].iov_base = head;
    parts[1].iov_base = (void *)data;
    parts[1].iov_len = size;
    parts[2].iov_base = "\n";
    parts[2].iov_len = 1;
    if (REAL(writev)(log_file, parts, 3) < 0) abort();
    errno = saved;
}

/* Names are told by the folder that holds them. */
static int is_below(int folder, const char *path, unsigned long *parent, const char **name) {
    char whole[PATH_MAX], place[64];
    struct stat found;
    if (log_file < 0) return 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) strcpy(place, "/proc/self/cwd");
        else snprintf(place, sizeof place, "/proc/self/fd/%d", folder);
        ssize_t end = readlink(place, whole, sizeof whole - 1);
        if (end < 0) return 0;
        snprintf(whole + end, sizeof whole - (size_t)end, "/%s", path);
    } else {
        snprintf(whole, sizeof whole, "%s", path);
    }
    size_t length = strlen(root);
    if (strncmp(whole, root, length) || (whole[length] && whole[length] != '/')) return 0;
    char *slash = strrchr(whole, '/');
    *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    *slash = 0;
    if (stat(whole, &found)) return 0;
    *parent = found.st_ino;
    return 1;
}

static unsigned long inode_at(int folder, const char *path) {
    struct stat found;
    return fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) ? 0 : found.st_ino;
}

static unsigned long inode_of(int file) {
    struct stat found;
    return fstat(file, &found) ? 0 : found.st_ino;
}

static int is_watched(int file) { return file >= 0 && file < MAX_FILES && watched[file]; }

static int opened(int folder, const char *path, int flags, mode_t mode) {
    unsigned long parent = 0, before = 0;
    const char *name = "";
    int below = is_below(folder, path, &parent, &name);
    int saved = errno;
    if (below) before = inode_at(folder, path);
    errno = saved;
    int file = REAL(openat)(folder, path, flags, mode);
    if (file >= 0 && file < MAX_FILES) {
        watched[file] = (char)below;
        if (below && !before && flags & O_CREAT)
            note("", 0, "create %lu %lu %s", parent, inode_of(file), name);
        if (below && before && flags & O_TRUNC && (flags & O_ACCMODE) != O_RDONLY)
            note("", 0, "truncate %lu 0", before);
    }
    return file;
}

#define MODE(flags, mode)                         \
    mode_t mode = 0;                              \
    if ((flags) & (O_CREAT | O_TMPFILE)) {        \
        va_list values;                           \
        va_start(values, flags);                  \
        mode = (mode_t)va_arg(values, int);       \
        va_end(values);                           \
    }

int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(folder, path, flags, mode);
}

int close(int file) {
    if (file >= 0 && file < MAX_FILES) watched[file] = 0;
    return REAL(close)(file);
}

static void wrote(int file, const void *data, ssize_t size, off_t offset) {
    if (size > 0)
        note(data, (size_t)size, "write %lu %lld %zd\n", inode_of(file), (long long)offset, size);
}

ssize_t write(int file, const void *data, size_t size) {
    ssize_t done = REAL(write)(file, data, size);
    if (is_watched(file)) wrote(file, data, done, lseek(file, 0, SEEK_CUR) - done);
    return done;
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    ssize_t done = REAL(pwrite)(file, data, size, offset);
    if (is_watched(file)) wrote(file, data, done, offset);
    return done;
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    return pwrite(file, data, size, offset);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (is_watched(file)) abort(); /* nobody does; it would have to be recorded */
    return REAL(writev)(file, parts, count);
}

int ftruncate(int file, off_t size) {
    int result = REAL(ftruncate)(file, size);
    if (!result && is_watched(file))
        note("", 0, "truncate %lu %lld", inode_of(file), (long long)size);
    return result;
}

int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

static int synced(int file, int (*sync)(int)) {
    static unsigned counter;
    unsigned number = __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
    if (!is_watched(file)) return sync(file);
    note("", 0, "sync-begins %d.%u %lu", getpid(), number, inode_of(file));
    int result = sync(file);
    if (!result) note("", 0, "sync-ended %d.%u %lu", getpid(), number, inode_of(file));
    return result;
}

int fsync(int file) { return synced(file, REAL(fsync)); }

int fdatasync(int file) { return synced(file, REAL(fdatasync)); }

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    unsigned long from_parent, to_parent;
    const char *from_name, *to_name;
    int below = is_below(from_folder, from, &from_parent, &from_name) &&
                is_below(to_folder, to, &to_parent, &to_name);
    unsigned long inode = below ? inode_at(from_folder, from) : 0;
    int result = REAL(renameat)(from_folder, from, to_folder, to);
    if (!result && below) {
        if (from_parent != to_parent) abort(); /* nobody does; it would be two changes */
        note("", 0, "rename %lu %lu %s %s", to_parent, inode, from_name, to_name);
    }
    return result;
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int folder, const char *path, int flags) {
    unsigned long parent;
    const char *name;
    int below = is_below(folder, path, &parent, &name);
    int result = REAL(unlinkat)(folder, path, flags);
    if (!result && below) note("", 0, "unlink %lu %s", parent, name);
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    unsigned long parent;
    const char *name;
    int below = is_below(folder, path, &parent, &name);
    int result = REAL(mkdirat)(folder, path, mode);
    if (!result && below) note("", 0, "mkdir %lu %lu %s", parent, inode_at(folder, path), name);
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
