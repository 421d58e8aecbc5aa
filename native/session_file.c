/* session_file.c - a session on disk: written to a temporary name, flushed, renamed; checksummed, tied to its model. What a killed
 * process leaves half written, the next one removes that saves to the same path.
 *
 * Layout, little-endian: header (struct below, with a checksum of its own), timeline, cache rows by layer and head, history,
 * ring of exact rows, logits, and a 64-bit checksum over all of it. */
#include "session.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_VERSION = 4, MAX_PATH = PATH_MAX };

typedef struct saved_policy {
    char name[16];
    int32_t n, zero;
    double value[KVS_MAX_FACTS]; /* its facts */
} saved_policy;

typedef struct header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t identity, mmproj_identity;
    int32_t n_ctx, kv_type, n_exact, n_policies;
    int32_t n_past, n_turns, n_pictures, n_events, quiet, exact_from, has_logits, zero;
    saved_policy policies[KVS_MAX_POLICIES];
    kvs_rng rng;
    uint64_t check; /* hash of all the above: a damaged header must not pass for one of another model or policy */
} header;

typedef struct saved_event {
    int32_t index, forced, n_dropped, first;
} saved_event;

typedef struct stream {
    FILE *file;
    bool write, failed;
    bool memory; /* it failed for want of it */
    bool cancelled;
    const int32_t *cancel;
    uint64_t hash;
    const char *path;
    const kvs_backend *be;
    uint8_t *buffer; /* for device memory */
    uint64_t buffer_bytes;
} stream;

/* One function for both directions, so that reader and writer can't drift apart. */
static void transfer(stream *f, void *data, uint64_t bytes) {
    if (kvs_cancelled(f->cancel)) f->failed = f->cancelled = true;
    if (f->failed || !bytes) return;
    size_t done = f->write ? fwrite(data, 1, (size_t)bytes, f->file) : fread(data, 1, (size_t)bytes, f->file);
    f->failed = done != bytes;
    if (!f->failed) f->hash = kvs_hash(f->hash, data, bytes);
}

static void transfer_device(stream *f, void *device, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes && !f->failed; at += f->buffer_bytes) {
        uint64_t n = KVS_MIN(bytes - at, f->buffer_bytes);
        kvs_backend *be = (kvs_backend *)f->be;
        if (f->write) be->ops->download(be, f->buffer, (uint8_t *)device + at, n);
        transfer(f, f->buffer, n);
        if (!f->write && !f->failed) be->ops->upload(be, (uint8_t *)device + at, f->buffer, n);
    }
}

typedef struct saved_picture {
    int32_t first, n, sealed, has_depth;
} saved_picture;

/* Of a file only n_pictures is known yet. The depths follow their pictures; a length that can't be ends the reading. */
static void transfer_pictures(stream *f, kvs_cache *cache) {
    for (int32_t i = 0; i < cache->n_pictures; i++) {
        kvs_picture *p = &cache->pictures[i];
        saved_picture saved = {p->first, p->n, p->sealed, p->depth != NULL};
        transfer(f, &saved, sizeof saved);
        if (f->failed) return;
        if (!f->write) {
            p->first = saved.first, p->n = saved.n, p->sealed = saved.sealed;
            f->failed = saved.n < 1 || saved.n > cache->n_past || (saved.has_depth != 0 && saved.has_depth != 1);
            if (saved.has_depth && !f->failed) p->depth = kvs_calloc((uint64_t)saved.n, sizeof *p->depth);
            if (saved.has_depth && !f->failed && !p->depth) f->failed = f->memory = true;
        }
        if (!f->failed && p->depth) transfer(f, p->depth, (uint64_t)p->n * sizeof *p->depth);
    }
}

/* Events, which rows they took, and those rows where they are kept. The numbers come first: a reader must trust them before the rest. */
static void transfer_events(stream *f, kvs_cache *cache) {
    kvs_pruned *p = &cache->pruned;
    const kvs_kv *kv = &cache->kv;
    for (int32_t layer = 0; layer < kv->n_layer && p->n_events; layer++)
        for (int32_t set = 0; set < kv->n_sets; set++)
            transfer(f, kvs_pruned_list(p, kv, layer, set), (uint64_t)cache->n_past * sizeof *p->gone);
    for (int32_t i = 0; i < p->n_events; i++) {
        const kvs_event *e = &p->events[i];
        if (e->rows) transfer(f, e->rows, 2 * (uint64_t)e->n_moves * (uint64_t)e->n_dropped * (uint64_t)kv->row_bytes);
    }
}

static void transfer_cache(stream *f, kvs_cache *cache) {
    kvs_kv *kv = &cache->kv;
    uint64_t history = (uint64_t)cache->n_past * (uint64_t)kv->n_group * sizeof(float);
    transfer(f, cache->ids, (uint64_t)cache->n_past * sizeof *cache->ids);
    transfer(f, cache->hashes, (uint64_t)cache->n_past * sizeof *cache->hashes);
    transfer(f, cache->flags, (uint64_t)cache->n_past * sizeof *cache->flags);
    transfer(f, cache->turns, (uint64_t)cache->n_turns * sizeof *cache->turns);
    transfer_pictures(f, cache);
    transfer_events(f, cache);
    for (int32_t layer = 0; layer < kv->n_layer; layer++) {
        uint64_t rows = (uint64_t)kvs_cache_n_rows(cache, layer) * (uint64_t)kv->row_bytes;
        for (int32_t head = 0; head < kv->n_kv_head; head++) {
            transfer_device(f, kvs_kv_rows(kv, kv->k, layer, head), rows);
            transfer_device(f, kvs_kv_rows(kv, kv->v, layer, head), rows);
        }
        transfer_device(f, kv->entropy + kvs_kv_history(kv, layer, 0), history);
        transfer_device(f, kv->strength + kvs_kv_history(kv, layer, 0), history);
        transfer_device(f, kv->mass + kvs_kv_mass(kv, layer, 0), (uint64_t)cache->n_past * sizeof(float));
    }
    uint64_t ring = (uint64_t)kv->n_layer * (uint64_t)kv->n_exact * (uint64_t)kv->head_dim * sizeof(float);
    if (kv->exact_k) transfer_device(f, kv->exact_k, ring * (uint64_t)kv->n_kv_head);
    if (kv->exact_v) transfer_device(f, kv->exact_v, ring * (uint64_t)kv->n_kv_head);
    if (kv->exact_o) transfer_device(f, kv->exact_o, ring * (uint64_t)kv->n_head);
}

static uint64_t header_check(const header *h) { return kvs_hash(0, h, offsetof(header, check)); }

static int file_error(kvs_error *err, const char *path, const char *what, const char *message) {
    return kvs_fail_file(err, KVS_E_SESSION_FILE, path, what, -1, "%s", message);
}

static int io_error(kvs_error *err, const char *path, int code, const char *action) {
    kvs_fail_file(err, KVS_E_IO, path, "", code, "%s failed: %s", action, strerror(code));
    return KVS_E_IO;
}

static bool open_buffer(stream *f, const kvs_cache *cache) {
    f->be = cache->be;
    f->buffer_bytes = 1 << 20;
    f->buffer = kvs_calloc(1, f->buffer_bytes);
    return f->buffer != NULL;
}

/* ---- save ---- */

static header make_header(const kvs_session *s) {
    const kvs_cache *c = &s->cache;
    header h = {.magic = "KVSSESS", .version = FILE_VERSION, .header_bytes = sizeof h};
    h.identity = s->model->identity;
    h.mmproj_identity = s->model->mmproj_identity;
    h.n_ctx = c->kv.n_ctx;
    h.kv_type = c->kv.type;
    h.n_exact = c->kv.n_exact;
    h.n_policies = c->n_policies;
    h.n_past = c->n_past;
    h.n_turns = c->n_turns;
    h.n_pictures = c->n_pictures;
    h.n_events = c->pruned.n_events;
    h.quiet = c->pruned.quiet;
    h.exact_from = c->exact_from;
    h.has_logits = s->has_logits;
    h.rng = s->rng;
    for (int32_t i = 0; i < c->n_policies; i++) {
        kvs_facts facts = {0};
        c->policies[i]->ops->facts(c->policies[i], &facts);
        snprintf(h.policies[i].name, sizeof h.policies[i].name, "%s", c->policies[i]->ops->name);
        h.policies[i].n = facts.n;
        memcpy(h.policies[i].value, facts.value, (size_t)facts.n * sizeof *facts.value);
    }
    h.check = header_check(&h);
    return h;
}

static void write_all(stream *f, kvs_session *s) {
    header h = make_header(s);
    transfer(f, &h, sizeof h);
    for (int32_t i = 0; i < h.n_events; i++) {
        const kvs_event *e = &s->cache.pruned.events[i];
        saved_event saved = {e->index, e->forced, e->n_dropped, e->first};
        transfer(f, &saved, sizeof saved);
    }
    transfer_cache(f, &s->cache);
    if (s->has_logits) transfer_device(f, s->logits, kvs_session_logits_bytes(s));
    uint64_t sum = f->hash;
    transfer(f, &sum, sizeof sum);
}

static int open_folder(const char *path) {
    char folder[MAX_PATH];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    return open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* The rename lasts only when its folder is on the disk, too. A folder that can't be opened is no reason to fail: the data are safe. */
static void sync_folder(const char *path) {
    int fd = open_folder(path);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

static int write_temporary(kvs_session *s, const char *path, const char *temporary, int fd, const int32_t *cancel, kvs_error *err) {
    stream f = {.write = true, .path = path, .cancel = cancel, .file = kvs_refused() ? NULL : fdopen(fd, "wb")};
    if (!f.file) {
        int code = errno;
        close(fd);
        return code == ENOMEM ? kvs_fail_memory(err, 0, "saving a session") : io_error(err, path, code, "writing");
    }
    bool memory = open_buffer(&f, &s->cache);
    errno = 0;
    if (memory) write_all(&f, s);
    int code = errno;
    int lost = kvs_device_check(s->cache.be, err); /* what was read there can't be trusted */
    bool failed = !memory || lost || f.failed || fflush(f.file) || fsync(fileno(f.file)) || rename(temporary, path);
    if (failed && errno) code = errno;
    fclose(f.file); /* and the lock goes, which must last until the rename; all that could fail has been flushed */
    free(f.buffer);
    if (!memory) return kvs_fail_memory(err, f.buffer_bytes, "saving a session");
    if (f.cancelled) return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
    if (lost) return kvs_device_check(s->cache.be, err);
    return failed ? io_error(err, path, code ? code : EIO, "saving the session") : KVS_OK;
}

/* NAME.PID-NUMBER.tmp */
static bool is_temporary(const char *entry, const char *name) {
    size_t n = strlen(name);
    if (strncmp(entry, name, n) || entry[n] != '.') return false;
    const char *pid = entry + n + 1, *dash = pid + strspn(pid, "0123456789");
    if (dash == pid || *dash != '-') return false;
    const char *end = dash + 1 + strspn(dash + 1, "0123456789");
    return end > dash + 1 && !strcmp(end, ".tmp");
}

/* Goes if nobody writes it any more: a writer holds its lock from before the first byte until the rename. */
static void remove_abandoned(int folder, const char *entry) {
    int fd = openat(folder, entry, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return;
    struct stat st;
    if (!fstat(fd, &st) && S_ISREG(st.st_mode) && !flock(fd, LOCK_EX | LOCK_NB)) unlinkat(folder, entry, 0);
    close(fd);
}

/* What processes left that were killed while they saved to this very path. */
static void remove_all_abandoned(const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    int fd = open_folder(path);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (fd >= 0 && !folder) close(fd);
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (is_temporary(entry->d_name, name)) remove_abandoned(fd, entry->d_name);
    if (folder) closedir(folder);
}

/* Locked, unless the file system has no locks. Somebody who cleans up may have taken the new file for an abandoned one. */
static bool lock_temporary(int fd) {
    struct stat st;
    if (flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) return false;
    return !fstat(fd, &st) && st.st_nlink > 0;
}

/* A new file beside the wanted one, so that the rename stays inside one file system. The number tells savers of one process apart. */
static int open_temporary(const char *path, char *temporary, size_t size) {
    static uint32_t counter;
    for (int attempt = 0; attempt < 100; attempt++) {
        uint32_t number = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
        int length = snprintf(temporary, size, "%s.%ld-%u.tmp", path, (long)getpid(), number);
        if (length < 0 || (size_t)length >= size) {
            errno = ENAMETOOLONG;
            return -1;
        }
        int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0 ? lock_temporary(fd) : errno != EEXIST) return fd;
        if (fd >= 0) close(fd);
    }
    return -1;
}

static int save(kvs_session *s, const char *wanted, const int32_t *cancel, kvs_error *err) {
    char temporary[MAX_PATH], real[PATH_MAX];
    const char *path = realpath(wanted, real) ? real : wanted; /* a link stays a link: the file behind it is replaced */
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        return file_error(err, path, "", S_ISDIR(st.st_mode) ? "this is a folder: name a file in it" : "this is not a regular file");
    remove_all_abandoned(path);
    int fd = open_temporary(path, temporary, sizeof temporary);
    if (fd < 0) return io_error(err, path, errno, "saving the session");
    int status = write_temporary(s, path, temporary, fd, cancel, err);
    if (status)
        unlink(temporary);
    else
        sync_folder(path);
    return status;
}

int32_t kvs_session_save(kvs_session *session, const char *path, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = save(session, path, cancel, err);
    kvs_session_leave(session);
    return status;
}

/* ---- load ---- */

static int check_header(const header *h, const kvs_model *model, const char *path, kvs_error *err) {
    if (memcmp(h->magic, "KVSSESS", 8)) return file_error(err, path, "magic", "this is not a saved session");
    if (h->version != FILE_VERSION || h->header_bytes != sizeof *h)
        return kvs_fail_file(err, KVS_E_SESSION_FILE, path, "version", -1, "saved by %s version (format %u, this one reads %d)",
                             h->version > FILE_VERSION ? "a newer" : "another", h->version, FILE_VERSION);
    if (h->check != header_check(h)) return file_error(err, path, "header", "the file is damaged");
    if (h->identity != model->identity) return file_error(err, path, "model", "saved with another text model");
    if (h->mmproj_identity != model->mmproj_identity) return file_error(err, path, "mmproj", "saved with another mmproj, or with none");
    bool sane = h->n_past >= 0 && h->n_past <= h->n_ctx && h->n_turns >= 0 && h->n_turns <= h->n_past && h->n_pictures >= 0 &&
                h->n_pictures <= h->n_past && h->n_events >= 0 && h->n_events <= KVS_MIN(h->n_past, KVS_MAX_EVENTS) && h->quiet >= 0 &&
                h->quiet <= h->n_past && h->n_policies >= 0 && h->n_policies <= KVS_MAX_POLICIES && h->exact_from >= 0 &&
                h->exact_from <= h->n_past && (h->has_logits == 0 || h->has_logits == 1) && h->n_exact >= 0;
    return sane ? KVS_OK : file_error(err, path, "header", "the file is damaged");
}

static int check_facts(const saved_policy *saved, const kvs_policy *given, const char *path, kvs_error *err) {
    kvs_facts facts = {0};
    given->ops->facts(given, &facts);
    for (int32_t i = 0; i < facts.n; i++) {
        double was = saved->value[i], is = facts.value[i];
        if (was != is && !(isnan(was) && isnan(is)))
            return kvs_fail_file(err, KVS_E_SESSION_FILE, path, facts.name[i], -1, "%s: saved with %.9g, the policy given has %.9g",
                                 given->ops->name, was, is);
    }
    return KVS_OK;
}

static void list_names(const char *names[], int32_t n, char *out, size_t size) {
    out[0] = 0;
    for (int32_t i = 0; i < n; i++) {
        size_t at = strlen(out);
        snprintf(out + at, size - at, "%s%.15s", i ? ", " : "", names[i]);
    }
    if (!n) snprintf(out, size, "no policy");
}

static int check_policies(const header *h, const kvs_cache *cache, const char *path, kvs_error *err) {
    const char *saved[KVS_MAX_POLICIES], *given[KVS_MAX_POLICIES];
    for (int32_t i = 0; i < h->n_policies; i++) saved[i] = h->policies[i].name;
    for (int32_t i = 0; i < cache->n_policies; i++) given[i] = cache->policies[i]->ops->name;
    char was[64], is[64];
    list_names(saved, h->n_policies, was, sizeof was);
    list_names(given, cache->n_policies, is, sizeof is);
    if (strcmp(was, is))
        return kvs_fail_file(err, KVS_E_SESSION_FILE, path, "policy", -1, "saved with %s, to be loaded with %s: load it with the same", was,
                             is);
    int status = KVS_OK;
    for (int32_t i = 0; i < cache->n_policies && !status; i++) status = check_facts(&h->policies[i], cache->policies[i], path, err);
    return status;
}

/* Every image row is some picture's, and nothing else is. */
static bool sane_pictures(const kvs_cache *c) {
    int32_t at = 0;
    for (int32_t i = 0; i <= c->n_pictures; i++) {
        kvs_picture p = i < c->n_pictures ? c->pictures[i] : (kvs_picture){.first = c->n_past};
        if (p.first < at || p.first > c->n_past || p.n < 0 || p.n > c->n_past - p.first || (!p.n && i < c->n_pictures)) return false;
        if (p.sealed && (p.sealed < p.first + p.n || p.sealed > c->n_past)) return false;
        for (; at < p.first; at++)
            if (c->ids[at] < 0) return false;
        for (; at < p.first + p.n; at++)
            if (c->ids[at] >= 0) return false;
    }
    return true;
}

static int32_t pictures_before(const kvs_cache *c, int32_t index) { /* rows of pictures before that row */
    int32_t n = 0;
    for (int32_t i = 0; i < c->n_pictures; i++) n += KVS_MAX(0, KVS_MIN(c->pictures[i].n, index - c->pictures[i].first));
    return n;
}

/* Marks of one list: rows of pictures before the event's own row, as many as it says, one of each picture left. */
static bool sane_marks(const kvs_cache *c, int32_t layer, const uint16_t *gone) {
    const kvs_pruned *p = &c->pruned;
    int32_t marked = 0;
    for (int32_t j = 0; j < c->n_past; j++) {
        if (!gone[j]) continue;
        if (gone[j] > p->n_events || c->ids[j] >= 0 || j < p->events[gone[j] - 1].first || j >= p->events[gone[j] - 1].index) return false;
        marked++;
    }
    if (marked != (p->on[layer] ? kvs_pruned_missing(p, INT32_MAX) : 0)) return false;
    for (int32_t i = 0; i < p->n_events && marked; i++) {
        int32_t n = 0;
        for (int32_t j = p->events[i].first; j < p->events[i].index; j++) n += gone[j] == i + 1;
        if (n != p->events[i].n_dropped) return false;
    }
    for (int32_t i = 0; i < c->n_pictures; i++) {
        int32_t n = 0;
        for (int32_t j = c->pictures[i].first; j < c->pictures[i].first + c->pictures[i].n; j++) n += !gone[j];
        if (!n) return false;
    }
    return true;
}

static bool sane_events(const kvs_cache *c) {
    const kvs_pruned *p = &c->pruned;
    for (int32_t i = 0; i < p->n_events; i++) {
        const kvs_event *e = &p->events[i];
        bool nothing = !e->n_dropped && e->first == INT32_MAX;
        if (!(c->flags[e->index] & KVS_ROW_GENERATED) || !(nothing || (e->n_dropped && e->first >= 0 && e->first < e->index))) return false;
    }
    for (int32_t layer = 0; layer < c->kv.n_layer && p->n_events; layer++)
        for (int32_t set = 0; set < c->kv.n_sets; set++)
            if (!sane_marks(c, layer, kvs_pruned_list(p, &c->kv, layer, set))) return false;
    return true;
}

/* What was read must be a timeline before anything derives from it. */
static bool sane_timeline(const kvs_session *s) {
    const kvs_cache *c = &s->cache;
    for (int32_t i = 0; i < c->n_past; i++) {
        if (c->ids[i] < -1 || c->ids[i] >= s->model->text.n_vocab || (c->flags[i] & KVS_ROW_GENERATED && c->ids[i] < 0)) return false;
        if (c->flags[i] & ~(KVS_ROW_GENERATED | KVS_ROW_ENDED)) return false;
    }
    for (int32_t i = 0; i < c->n_turns; i++)
        if (c->turns[i] < (i ? c->turns[i - 1] + 1 : 1) || c->turns[i] > c->n_past) return false;
    bool can_run_again = s->has_logits || kvs_pruned_can_end(c, c->n_past, true); /* the last row, for its logits */
    return sane_pictures(c) && sane_events(c) && can_run_again;
}

/* Room for the events, whose numbers must be possible before anything is read by them. */
static int read_events(stream *f, const header *h, kvs_cache *c, kvs_error *err) {
    kvs_pruned *p = &c->pruned;
    int32_t dropped = 0, index = 0;
    for (int32_t i = 0; i < h->n_events; i++) {
        saved_event e = {0};
        kvs_event event;
        transfer(f, &e, sizeof e);
        bool sane = !f->failed && p->on && e.index > index && e.index < h->n_past && e.n_dropped >= 0 && e.n_dropped <= e.index - dropped &&
                    (e.forced == 0 || e.forced == 1);
        if (!sane) return file_error(err, f->path, "prunings", "the file is damaged");
        if (!kvs_event_make(c, e.index, 0, e.n_dropped, &event)) return kvs_fail_memory(err, 0, "dropped rows of a saved session");
        event.forced = e.forced;
        event.first = e.first;
        p->events[p->n_events++] = event;
        p->n_applied++;
        index = e.index;
        dropped += e.n_dropped;
    }
    return KVS_OK;
}

/* What derives from events and marks that are known to be sound. */
static void finish_events(kvs_cache *c) {
    kvs_pruned *p = &c->pruned;
    for (int32_t i = 0; i < p->n_events; i++) {
        p->events[i].n_before = pictures_before(c, p->events[i].index) - kvs_pruned_missing(p, p->events[i].index);
        kvs_event_locate(c, i + 1);
        if (!p->reversible) kvs_event_free(&p->events[i]);
    }
}

static int read_body(stream *f, const header *h, kvs_session *s, kvs_error *err) {
    kvs_cache *c = &s->cache;
    c->n_past = h->n_past;
    c->pruned.quiet = h->quiet;
    c->n_turns = h->n_turns;
    c->exact_from = h->exact_from;
    s->has_logits = h->has_logits;
    s->rng = h->rng;
    if (!open_buffer(f, c)) return kvs_fail_memory(err, f->buffer_bytes, "loading a session");
    for (int32_t i = 0; i < h->n_pictures; i++) {
        int status = kvs_cache_add_picture(c, 0, 0, NULL, err); /* room for them */
        if (status) return status;
    }
    int status = read_events(f, h, c, err);
    if (status) return status;
    for (int32_t layer = 0; layer < c->kv.n_layer && c->pruned.on; layer++)
        c->pruned.dropped[layer] = c->pruned.on[layer] ? kvs_pruned_missing(&c->pruned, INT32_MAX) : 0;
    transfer_cache(f, c);
    if (s->has_logits) transfer_device(f, s->logits, kvs_session_logits_bytes(s));
    uint64_t sum = f->hash, saved = 0;
    transfer(f, &saved, sizeof saved);
    if (f->memory) return kvs_fail_memory(err, 0, "loading a session");
    if (f->failed || fgetc(f->file) != EOF) return file_error(err, f->path, "length", "the file is cut off or has grown");
    if (saved != sum || !sane_timeline(s)) return file_error(err, f->path, "checksum", "the file is damaged");
    finish_events(c);
    kvs_pruned_refresh(c);
    return kvs_device_check(c->be, err);
}

static int load(stream *f, kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err) {
    header h;
    transfer(f, &h, sizeof h);
    if (f->failed) return file_error(err, f->path, "length", "too short: this is not a saved session");
    int status = check_header(&h, model, f->path, err);
    if (status) return status;
    kvs_session_params as_saved = *params;
    as_saved.n_ctx = h.n_ctx;
    as_saved.kv_type = h.kv_type;
    as_saved.exact_rows = h.n_exact;
    if ((status = kvs_session_create(model, &as_saved, out, err))) {
        return status == KVS_E_ARGUMENT ? file_error(err, f->path, "header", "the file is damaged") : status;
    }
    status = check_policies(&h, &(*out)->cache, f->path, err);
    if (!status && (*out)->cache.kv.n_exact != h.n_exact) status = file_error(err, f->path, "header", "the file is damaged");
    if (!status) status = read_body(f, &h, *out, err);
    if (status) {
        kvs_session_free(*out);
        *out = NULL;
    }
    return status;
}

int32_t kvs_session_load(kvs_model *model, const char *path, const kvs_session_params *params, kvs_session **out, int32_t *cancel,
                         kvs_error *err) {
    *out = NULL;
    stream f = {.path = path, .cancel = cancel};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) {
        int code = errno;
        if (fd >= 0) close(fd);
        return io_error(err, path, code, "loading the session");
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return file_error(err, path, "", "this is not a regular file");
    }
    f.file = kvs_refused() ? NULL : fdopen(fd, "rb");
    if (!f.file) {
        close(fd);
        return kvs_fail_memory(err, 0, "loading a session");
    }
    int status = load(&f, model, params, out, err);
    if (f.cancelled) status = kvs_fail(err, KVS_E_CANCELLED, "cancelled"); /* not what the reader took it for */
    fclose(f.file);
    free(f.buffer);
    return status;
}
