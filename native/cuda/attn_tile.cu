/* attn_tile.cu - attention of many rows: a block of four warps takes up to 32 neighbouring rows of one query head and walks over the keys, which
 * its warps share in slices that are widened to float32 in shared memory: 32 dimensions of 64 keys, or some values. A warp has some rows
 * for itself, from scores to outputs. Also full attention, of a vision tower's rows.
 *
 * The next slice is read from memory before the last one is computed with, and stored behind it: two buffers, one barrier per slice. */
#include "attn.cuh"

enum {
    SLICE_DIMS = 32,                           /* of keys */
    KEY_STRIDE = SLICE_DIMS + 4,               /* floats: threads that read 16 bytes of 8 neighbouring keys meet no bank twice */
    SLICE_FLOATS = KVS_ATTN_TILE * KEY_STRIDE, /* also of values */
    SLICE_READS = KVS_ATTN_TILE * SLICE_DIMS / 8 / KVS_ATTN_THREADS, /* eights per thread */
};

/* DIMS: dimensions of a lane, head_dim <= 32 DIMS; ROWS: rows of a warp, so that its sums fit into registers twice */
template <int DIMS> struct tile_shape {
    enum {
        ROWS = DIMS <= 4   ? 8
               : DIMS <= 8 ? 4
                           : 2,
        BLOCK_ROWS = ROWS * KVS_ATTN_WARPS,
        WIDTH = DIMS * KVS_WARP, /* of a row in shared memory */
        SLICE_KEYS = DIMS <= 2   ? 32
                     : DIMS <= 4 ? 16
                     : DIMS <= 8 ? 8
                                 : 4, /* of values */
        SHARED_FLOATS = 2 * SLICE_FLOATS + BLOCK_ROWS * (WIDTH + KVS_ATTN_TILE),
    };
    static_assert(SLICE_KEYS * WIDTH <= SLICE_FLOATS && SLICE_KEYS * WIDTH / 8 <= SLICE_READS * KVS_ATTN_THREADS, "a slice of values fits");
};

typedef struct tile_work { /* rows of a block that are of one session */
    kvs_attn_rows k, v;
    const kvs_range *spans;
    int32_t n_spans;
    bool exclude_self;
    int32_t n_keys;          /* that any of them sees */
    int32_t first_row, head; /* of the block */
    float *slices, *q, *p;   /* shared: two; (BLOCK_ROWS, WIDTH), scaled; (BLOCK_ROWS, TILE), e^(s - m) */
    const int32_t *seen;     /* shared: (BLOCK_ROWS) keys, 0 for rows that are not of this session */
} tile_work;

template <int DIMS> struct tile_state { /* of a warp; lane r < ROWS has the statistics of row r */
    enum { ROWS = tile_shape<DIMS>::ROWS };
    kvs_attn_part all;
    kvs_attn_shift shift;   /* from all to what it was joined with */
    float sums[ROWS][DIMS]; /* of e^(s - m) v: of all tiles before */
    float acc[ROWS][DIMS];  /* of this tile */
    float s[ROWS][2];       /* scores of keys lane and lane + 32 */
};

/* By hand: "= {}" becomes a loop over memory, and the sums would not be in registers. */
template <int DIMS> KVS_DEVICE void clear(tile_state<DIMS> &state) {
    state.all = kvs_attn_none();
    state.shift = kvs_attn_shift_of(0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        state.s[r][0] = state.s[r][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMS; i++) state.sums[r][i] = state.acc[r][i] = 0.0f;
    }
}

KVS_DEVICE int tile_lane(void) { return threadIdx.x % KVS_WARP; }
template <int DIMS> KVS_DEVICE int warp_row(void) {
    return (int)threadIdx.x / KVS_WARP * tile_shape<DIMS>::ROWS;
} /* its first, in the block */

/* Which dimension is the i-th of a lane: neighbours where several are read at once, and no bank twice. */
template <int DIMS> KVS_DEVICE int lane_dim(int i) {
    if (DIMS % 4 == 0) return i / 4 * 128 + tile_lane() * 4 + i % 4;
    return DIMS == 2 ? tile_lane() * 2 + i : i * KVS_WARP + tile_lane();
}
template <int DIMS> KVS_DEVICE void lane_values(const float *row, float out[DIMS]) {
#pragma unroll
    for (int i = 0; i < DIMS; i++)
        if (DIMS % 4 == 0) {
            if (i % 4) continue;
            float4 x = kvs_load_float4(row + lane_dim<DIMS>(i));
            out[i] = x.x, out[(i + 1) % DIMS] = x.y, out[(i + 2) % DIMS] = x.z, out[(i + 3) % DIMS] = x.w;
        } else if (DIMS == 2) {
            if (i % 2) continue;
            uint2 x = kvs_load8(row + lane_dim<DIMS>(i));
            out[i] = kvs_bits_float(x.x), out[(i + 1) % DIMS] = kvs_bits_float(x.y);
        } else
            out[i] = row[lane_dim<DIMS>(i)];
}

/* ---- slices ---- */

typedef struct tile_slice { /* of a tile: 0 .. key_slices - 1 are dimensions of its keys, then values come */
    int32_t tile, slice;
} tile_slice;

KVS_DEVICE int32_t key_slices(const tile_work &w) { return (w.k.head_dim + SLICE_DIMS - 1) / SLICE_DIMS; }

template <int DIMS> KVS_DEVICE int32_t count_slices(const tile_work &w, int32_t tile) {
    int32_t keys = KVS_MIN((int32_t)KVS_ATTN_TILE, w.n_keys - tile * KVS_ATTN_TILE);
    return key_slices(w) + (keys + tile_shape<DIMS>::SLICE_KEYS - 1) / tile_shape<DIMS>::SLICE_KEYS;
}

template <int DIMS> KVS_DEVICE int32_t slice_first(const tile_work &w, const tile_slice &at) { /* key */
    int32_t values = at.slice - key_slices(w);
    return at.tile * KVS_ATTN_TILE + (values < 0 ? 0 : values * tile_shape<DIMS>::SLICE_KEYS);
}

/* The eights that a thread reads: of 64 keys 4 each, or of some values all. Keys that nobody sees are zeros. */
template <int DIMS> KVS_DEVICE void read_slice(const tile_work &w, const tile_slice &at, kvs_attn_eight x[SLICE_READS]) {
    int32_t values = at.slice - key_slices(w), first = slice_first<DIMS>(w, at);
    if (!kvs_kv_in_eights(w.k.head_dim)) return;
#pragma unroll
    for (int i = 0; i < SLICE_READS; i++) {
        int32_t item = (int32_t)threadIdx.x + i * KVS_ATTN_THREADS, eights = values < 0 ? SLICE_DIMS / 8 : tile_shape<DIMS>::WIDTH / 8;
        int32_t key = first + item / eights, d = item % eights * 8 + (values < 0 ? at.slice * SLICE_DIMS : 0);
        kvs_attn_rows rows = w.k;
        rows.base = values < 0 ? w.k.base : w.v.base;
        x[i] = {};
        if (key < w.n_keys) x[i] = kvs_attn_read(rows, key, d);
    }
}

/* Rows of other head_dims are read no earlier than here, value by value. */
template <int DIMS> KVS_DEVICE void store_values(const tile_work &w, const tile_slice &at, float *to) {
    int32_t values = at.slice - key_slices(w), first = slice_first<DIMS>(w, at),
            n = values < 0 ? KVS_ATTN_TILE : tile_shape<DIMS>::SLICE_KEYS;
    int32_t width = values < 0 ? SLICE_DIMS : tile_shape<DIMS>::WIDTH, stride = values < 0 ? KEY_STRIDE : tile_shape<DIMS>::WIDTH;
    for (int32_t item = (int32_t)threadIdx.x; item < n * width; item += KVS_ATTN_THREADS) {
        int32_t key = item / width, d = item % width;
        float x = 0.0f;
        if (first + key < w.n_keys)
            x = values < 0 ? kvs_attn_value(w.k, first + key, at.slice * SLICE_DIMS + d) : kvs_attn_value(w.v, first + key, d);
        to[key * stride + d] = x;
    }
}

template <int DIMS> KVS_DEVICE void store_slice(const tile_work &w, const tile_slice &at, const kvs_attn_eight x[SLICE_READS], float *to) {
    if (!kvs_kv_in_eights(w.k.head_dim)) {
        store_values<DIMS>(w, at, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < SLICE_READS; i++) {
        int32_t item = (int32_t)threadIdx.x + i * KVS_ATTN_THREADS;
        if (at.slice < key_slices(w))
            kvs_attn_store(w.k, x[i], to + item / 4 * KEY_STRIDE + item % 4 * 8);
        else if (item < tile_shape<DIMS>::SLICE_KEYS * tile_shape<DIMS>::WIDTH / 8)
            kvs_attn_store(w.v, x[i], to + item * 8);
    }
}

/* ---- scores ---- */

template <int DIMS> KVS_DEVICE void score_slice(const tile_work &w, int32_t slice, const float *keys, tile_state<DIMS> &state) {
    const float *q = w.q + warp_row<DIMS>() * tile_shape<DIMS>::WIDTH + slice * SLICE_DIMS;
    const float *k = keys + tile_lane() * KEY_STRIDE;
#pragma unroll 2
    for (int d = 0; d < SLICE_DIMS; d += 4) {
        float4 k0 = kvs_load_float4(k + d), k1 = kvs_load_float4(k + KVS_WARP * KEY_STRIDE + d);
#pragma unroll
        for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
            float4 x = kvs_load_float4(q + r * tile_shape<DIMS>::WIDTH + d);
            state.s[r][0] = fmaf(x.w, k0.w, fmaf(x.z, k0.z, fmaf(x.y, k0.y, fmaf(x.x, k0.x, state.s[r][0]))));
            state.s[r][1] = fmaf(x.w, k1.w, fmaf(x.z, k1.z, fmaf(x.y, k1.y, fmaf(x.x, k1.x, state.s[r][1]))));
        }
    }
}

/* ---- softmax ---- */

KVS_DEVICE void take_part(kvs_attn_part &mine, const kvs_attn_part &part, bool take) {
    mine.m = take ? part.m : mine.m;
    mine.l = take ? part.l : mine.l;
    mine.u = take ? part.u : mine.u;
    mine.vis = take ? part.vis : mine.vis;
}

/* Lane r: the tile's statistics of row r join those of before. behind: of soften_behind, where rows' own keys stay out. */
template <int DIMS>
KVS_DEVICE void join_tile(const kvs_attn_args &a, const tile_work &w, int32_t first, const kvs_attn_part &part, const kvs_attn_part &behind,
                          tile_state<DIMS> &state) {
    int32_t lane = tile_lane(), row = warp_row<DIMS>() + KVS_MIN(lane, tile_shape<DIMS>::ROWS - 1), seen = w.seen[row] - first;
    if (lane >= tile_shape<DIMS>::ROWS || seen <= 0) return;
    kvs_attn_part rest = state.all;
    state.shift = kvs_attn_shift_of(state.all.m, part.m);
    kvs_attn_join(state.all, part, state.shift);
    if (!a.taps.entropy || seen > KVS_ATTN_TILE) return;
    float entropy = kvs_attn_entropy(state.all);
    if (w.exclude_self) {
        if (seen > 1) kvs_attn_join(rest, behind, kvs_attn_shift_of(rest.m, behind.m));
        entropy = kvs_attn_entropy(rest);
    }
    a.taps.entropy[(int64_t)(w.first_row + row) * a.n_head + w.head] = entropy;
}

/* Lane r: of row r without its own key, if that is of this tile and there are others. */
template <int DIMS> KVS_DEVICE kvs_attn_part soften_behind(const tile_work &w, int32_t first, const tile_state<DIMS> &state) {
    const uint32_t no_spans[2] = {0, 0};
    kvs_attn_part behind = kvs_attn_none();
#pragma unroll
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        int32_t seen = w.seen[warp_row<DIMS>() + r] - first;
        if (seen <= 1 || seen > KVS_ATTN_TILE) continue;
        float s[2] = {state.s[r][0], state.s[r][1]};
        take_part(behind, kvs_attn_soften(s, seen - 1, no_spans, true), tile_lane() == r);
    }
    return behind;
}

template <int DIMS> KVS_DEVICE void soften_rows(const kvs_attn_args &a, const tile_work &w, int32_t tile, tile_state<DIMS> &state) {
    int32_t lane = tile_lane(), first = tile * KVS_ATTN_TILE, row = warp_row<DIMS>();
    bool entropy = a.taps.entropy != NULL;
    uint32_t spans[2] = {0, 0};
    if (a.taps.mass) kvs_attn_span_bits(w.spans, w.n_spans, first, spans);
    kvs_attn_part mine = kvs_attn_none(), behind = mine;
    if (entropy && w.exclude_self) behind = soften_behind<DIMS>(w, first, state);
#pragma unroll
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        int32_t seen = w.seen[row + r] - first;
        take_part(mine, kvs_attn_soften(state.s[r], seen, spans, entropy), lane == r);
        float *p = w.p + (row + r) * KVS_ATTN_TILE;
        p[lane] = state.s[r][0];
        p[lane + KVS_WARP] = state.s[r][1];
        state.s[r][0] = state.s[r][1] = 0.0f; /* for the next tile */
    }
    join_tile<DIMS>(a, w, first, mine, behind, state);
    __syncwarp(); /* p is of this warp alone */
}

/* ---- values ---- */

/* WHOLE: all rows of the warp see all keys of the slice; else a row adds those that it sees. */
template <int DIMS, bool WHOLE>
KVS_DEVICE void add_keys(const tile_work &w, int32_t tile_first, int32_t first, const float *values, tile_state<DIMS> &state) {
    typedef tile_shape<DIMS> shape;
    const float *p = w.p + warp_row<DIMS>() * KVS_ATTN_TILE + first;
#pragma unroll 1
    for (int k = 0; k < shape::SLICE_KEYS; k += 4) {
        float v[4][DIMS];
#pragma unroll
        for (int j = 0; j < 4; j++) lane_values<DIMS>(values + (k + j) * shape::WIDTH, v[j]);
#pragma unroll
        for (int r = 0; r < shape::ROWS; r++) {
            float4 x = kvs_load_float4(p + r * KVS_ATTN_TILE + k);
            float e[4] = {x.x, x.y, x.z, x.w};
            int32_t left = WHOLE ? 4 : w.seen[warp_row<DIMS>() + r] - (tile_first + first + k);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (WHOLE || j < left)
#pragma unroll
                    for (int i = 0; i < DIMS; i++) state.acc[r][i] = fmaf(e[j], v[j][i], state.acc[r][i]);
        }
    }
}

/* The tile's sums join those of before, in the rows that saw any of it. */
template <int DIMS> KVS_DEVICE void join_sums(const tile_work &w, int32_t tile, tile_state<DIMS> &state) {
#pragma unroll
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        kvs_attn_shift shift = {};
        shift.c0 = __shfl_sync(KVS_ALL_LANES, state.shift.c0, r);
        shift.c1 = __shfl_sync(KVS_ALL_LANES, state.shift.c1, r);
        bool any = w.seen[warp_row<DIMS>() + r] > tile * KVS_ATTN_TILE;
#pragma unroll
        for (int i = 0; i < DIMS; i++) {
            if (any) state.sums[r][i] = kvs_attn_add(state.sums[r][i], state.acc[r][i], shift);
            state.acc[r][i] = 0.0f;
        }
    }
}

/* ---- the whole ---- */

/* least, most: keys that the rows of the warp see */
template <int DIMS>
KVS_DEVICE void compute_slice(const kvs_attn_args &a, const tile_work &w, const tile_slice &at, const float *slice, int32_t least,
                              int32_t most, tile_state<DIMS> &state) {
    int32_t tile_first = at.tile * KVS_ATTN_TILE, values = at.slice - key_slices(w), first = values * tile_shape<DIMS>::SLICE_KEYS;
    if (tile_first >= most) return;
    if (values < 0) {
        score_slice<DIMS>(w, at.slice, slice, state);
        return;
    }
    if (!values) soften_rows<DIMS>(a, w, at.tile, state);
    if (least >= tile_first + first + tile_shape<DIMS>::SLICE_KEYS)
        add_keys<DIMS, true>(w, tile_first, first, slice, state);
    else
        add_keys<DIMS, false>(w, tile_first, first, slice, state);
}

template <int DIMS> KVS_DEVICE void walk_keys(const kvs_attn_args &a, const tile_work &w, tile_state<DIMS> &state) {
    int32_t n_tiles = (w.n_keys + KVS_ATTN_TILE - 1) / KVS_ATTN_TILE, least = w.n_keys, most = 0;
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        int32_t seen = w.seen[warp_row<DIMS>() + r];
        least = KVS_MIN(least, seen);
        most = KVS_MAX(most, seen);
    }
    kvs_attn_eight x[SLICE_READS];
    tile_slice at = {0, 0};
    float *slice = w.slices, *other = slice + SLICE_FLOATS;
    read_slice<DIMS>(w, at, x);
    store_slice<DIMS>(w, at, x, slice);
    __syncthreads();
    while (at.tile < n_tiles) {
        tile_slice next = {at.tile, at.slice + 1};
        if (next.slice == count_slices<DIMS>(w, at.tile)) next = {at.tile + 1, 0};
        if (next.tile < n_tiles) read_slice<DIMS>(w, next, x);
        compute_slice<DIMS>(a, w, at, slice, least, most, state);
        if (next.tile != at.tile) join_sums<DIMS>(w, at.tile, state);
        if (next.tile < n_tiles) store_slice<DIMS>(w, next, x, other);
        __syncthreads();
        float *swap = slice;
        slice = other;
        other = swap;
        at = next;
    }
}

template <int DIMS> KVS_DEVICE void write_rows(const kvs_attn_args &a, const tile_work &w, const tile_state<DIMS> &state) {
    int32_t row = w.first_row + warp_row<DIMS>();
#pragma unroll
    for (int r = 0; r < tile_shape<DIMS>::ROWS; r++) {
        float l = __shfl_sync(KVS_ALL_LANES, state.all.l, r);
        if (!w.seen[warp_row<DIMS>() + r]) continue;
        float *out = a.out + ((int64_t)(row + r) * a.n_head + w.head) * a.head_dim;
#pragma unroll
        for (int i = 0; i < DIMS; i++)
            if (lane_dim<DIMS>(i) < a.head_dim) out[lane_dim<DIMS>(i)] = state.sums[r][i] / l;
    }
    int32_t lane = tile_lane();
    if (lane >= tile_shape<DIMS>::ROWS || !w.seen[warp_row<DIMS>() + lane]) return;
    int64_t place = (int64_t)(row + lane) * a.n_head + w.head;
    if (a.taps.mass) a.taps.mass[place] = state.all.vis / state.all.l;
    if (a.taps.lse) a.taps.lse[place] = state.all.m + logf(state.all.l);
}

/* Rows first .. last of the step, which are of one session. */
KVS_DEVICE void find_keys(const kvs_attn_args &a, int32_t last, tile_work &w) {
    if (!a.rows) {
        int64_t stride = (int64_t)a.n_head * a.head_dim, at = (int64_t)w.head * a.head_dim;
        w.k = {(const uint8_t *)(a.k + at), stride * (int64_t)sizeof(float), KVS_TYPE_F32, a.head_dim};
        w.v = {(const uint8_t *)(a.v + at), stride * (int64_t)sizeof(float), KVS_TYPE_F32, a.head_dim};
        w.n_keys = a.n;
        return;
    }
    const kvs_kv *kv = a.rows[last].kv;
    int32_t kv_head = w.head / (a.n_head / a.n_kv_head);
    w.k = {kvs_kv_rows(kv, kv->k, a.layer, kv_head), kv->row_bytes, kv->type, a.head_dim};
    w.v = {kvs_kv_rows(kv, kv->v, a.layer, kv_head), kv->row_bytes, kv->type, a.head_dim};
    w.spans = kvs_kv_spans(kv, a.layer, kv_head);
    w.n_spans = kv->n_spans;
    w.exclude_self = kv->exclude_self;
    w.n_keys = kvs_kv_place(kv, a.layer, a.rows[last].index) + 1; /* rows of a session are in order: the last one sees the most */
}

template <int DIMS> KVS_DEVICE void load_queries(const kvs_attn_args &a, const tile_work &w) {
    typedef tile_shape<DIMS> shape;
    for (int32_t i = (int32_t)threadIdx.x; i < shape::BLOCK_ROWS * shape::WIDTH; i += KVS_ATTN_THREADS) {
        int32_t row = w.first_row + i / shape::WIDTH, d = i % shape::WIDTH;
        bool inside = row < a.n && d < a.head_dim;
        w.q[i] = inside ? kvs_mul(a.q[((int64_t)row * a.n_head + w.head) * a.head_dim + d], a.scale) : 0.0f;
    }
}

/* Blocks along x take rows, the last ones first, as they have the most keys; along y heads. Rows of several sessions, where one ends and
 * another begins, are taken one session after the other. */
template <int DIMS> static __global__ void __launch_bounds__(KVS_ATTN_THREADS, 3) tile_kernel(kvs_attn_args a) {
    typedef tile_shape<DIMS> shape;
    KVS_DYNAMIC_SHARED(float, shared);
    __shared__ int32_t seen[shape::BLOCK_ROWS];
    tile_work w = {};
    w.first_row = (int32_t)(gridDim.x - 1 - blockIdx.x) * shape::BLOCK_ROWS;
    w.head = (int32_t)blockIdx.y;
    w.slices = shared;
    w.q = shared + 2 * SLICE_FLOATS;
    w.p = w.q + shape::BLOCK_ROWS * shape::WIDTH;
    w.seen = seen;
    load_queries<DIMS>(a, w);
    int32_t lane = tile_lane(), row = w.first_row + lane, n = KVS_MIN((int32_t)shape::BLOCK_ROWS, a.n - w.first_row);
    bool together = lane + 1 < n && (!a.rows || a.rows[row].kv == a.rows[row + 1].kv);
    uint32_t with_next = __ballot_sync(KVS_ALL_LANES, together);
    for (int32_t first = 0, end; first < n; first = end) {
        end = first + __ffs((int)~(with_next >> first));
        find_keys(a, w.first_row + end - 1, w);
        if (threadIdx.x < shape::BLOCK_ROWS) {
            bool inside = lane >= first && lane < end;
            seen[lane] = !inside ? 0 : a.rows ? kvs_kv_place(a.rows[row].kv, a.layer, a.rows[row].index) + 1 : a.n;
        }
        __syncthreads();
        tile_state<DIMS> state;
        clear<DIMS>(state);
        walk_keys<DIMS>(a, w, state);
        write_rows<DIMS>(a, w, state);
        __syncthreads(); /* seen and the slices are free */
    }
}

template <int DIMS> static void launch_dims(kvs_cuda *cu, const kvs_attn_args *a) {
    typedef tile_shape<DIMS> shape;
    dim3 grid((unsigned)kvs_ceil_div(a->n, shape::BLOCK_ROWS), (unsigned)a->n_head);
    KVS_LAUNCH(cu, tile_kernel<DIMS>, grid, dim3(KVS_ATTN_THREADS), shape::SHARED_FLOATS * sizeof(float), *a);
}

void kvs_attn_launch_tile(kvs_cuda *cu, const kvs_attn_args *a) {
    int32_t dims = (a->head_dim + KVS_WARP - 1) / KVS_WARP;
    if (dims <= 1)
        launch_dims<1>(cu, a);
    else if (dims == 2)
        launch_dims<2>(cu, a);
    else if (dims == 3)
        launch_dims<3>(cu, a);
    else if (dims == 4)
        launch_dims<4>(cu, a);
    else if (dims <= 8)
        launch_dims<8>(cu, a);
    else
        launch_dims<16>(cu, a);
}
