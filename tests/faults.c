/* A disk that is full from the n-th write on, for test_faults.py: preloaded, it stands in front of libc's calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long first = 0, seen = 0;

void full_from(const char *path, long n) { strncpy(folder, path, sizeof folder - 1); first = n; seen = 0; }
long calls_seen(void) { return seen; }

static int fails_path(const char *path) {
    return *folder && !strncmp(path, folder, strlen(folder)) && ++seen >= first && first && (errno = ENOSPC);
}
static int fails(int fd) {
    char link[64], path[4096];
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails_path(path);
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *b, size_t n) { REAL(write); return fails(fd) ? -1 : real(fd, b, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); return fails(fd) ? -1 : real(fd, v, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { REAL(pwrite); return fails(fd) ? -1 : real(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { REAL(pwrite64); return fails(fd) ? -1 : real(fd, b, n, o); }
int fsync(int fd) { REAL(fsync); return fails(fd) ? -1 : real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); return fails(fd) ? -1 : real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return fails(fd) ? -1 : real(fd, n); }
int rename(const char *a, const char *b) { REAL(rename); return fails_path(b) ? -1 : real(a, b); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails_path(path) ? -1 : real(path, mode); }
