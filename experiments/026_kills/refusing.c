/* A disk that refuses: preloaded, it lets the first REFUSE_AFTER bytes that a process writes below REFUSE_BELOW pass, and
 * answers every later write and fsync there with the error REFUSE_WITH. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static long written;

static int below(int fd) {
    const char *folder = getenv("REFUSE_BELOW");
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = folder ? readlink(link, path, sizeof path - 1) : -1;
    return length >= (ssize_t)(folder ? strlen(folder) : 0) && length > 0 && !strncmp(path, folder, strlen(folder));
}

static int refused(int fd, long bytes) {
    int before = errno;
    if (!below(fd)) {
        errno = before;
        return 0;
    }
    if (__sync_add_and_fetch(&written, bytes) <= atol(getenv("REFUSE_AFTER"))) {
        errno = before;
        return 0;
    }
    errno = atoi(getenv("REFUSE_WITH"));
    return 1;
}

static long length_of(const struct iovec *parts, int count) {
    long bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return bytes;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) { return refused(fd, n) ? -1 : REAL(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return refused(fd, n) ? -1 : REAL(pwrite)(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return refused(fd, n) ? -1 : REAL(pwrite64)(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return refused(fd, length_of(parts, n)) ? -1 : REAL(writev)(fd, parts, n); }
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) {
    return refused(fd, length_of(parts, n)) ? -1 : REAL(pwritev)(fd, parts, n, at);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t at) {
    return refused(fd, length_of(parts, n)) ? -1 : REAL(pwritev64)(fd, parts, n, at);
}
int fsync(int fd) { return refused(fd, 0) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return refused(fd, 0) ? -1 : REAL(fdatasync)(fd); }
