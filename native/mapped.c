#include "mapped.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __APPLE__
#define MODIFIED st_mtimespec
#else
#define MODIFIED st_mtim
#endif

/* ---- what the signal handler may look at ---- */

/* A mapping, as the handler sees it. Slots are never freed, only used again, so that the list can be walked at any moment; a slot whose
 * turn was odd, or another one afterwards, was about to change: it is not that of the mapping whose page is missing, for that one is in use. */
typedef struct slot {
    _Atomic uint64_t turn;
    _Atomic uintptr_t begin, end; /* whole pages; both 0: free */
    _Atomic bool torn;
    struct slot *next; /* written once */
} slot;

static slot *_Atomic slots;
static slot first_slots[64];                                    /* memory is asked for only beyond these */
static pthread_mutex_t slots_mutex = PTHREAD_MUTEX_INITIALIZER; /* for those who add or remove; the handler does without */
static uintptr_t page_bytes;
static struct sigaction before; /* the handler that was there */

static void set_slot(slot *s, uintptr_t begin, uintptr_t end) {
    atomic_fetch_add(&s->turn, 1);
    atomic_store(&s->begin, begin);
    atomic_store(&s->end, end);
    atomic_store(&s->torn, false);
    atomic_fetch_add(&s->turn, 1);
}

static slot *find_slot(uintptr_t address) {
    for (slot *s = atomic_load(&slots); s; s = s->next) {
        uint64_t turn = atomic_load(&s->turn);
        bool inside = address >= atomic_load(&s->begin) && address < atomic_load(&s->end);
        if (inside && turn % 2 == 0 && turn == atomic_load(&s->turn)) return s;
    }
    return NULL;
}

/* Zeros from the missing page to the end of the mapping: one call, however much is gone, and what is still there is of no use any more.
 * The only mapping that does not ask kvs_refused(): without it there is no way back. */
static bool fill(uintptr_t address) {
    slot *s = find_slot(address);
    if (!s) return false;
    atomic_store(&s->torn, true); /* before anybody can read a zero */
    uintptr_t page = address / page_bytes * page_bytes;
    void *zeros = mmap((void *)page, atomic_load(&s->end) - page, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return zeros != MAP_FAILED;
}

static void pass_on(int number, siginfo_t *info, void *context) {
    bool sent = info->si_code <= 0; /* by kill(), not by a page */
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else if (before.sa_handler == SIG_DFL || !sent) {
        struct sigaction standard = {.sa_handler = SIG_DFL};
        sigaction(number, &standard, NULL);
        raise(number); /* it is blocked in here: it comes when we return */
    }
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    if (info->si_code <= 0 || !fill((uintptr_t)info->si_addr)) pass_on(number, info, context);
    errno = saved;
}

/* Once, and again where somebody has put the standard action back since. slots_mutex is held. */
static void install_handler(void) {
    static bool installed;
    const char *wish = getenv("KVS_SIGBUS");
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    if ((wish && !strcmp(wish, "0")) || sigaction(SIGBUS, NULL, &now)) return;
    bool standard = !(now.sa_flags & SA_SIGINFO) && now.sa_handler == SIG_DFL;
    if (installed && !standard) return; /* it is there, or below one that came later */
    before = now;
    sigemptyset(&ours.sa_mask);
    installed = !sigaction(SIGBUS, &ours, NULL);
}

static void lock(void) { pthread_mutex_lock(&slots_mutex); }
static void unlock(void) { pthread_mutex_unlock(&slots_mutex); }

static slot *new_slot(void) { /* slots_mutex is held */
    static size_t n;
    return n < sizeof first_slots / sizeof *first_slots ? &first_slots[n++] : kvs_calloc(1, sizeof *first_slots);
}

static slot *take_slot(const void *data, uint64_t size) {
    lock();
    if (!page_bytes) {
        page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
        pthread_atfork(lock, unlock, unlock); /* a child may load a model of its own */
    }
    install_handler();
    slot *s = atomic_load(&slots);
    while (s && atomic_load(&s->end)) s = s->next;
    if (!s && (s = new_slot())) {
        s->next = atomic_load(&slots);
        atomic_store(&slots, s);
    }
    uintptr_t begin = (uintptr_t)data;
    if (s) set_slot(s, begin, begin + ((uintptr_t)size + page_bytes - 1) / page_bytes * page_bytes);
    unlock();
    return s;
}

static void give_slot(slot *s) {
    lock();
    set_slot(s, 0, 0);
    unlock();
}

/* ---- a file ---- */

struct kvs_mapped {
    char *path;
    int fd; /* stays open: the name may be another file's by tomorrow */
    uint8_t *data;
    uint64_t size;
    struct timespec modified;
    slot *slot;
    _Atomic bool spoiled;
    _Atomic uint64_t shrunk; /* to so many bytes, when it was noticed; size: it has not */
};

static int fail_os(const char *path, int code, const char *verb, kvs_error *err) {
    return kvs_fail_file(err, KVS_E_IO, path, "", code, "cannot be %s: %s; check the path and its permissions", verb, strerror(code));
}

static int map(kvs_mapped *f, kvs_error *err) {
    struct stat st;
    if (fstat(f->fd, &st)) return fail_os(f->path, errno, "examined", err);
    if (S_ISDIR(st.st_mode)) return kvs_fail_file(err, KVS_E_IO, f->path, "", EISDIR, "is a folder; give the GGUF file in it");
    if (!S_ISREG(st.st_mode))
        return kvs_fail_file(err, KVS_E_IO, f->path, "", EINVAL, "is no regular file: a model is mapped, not streamed");
    if (st.st_size <= 0) return kvs_fail_file(err, KVS_E_FORMAT, f->path, "", 0, "the file is empty");
    f->size = (uint64_t)st.st_size;
    f->modified = st.MODIFIED;
    atomic_store(&f->shrunk, f->size);
    bool refused = f->size > SIZE_MAX / 2 || kvs_refused();
    void *data = refused ? MAP_FAILED : mmap(NULL, (size_t)f->size, PROT_READ, MAP_PRIVATE, f->fd, 0);
    if (data == MAP_FAILED && (refused || errno == ENOMEM)) return kvs_fail_memory(err, f->size, "the address space of a model file");
    if (data == MAP_FAILED) return fail_os(f->path, errno, "mapped", err);
    f->data = data;
    f->slot = take_slot(data, f->size);
    return f->slot ? KVS_OK : kvs_fail_memory(err, sizeof(slot), "a model file");
}

int kvs_mapped_open(const char *path, kvs_mapped **out, kvs_error *err) {
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK); /* a FIFO must not block us */
    if (fd < 0) return fail_os(path, errno, "opened", err);
    kvs_mapped *f = kvs_calloc(1, sizeof *f);
    if (!f) {
        close(fd);
        return kvs_fail_memory(err, sizeof *f, "a model file");
    }
    f->fd = fd;
    f->path = kvs_calloc(strlen(path) + 1, 1);
    if (f->path) strcpy(f->path, path);
    int status = f->path ? map(f, err) : kvs_fail_memory(err, strlen(path) + 1, "a path");
    if (status)
        kvs_mapped_close(f);
    else
        *out = f;
    return status;
}

void kvs_mapped_close(kvs_mapped *f) {
    if (!f) return;
    if (f->slot) give_slot(f->slot);
    if (f->data) munmap(f->data, (size_t)f->size);
    close(f->fd);
    free(f->path);
    free(f);
}

const uint8_t *kvs_mapped_data(const kvs_mapped *f) { return f->data; }
uint64_t kvs_mapped_size(const kvs_mapped *f) { return f->size; }
const char *kvs_mapped_path(const kvs_mapped *f) { return f->path; }

static int fail_spoiled(const kvs_mapped *f, kvs_error *err) {
    uint64_t shrunk = atomic_load(&f->shrunk);
    if (shrunk < f->size)
        return kvs_fail_file(err, KVS_E_FORMAT, f->path, "", -1,
                             "the file shrank from %llu to %llu bytes while in use; load it again when it is whole, and put another "
                             "file in its place by renaming, not by writing into it",
                             (unsigned long long)f->size, (unsigned long long)shrunk);
    if (atomic_load(&f->slot->torn))
        return kvs_fail_file(err, KVS_E_FORMAT, f->path, "", -1,
                             "a part of the file could not be read while it was in use: it has shrunk and grown again, or its disk fails");
    return kvs_fail_file(err, KVS_E_FORMAT, f->path, "", -1,
                         "the file has changed since it was loaded; load it again, and put another file in its place by renaming, not "
                         "by writing into it");
}

int kvs_mapped_check(kvs_mapped *f, kvs_error *err) {
    struct stat st;
    if (atomic_load(&f->spoiled)) return fail_spoiled(f, err);
    bool known = !fstat(f->fd, &st);
    bool same = !known ||
                ((uint64_t)st.st_size == f->size && st.MODIFIED.tv_sec == f->modified.tv_sec && st.MODIFIED.tv_nsec == f->modified.tv_nsec);
    if (same && !atomic_load(&f->slot->torn)) return KVS_OK;
    if (known && (uint64_t)st.st_size < f->size) atomic_store(&f->shrunk, (uint64_t)st.st_size);
    atomic_store(&f->spoiled, true);
    return fail_spoiled(f, err);
}
