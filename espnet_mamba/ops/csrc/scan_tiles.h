// What both passes of the selective scan stand on: the arguments of a call, and tiles of time and channels in memory.
#ifndef ESPNET_MAMBA_SCAN_TILES_H
#define ESPNET_MAMBA_SCAN_TILES_H

#include "frames.h"
#include "simd.h"

#include <stdlib.h>

#define TILE 16
#define FOUR 4                         // states held in registers together
#define BLOCKS (128 / LANES)           // blocks in a group
#define GROUP (BLOCKS * LANES)         // channels of a work item
#define FLUSH 64                       // tiles after which float sums are added to the double ones
#define UNROLL _Pragma("GCC unroll 4")  // over the four states, so that they are registers and not an array

typedef struct {
    Frames dt, B, C;
    const float *A, *D, *dt_bias, *state;  // (E, N), (E,) or NULL, (E,) or NULL, (B, E, N) or NULL
    float *last, *kept;                    // (B, E, N); scan_kept_floats() floats, NULL where none are kept
    Frames grad_dt, grad_B, grad_C;
    const float *grad_last;                         // (B, E, N) or NULL
    float *grad_A, *grad_D, *grad_dt_bias, *grad_state;  // as above; each NULL if not wanted, except grad_A
    int64_t reverse;
} Direction;

typedef struct {
    int64_t batch, frames, channels, states, directions, dt_softplus, threads;
    const int64_t *lengths;  // (B,) or NULL
    Frames x, z, y, grad_y, grad_x, grad_z;
    Direction direction[2];
} Scan;

typedef struct {  // a unit of work
    int64_t utterance, length, channel, channels;
} Item;

typedef struct {  // where a tile lies: frame `first` is its first in scan order, the next is at first + sign
    int64_t utterance, first, sign, channel;
    int steps, width;  // width: valid channels, LANES except in the last block
} Place;

typedef struct {  // a tile in memory: rows of LANES channels in scan order
    float *row;
    int64_t stride;
} Rows;

// Scratch memory of one work item. Per block of its group: what depends on channels only, the running state or its
// gradient, the sums over time. Shared by the blocks: the weights of a tile, and room for blocks that are not full.
typedef struct {
    int64_t padded;                  // states, rounded up to a multiple of four
    int growing;                     // whether a decay may exceed 1, where the exponential needs another limit
    float *rates, *skip, *bias;      // A log2(e), D, dt_bias: (BLOCKS, padded or 1, LANES)
    float *carried;                  // state, or its gradient (BLOCKS, padded, LANES)
    float *sums;                     // of grad A, grad D, grad dt_bias (BLOCKS, padded + 2, LANES)
    float *B, *C;                    // (padded / 4, TILE, 4)
    float *lanes_B, *lanes_C;        // their gradients before the sum over lanes (padded / 4, TILE, 4, LANES)
    float *narrow;                   // (4, TILE, LANES)
} Work;

static int64_t padded_states(int64_t states) { return divide_up(states, FOUR) * FOUR; }

static Item make_item(const Scan *scan, int64_t number) {
    const int64_t groups = divide_up(scan->channels, GROUP), channel = number % groups * GROUP;
    const int64_t utterance = number / groups, length = scan->lengths ? scan->lengths[utterance] : scan->frames;
    return (Item){utterance, length, channel, least(GROUP, scan->channels - channel)};
}

static int64_t count_items(const Scan *scan) { return scan->batch * divide_up(scan->channels, GROUP); }

static float *kept_state(const Scan *scan, const Direction *way, int64_t utterance, int64_t tile, int64_t block) {
    int64_t tiles = divide_up(scan->frames, TILE), blocks = divide_up(scan->channels, LANES);
    return way->kept + ((utterance * tiles + tile) * blocks + block) * padded_states(scan->states) * LANES;
}

// exp(step A), with A in units of ln 2. In a scan proper A < 0 and step > 0, and the upper limit is not needed.
INLINE vec decay_of(vec step, const float *rate, const int growing) {
    vec exponent = step * load(rate);
    if (growing) exponent = at_most(spread(127.f), exponent);
    return exp2_vec(exponent);
}

// ---- scratch memory ----

static int open_work(Work *work, int64_t states, int backward) {
    int64_t padded = padded_states(states), tile = TILE * LANES;
    int64_t sizes[] = {GROUP * padded, GROUP, GROUP, GROUP * padded, backward * GROUP * (padded + 2), TILE * padded,
                       TILE * padded, backward * tile * padded, backward * tile * padded, 4 * tile};
    float **parts[] = {&work->rates, &work->skip, &work->bias, &work->carried, &work->sums, &work->B,
                       &work->C, &work->lanes_B, &work->lanes_C, &work->narrow};
    const int64_t apart = 5 * 16;  // else parts lie a multiple of 4 KiB apart, and loads wait for unrelated stores
    int64_t total = 0;
    for (int i = 0; i < 10; i++) total += sizes[i] + apart;
    void *memory;
    if (posix_memalign(&memory, 64, sizeof(float) * (size_t)total)) return -1;
    work->padded = padded;
    float *next = memory;
    for (int i = 0; i < 10; i++) {
        *parts[i] = next;
        next += sizes[i] + apart;
    }
    return 0;
}

static void close_work(Work *work) { free(work->rates); }

// (E, N) at `from`, its first channel, into (BLOCKS, padded, LANES); what is beyond either is 0.
static void fill_states(float *to, const float *from, int64_t channels, int64_t states, int64_t padded, double factor) {
    memset(to, 0, sizeof(float) * (size_t)(GROUP * padded));
    if (!from) return;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t n = 0; n < states; n++)
            to[(c / LANES * padded + n) * LANES + c % LANES] = (float)(from[c * states + n] * factor);
}

static void read_states(float *to, const float *from, int64_t channels, int64_t states, int64_t padded) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t n = 0; n < states; n++) to[c * states + n] = from[(c / LANES * padded + n) * LANES + c % LANES];
}

static void fill_channels(float *to, const float *from, int64_t channels) {
    memset(to, 0, sizeof(float) * GROUP);
    if (from) memcpy(to, from, sizeof(float) * (size_t)channels);
}

static void fill_parameters(const Scan *scan, const Direction *way, Work *work, const Item *item) {
    const float *A = way->A + item->channel * scan->states;
    fill_states(work->rates, A, item->channels, scan->states, work->padded, LOG2_E);
    fill_channels(work->skip, way->D ? way->D + item->channel : NULL, item->channels);
    fill_channels(work->bias, way->dt_bias ? way->dt_bias + item->channel : NULL, item->channels);
    work->growing = !scan->dt_softplus;
    for (int64_t i = 0; i < item->channels * scan->states; i++) work->growing |= A[i] > 0;
}

// ---- tiles in memory ----

// The first block of a tile.
static Place place_tile(const Direction *way, const Item *item, int64_t tile) {
    const int64_t start = tile * TILE;
    return (Place){item->utterance, way->reverse ? item->length - 1 - start : start, way->reverse ? -1 : 1,
                   item->channel, (int)least(TILE, item->length - start), LANES};
}

// Rows of a tile: in place, or, where the block is narrower than a register, in `buffer`, read or not.
static Rows open_rows(Frames frames, const Place *at, float *buffer, int read) {
    Rows rows = {row_at(frames, at->utterance, at->first) + at->channel, frames.time * at->sign};
    if (at->width == LANES) return rows;
    if (read) {
        memset(buffer, 0, sizeof(float) * TILE * LANES);
        for (int t = 0; t < at->steps; t++)
            memcpy(buffer + t * LANES, rows.row + t * rows.stride, sizeof(float) * (size_t)at->width);
    }
    return (Rows){buffer, LANES};
}

static void close_rows(Frames frames, const Place *at, Rows rows) {
    if (at->width == LANES) return;
    float *to = row_at(frames, at->utterance, at->first) + at->channel;
    for (int t = 0; t < at->steps; t++)
        memcpy(to + t * frames.time * at->sign, rows.row + t * LANES, sizeof(float) * (size_t)at->width);
}

// The hardware does not guess that the next block, or the next tile, follows: ask for its rows, a few at a time,
// because a burst of requests would block the loads of the present one.
#define PREFETCH(frames, at, from, to, write)                                                                   \
    do {                                                                                                        \
        const char *ahead_ = (const char *)(row_at(frames, (at)->utterance, (at)->first) + (at)->channel);      \
        int64_t stride_ = (int64_t)sizeof(float) * (frames).time * (at)->sign;                                  \
        for (int t_ = from; t_ < (to); t_++) __builtin_prefetch(ahead_ + t_ * stride_, write, 2);               \
    } while (0)

static int starts_line(const Place *at) { return at->channel % 16 == 0; }  // of a cache; else it was asked for before

// B or C of a tile, as (padded / 4, TILE, 4).
static void fill_weights(float *to, Frames from, const Place *at, int64_t states, int64_t padded) {
    const float *row = row_at(from, at->utterance, at->first);
    if (padded != states) memset(to, 0, sizeof(float) * (size_t)(TILE * padded));
    for (int t = 0; t < at->steps; t++, row += from.time * at->sign) {
        int64_t n = 0;
        for (; n + FOUR <= states; n += FOUR) memcpy(to + n * TILE + t * FOUR, row + n, sizeof(float) * FOUR);
        for (; n < states; n++) to[n / FOUR * FOUR * TILE + t * FOUR + n % FOUR] = row[n];
    }
}

// The tile that is worked on after `at`: the next block, or the first block of the tile that starts `frames` later.
static Place next_place(const Place *at, const Item *item, int64_t frames) {
    Place next = *at;
    next.channel += LANES;
    if (next.channel + LANES > item->channel + item->channels) {
        next.channel = item->channel;
        next.first += frames * at->sign;
        if (frames < 0) next.steps = TILE;
    }
    return next;
}

#endif
