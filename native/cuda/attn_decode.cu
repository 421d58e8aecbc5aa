/* attn_decode.cu - attention of few rows: a block takes one tile of keys for one row and some query heads of one KV head, so that a long cache is
 * read by the whole device; a second kernel joins the tiles.
 *
 * Keys and values come in pieces that two buffers of shared memory hold in turns; rows whose bytes are a multiple of 16 are copied as they
 * are, behind the computation, others are widened to float32 on their way. A row there takes an odd multiple of 16 bytes, so that 8
 * threads that read 16 bytes of 8 rows meet no bank twice. */
#include "attn.cuh"

static constexpr int PIECE_BYTES = 64 * 272 /* 64 rows of 128 halves */, LINE = 16;

typedef struct decode_layout { /* of a piece */
    bool halves, raw;          /* raw: the bytes of the cache; else float32 */
    int32_t keys, stride;      /* a power of two from 8 to 64; bytes */
} decode_layout;

KVS_SHARED int32_t decode_width(int32_t head_dim) { return (head_dim + 7) / 8 * 8; } /* of a row in float32 */

KVS_SHARED decode_layout decode_layout_of(int32_t type, int32_t head_dim) {
    decode_layout l;
    l.halves = type == KVS_TYPE_F16 && head_dim % 8 == 0;
    l.raw = l.halves || (type == KVS_TYPE_F32 && head_dim % 4 == 0);
    l.stride = (decode_width(head_dim) * (l.halves ? 2 : 4) / LINE | 1) * LINE;
    for (l.keys = KVS_ATTN_TILE; l.keys * l.stride > PIECE_BYTES;) l.keys /= 2;
    return l;
}

int32_t kvs_attn_piece_bytes(int32_t type, int32_t head_dim) {
    decode_layout l = decode_layout_of(type, head_dim);
    return l.keys * l.stride;
}

uint64_t kvs_attn_left_bytes(int32_t head_dim) { return (uint64_t)head_dim * sizeof(float) + sizeof(kvs_attn_left); }

typedef struct decode_block {
    const kvs_kv *kv;
    kvs_attn_rows k, v; /* from the first key of the tile on */
    decode_layout layout;
    int32_t n;                  /* keys of the tile that the row sees, at least 1 */
    int32_t row, head, n_heads; /* of the step; query heads of this block */
    int32_t kv_head, tile;
    bool newest;     /* the row's own key is the last of them */
    float *q, *s;    /* shared: (HEADS, width), scaled; (HEADS, TILE): scores, then e^(s - m) */
    uint8_t *pieces; /* shared: two */
    int32_t piece_bytes;
} decode_block;

/* false: the row does not reach so far, and nobody will ask for this tile */
KVS_DEVICE bool find_block(const kvs_attn_args &a, int heads, decode_block &b) {
    int32_t group = a.n_head / a.n_kv_head, chunks = (group + heads - 1) / heads, chunk = (int32_t)blockIdx.y % chunks;
    b.row = a.first_row + (int32_t)blockIdx.z;
    b.tile = (int32_t)blockIdx.x;
    b.kv_head = (int32_t)blockIdx.y / chunks;
    b.head = b.kv_head * group + chunk * heads;
    b.n_heads = KVS_MIN(heads, group - chunk * heads);
    const kvs_kv *kv = b.kv = a.rows[b.row].kv;
    int32_t seen = kvs_kv_place(kv, a.layer, a.rows[b.row].index) + 1, first = b.tile * KVS_ATTN_TILE;
    if (first >= seen) return false;
    b.n = KVS_MIN(KVS_ATTN_TILE, seen - first);
    b.newest = first + b.n == seen;
    b.k = {kvs_kv_rows(kv, kv->k, a.layer, b.kv_head) + first * kv->row_bytes, kv->row_bytes, kv->type, a.head_dim};
    b.v = {kvs_kv_rows(kv, kv->v, a.layer, b.kv_head) + first * kv->row_bytes, kv->row_bytes, kv->type, a.head_dim};
    b.layout = decode_layout_of(kv->type, a.head_dim);
    b.piece_bytes = a.piece_bytes;
    return true;
}

/* ---- pieces ---- */

KVS_DEVICE void copy_rows(const kvs_attn_rows &rows, int32_t first, int32_t n, uint8_t *to, int32_t stride) {
    int32_t lines = (int32_t)(rows.stride / LINE), row = (int32_t)threadIdx.x / lines, column = (int32_t)threadIdx.x % lines;
    int32_t row_step = KVS_ATTN_THREADS / lines, column_step = KVS_ATTN_THREADS % lines;
    while (row < n) {
        kvs_async16(to + row * stride + column * LINE, rows.base + (first + row) * rows.stride + column * LINE);
        row += row_step;
        column += column_step;
        if (column >= lines) {
            column -= lines;
            row++;
        }
    }
}

KVS_DEVICE void widen_eights(const kvs_attn_rows &rows, int32_t first, int32_t n, uint8_t *to, int32_t stride) {
    constexpr int AT_ONCE = 4;
    int32_t eights = rows.head_dim / 8, all = n * eights;
#pragma unroll 1
    for (int32_t begin = (int32_t)threadIdx.x; begin < all; begin += AT_ONCE * KVS_ATTN_THREADS) {
        kvs_attn_eight x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t item = begin + i * KVS_ATTN_THREADS;
            if (item < all) x[i] = kvs_attn_read(rows, first + item / eights, item % eights * 8);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t item = begin + i * KVS_ATTN_THREADS;
            if (item < all) kvs_attn_store(rows, x[i], (float *)(void *)(to + item / eights * stride) + item % eights * 8);
        }
    }
}

/* Rows of any head_dim, value by value, with zeros behind */
KVS_DEVICE void widen_values(const kvs_attn_rows &rows, int32_t first, int32_t n, uint8_t *to, int32_t stride) {
    int32_t width = decode_width(rows.head_dim);
    for (int32_t item = (int32_t)threadIdx.x; item < n * width; item += KVS_ATTN_THREADS) {
        int32_t i = item / width, d = item % width;
        ((float *)(void *)(to + i * stride))[d] = kvs_attn_value(rows, first + i, d);
    }
}

/* Pieces 0 .. n - 1 are keys, n .. 2 n - 1 values; there is nothing behind them. */
KVS_DEVICE int32_t pieces_of(const decode_block &b) { return (b.n + b.layout.keys - 1) / b.layout.keys; }
KVS_DEVICE int32_t piece_first(const decode_block &b, int32_t piece) {
    return (piece < pieces_of(b) ? piece : piece - pieces_of(b)) * b.layout.keys;
}
KVS_DEVICE int32_t piece_keys(const decode_block &b, int32_t piece) { return KVS_MIN(b.layout.keys, b.n - piece_first(b, piece)); }
KVS_DEVICE uint8_t *piece_buffer(const decode_block &b, int32_t piece) { return b.pieces + piece % 2 * b.piece_bytes; }

template <bool HALVES> KVS_DEVICE void stage_piece(const decode_block &b, int32_t piece) {
    if (piece < 2 * pieces_of(b)) {
        kvs_attn_rows rows = b.k;
        rows.base = piece < pieces_of(b) ? b.k.base : b.v.base;
        int32_t first = piece_first(b, piece), n = piece_keys(b, piece), stride = b.layout.stride;
        uint8_t *to = piece_buffer(b, piece);
        if (HALVES || b.layout.raw)
            copy_rows(rows, first, n, to, stride);
        else if (kvs_kv_in_eights(rows.head_dim))
            widen_eights(rows, first, n, to, stride);
        else
            widen_values(rows, first, n, to, stride);
    }
    kvs_async_commit(); /* an empty group, too: waits count groups */
}

/* ---- scores ---- */

/* STEP<HALVES> values of a row of a piece, from d on */
template <bool HALVES> KVS_DEVICE void piece_values(const uint8_t *row, int32_t d, float *out) {
    if (HALVES) {
        uint4 h = kvs_load16(row + 2 * d);
        uint32_t word[4] = {h.x, h.y, h.z, h.w};
        kvs_attn_halves(word, out);
    } else {
        float4 x = kvs_load_float4((const float *)(const void *)row + d);
        out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    }
}

/* A thread takes one key and half of the heads, or all of one. */
template <bool HALVES, int HEADS> KVS_DEVICE void score_piece(const decode_block &b, int32_t piece) {
    constexpr int MINE = (HEADS + 1) / 2, SETS = HEADS / MINE, STEP = HALVES ? 8 : 4;
    int32_t first = piece_first(b, piece), n = piece_keys(b, piece), width = decode_width(b.k.head_dim);
    for (int32_t item = (int32_t)threadIdx.x; item < SETS * b.layout.keys; item += KVS_ATTN_THREADS) {
        int32_t set = item >= b.layout.keys, key = item - set * b.layout.keys;
        if (key >= n) continue;
        const uint8_t *row = piece_buffer(b, piece) + key * b.layout.stride;
        const float *q = b.q + set * MINE * width;
        float s[MINE] = {};
#pragma unroll 4
        for (int32_t d = 0; d < b.k.head_dim; d += STEP) {
            float x[STEP];
            piece_values<HALVES>(row, d, x);
#pragma unroll
            for (int h = 0; h < MINE; h++)
#pragma unroll
                for (int i = 0; i < STEP; i += 4) {
                    float4 y = kvs_load_float4(q + h * width + d + i);
                    s[h] = fmaf(y.w, x[i + 3], fmaf(y.z, x[i + 2], fmaf(y.y, x[i + 1], fmaf(y.x, x[i], s[h]))));
                }
        }
#pragma unroll
        for (int h = 0; h < MINE; h++) b.s[(set * MINE + h) * KVS_ATTN_TILE + first + key] = s[h];
    }
}

/* ---- softmax ---- */

KVS_DEVICE void leave(const kvs_attn_args &a, int64_t place, const kvs_attn_left &left) {
    float *to = (float *)(void *)(a.left + place);
    kvs_store_float4(to, make_float4(left.all.m, left.all.l, left.all.u, left.all.vis));
    kvs_store_float4(to + 4, make_float4(left.before.m, left.before.l, left.before.u, left.before.vis));
}

KVS_DEVICE int64_t left_place(const kvs_attn_args &a, int32_t row, int32_t head, int32_t tile) { /* in sums and left */
    return ((int64_t)(row - a.first_row) * a.n_head + head) * a.n_tiles + tile;
}

/* A warp takes one head after the other. */
KVS_DEVICE void soften_tile(const kvs_attn_args &a, const decode_block &b) {
    int32_t lane = threadIdx.x % KVS_WARP, first = b.tile * KVS_ATTN_TILE;
    bool entropy = a.taps.entropy != NULL;
    uint32_t spans[2] = {0, 0}, no_spans[2] = {0, 0};
    if (a.taps.mass) kvs_attn_span_bits(kvs_kv_spans(b.kv, a.layer, b.kv_head), b.kv->n_spans, first, spans);
    for (int32_t h = (int32_t)threadIdx.x / KVS_WARP; h < b.n_heads; h += KVS_ATTN_WARPS) {
        float *row = b.s + h * KVS_ATTN_TILE;
        float s[2] = {lane < b.n ? row[lane] : 0.0f, lane + KVS_WARP < b.n ? row[lane + KVS_WARP] : 0.0f};
        kvs_attn_left left = {kvs_attn_none(), kvs_attn_none()};
        if (entropy && b.newest && b.kv->exclude_self && b.n > 1) {
            float t[2] = {s[0], s[1]};
            left.before = kvs_attn_soften(t, b.n - 1, no_spans, true);
        }
        left.all = kvs_attn_soften(s, b.n, spans, entropy);
        row[lane] = s[0];
        row[lane + KVS_WARP] = s[1];
        if (!lane) leave(a, left_place(a, b.row, b.head + h, b.tile), left);
    }
}

/* ---- values ---- */

template <bool HALVES> KVS_DEVICE float2 piece_pair(const uint8_t *row, int32_t pair) {
    if (HALVES) return kvs_half2_float2(kvs_load4(row + 4 * pair));
    uint2 bits = kvs_load8(row + 8 * pair);
    return make_float2(kvs_bits_float(bits.x), kvs_bits_float(bits.y));
}

/* KEYS neighbouring keys, their weights in p[h * TILE ..] */
template <bool HALVES, int MINE, int KEYS>
KVS_DEVICE void add_keys(const uint8_t *row, int32_t stride, int32_t pair, const float *p, float acc[MINE][2]) {
    float2 v[KEYS];
#pragma unroll
    for (int k = 0; k < KEYS; k++) v[k] = piece_pair<HALVES>(row + k * stride, pair);
#pragma unroll
    for (int h = 0; h < MINE; h++) {
        float e[KEYS];
        if (KEYS == 4) {
            float4 all = kvs_load_float4(p + h * KVS_ATTN_TILE);
            e[0] = all.x, e[1 % KEYS] = all.y, e[2 % KEYS] = all.z, e[3 % KEYS] = all.w;
        } else
            e[0] = p[h * KVS_ATTN_TILE];
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            acc[h][0] = fmaf(e[k], v[k].x, acc[h][0]);
            acc[h][1] = fmaf(e[k], v[k].y, acc[h][1]);
        }
    }
}

/* A thread takes two neighbouring dimensions and half of the heads, ITEMS times. */
template <bool HALVES, int HEADS, int ITEMS>
KVS_DEVICE void add_piece(const decode_block &b, int32_t piece, float acc[ITEMS][(HEADS + 1) / 2][2]) {
    constexpr int MINE = (HEADS + 1) / 2, SETS = HEADS / MINE;
    int32_t n = piece_keys(b, piece), pairs = (b.v.head_dim + 1) / 2, stride = b.layout.stride;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int32_t item = (int32_t)threadIdx.x + i * KVS_ATTN_THREADS, set = item >= pairs, pair = item - set * pairs, k = 0;
        if (item >= SETS * pairs) continue;
        const uint8_t *rows = piece_buffer(b, piece);
        const float *p = b.s + set * MINE * KVS_ATTN_TILE + piece_first(b, piece);
        for (; k + 4 <= n; k += 4) add_keys<HALVES, MINE, 4>(rows + k * stride, stride, pair, p + k, acc[i]);
        for (; k < n; k++) add_keys<HALVES, MINE, 1>(rows + k * stride, stride, pair, p + k, acc[i]);
    }
}

template <int HEADS, int ITEMS>
KVS_DEVICE void leave_sums(const kvs_attn_args &a, const decode_block &b, const float acc[ITEMS][(HEADS + 1) / 2][2]) {
    constexpr int MINE = (HEADS + 1) / 2, SETS = HEADS / MINE;
    int32_t pairs = (a.head_dim + 1) / 2;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int32_t item = (int32_t)threadIdx.x + i * KVS_ATTN_THREADS, set = item >= pairs, d = 2 * (item - set * pairs);
        if (item >= SETS * pairs) continue;
#pragma unroll
        for (int h = 0; h < MINE; h++) {
            if (set * MINE + h >= b.n_heads) continue;
            float *to = a.sums + left_place(a, b.row, b.head + set * MINE + h, b.tile) * a.head_dim + d;
            to[0] = acc[i][h][0];
            if (d + 1 < a.head_dim) to[1] = acc[i][h][1];
        }
    }
}

/* ---- the whole tile ---- */

KVS_DEVICE void load_queries(const kvs_attn_args &a, const decode_block &b, int heads) {
    int32_t width = decode_width(a.head_dim);
    const float *q = a.q + ((int64_t)b.row * a.n_head + b.head) * a.head_dim;
    for (int32_t i = (int32_t)threadIdx.x; i < heads * width; i += KVS_ATTN_THREADS) {
        int32_t h = i / width, d = i % width;
        b.q[i] = h < b.n_heads && d < a.head_dim ? kvs_mul(q[h * a.head_dim + d], a.scale) : 0.0f;
    }
}

template <bool HALVES, int HEADS, int ITEMS> KVS_DEVICE void attend_tile(const kvs_attn_args &a, const decode_block &b) {
    int32_t n = pieces_of(b);
    float acc[ITEMS][(HEADS + 1) / 2][2] = {};
#pragma unroll 1
    for (int32_t piece = 0; piece < 2; piece++) stage_piece<HALVES>(b, piece);
    load_queries(a, b, HEADS);
#pragma unroll 1
    for (int32_t piece = 0; piece < 2 * n; piece++) {
        kvs_async_wait<1>(); /* this one is there, the next one may still be on its way */
        __syncthreads();
        if (piece == n) {
            soften_tile(a, b);
            __syncthreads();
        }
        if (piece < n)
            score_piece<HALVES, HEADS>(b, piece);
        else
            add_piece<HALVES, HEADS, ITEMS>(b, piece, acc);
        __syncthreads(); /* its buffer is free */
        stage_piece<HALVES>(b, piece + 2);
    }
    leave_sums<HEADS, ITEMS>(a, b, acc);
}

template <int HEADS, int ITEMS>
static __global__ void __launch_bounds__(KVS_ATTN_THREADS, ITEMS > 1   ? 3
                                                           : HEADS > 4 ? 4
                                                                       : 5) decode_kernel(kvs_attn_args a) {
    KVS_DYNAMIC_SHARED(uint8_t, shared);
    decode_block b;
    kvs_let_next_begin();
    if (!find_block(a, HEADS, b)) return;
    b.q = (float *)(void *)shared;
    b.s = b.q + HEADS * decode_width(a.head_dim);
    b.pieces = (uint8_t *)(b.s + HEADS * KVS_ATTN_TILE);
    kvs_await_previous();
    if (b.layout.halves)
        attend_tile<true, HEADS, ITEMS>(a, b);
    else
        attend_tile<false, HEADS, ITEMS>(a, b);
}

/* ---- joining tiles ---- */

KVS_DEVICE kvs_attn_part left_part(const kvs_attn_part *part) {
    float4 x = kvs_load_float4(&part->m);
    return {x.x, x.y, x.z, x.w};
}

KVS_DEVICE kvs_attn_part part_of_lane(const kvs_attn_part &part, int lane) { /* but for m */
    return {0.0f, __shfl_sync(KVS_ALL_LANES, part.l, lane), __shfl_sync(KVS_ALL_LANES, part.u, lane),
            __shfl_sync(KVS_ALL_LANES, part.vis, lane)};
}

KVS_DEVICE kvs_attn_shift shift_of_lane(const kvs_attn_shift &shift, int lane) {
    return {__shfl_sync(KVS_ALL_LANES, shift.d0, lane), __shfl_sync(KVS_ALL_LANES, shift.d1, lane),
            __shfl_sync(KVS_ALL_LANES, shift.c0, lane), __shfl_sync(KVS_ALL_LANES, shift.c1, lane)};
}

/* m of all tiles up to a lane's own; before: of those before this warp's */
KVS_DEVICE float running_maximum(float m, float before) {
    int32_t lane = threadIdx.x % KVS_WARP;
    for (int d = 1; d < KVS_WARP; d *= 2) {
        float other = __shfl_sync(KVS_ALL_LANES, m, lane - d < 0 ? lane : lane - d);
        m = fmaxf(m, other);
    }
    return fmaxf(m, before);
}

KVS_DEVICE void tell(const kvs_attn_args &a, int64_t place, const kvs_attn_part &all, float entropy) {
    if (a.taps.entropy) a.taps.entropy[place] = entropy;
    if (a.taps.mass) a.taps.mass[place] = all.vis / all.l;
    if (a.taps.lse) a.taps.lse[place] = all.m + logf(all.l);
}

static constexpr int MERGE_DIMS = KVS_MAX_HEAD_DIM / KVS_ATTN_THREADS;

/* A block for each head of each row; each of its warps joins all tiles for its own dimensions, 32 tiles at a time: their factors are found
 * side by side, the sums follow one another. */
static __global__ void __launch_bounds__(KVS_ATTN_THREADS) merge_kernel(kvs_attn_args a) {
    int32_t head = (int32_t)blockIdx.x, row = a.first_row + (int32_t)blockIdx.y, lane = threadIdx.x % KVS_WARP;
    const kvs_kv *kv = a.rows[row].kv;
    int32_t seen = kvs_kv_place(kv, a.layer, a.rows[row].index) + 1, n = (seen + KVS_ATTN_TILE - 1) / KVS_ATTN_TILE;
    int64_t place = left_place(a, row, head, 0), out = (int64_t)row * a.n_head + head;
    kvs_attn_part all = kvs_attn_none(), before = all;
    float o[MERGE_DIMS] = {};
    kvs_let_next_begin();
    kvs_await_previous();
    for (int32_t first = 0; first < n; first += KVS_WARP) {
        kvs_attn_part mine = first + lane < n ? left_part(&a.left[place + first + lane].all) : kvs_attn_none();
        float top = running_maximum(mine.m, all.m), below = __shfl_sync(KVS_ALL_LANES, top, lane ? lane - 1 : 0);
        kvs_attn_shift shift = kvs_attn_shift_of(lane ? below : all.m, mine.m);
        float m = all.m;
        int32_t here = KVS_MIN(n - first, (int32_t)KVS_WARP);
#pragma unroll 4
        for (int32_t i = 0; i < here; i++) {
            kvs_attn_shift s = shift_of_lane(shift, i);
            before = all;
            kvs_attn_join(all, part_of_lane(mine, i), s);
            const float *sums = a.sums + (place + first + i) * a.head_dim;
            for (int j = 0; j < MERGE_DIMS; j++) {
                int32_t d = (int32_t)(threadIdx.x + j * blockDim.x);
                if (d < a.head_dim) o[j] = kvs_attn_add(o[j], sums[d], s);
            }
        }
        before.m = here > 1 ? __shfl_sync(KVS_ALL_LANES, top, here - 2) : m;
        all.m = __shfl_sync(KVS_ALL_LANES, top, here - 1);
    }
    for (int j = 0; j < MERGE_DIMS; j++) {
        int32_t d = (int32_t)(threadIdx.x + j * blockDim.x);
        if (d >= a.head_dim) break; /* whole warps, where there are tiles: head_dim is a multiple of a group then */
        float x = o[j] / all.l;
        a.out[out * a.head_dim + d] = x;
        if (a.tiles.p) kvs_act_put_group(a.tiles, row, (head * a.head_dim + d) / KVS_GROUP, x);
    }
    if (threadIdx.x) return;
    if (kv->exclude_self && a.taps.entropy) {
        kvs_attn_part last = left_part(&a.left[place + n - 1].before);
        if (seen % KVS_ATTN_TILE != 1) kvs_attn_join(before, last, kvs_attn_shift_of(before.m, last.m));
        tell(a, out, all, kvs_attn_entropy(before));
    } else
        tell(a, out, all, kvs_attn_entropy(all));
}

/* ---- launches ---- */

template <int HEADS, int ITEMS> static void launch_heads(kvs_cuda *cu, const kvs_attn_args *a) {
    int64_t group = a->n_head / a->n_kv_head;
    dim3 grid((unsigned)a->n_tiles, (unsigned)(a->n_kv_head * kvs_ceil_div(group, HEADS)), (unsigned)a->n_rows);
    size_t shared = HEADS * (decode_width(a->head_dim) + KVS_ATTN_TILE) * sizeof(float) + 2 * (size_t)a->piece_bytes;
    KVS_LAUNCH_EARLY(cu, (decode_kernel<HEADS, ITEMS>), grid, dim3(KVS_ATTN_THREADS), shared, *a);
}

static void launch_rows(kvs_cuda *cu, const kvs_attn_args *a) {
    int32_t group = a->n_head / a->n_kv_head;
    if (a->head_dim > KVS_ATTN_THREADS) /* few models have such heads: not worth a kernel for each group */
        launch_heads<1, 4>(cu, a);
    else if (group == 1)
        launch_heads<1, 1>(cu, a);
    else if (group == 2)
        launch_heads<2, 1>(cu, a);
    else if (group <= 4)
        launch_heads<4, 1>(cu, a);
    else
        launch_heads<8, 1>(cu, a);
    int32_t warps = KVS_MIN((a->head_dim + KVS_WARP - 1) / KVS_WARP, KVS_ATTN_WARPS);
    KVS_LAUNCH_EARLY(cu, merge_kernel, dim3((unsigned)a->n_head, (unsigned)a->n_rows), dim3((unsigned)(warps * KVS_WARP)), 0, *a);
}

void kvs_attn_launch_decode(kvs_cuda *cu, const kvs_attn_args *a) {
    kvs_attn_args some = *a;
    for (some.first_row = 0; some.first_row < a->n; some.first_row += a->rows_at_once) {
        some.n_rows = KVS_MIN(a->rows_at_once, a->n - some.first_row);
        launch_rows(cu, &some);
    }
}
