// The selective scan of Mamba-1 (docs/papers.md 2), forward and backward, one or two directions of time in one call:
//
//   h_t = exp(step_t A) h_{t-1} + step_t x_t B_t,   y_t = (sum over directions of C_t . h_t + D x_t) SiLU(z_t)
//
// A register holds LANES channels (a block) and a tile is one block over TILE frames. States run in fours that stay in
// registers over a tile. The forward pass keeps the state before each tile; the backward pass recomputes the states and
// decays within a tile from it. Work is divided into items, (utterance, GROUP channels); both directions of an item run
// one after the other, so that x and z still lie in a cache for the second. Sums over items are made afterwards in a
// fixed order: no result depends on the number of threads. Time runs in scan order; reversed, it is a negative stride.
#include "scan_tiles.h"

int64_t scan_kept_floats(int64_t batch, int64_t frames, int64_t channels, int64_t states) {
    return batch * divide_up(frames, TILE) * divide_up(channels, LANES) * padded_states(states) * LANES;
}

// Four states over a tile: adds C . h to y.
INLINE void advance_four(int steps, const vec *restrict step, const vec *restrict drive, vec *restrict y,
                         const float *restrict B, const float *restrict C, const float *restrict rates,
                         float *restrict state, const int growing) {
    vec h[FOUR];
    UNROLL for (int n = 0; n < FOUR; n++) h[n] = load(state + n * LANES);
    for (int t = 0; t < steps; t++) {
        vec sum = y[t];
        UNROLL for (int n = 0; n < FOUR; n++) {
            vec decay = decay_of(step[t], rates + n * LANES, growing);
            h[n] = decay * h[n] + drive[t] * spread(B[t * FOUR + n]);
            sum += h[n] * spread(C[t * FOUR + n]);
        }
        y[t] = sum;
    }
    UNROLL for (int n = 0; n < FOUR; n++) store(state + n * LANES, h[n]);
}

// Part n of the padded states of the tile `next`, which is needed soon.
INLINE void prefetch_part(const Scan *scan, const Direction *way, const Place *next, int64_t n, int64_t padded,
                          int gate) {
    const int from = (int)(next->steps * n / padded), to = (int)(next->steps * (n + FOUR) / padded);
    PREFETCH(scan->x, next, from, to, 0);
    PREFETCH(way->dt, next, from, to, 0);
    PREFETCH(scan->y, next, from, to, 1);
    if (gate) PREFETCH(scan->z, next, from, to, 0);
}

// One block over one tile. The second direction adds to the first one's sum, and the last one gates it.
static void forward_tile(const Scan *scan, int index, Work *work, const Place *at, int block, const Place *next) {
    const Direction *way = &scan->direction[index];
    const int second = index > 0, gate = scan->z.data && index + 1 == scan->directions;
    const int64_t tile = TILE * LANES, offset = block * work->padded * LANES;
    Rows x = open_rows(scan->x, at, work->narrow, 1), dt = open_rows(way->dt, at, work->narrow + tile, 1);
    Rows out = open_rows(scan->y, at, work->narrow + 2 * tile, second);
    vec step[TILE], drive[TILE], y[TILE], slope;
    const vec bias = load(work->bias + block * LANES), skip = load(work->skip + block * LANES);
    for (int t = 0; t < at->steps; t++) {
        vec input = load(x.row + t * x.stride);
        step[t] = load(dt.row + t * dt.stride) + bias;
        if (scan->dt_softplus) step[t] = softplus(step[t], &slope);
        drive[t] = step[t] * input;
        y[t] = input * skip;
        if (second) y[t] += load(out.row + t * out.stride);
    }
    for (int64_t n = 0; n < work->padded; n += FOUR) {
        if (next) prefetch_part(scan, way, next, n, work->padded, gate);
        const float *B = work->B + n * TILE, *C = work->C + n * TILE, *rates = work->rates + offset + n * LANES;
        float *state = work->carried + offset + n * LANES;
        if (work->growing) advance_four(at->steps, step, drive, y, B, C, rates, state, 1);
        else advance_four(at->steps, step, drive, y, B, C, rates, state, 0);
    }
    if (gate) {
        Rows z = open_rows(scan->z, at, work->narrow + 3 * tile, 1);
        for (int t = 0; t < at->steps; t++) {
            vec value = load(z.row + t * z.stride);
            y[t] *= value * sigmoid(value);
        }
    }
    for (int t = 0; t < at->steps; t++) store(out.row + t * out.stride, y[t]);
    close_rows(scan->y, at, out);
}

static void forward_direction(const Scan *scan, int index, Work *work, const Item *item) {
    const Direction *way = &scan->direction[index];
    const int64_t size = work->padded * LANES, tiles = divide_up(item->length, TILE);
    const int64_t states = (item->utterance * scan->channels + item->channel) * scan->states;
    const float *state = way->state ? way->state + states : NULL;
    fill_parameters(scan, way, work, item);
    fill_states(work->carried, state, item->channels, scan->states, work->padded, 1.0);
    for (int64_t tile = 0; tile < tiles; tile++) {
        Place at = place_tile(way, item, tile);
        fill_weights(work->B, way->B, &at, scan->states, work->padded);
        fill_weights(work->C, way->C, &at, scan->states, work->padded);
        for (int block = 0; block * LANES < item->channels; block++, at.channel += LANES) {
            at.width = (int)least(LANES, item->channels - block * LANES);
            if (way->kept)
                memcpy(kept_state(scan, way, item->utterance, tile, at.channel / LANES), work->carried + block * size,
                       sizeof(float) * (size_t)size);
            Place next = next_place(&at, item, TILE);
            const int more = next.first == at.first || (tile + 2) * TILE <= item->length;
            forward_tile(scan, index, work, &at, block, more && starts_line(&next) ? &next : NULL);
        }
    }
    read_states(way->last + states, work->carried, item->channels, scan->states, work->padded);
}

static int forward_item(const Scan *scan, Item item) {
    Work work;
    if (open_work(&work, scan->states, 0)) return -1;
    unsigned mode = flush_denormals();
    for (int index = 0; index < scan->directions; index++) forward_direction(scan, index, &work, &item);
    clear_padding(scan->y, item.utterance, item.channel, item.channels, item.length, scan->frames);
    restore_denormals(mode);
    close_work(&work);
    return 0;
}

// Returns 0, or -1 where there was no memory.
int scan_forward(const Scan *scan) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)scan->threads) reduction(| : failed)
    for (int64_t number = 0; number < count_items(scan); number++)
        failed |= forward_item(scan, make_item(scan, number));
    return failed;
}
