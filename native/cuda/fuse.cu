/* fuse.cu - steps of few rows: neighbours in the list of ops that one launch can do, and what all layers can do together at the end. A launch
 * of a small kernel takes longer than its work: a layer of a token in Q8_0 is 22 launches op by op, and 10 when it comes from here.
 *
 * What is done is what the ops would have done, each one's results in memory among them, bit by bit; but what attention tells is seen by the
 * kv_record behind it alone. KVS_CUDA_FUSE=0, when a device is opened, launches them one by one. */
#include "ops.cuh"

/* A place in the list */
typedef struct cursor {
    const kvs_cuda_noted *op, *end;
} cursor;

/* The op's arguments if it is of this kind, and then the cursor goes on; else NULL */
template <class A> static const A *take(cursor *at, int32_t kind) {
    if (at->op >= at->end || at->op->kind != kind) return NULL;
    const A *args = (const A *)kvs_cuda_noted_args(at->op);
    at->op = kvs_cuda_noted_next(at->op);
    return args;
}

/* take, if good(args) */
template <class A, class F> static const A *take_if(cursor *at, int32_t kind, F good) {
    cursor next = *at;
    const A *args = take<A>(&next, kind);
    if (!args || !good(args)) return NULL;
    *at = next;
    return args;
}

/* The product that wants rows x as integers, and nothing else of them */
static const kvs_matvec_args *take_product(cursor *at, const float *x, int64_t cols, int64_t n) {
    return take_if<kvs_matvec_args>(at, KVS_CUDA_MATVEC, [=](const kvs_matvec_args *m) {
        return m->x == x && m->cols == cols && m->n == n && m->tiles.p && !m->padded && cols % KVS_GROUP == 0;
    });
}

/* ---- x += y, finite(x), y = norm(x), products of y ---- */

static bool fuse_row(kvs_cuda *cu, cursor *at) {
    cursor next = *at;
    kvs_row_args row = {};
    const kvs_each_args *add =
        take_if<kvs_each_args>(&next, KVS_CUDA_EACH, [](const kvs_each_args *e) { return e->kind == KVS_OP_ADD && e->wide; });
    const kvs_finite_args *finite =
        take_if<kvs_finite_args>(&next, KVS_CUDA_FINITE, [=](const kvs_finite_args *f) { return f->wide && (!add || f->x == add->y); });
    const float *x = add ? add->y : finite ? finite->x : NULL;
    const kvs_norm_args *norm = take_if<kvs_norm_args>(&next, KVS_CUDA_NORM, [=](const kvs_norm_args *n) {
        return n->wide && (!x || n->x == x) && (!finite || (n->n == finite->n && n->cols == finite->cols));
    });
    if (!finite && !norm) return false;
    row.n = norm ? norm->n : finite->n;
    row.cols = norm ? norm->cols : finite->cols;
    if (!kvs_row_fits(row.cols) || (add && add->n != (int64_t)row.n * row.cols)) return false;
    const kvs_matvec_args *product = norm ? take_product(&next, norm->y, norm->cols, norm->n) : NULL;
    if (!!add + !!finite + !!norm + !!product < 2) return false;
    row.x = add ? add->y : (float *)(finite ? finite->x : norm->x);
    if (add) row.add = add->x;
    if (finite) row.finite = *finite;
    if (norm) row.norm = *norm;
    if (product) row.tiles = product->tiles;
    kvs_row_launch(cu, &row);
    if (product) kvs_matvec_launch_products(cu, product);
    *at = next;
    return true;
}

/* ---- g = silu(g) u, products of g ---- */

static bool fuse_gate(kvs_cuda *cu, cursor *at) {
    cursor next = *at;
    const kvs_each_args *gate =
        take_if<kvs_each_args>(&next, KVS_CUDA_EACH, [](const kvs_each_args *e) { return e->kind == KVS_OP_GATE && e->wide; });
    if (!gate || next.op >= next.end || next.op->kind != KVS_CUDA_MATVEC) return false;
    const int64_t cols = ((const kvs_matvec_args *)kvs_cuda_noted_args(next.op))->cols;
    const kvs_matvec_args *product = gate->n % cols ? NULL : take_product(&next, gate->y, cols, gate->n / cols);
    if (!product) return false;
    kvs_gate_launch(cu, gate, (int32_t)cols, product->tiles);
    kvs_matvec_launch_products(cu, product);
    *at = next;
    return true;
}

/* ---- what the next step needs, not this one ---- */

/* kv_record and kv_smooth of all layers, launched together: of a layer each would be a launch that the rest of the step waits for. Not where an
 * op in between may look at them, or takes part in it: targets "o", queries that PruneHal keeps. */
typedef struct late_ops {
    kvs_record_args record; /* n_layer 0: none */
    kvs_smooth_batch smooth;
} late_ops;

static void launch_late(kvs_cuda *cu, late_ops *late) {
    if (late->record.n_layer) kvs_record_launch(cu, &late->record);
    kvs_smooth_launch(cu, &late->smooth);
    late->record.n_layer = 0;
}

/* What attention tells goes to room of the layer's own, where it stays until all layers are recorded. */
static void put_off_record(kvs_cuda *cu, late_ops *late, const kvs_record_args *record, kvs_attn_args *attn) {
    const int64_t width = (int64_t)attn->n * attn->n_head;
    float *room = attn->late + 3 * width * attn->layer;
    attn->taps = {room, room + width, room + 2 * width};
    kvs_record_args *all = &late->record;
    const bool goes_on = all->layer + all->n_layer == attn->layer && all->rows == record->rows && all->n == record->n &&
                         all->entropy + (int64_t)all->n_layer * all->stride == room;
    if (all->n_layer && !goes_on) launch_late(cu, late);
    if (!all->n_layer) {
        *all = *record;
        all->entropy = attn->taps.entropy;
        all->mass = attn->taps.mass;
        all->lse = attn->taps.lse;
        all->stride = (int32_t)(3 * width);
        all->n_layer = 0;
    }
    all->n_layer++;
}

static void put_off_smooth(kvs_cuda *cu, late_ops *late, const kvs_smooth_args *smooth) {
    for (int32_t done = 0; !kvs_smooth_take(&late->smooth, smooth, &done);) launch_late(cu, late);
}

static const kvs_smooth_args *take_smooth(cursor *at) {
    return take_if<kvs_smooth_args>(at, KVS_CUDA_SMOOTH, [](const kvs_smooth_args *s) { return !s->writes_out; });
}

/* ---- RoPE of q and k, searches in k and v, rows of the cache ---- */

/* Rows of k (value 0) or of v (1) that a search looks at; false: it looks at something else. */
static bool note_check(kvs_keys_args *a, const kvs_finite_args *f, int32_t width) {
    for (int32_t value = 0; value < 2; value++) {
        const int64_t offset = f->x - (value ? a->put.v : a->put.k), first = offset / width;
        if (f->cols != width || offset < 0 || offset % width || first + f->n > a->put.n) continue;
        for (int32_t i = 0; i < f->n; i++) a->checks[first + i][value] = {f->limit, 1, f->place, i};
        a->fault = f->fault;
        return true;
    }
    return false;
}

static bool fuse_keys(kvs_cuda *cu, cursor *at) {
    cursor next = *at;
    const kvs_rope_args *q = take<kvs_rope_args>(&next, KVS_CUDA_ROPE), *k = take<kvs_rope_args>(&next, KVS_CUDA_ROPE);
    if (!q || !k) return false;
    cursor searches = next;
    while (take<void>(&next, KVS_CUDA_FINITE)) {} /* one of K and one of V for each session */
    const kvs_cuda_noted *behind = next.op;
    const kvs_put_args *put = take<kvs_put_args>(&next, KVS_CUDA_PUT);
    const bool same = put && put->n <= KVS_GRAPH_ROWS && q->n == put->n && k->n == put->n && k->x == put->k && q->x != k->x &&
                      k->n_head == put->heads && q->table == k->table && q->head_dim == k->head_dim && q->n_rot == k->n_rot &&
                      q->n_rot % 2 == 0 && q->n_rot <= q->head_dim;
    if (!same) return false;
    kvs_keys_args a = {*q, *put, NULL, {}};
    while (searches.op < behind)
        if (!note_check(&a, take<kvs_finite_args>(&searches, KVS_CUDA_FINITE), k->n_head * k->head_dim)) return false;
    kvs_keys_launch(cu, &a);
    *at = next;
    return true;
}

/* ---- attention, what is kept of it, products of its output ---- */

static bool fuse_attention(kvs_cuda *cu, cursor *at, late_ops *late) {
    cursor next = *at;
    const kvs_attn_args *attn = take<kvs_attn_args>(&next, KVS_CUDA_ATTN);
    if (!attn) return false;
    kvs_attn_args a = *attn;
    const kvs_record_args *record = take_if<kvs_record_args>(&next, KVS_CUDA_RECORD, [=](const kvs_record_args *r) {
        return attn->late && r->entropy == attn->taps.entropy && r->mass == attn->taps.mass && r->lse == attn->taps.lse &&
               r->layer == attn->layer && r->n == attn->n && !r->keeps_queries;
    });
    if (record) put_off_record(cu, late, record, &a);
    cursor smooths = next;
    while (take_smooth(&next)) {}
    const bool whole = a.head_dim % KVS_GROUP == 0;
    const kvs_matvec_args *product = whole ? take_product(&next, a.out, (int64_t)a.n_head * a.head_dim, a.n) : NULL;
    if (product) a.tiles = product->tiles;
    kvs_attn_launch_decode(cu, &a);
    while (const kvs_smooth_args *smooth = take_smooth(&smooths)) put_off_smooth(cu, late, smooth); /* may launch what came before it */
    if (product) kvs_matvec_launch_products(cu, product);
    *at = next;
    return true;
}

/* ---- the list ---- */

/* Layers come once and rising in a step, so that rows of a layer's cache are written and read before anything of it is put off. */
static bool leaves_put_off_alone(int32_t kind) { return kind != KVS_CUDA_OTHER && kind != KVS_CUDA_RECORD && kind != KVS_CUDA_SMOOTH; }

static void launch_alone(kvs_cuda *cu, cursor *at, late_ops *late) {
    const kvs_cuda_noted *op = at->op;
    if (!leaves_put_off_alone(op->kind)) launch_late(cu, late);
    op->launch(cu, kvs_cuda_noted_args(op));
    at->op = kvs_cuda_noted_next(op);
}

static bool fuse(kvs_cuda *cu, cursor *at, late_ops *late) {
    if (fuse_row(cu, at) || fuse_gate(cu, at) || fuse_keys(cu, at) || fuse_attention(cu, at, late)) return true;
    const kvs_smooth_args *smooth = take_smooth(at);
    if (smooth) put_off_smooth(cu, late, smooth);
    return smooth != NULL;
}

void kvs_cuda_launch_noted(kvs_cuda *cu) {
    cursor at = {(const kvs_cuda_noted *)cu->list.bytes, (const kvs_cuda_noted *)(cu->list.bytes + cu->list.used)};
    late_ops late = {};
    while (at.op < at.end && !cu->status)
        if (!cu->fuses || !fuse(cu, &at, &late)) launch_alone(cu, &at, &late);
    launch_late(cu, &late);
}
