/* Guarded tensor memory, for fuzzing.  LD_PRELOAD it in front of a process that uses torch's CPU
 * allocator, which takes all tensor memory with posix_memalign.
 *
 * Each allocation ends at an inaccessible page, its start is preceded by one, and all of it is
 * filled with a pattern, so that
 *   - a read or write past either end ends the process with SIGSEGV,
 *   - a shorter read outside of the tensor, and any read of uninitialised memory, gives results
 *     that depend on the pattern (run twice, with two patterns, and compare),
 *   - a write between the end of the tensor and that page is found when it is freed (SIGABRT),
 *   - a use after free ends with SIGSEGV: addresses are not used again.
 * Requests beyond guard_limit() bytes in all fail with ENOMEM, and guard_peak() says what was used.
 *
 *   cc -O2 -shared -fPIC -o guard_malloc.so guard_malloc.c -ldl -lpthread
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define REGION (1UL << 43)
#define MAGIC 0x6e67756172643031UL

typedef struct {
  uint64_t magic, size, mapped, base;
  uint64_t filled; /* the byte that was used, once for each allocation */
} header; /* at the start of the first, readable but never handed out, page */

static char *region, *next_free;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t live, peak, limit = 1UL << 33;
static unsigned char pattern = 0xA5;
static void (*real_free)(void *);

void guard_pattern(unsigned char byte) { pattern = byte; }
void guard_limit(size_t bytes) { limit = bytes; }
void guard_reset(void) { peak = live; }
size_t guard_live(void) { return live; }
size_t guard_peak(void) { return peak; }

static size_t up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

int posix_memalign(void **out, size_t alignment, size_t size) {
  if (alignment < 64) alignment = 64;
  if (alignment > PAGE) return ENOMEM;
  if (size > (1UL << 40)) return ENOMEM;
  size_t body = up(up(size ? size : 1, alignment), PAGE);
  size_t mapped = PAGE + body; /* one header page and the body, with a guard page after each */
  pthread_mutex_lock(&lock);
  if (!region) {
    region = mmap(NULL, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) abort();
    next_free = region;
  }
  if (live + size > limit || (size_t)(next_free - region) + mapped + 2 * PAGE > REGION) {
    pthread_mutex_unlock(&lock);
    return ENOMEM;
  }
  char *base = next_free;
  next_free += mapped + 2 * PAGE;
  live += size;
  if (live > peak) peak = live;
  pthread_mutex_unlock(&lock);
  /* page 0: header; page 1: inaccessible; then the body, then a page that is inaccessible */
  if (mprotect(base, PAGE, PROT_READ | PROT_WRITE)) return ENOMEM;
  if (mprotect(base + 2 * PAGE, body, PROT_READ | PROT_WRITE)) return ENOMEM;
  memset(base + 2 * PAGE, pattern, body);
  header *head = (header *)base;
  char *user = base + 2 * PAGE + body - up(size ? size : 1, alignment);
  *head = (header){MAGIC, size, body, (uint64_t)user, pattern};
  *out = user;
  return 0;
}

static void release(char *user) {
  /* The body begins on the page of `user`'s allocation; walk down to its header. */
  char *page = (char *)((uintptr_t)user & ~(PAGE - 1));
  header *head = (header *)(page - 2 * PAGE);
  if (head->magic != MAGIC || head->base != (uint64_t)user) abort();
  unsigned char filled = (unsigned char)head->filled;
  for (unsigned char *at = (unsigned char *)page; at < (unsigned char *)user; at++)
    if (*at != filled) abort(); /* written before its start */
  for (unsigned char *at = (unsigned char *)user + head->size;
       at < (unsigned char *)page + head->mapped; at++)
    if (*at != filled) abort(); /* written past its end */
  size_t size = head->size, mapped = head->mapped;
  madvise(page - 2 * PAGE, mapped + 2 * PAGE, MADV_DONTNEED);
  mprotect(page - 2 * PAGE, mapped + 2 * PAGE, PROT_NONE);
  pthread_mutex_lock(&lock);
  live -= size;
  pthread_mutex_unlock(&lock);
}

void free(void *pointer) {
  if (region && (char *)pointer >= region && (char *)pointer < region + REGION) {
    release(pointer);
    return;
  }
  if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
  real_free(pointer);
}
