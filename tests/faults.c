/* Calls of the C library that fail, stop or kill the process on request: preloaded by
 * tests/faults.py.
 *
 * Every call that touches a file below one directory is counted and written down. The n-th of
 * those that were asked for does what was asked for: it fails, is cut short, or is preceded or
 * followed by a signal. The record is in memory that forked children share, so that it is there
 * however they end.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* As in tests/faults.py. */
enum {
    CREATE = 1, ALLOCATE = 2, WRITE = 4, SYNC = 8, SYNC_FOLDER = 16, LINK = 32, RENAME = 64,
    REMOVE = 128, MKDIR = 256, CHMOD = 512, READ = 1024, OPEN = 2048
};
enum { NOTHING, FAIL, SIGNAL_BEFORE, SIGNAL_AFTER, SHORT };
enum { NO_EXCHANGE = 1, NO_LINK = 2 };

#define LOG_SIZE (4 << 20)

struct state {
    unsigned kinds, refused;
    int act, value, sticky, armed;
    long number;
    char root[4096];
    atomic_long count, length;
    char log[LOG_SIZE];
};

static struct state *state;
static __thread int signal_after, shortened;

void faults_arm(const char *root, unsigned kinds, long number, int act, int value, int sticky,
                unsigned refused) {
    snprintf(state->root, sizeof state->root, "%s", root);
    state->kinds = kinds;
    state->number = number;
    state->act = act;
    state->value = value;
    state->sticky = sticky;
    state->refused = refused;
    state->count = 0;
    state->length = 0;
    state->armed = 1;
}

/* A process that is started anew is armed from its first call; one that forks arms itself. */
__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (state == MAP_FAILED)
        abort();
    const char *words = getenv("FAULTS"), *root = getenv("FAULTS_ROOT");
    unsigned kinds, refused;
    long number;
    int act, value, sticky;
    if (words && root && sscanf(words, "%u %ld %d %d %d %u", &kinds, &number, &act, &value,
                                &sticky, &refused) == 6)
        faults_arm(root, kinds, number, act, value, sticky, refused);
}

const char *faults_log(void) {
    state->log[state->length < LOG_SIZE ? state->length : LOG_SIZE - 1] = 0;
    return state->log;
}

static int is_below(const char *path) {
    size_t length = strlen(state->root);
    return strncmp(path, state->root, length) == 0 && (path[length] == '/' || !path[length]);
}

/* Whether the call is one that counts; the file's name is put where the caller wants it. */
static int concerns(int folder, const char *path, char *full) {
    if (!state->armed)
        return 0;
    if (path && (path[0] == '/' || folder == AT_FDCWD)) {
        snprintf(full, PATH_MAX, "%s", path);
        return path[0] != '/' || is_below(full);
    }
    char link[64], name[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, name, sizeof name - 1);
    if (size < 0)
        return 0;
    name[size] = 0;
    if (path)
        snprintf(full, PATH_MAX, "%.2000s/%.2000s", name, path);
    else
        snprintf(full, PATH_MAX, "%s", name);
    return is_below(full);
}

/* The error to fail with, or 0. */
static int decide(unsigned kind, const char *call, int folder, const char *path) {
    int before = errno, number = 0;
    char full[PATH_MAX], line[PATH_MAX + 64];
    signal_after = shortened = 0;
    if (!concerns(folder, path, full)) {
        errno = before;
        return 0;
    }
    int size = snprintf(line, sizeof line, "%u %s %s\n", kind, call, full);
    long at = atomic_fetch_add(&state->length, size);
    if (at + size < LOG_SIZE)
        memcpy(state->log + at, line, size);
    if (kind & state->kinds) {
        long count = atomic_fetch_add(&state->count, 1) + 1;
        if (count == state->number || (state->sticky && count > state->number)) {
            if (state->act == FAIL)
                number = state->value;
            else if (state->act == SIGNAL_BEFORE)
                kill(getpid(), state->value);
            else if (state->act == SIGNAL_AFTER)
                signal_after = state->value;
            else if (state->act == SHORT)
                shortened = 1;
        }
    }
    errno = before;
    return number;
}

static long finish(long result) {
    int number = errno, sent = signal_after;
    signal_after = 0;
    if (sent)
        kill(getpid(), sent);
    errno = number;
    return result;
}

static size_t part(size_t size) {
    return shortened && size > 1 ? size / 2 : size;
}

#define FIND(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define UNLESS_FAILING(kind, call, folder, path) \
    do { \
        int number = decide(kind, call, folder, path); \
        if (number) { errno = number; return -1; } \
    } while (0)

static unsigned sync_of(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISDIR(status.st_mode) ? SYNC_FOLDER : SYNC;
}

#define OPENING(name, DECLARED, FOLDER, PASSED) \
    int name DECLARED { \
        FIND(name); \
        mode_t mode = 0; \
        int creates = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE; \
        if (creates) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        if (!(flags & O_DIRECTORY) || creates) \
            UNLESS_FAILING(creates ? CREATE : OPEN, #name, FOLDER, path); \
        return finish(real PASSED); \
    }

OPENING(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(openat, (int folder, const char *path, int flags, ...), folder, (folder, path, flags, mode))
OPENING(openat64, (int folder, const char *path, int flags, ...), folder,
        (folder, path, flags, mode))

/* posix_fallocate returns its error. */
#define ALLOCATING(name, offset_type) \
    int name(int fd, offset_type start, offset_type size) { \
        FIND(name); \
        int number = decide(ALLOCATE, #name, fd, NULL); \
        return number ? number : (int)finish(real(fd, start, size)); \
    }
ALLOCATING(posix_fallocate, off_t)
ALLOCATING(posix_fallocate64, off64_t)

#define TRUNCATING(name, offset_type) \
    int name(int fd, offset_type size) { \
        FIND(name); \
        UNLESS_FAILING(ALLOCATE, #name, fd, NULL); \
        return finish(real(fd, size)); \
    }
TRUNCATING(ftruncate, off_t)
TRUNCATING(ftruncate64, off64_t)

#define WRITING(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
        FIND(name); \
        UNLESS_FAILING(WRITE, #name, fd, NULL); \
        return finish(real(fd, data, part(size), offset)); \
    }
WRITING(pwrite, off_t)
WRITING(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t size) {
    FIND(write);
    UNLESS_FAILING(WRITE, "write", fd, NULL);
    return finish(real(fd, data, part(size)));
}

#define READING(name, offset_type) \
    ssize_t name(int fd, void *data, size_t size, offset_type offset) { \
        FIND(name); \
        UNLESS_FAILING(READ, #name, fd, NULL); \
        return finish(real(fd, data, part(size), offset)); \
    }
READING(pread, off_t)
READING(pread64, off64_t)

ssize_t read(int fd, void *data, size_t size) {
    FIND(read);
    UNLESS_FAILING(READ, "read", fd, NULL);
    return finish(real(fd, data, part(size)));
}

#define READING_MANY(name, ARGUMENTS, PASSED, SHORTER) \
    ssize_t name ARGUMENTS { \
        FIND(name); \
        UNLESS_FAILING(READ, #name, fd, NULL); \
        struct iovec one; \
        if (shortened && count == 1) { \
            one = (struct iovec){places->iov_base, part(places->iov_len)}; \
            return finish(real SHORTER); \
        } \
        return finish(real PASSED); \
    }
READING_MANY(preadv, (int fd, const struct iovec *places, int count, off_t offset),
             (fd, places, count, offset), (fd, &one, 1, offset))
READING_MANY(preadv64, (int fd, const struct iovec *places, int count, off64_t offset),
             (fd, places, count, offset), (fd, &one, 1, offset))
READING_MANY(preadv2, (int fd, const struct iovec *places, int count, off_t offset, int flags),
             (fd, places, count, offset, flags), (fd, &one, 1, offset, flags))
READING_MANY(preadv64v2,
             (int fd, const struct iovec *places, int count, off64_t offset, int flags),
             (fd, places, count, offset, flags), (fd, &one, 1, offset, flags))

#define ONE_PATH(name, kind, folder, DECLARED, PASSED) \
    int name DECLARED { \
        FIND(name); \
        UNLESS_FAILING(kind, #name, folder, path); \
        return finish(real PASSED); \
    }
ONE_PATH(unlink, REMOVE, AT_FDCWD, (const char *path), (path))
ONE_PATH(unlinkat, REMOVE, folder, (int folder, const char *path, int flags),
         (folder, path, flags))
ONE_PATH(rmdir, REMOVE, AT_FDCWD, (const char *path), (path))
ONE_PATH(mkdir, MKDIR, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ONE_PATH(mkdirat, MKDIR, folder, (int folder, const char *path, mode_t mode),
         (folder, path, mode))
ONE_PATH(chmod, CHMOD, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ONE_PATH(fchmodat, CHMOD, folder, (int folder, const char *path, mode_t mode, int flags),
         (folder, path, mode, flags))
ONE_PATH(rename, RENAME, AT_FDCWD, (const char *path, const char *other), (path, other))
ONE_PATH(renameat, RENAME, folder,
         (int folder, const char *path, int target, const char *other),
         (folder, path, target, other))

int fchmod(int fd, mode_t mode) {
    FIND(fchmod);
    UNLESS_FAILING(CHMOD, "fchmod", fd, NULL);
    return finish(real(fd, mode));
}

int renameat2(int folder, const char *path, int target, const char *other, unsigned flags) {
    FIND(renameat2);
    if (state->armed && (state->refused & NO_EXCHANGE) && (flags & RENAME_EXCHANGE)) {
        errno = EINVAL;
        return -1;
    }
    UNLESS_FAILING(RENAME, "renameat2", folder, path);
    return finish(real(folder, path, target, other, flags));
}

/* Links are told by the new name: the old one may be in /proc. */
int link(const char *path, const char *other) {
    FIND(link);
    if (state->armed && (state->refused & NO_LINK)) {
        errno = EPERM;
        return -1;
    }
    UNLESS_FAILING(LINK, "link", AT_FDCWD, other);
    return finish(real(path, other));
}

int linkat(int folder, const char *path, int target, const char *other, int flags) {
    FIND(linkat);
    if (state->armed && (state->refused & NO_LINK)) {
        errno = EPERM;
        return -1;
    }
    UNLESS_FAILING(LINK, "linkat", target, other);
    return finish(real(folder, path, target, other, flags));
}

/* It is processes that die here, not the machine: nothing needs to reach the disk. */
int fsync(int fd) {
    UNLESS_FAILING(sync_of(fd), "fsync", fd, NULL);
    return finish(0);
}

int fdatasync(int fd) {
    UNLESS_FAILING(sync_of(fd), "fdatasync", fd, NULL);
    return finish(0);
}
