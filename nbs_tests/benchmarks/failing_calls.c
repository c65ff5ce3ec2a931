/* Loaded before the C library: counts the calls of a process that write below a folder, or open there, and has the n-th fail once.

   gcc -O1 -shared -fPIC failing_calls.c -ldl; then LD_PRELOAD; `arm` and `failed` are called from Python. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long wanted, seen, kind; /* of two errors, the first or the second */
static char name[PATH_MAX + 32];

/* From now on the n-th call below a folder fails; 0: none. */
void arm(const char *folder, long n, long which) {
    strncpy(below, folder, sizeof below - 1);
    seen = 0, wanted = n, kind = which, name[0] = 0;
}

/* The call that failed, and its path; empty where none has. Counts and fails no more. */
const char *failed(void) {
    below[0] = 0;
    return name;
}

static int fails(const char *call, const char *path, int first, int second) {
    if (!below[0] || strncmp(path, below, strlen(below)) || path[strlen(below)] != '/') return 0;
    if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != wanted) return 0;
    snprintf(name, sizeof name, "%s %s", call, path);
    errno = kind ? second : first;
    return 1;
}

static const char *of_descriptor(int descriptor, char *path) {
    char link[40];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size > 0 ? size : 0] = 0;
    errno = before;
    return path;
}

static const char *whole(int folder, const char *given, char *path) {
    if (given[0] == '/') return given;
    char at[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(at, sizeof at)) at[0] = 0;
    } else
        of_descriptor(folder, at);
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", at, given);
    return path;
}

#define REAL(call) static __typeof__(call) *real; if (!real) real = (__typeof__(call) *)dlsym(RTLD_NEXT, #call)
#define PATH char path[PATH_MAX]

#define OPEN(call)                                                                                        \
    int call(const char *given, int flags, ...) {                                                         \
        REAL(call); PATH; va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, int); va_end(rest); \
        int makes = flags & O_CREAT;                                                                      \
        if (fails(makes ? "create" : "open", whole(AT_FDCWD, given, path), makes ? ENOSPC : EACCES, makes ? EACCES : EIO)) return -1; \
        return real(given, flags, mode);                                                                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(call)                                                                                      \
    int call(int folder, const char *given, int flags, ...) {                                             \
        REAL(call); PATH; va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, int); va_end(rest); \
        int makes = flags & O_CREAT;                                                                      \
        if (fails(makes ? "create" : "open", whole(folder, given, path), makes ? ENOSPC : EACCES, makes ? EACCES : EIO)) return -1; \
        return real(folder, given, flags, mode);                                                          \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_DESCRIPTOR(type, call, word, first, second, parameters, ...)                                   \
    type call parameters {                                                                                \
        REAL(call); PATH;                                                                                 \
        if (below[0] && fails(word, of_descriptor(descriptor, path), first, second)) return -1;           \
        return real(__VA_ARGS__);                                                                         \
    }
ON_DESCRIPTOR(ssize_t, write, "write", ENOSPC, EIO, (int descriptor, const void *bytes, size_t size), descriptor, bytes, size)
ON_DESCRIPTOR(ssize_t, writev, "write", ENOSPC, EIO, (int descriptor, const struct iovec *parts, int count), descriptor, parts, count)
ON_DESCRIPTOR(ssize_t, pwrite, "write", ENOSPC, EDQUOT, (int descriptor, const void *bytes, size_t size, off_t at), descriptor, bytes, size, at)
ON_DESCRIPTOR(ssize_t, pwrite64, "write", ENOSPC, EDQUOT, (int descriptor, const void *bytes, size_t size, off64_t at), descriptor, bytes, size, at)
ON_DESCRIPTOR(int, fsync, "fsync", EIO, ENOSPC, (int descriptor), descriptor)
ON_DESCRIPTOR(int, fdatasync, "fsync", EIO, ENOSPC, (int descriptor), descriptor)
ON_DESCRIPTOR(int, ftruncate, "truncate", EIO, ENOSPC, (int descriptor, off_t size), descriptor, size)
ON_DESCRIPTOR(int, ftruncate64, "truncate", EIO, ENOSPC, (int descriptor, off64_t size), descriptor, size)

#define ON_PATH(call, word, first, second, folder, given, parameters, ...)                                \
    int call parameters {                                                                                 \
        REAL(call); PATH;                                                                                 \
        if (below[0] && fails(word, whole(folder, given, path), first, second)) return -1;                \
        return real(__VA_ARGS__);                                                                         \
    }
ON_PATH(mkdir, "mkdir", ENOSPC, EACCES, AT_FDCWD, at, (const char *at, mode_t mode), at, mode)
ON_PATH(mkdirat, "mkdir", ENOSPC, EACCES, folder, at, (int folder, const char *at, mode_t mode), folder, at, mode)
ON_PATH(unlink, "unlink", EACCES, EIO, AT_FDCWD, at, (const char *at), at)
ON_PATH(unlinkat, "unlink", EACCES, EIO, folder, at, (int folder, const char *at, int flags), folder, at, flags)
ON_PATH(rmdir, "rmdir", EACCES, EIO, AT_FDCWD, at, (const char *at), at)
ON_PATH(rename, "rename", EACCES, ENOSPC, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, "rename", EACCES, ENOSPC, there, to, (int here, const char *from, int there, const char *to), here, from, there, to)
ON_PATH(renameat2, "exchange", EINVAL, EACCES, there, to, (int here, const char *from, int there, const char *to, unsigned flags), here, from, there, to, flags)
ON_PATH(link, "link", EACCES, ENOSPC, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(linkat, "link", EACCES, ENOSPC, there, to, (int here, const char *from, int there, const char *to, int flags), here, from, there, to, flags)
