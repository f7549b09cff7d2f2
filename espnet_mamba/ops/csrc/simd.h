// Float vectors of one register, written with the vector extensions of gcc and clang so that one source serves AVX-512,
// AVX2, SSE2 and other processors. Nothing here would survive -ffast-math: exp2 rounds by adding a big number.
#ifndef ESPNET_MAMBA_SIMD_H
#define ESPNET_MAMBA_SIMD_H

#include <stdint.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vec_int __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));

INLINE vec load(const float *from) { return (vec) * (const vec_unaligned *)from; }
INLINE void store(float *to, vec value) { *(vec_unaligned *)to = (vec_unaligned)value; }
INLINE vec spread(float value) { return value - (vec){0}; }

// The first `count` lanes; the others read as 0 and are not written. With count == LANES this is load and store.
INLINE vec load_some(const float *from, int count) {
    if (count == LANES) return load(from);
    vec value = {0};
    memcpy(&value, from, sizeof(float) * (size_t)count);
    return value;
}
INLINE void store_some(float *to, vec value, int count) {
    if (count == LANES) store(to, value);
    else memcpy(to, &value, sizeof(float) * (size_t)count);
}

INLINE vec where(vec_int mask, vec yes, vec no) { return (vec)(((vec_int)yes & mask) | ((vec_int)no & ~mask)); }
INLINE vec magnitude(vec x) { return (vec)((vec_int)x & (0x7fffffff - (vec_int){0})); }

// The larger or smaller of both, where a NaN of x stays one (the x86 instructions return their second operand then).
#if defined(__AVX512F__)
INLINE vec at_least(vec low, vec x) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }
INLINE vec at_most(vec high, vec x) { return (vec)_mm512_min_ps((__m512)high, (__m512)x); }
#elif defined(__AVX__)
INLINE vec at_least(vec low, vec x) { return (vec)_mm256_max_ps((__m256)low, (__m256)x); }
INLINE vec at_most(vec high, vec x) { return (vec)_mm256_min_ps((__m256)high, (__m256)x); }
#elif defined(__SSE__)
INLINE vec at_least(vec low, vec x) { return (vec)_mm_max_ps((__m128)low, (__m128)x); }
INLINE vec at_most(vec high, vec x) { return (vec)_mm_min_ps((__m128)high, (__m128)x); }
#else
INLINE vec at_least(vec low, vec x) { return where(x < low, low, x); }
INLINE vec at_most(vec high, vec x) { return where(x > high, high, x); }
#endif

#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453

// 2^x for x <= 127, relative error 1e-7, never below 2^-126: x = integer + rest with |rest| <= 1/2, a minimax
// polynomial of the rest with p(0) = 1, the integer added to the exponent bits.
INLINE vec exp2_vec(vec x) {
    const vec round = spread(12582912.f);  // 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa
    x = at_least(spread(-126.f), x);
    vec shifted = x + round, rest = x - (shifted - round);
    vec p = spread(1.326472731307149e-3f);
    p = p * rest + spread(9.671512991189957e-3f);
    p = p * rest + spread(5.550733581185341e-2f);
    p = p * rest + spread(0.24022242426872253f);
    p = p * rest + spread(0.6931470036506653f);
    p = p * rest + spread(1.f);
    return (vec)((vec_int)p + ((vec_int)shifted << 23));
}
// Between 2^-126 and 1. Some NaNs come out as numbers, since exp2 shifts their bits; x times it is a NaN again.
INLINE vec sigmoid(vec x) {
    vec exponent = at_most(spread(126.f), x * spread((float)-LOG2_E));
    return spread(1.f) / (spread(1.f) + exp2_vec(exponent));
}

// log(1 + exp(x)), and its slope sigmoid(x). log1p(w) = 2 atanh(w / (2 + w)), an odd polynomial on [0, 1/3].
INLINE vec softplus(vec x, vec *slope) {
    vec w = exp2_vec(magnitude(x) * spread((float)-LOG2_E)), inverse = spread(1.f) / (spread(1.f) + w);
    vec q = w / (spread(2.f) + w), s = q * q;
    vec p = spread(0.1408916711807251f);
    p = p * s + spread(0.13980300724506378f);
    p = p * s + spread(0.20012454688549042f);
    p = p * s + spread(0.3333315849304199f);
    p = p * s + spread(1.f);
    vec log1p = (q + q) * p;
    vec_int negative = x <= spread(0.f);  // false for a NaN, which the sum keeps
    *slope = where(negative, w * inverse, inverse);
    return where(negative, log1p, x + log1p);
}

// Sums of neighbours: pick_* takes one half of the lanes of two registers. Within each quad of lanes first, then quads.
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif
#if LANES == 16
#define EVEN_LANES 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ODD_LANES 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#define EVEN_QUADS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_QUADS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif LANES == 8
#define EVEN_LANES 0, 2, 8, 10, 4, 6, 12, 14
#define ODD_LANES 1, 3, 9, 11, 5, 7, 13, 15
#define EVEN_QUADS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_QUADS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif

// The sum of each of LANES consecutive registers, as one register: lane i is the sum of register i.
INLINE vec lane_sums(const float *registers) {
    vec sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = load(registers + i * LANES);
#pragma GCC unroll 16
    for (int count = LANES / 2; count >= LANES / 4; count /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            sum[i] = PICK(sum[2 * i], sum[2 * i + 1], EVEN_LANES) + PICK(sum[2 * i], sum[2 * i + 1], ODD_LANES);
#if LANES > 4
#pragma GCC unroll 16
    for (int count = LANES / 8; count >= 1; count /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            sum[i] = PICK(sum[2 * i], sum[2 * i + 1], EVEN_QUADS) + PICK(sum[2 * i], sum[2 * i + 1], ODD_QUADS);
#endif
    return sum[0];
}

// Numbers below 2^-126 read and written as 0 while a kernel runs: a state that decays for long would else run into
// denormal numbers, which are some hundred times slower. The mode belongs to the thread and is put back.
#if defined(__SSE__)
INLINE unsigned flush_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) { (void)before; }
#endif

#endif
