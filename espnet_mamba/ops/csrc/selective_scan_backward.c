// The backward pass of selective_scan.c, derived by hand. Per state, with g_t the gradient of h_t from y_t and h_{t+1}:
//
//   grad C_t = grad y_t h_t,   grad B_t = g_t step_t x_t   (summed over channels)
//   grad step_t = sum over states of g_t (a_t h_{t-1} A + B_t x_t),   grad A = sum over time of g_t a_t h_{t-1} step_t
//
// with a_t = exp(step_t A), and g_{t-1} = a_t g_t + C_{t-1} grad y_{t-1}.
#include "scan_tiles.h"

#define SPAN 256  // frames of grad B and grad C that a thread adds up at a time

// Sums over time and channels are left by the items and completed at the end: those of B and C as (directions, B,
// groups, 2, T, N), those of A, D and dt_bias as (directions, B, blocks, padded + 2, LANES).
typedef struct {
    float *frames;
    double *channels;
} Partial;

// Four states over a tile again, with each state and decay written down; adds C . h to y where y is wanted.
INLINE void recompute_four(int steps, const vec *restrict step, const vec *restrict drive, vec *restrict y,
                           const float *restrict B, const float *restrict C, const float *restrict rates,
                           const float *restrict state, float *restrict states, float *restrict decays,
                           const int want_y, const int growing) {
    vec h[FOUR];
    UNROLL for (int n = 0; n < FOUR; n++) {
        h[n] = load(state + n * LANES);
        store(states + n * LANES, h[n]);
    }
    for (int t = 0; t < steps; t++) {
        vec sum = y[t];
        UNROLL for (int n = 0; n < FOUR; n++) {
            vec decay = decay_of(step[t], rates + n * LANES, growing);
            store(decays + (t * FOUR + n) * LANES, decay);
            h[n] = decay * h[n] + drive[t] * spread(B[t * FOUR + n]);
            store(states + ((t + 1) * FOUR + n) * LANES, h[n]);
            if (want_y) sum += h[n] * spread(C[t * FOUR + n]);
        }
        if (want_y) y[t] = sum;
    }
}

// The gradients of four states over a tile, last step first. `carried` holds the gradient of the state after the tile,
// then before it. Adds to grad_drive, to grad_decay (of step, through the decay, in units of ln 2), and to grad_A.
INLINE void reverse_four(int steps, const vec *restrict step, const vec *restrict drive, const vec *restrict grad_y,
                         const float *restrict B, const float *restrict C, const float *restrict rates,
                         const float *restrict states, const float *restrict decays, float *restrict carried,
                         vec *restrict grad_drive, vec *restrict grad_decay, float *restrict grad_A,
                         float *restrict lanes_B, float *restrict lanes_C) {
    vec grad[FOUR], sum_A[FOUR];
    UNROLL for (int n = 0; n < FOUR; n++) {
        grad[n] = load(carried + n * LANES);
        sum_A[n] = (vec){0};
    }
    for (int t = steps - 1; t >= 0; t--) {
        vec sum_drive = grad_drive[t], sum_decay = grad_decay[t];
        UNROLL for (int n = 0; n < FOUR; n++) {
            const int now = (t * FOUR + n) * LANES, after = now + FOUR * LANES;
            vec of_state = grad[n] + grad_y[t] * spread(C[t * FOUR + n]);
            store(lanes_C + now, load(lanes_C + now) + grad_y[t] * load(states + after));
            store(lanes_B + now, load(lanes_B + now) + of_state * drive[t]);
            sum_drive += of_state * spread(B[t * FOUR + n]);
            grad[n] = of_state * load(decays + now);
            vec of_exponent = grad[n] * load(states + now);
            sum_decay += of_exponent * load(rates + n * LANES);
            sum_A[n] += of_exponent * step[t];
        }
        grad_drive[t] = sum_drive;
        grad_decay[t] = sum_decay;
    }
    UNROLL for (int n = 0; n < FOUR; n++) {
        store(carried + n * LANES, grad[n]);
        store(grad_A + n * LANES, load(grad_A + n * LANES) + sum_A[n]);
    }
}

typedef struct {  // one block over one tile, in registers' width
    vec x[TILE], step[TILE], slope[TILE], drive[TILE], y[TILE], grad_y[TILE], gate_slope[TILE];
    vec grad_drive[TILE], grad_decay[TILE];
} Tile;

// What does not depend on the states: the steps, and y's gradient before the gate.
static void prepare_tile(const Scan *scan, const Direction *way, Work *work, const Place *at, int block, Tile *tile) {
    const int64_t size = TILE * LANES;
    Rows x = open_rows(scan->x, at, work->narrow, 1), dt = open_rows(way->dt, at, work->narrow + size, 1);
    Rows grad_y = open_rows(scan->grad_y, at, work->narrow + 2 * size, 1);
    const vec bias = load(work->bias + block * LANES), skip = load(work->skip + block * LANES), one = spread(1.f);
    for (int t = 0; t < at->steps; t++) {
        vec slope = one;
        tile->step[t] = load(dt.row + t * dt.stride) + bias;
        if (scan->dt_softplus) tile->step[t] = softplus(tile->step[t], &slope);
        tile->slope[t] = slope;
        tile->x[t] = load(x.row + t * x.stride);
        tile->drive[t] = tile->step[t] * tile->x[t];
        tile->y[t] = tile->x[t] * skip;
        tile->grad_y[t] = load(grad_y.row + t * grad_y.stride);
        tile->grad_drive[t] = tile->grad_decay[t] = (vec){0};
    }
    if (!scan->z.data) return;
    Rows z = open_rows(scan->z, at, work->narrow, 1);
    for (int t = 0; t < at->steps; t++) {
        vec value = load(z.row + t * z.stride), share = sigmoid(value), silu = value * share;
        tile->gate_slope[t] = tile->grad_y[t] * (share + silu * (one - share));
        tile->grad_y[t] *= silu;
    }
}

// The gradients of x, dt, and z, and the sums for D and dt_bias. The gate's gradient needs y of both directions: the
// first leaves its own where the gradient will be.
static void finish_tile(const Scan *scan, int index, Work *work, const Place *at, int block, const Tile *tile) {
    const Direction *way = &scan->direction[index];
    float *sums = work->sums + block * (work->padded + 2) * LANES + work->padded * LANES;
    Rows to_x = open_rows(scan->grad_x, at, work->narrow, index > 0);
    Rows to_dt = open_rows(way->grad_dt, at, work->narrow + TILE * LANES, 0);
    const vec skip = load(work->skip + block * LANES), ln_2 = spread((float)LN_2);
    vec sum_D = {0}, sum_bias = {0};
    for (int t = 0; t < at->steps; t++) {
        vec grad_x = tile->step[t] * tile->grad_drive[t] + skip * tile->grad_y[t];
        vec grad_dt = (ln_2 * tile->grad_decay[t] + tile->x[t] * tile->grad_drive[t]) * tile->slope[t];
        if (index) grad_x += load(to_x.row + t * to_x.stride);
        store(to_x.row + t * to_x.stride, grad_x);
        store(to_dt.row + t * to_dt.stride, grad_dt);
        sum_D += tile->x[t] * tile->grad_y[t];
        sum_bias += grad_dt;
    }
    store(sums, load(sums) + sum_D);
    store(sums + LANES, load(sums + LANES) + sum_bias);
    close_rows(scan->grad_x, at, to_x);
    close_rows(way->grad_dt, at, to_dt);
    if (!scan->z.data) return;
    const int last = index + 1 == scan->directions;
    Rows to_z = open_rows(scan->grad_z, at, work->narrow, index > 0);
    for (int t = 0; t < at->steps; t++) {
        vec y = tile->y[t];
        if (index) y += load(to_z.row + t * to_z.stride);
        if (last) y *= tile->gate_slope[t];
        store(to_z.row + t * to_z.stride, y);
    }
    close_rows(scan->grad_z, at, to_z);
}

// Part n of the padded states of a tile that will be needed soon: its rows, and its kept state.
INLINE void prefetch_part(const Scan *scan, const Direction *way, const Place *next, const float *state, int64_t n,
                          int64_t padded) {
    const int from = (int)(next->steps * n / padded), to = (int)(next->steps * (n + FOUR) / padded);
    PREFETCH(scan->x, next, from, to, 0);
    PREFETCH(way->dt, next, from, to, 0);
    PREFETCH(scan->grad_y, next, from, to, 0);
    PREFETCH(scan->grad_x, next, from, to, 1);
    PREFETCH(way->grad_dt, next, from, to, 1);
    if (scan->z.data) {
        PREFETCH(scan->z, next, from, to, 0);
        PREFETCH(scan->grad_z, next, from, to, 1);
    }
    for (int64_t i = n * LANES; i < (n + FOUR) * LANES; i += 16) __builtin_prefetch(state + i);
}

// state: the kept one before the tile. next, next_state: those of the tile after, or NULL.
static void backward_tile(const Scan *scan, int index, Work *work, const Place *at, int block, const float *state,
                          const Place *next, const float *next_state) {
    const Direction *way = &scan->direction[index];
    const int64_t offset = block * work->padded * LANES;
    float *sums = work->sums + block * (work->padded + 2) * LANES;
    float states[(TILE + 1) * FOUR * LANES] __attribute__((aligned(64)));
    float decays[TILE * FOUR * LANES] __attribute__((aligned(64)));
    Tile tile;
    prepare_tile(scan, way, work, at, block, &tile);
    for (int64_t n = 0; n < work->padded; n += FOUR) {
        if (next_state) prefetch_part(scan, way, next, next_state, n, work->padded);
        const float *B = work->B + n * TILE, *C = work->C + n * TILE, *rates = work->rates + offset + n * LANES;
        const float *before = state + n * LANES;
        if (work->growing)
            recompute_four(at->steps, tile.step, tile.drive, tile.y, B, C, rates, before, states, decays, 1, 1);
        else if (scan->z.data)
            recompute_four(at->steps, tile.step, tile.drive, tile.y, B, C, rates, before, states, decays, 1, 0);
        else
            recompute_four(at->steps, tile.step, tile.drive, tile.y, B, C, rates, before, states, decays, 0, 0);
        reverse_four(at->steps, tile.step, tile.drive, tile.grad_y, B, C, rates, states, decays,
                     work->carried + offset + n * LANES, tile.grad_drive, tile.grad_decay, sums + n * LANES,
                     work->lanes_B + n * TILE * LANES, work->lanes_C + n * TILE * LANES);
    }
    finish_tile(scan, index, work, at, block, &tile);
}

// One tile of grad B or grad C: the lanes summed, into rows of (T, N).
static void sum_lanes(float *to, const float *lanes, const Place *at, int64_t states) {
    float sums[TILE * FOUR] __attribute__((aligned(64)));
    for (int64_t n = 0; n < states; n += FOUR, lanes += TILE * FOUR * LANES) {
        for (int i = 0; i < TILE * FOUR; i += LANES) store(sums + i, lane_sums(lanes + i * LANES));
        for (int t = 0; t < at->steps; t++)
            for (int64_t i = 0; i < FOUR && n + i < states; i++)
                to[(at->first + t * at->sign) * states + n + i] = sums[t * FOUR + i];
    }
}

static void flush_sums(Work *work, double *totals, int64_t channels) {
    int64_t count = divide_up(channels, LANES) * (work->padded + 2) * LANES;
    for (int64_t i = 0; i < count; i++) totals[i] += (double)work->sums[i];
    memset(work->sums, 0, sizeof(float) * (size_t)count);
}

// One tile of all blocks of an item.
static void backward_tiles(const Scan *scan, int index, Work *work, const Item *item, Place at, int64_t tile) {
    const Direction *way = &scan->direction[index];
    const int64_t size = work->padded * LANES, first = item->channel / LANES;
    for (int block = 0; block * LANES < item->channels; block++, at.channel += LANES) {
        at.width = (int)least(LANES, item->channels - block * LANES);
        const float *state = kept_state(scan, way, item->utterance, tile, first + block), *next_state = NULL;
        Place next = next_place(&at, item, -TILE);
        if (next.first == at.first) next_state = state + size;
        else if (tile > 0) next_state = kept_state(scan, way, item->utterance, tile - 1, first);
        if (!starts_line(&next)) next_state = NULL;
        backward_tile(scan, index, work, &at, block, state, &next, next_state);
    }
}

static void backward_direction(const Scan *scan, int index, Work *work, Partial partial, const Item *item) {
    const Direction *way = &scan->direction[index];
    const int64_t padded = work->padded, half = scan->frames * scan->states, groups = divide_up(scan->channels, GROUP);
    const int64_t blocks = divide_up(scan->channels, LANES), lanes = TILE * padded * LANES;
    const int64_t states = (item->utterance * scan->channels + item->channel) * scan->states;
    const float *of_last = way->grad_last ? way->grad_last + states : NULL;
    float *frames = partial.frames + (item->utterance * groups + item->channel / GROUP) * 2 * half;
    double *totals = partial.channels + (item->utterance * blocks + item->channel / LANES) * (padded + 2) * LANES;
    fill_parameters(scan, way, work, item);
    fill_states(work->carried, of_last, item->channels, scan->states, padded, 1.0);
    memset(work->sums, 0, sizeof(float) * (size_t)(GROUP * (padded + 2)));
    memset(totals, 0, sizeof(double) * (size_t)(divide_up(item->channels, LANES) * (padded + 2) * LANES));
    for (int64_t tile = divide_up(item->length, TILE) - 1; tile >= 0; tile--) {
        Place at = place_tile(way, item, tile);
        fill_weights(work->B, way->B, &at, scan->states, padded);
        fill_weights(work->C, way->C, &at, scan->states, padded);
        memset(work->lanes_B, 0, sizeof(float) * (size_t)lanes);
        memset(work->lanes_C, 0, sizeof(float) * (size_t)lanes);
        backward_tiles(scan, index, work, item, at, tile);
        sum_lanes(frames, work->lanes_B, &at, scan->states);
        sum_lanes(frames + half, work->lanes_C, &at, scan->states);
        if (tile % FLUSH == 0) flush_sums(work, totals, item->channels);
    }
    if (way->grad_state)
        read_states(way->grad_state + states, work->carried, item->channels, scan->states, padded);
}

// ---- all items ----

static int64_t partial_frames(const Scan *scan) {
    return scan->batch * divide_up(scan->channels, GROUP) * 2 * scan->frames * scan->states;
}
static int64_t partial_channels(const Scan *scan) {
    return scan->batch * divide_up(scan->channels, LANES) * (padded_states(scan->states) + 2) * LANES;
}

static int backward_item(const Scan *scan, Partial partial, Item item) {
    Work work;
    if (open_work(&work, scan->states, 1)) return -1;
    unsigned mode = flush_denormals();
    for (int index = 0; index < scan->directions; index++) {
        const Frames grad_dt = scan->direction[index].grad_dt;
        backward_direction(scan, index, &work, partial, &item);
        clear_padding(grad_dt, item.utterance, item.channel, item.channels, item.length, scan->frames);
        partial.frames += partial_frames(scan);
        partial.channels += partial_channels(scan);
    }
    clear_padding(scan->grad_x, item.utterance, item.channel, item.channels, item.length, scan->frames);
    if (scan->z.data)
        clear_padding(scan->grad_z, item.utterance, item.channel, item.channels, item.length, scan->frames);
    restore_denormals(mode);
    close_work(&work);
    return 0;
}

// grad B and grad C of SPAN frames of an utterance: the sum over the groups of channels.
static void sum_groups(const Scan *scan, const Direction *way, const float *partial, int64_t utterance, int64_t from) {
    const int64_t groups = divide_up(scan->channels, GROUP), half = scan->frames * scan->states;
    const int64_t length = scan->lengths ? scan->lengths[utterance] : scan->frames;
    for (int which = 0; which < 2; which++)
        for (int64_t t = from; t < least(from + SPAN, scan->frames); t++) {
            const float *row = partial + (utterance * groups * 2 + which) * half + t * scan->states;
            float *out = row_at(which ? way->grad_C : way->grad_B, utterance, t);
            for (int64_t n = 0; n < scan->states; n++) {
                float sum = 0;
                for (int64_t group = 0; t < length && group < groups; group++) sum += row[group * 2 * half + n];
                out[n] = sum;
            }
        }
}

// grad A, grad D and grad dt_bias of one channel: the sum over the utterances.
static void sum_utterances(const Scan *scan, const Direction *way, const double *partial, int64_t channel) {
    const int64_t padded = padded_states(scan->states), size = (padded + 2) * LANES;
    const int64_t blocks = divide_up(scan->channels, LANES);
    for (int64_t n = 0; n < padded + 2; n++) {
        double sum = 0;
        for (int64_t b = 0; b < scan->batch; b++)
            sum += partial[(b * blocks + channel / LANES) * size + n * LANES + channel % LANES];
        if (n < scan->states) way->grad_A[channel * scan->states + n] = (float)sum;
        if (n == padded && way->grad_D) way->grad_D[channel] = (float)sum;
        if (n == padded + 1 && way->grad_dt_bias) way->grad_dt_bias[channel] = (float)sum;
    }
}

static void complete_sums(const Scan *scan, Partial partial) {
    const int64_t spans = divide_up(scan->frames, SPAN);
    for (int index = 0; index < scan->directions; index++) {
        const Direction *way = &scan->direction[index];
#pragma omp parallel for schedule(static) num_threads((int)scan->threads)
        for (int64_t i = 0; i < scan->batch * spans; i++)
            sum_groups(scan, way, partial.frames, i / spans, i % spans * SPAN);
        for (int64_t channel = 0; channel < scan->channels; channel++)
            sum_utterances(scan, way, partial.channels, channel);
        partial.frames += partial_frames(scan);
        partial.channels += partial_channels(scan);
    }
}

// Returns 0, or -1 where there was no memory.
int scan_backward(const Scan *scan) {
    Partial partial = {malloc(sizeof(float) * (size_t)(scan->directions * partial_frames(scan))),
                       malloc(sizeof(double) * (size_t)(scan->directions * partial_channels(scan)))};
    int failed = partial.frames && partial.channels ? 0 : -1;
    if (!failed) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)scan->threads) reduction(| : failed)
        for (int64_t number = 0; number < count_items(scan); number++)
            failed |= backward_item(scan, partial, make_item(scan, number));
    }
    if (!failed) complete_sums(scan, partial);
    free(partial.frames);
    free(partial.channels);
    return failed;
}
