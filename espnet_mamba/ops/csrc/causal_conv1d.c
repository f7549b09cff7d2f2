// The depthwise causal convolution over time, fused with its SiLU, forward and backward (docs/papers.md 2):
//
//   p_i = bias + sum over k of weight_k x_{i - (W - 1) + k},   y_i = p_i sigmoid(p_i)
//
// i counts in scan order: frames of a reversed convolution are counted from the utterance's last one. Frames outside
// 0..L-1 are those of the state before, zeros after. Work is divided into (utterance, SPAN steps); within it, STEPS
// rows at a time are read and written from left to right, so that each row comes from memory once. The backward pass
// computes p again; each item goes W - 1 steps further than its own, which the gradients of its last frames need.
#include "frames.h"
#include "simd.h"

#include <stdlib.h>

#define STEPS 4         // rows computed together
#define SPAN 128        // steps of a work item, a multiple of STEPS
#define MAX_WIDTH 8
#define CHANNELS 512    // that the backward pass takes through a whole span before the next: their sums stay in L1
#define ROWS (STEPS + MAX_WIDTH - 1)
#define UNROLL _Pragma("GCC unroll 16")
// Loops of the kernels: unrolled, so that rows and taps are registers where `width` is a constant.
#define EACH(i, limit, most) UNROLL for (int i = 0; i < (most); i++) if (i < (limit))

typedef struct {
    int64_t batch, frames, channels, width, reverse, threads;
    const int64_t *lengths;             // (B,) or NULL
    Frames x, y, grad_y, grad_x;
    const float *weight, *bias, *state;  // (W, E), (E,) or NULL, (B, W - 1, E) or NULL
    float *grad_weight, *grad_bias;      // (W, E), (E,) or NULL
    float *grad_state;                   // (B, W - 1, E) or NULL; zeros, written where a frame depends on it
} Conv;

typedef struct {  // the rows of STEPS steps: inputs from W - 1 steps before them; outputs are NULL where not wanted
    const float *x[ROWS], *grad_y[STEPS];
    float *y[STEPS], *grad_x[STEPS];
} Strip;

static int64_t length_of(const Conv *conv, int64_t utterance) {
    return conv->lengths ? least(conv->lengths[utterance], conv->frames) : conv->frames;
}

// Where a step before the first one lies in (B, W - 1, E), which is in time order even if reversed.
static int64_t state_offset(const Conv *conv, int64_t utterance, int64_t step) {
    int64_t row = conv->reverse ? -1 - step : conv->width - 1 + step;
    return (utterance * (conv->width - 1) + row) * conv->channels;
}

static float *row_of_step(const Conv *conv, Frames frames, int64_t utterance, int64_t step, int64_t length) {
    return row_at(frames, utterance, conv->reverse ? length - 1 - step : step);
}

// The inputs of the steps from `first` on; `zeros` stands for what is not there.
static void find_inputs(const Conv *conv, Strip *strip, int64_t utterance, int64_t first, int64_t length,
                        const float *zeros) {
    for (int64_t i = 0; i < STEPS + conv->width - 1; i++) {
        int64_t step = first - (conv->width - 1) + i;
        strip->x[i] = zeros;
        if (step < 0 && conv->state) strip->x[i] = conv->state + state_offset(conv, utterance, step);
        if (step >= 0 && step < length) strip->x[i] = row_of_step(conv, conv->x, utterance, step, length);
    }
}

// ---- forward ----

INLINE void forward_lanes(const Conv *conv, const Strip *strip, const int width, int64_t channel, const int count) {
    vec x[ROWS] = {{0}}, weight[MAX_WIDTH] = {{0}};
    EACH(k, width, MAX_WIDTH) weight[k] = load_some(conv->weight + k * conv->channels + channel, count);
    EACH(i, STEPS + width - 1, ROWS) x[i] = load_some(strip->x[i] + channel, count);
    const vec bias = conv->bias ? load_some(conv->bias + channel, count) : (vec){0};
    UNROLL for (int i = 0; i < STEPS; i++) {
        vec sum = bias;
        EACH(k, width, MAX_WIDTH) sum += weight[k] * x[i + k];
        if (strip->y[i]) store_some(strip->y[i] + channel, sum * sigmoid(sum), count);
    }
}

// Any width, and what is left of the channels.
static __attribute__((noinline)) void forward_any(const Conv *conv, const Strip *strip, int64_t channel, int count) {
    forward_lanes(conv, strip, (int)conv->width, channel, count);
}

static void forward_strip(const Conv *conv, const Strip *strip) {
    int64_t channel = 0;
    if (conv->width == 4)
        for (; channel + LANES <= conv->channels; channel += LANES) forward_lanes(conv, strip, 4, channel, LANES);
    for (; channel < conv->channels; channel += LANES)
        forward_any(conv, strip, channel, (int)least(LANES, conv->channels - channel));
}

static void forward_item(const Conv *conv, int64_t utterance, int64_t start, const float *zeros) {
    const int64_t length = length_of(conv, utterance), limit = least(start + SPAN, conv->frames);
    const int64_t end = least(limit, length);
    for (int64_t first = start; first < end; first += STEPS) {
        Strip strip;
        find_inputs(conv, &strip, utterance, first, length, zeros);
        for (int i = 0; i < STEPS; i++)
            strip.y[i] = first + i < end ? row_of_step(conv, conv->y, utterance, first + i, length) : NULL;
        forward_strip(conv, &strip);
    }
    clear_padding(conv->y, utterance, 0, conv->channels, length > start ? length : start, limit);
}

// Returns 0, or -1 where there was no memory.
int conv_forward(const Conv *conv) {
    const int64_t spans = divide_up(conv->frames, SPAN);
    float *zeros = calloc((size_t)conv->channels, sizeof(float));
    if (!zeros) return -1;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)conv->threads)
    for (int64_t item = 0; item < conv->batch * spans; item++)
        forward_item(conv, item / spans, item % spans * SPAN, zeros);
    free(zeros);
    return 0;
}

// ---- backward ----

// carried: the gradients of p of the W - 1 steps before, (W - 1, CHANNELS), replaced by those of the last ones here.
// sums: of the gradients of the weight's rows and the bias, (W + 1, E), or NULL where these steps are another item's.
INLINE void backward_lanes(const Conv *conv, const Strip *strip, const int width, int64_t channel, const int count,
                           float *carried, float *sums) {
    vec x[ROWS] = {{0}}, grad[ROWS] = {{0}}, weight[MAX_WIDTH] = {{0}};
    const vec bias = conv->bias ? load_some(conv->bias + channel, count) : (vec){0}, one = spread(1.f);
    EACH(k, width, MAX_WIDTH) weight[k] = load_some(conv->weight + k * conv->channels + channel, count);
    EACH(i, STEPS + width - 1, ROWS) x[i] = load_some(strip->x[i] + channel, count);
    EACH(i, width - 1, MAX_WIDTH - 1) grad[i] = load(carried + i * CHANNELS);
    UNROLL for (int i = 0; i < STEPS; i++) {
        vec sum = bias;
        EACH(k, width, MAX_WIDTH) sum += weight[k] * x[i + k];
        vec share = sigmoid(sum);
        grad[width - 1 + i] = load_some(strip->grad_y[i] + channel, count) * (share + sum * share * (one - share));
    }
    UNROLL for (int i = 0; i < STEPS; i++) {
        vec sum = {0};
        EACH(k, width, MAX_WIDTH) sum += weight[k] * grad[width - 1 + i - k];
        if (strip->grad_x[i]) store_some(strip->grad_x[i] + channel, sum, count);
    }
    EACH(i, width - 1, MAX_WIDTH - 1) store(carried + i * CHANNELS, grad[STEPS + i]);
    if (!sums) return;
    EACH(k, width, MAX_WIDTH) {
        float *row = sums + k * conv->channels + channel;
        vec sum = load_some(row, count);
        UNROLL for (int i = 0; i < STEPS; i++) sum += grad[width - 1 + i] * x[i + k];
        store_some(row, sum, count);
    }
    float *row = sums + width * conv->channels + channel;
    vec sum = load_some(row, count);
    UNROLL for (int i = 0; i < STEPS; i++) sum += grad[width - 1 + i];
    store_some(row, sum, count);
}

static __attribute__((noinline)) void backward_any(const Conv *conv, const Strip *strip, int64_t channel, int count,
                                                   float *carried, float *sums) {
    backward_lanes(conv, strip, (int)conv->width, channel, count, carried, sums);
}

static void backward_strip(const Conv *conv, const Strip *strip, int64_t from, float *carried, float *sums) {
    const int64_t to = least(from + CHANNELS, conv->channels);
    int64_t channel = from;
    if (conv->width == 4)
        for (; channel + LANES <= to; channel += LANES)
            backward_lanes(conv, strip, 4, channel, LANES, carried + channel - from, sums);
    for (; channel < to; channel += LANES)
        backward_any(conv, strip, channel, (int)least(LANES, to - channel), carried + channel - from, sums);
}

// Where the gradient of x of a step goes: to another item, to the state, or into grad_x.
static float *find_output(const Conv *conv, int64_t utterance, int64_t step, int64_t start, int64_t end,
                          int64_t length) {
    if (step < 0 && start == 0 && conv->grad_state) return conv->grad_state + state_offset(conv, utterance, step);
    if (step < start || step >= end) return NULL;
    return row_of_step(conv, conv->grad_x, utterance, step, length);
}

static void backward_item(const Conv *conv, int64_t utterance, int64_t start, const float *zeros, float *sums) {
    const int64_t length = length_of(conv, utterance), limit = least(start + SPAN, conv->frames);
    const int64_t end = least(limit, length), before = conv->width - 1;
    float carried[(MAX_WIDTH - 1) * CHANNELS];
    memset(sums, 0, sizeof(float) * (size_t)((conv->width + 1) * conv->channels));
    for (int64_t channel = 0; start < end && channel < conv->channels; channel += CHANNELS) {
        memset(carried, 0, sizeof(carried));
        for (int64_t first = start; first < end + before; first += STEPS) {
            Strip strip;
            find_inputs(conv, &strip, utterance, first, length, zeros);
            for (int i = 0; i < STEPS; i++) {
                int64_t step = first + i;
                strip.grad_y[i] = step < length ? row_of_step(conv, conv->grad_y, utterance, step, length) : zeros;
                strip.grad_x[i] = find_output(conv, utterance, step - before, start, end, length);
            }
            float *own = first < end ? sums : NULL;
            backward_strip(conv, &strip, channel, carried, own);
        }
    }
    clear_padding(conv->grad_x, utterance, 0, conv->channels, length > start ? length : start, limit);
}

// Row k of the items' sums, added up in their order.
static void complete_sum(const Conv *conv, const float *sums, int64_t items, int64_t row, int64_t channel) {
    float *out = row < conv->width ? conv->grad_weight + row * conv->channels : conv->grad_bias;
    if (!out) return;
    double sum = 0;
    for (int64_t item = 0; item < items; item++)
        sum += (double)sums[(item * (conv->width + 1) + row) * conv->channels + channel];
    out[channel] = (float)sum;
}

// Returns 0, or -1 where there was no memory.
int conv_backward(const Conv *conv) {
    const int64_t spans = divide_up(conv->frames, SPAN), items = conv->batch * spans;
    const int64_t size = (conv->width + 1) * conv->channels;
    float *zeros = calloc((size_t)conv->channels, sizeof(float));
    float *sums = malloc(sizeof(float) * (size_t)(items * size));
    const int failed = zeros && sums ? 0 : -1;
    if (!failed) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)conv->threads)
        for (int64_t item = 0; item < items; item++)
            backward_item(conv, item / spans, item % spans * SPAN, zeros, sums + item * size);
#pragma omp parallel for schedule(static) num_threads((int)conv->threads)
        for (int64_t i = 0; i < size; i++) complete_sum(conv, sums, items, i / conv->channels, i % conv->channels);
    }
    free(zeros);
    free(sums);
    return failed;
}
