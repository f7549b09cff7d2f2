// Tensors of shape (B, T, channels) as the kernels see them.
#ifndef ESPNET_MAMBA_FRAMES_H
#define ESPNET_MAMBA_FRAMES_H

#include <stdint.h>
#include <string.h>

typedef struct {  // stride 1 in the last dimension, the others in floats; data is NULL where there is no such tensor
    float *data;
    int64_t batch, time;
} Frames;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float *row_at(Frames frames, int64_t utterance, int64_t frame) {
    return frames.data + utterance * frames.batch + frame * frames.time;
}

static inline void clear_padding(Frames frames, int64_t utterance, int64_t channel, int64_t channels, int64_t from,
                                 int64_t to) {
    for (int64_t t = from; t < to; t++)
        memset(row_at(frames, utterance, t) + channel, 0, sizeof(float) * (size_t)channels);
}

#endif
