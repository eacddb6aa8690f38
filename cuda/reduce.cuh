/*
reduce.cuh: what a thread, a warp or a block knows of a row, and how two of them become one.

Math      part: max m, rest = sum e, a = sum e*(y - m), q = sum e*e, sum = sum y, with e = exp(y -
          m) over the part's columns but the target; merge of 1 and 2: m = max(m1, m2), d = m1 - m,
          k = exp(d), rest = k*rest1 + ..., a = k*(a1 + rest1*d) + ..., q = k*k*q1 + ...
Shapes    scalars; Group<T> is 16 bytes of a row: WIDTH<T> neighbouring columns
Launch    none: nothing here has a thread index, so that a host test can run it
Traffic   load_group reads and store_group writes 16 bytes
Numerics  float32; every product that a compiler may fuse is written as it shall be rounded, so
          that a row has the same bits in every instantiation; a part of -inf alone adds nothing;
          NaN passes through the sums, fmaxf drops it
Source    Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3, with the target left out of
          the sum
*/
#pragma once
#ifndef EMU_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INFINITY __int_as_float(0x7f800000)  // NVRTC has no <cmath>
#define NAN __int_as_float(0x7fc00000)
#endif

constexpr int THREADS = 256;
constexpr int MAX_TILES = 64;  // tiles of a row, see token_stats.cu
constexpr int IGNORE = -100;   // the target of a token that is not scored
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// exp(y - shift). The subtraction is exact near the maximum; fusing shift*log2(e) into it would not
// be.
__device__ __forceinline__ float exp_of(float difference) {
    return exp2f(__fmul_rn(difference, LOG2E));
}

enum Map { PLAIN, SCALED, CAPPED };  // y = z, scale*z or cap*tanh(scale*z)

// Below it tanh is Cephes' polynomial, 1.5e-7 of its value off at most. Above, with E = exp(-2|u|),
// it is (1 - E)/(1 + E), which cancels near 0, and off by 3e-7 with a hardware exp2 (2^-22 of its
// value) and quotient (2 ulp).
constexpr float NEAR = 0.625f;

// y in the place of N logits; with SLOPE also dy/dz without its constant factors, where it is not
// 1. Logits of a model lie below NEAR: those beyond it are a branch, which most groups do not take.
template <Map MAP, bool SLOPE, int N>
__device__ __forceinline__ void transform(float (&y)[N], float (&slope)[N], float scale,
                                          float cap) {
    if (MAP == PLAIN) return;
    float u[N], largest = 0.f;
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = u[k] = __fmul_rn(scale, y[k]);
    if (MAP == SCALED) return;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float u2 = __fmul_rn(u[k], u[k]);
        float p = __fmaf_rn(-5.70498872745e-3f, u2, 2.06390887954e-2f);
        p = __fmaf_rn(p, u2, -5.37397155531e-2f);
        p = __fmaf_rn(p, u2, 1.33314422036e-1f);
        p = __fmaf_rn(p, u2, -3.33332819422e-1f);
        const float t = __fmaf_rn(__fmul_rn(p, u2), u[k], u[k]);
        y[k] = __fmul_rn(cap, t);
        if (SLOPE) slope[k] = __fmaf_rn(-t, t, 1.f);
        largest = fmaxf(largest, fabsf(u[k]));
    }
    if (largest < NEAR) return;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float a = fabsf(u[k]), e = exp2f(__fmul_rn(a, -2.f * LOG2E));
        const float r = __fdividef(1.f, 1.f + e), t = __fmul_rn(1.f - e, r);
        if (a >= NEAR) {
            y[k] = __fmul_rn(cap, copysignf(t, u[k]));
            if (SLOPE) slope[k] = __fmul_rn(__fmul_rn(4.f, e), __fmul_rn(r, r));  // never cancels
        }
    }
}

struct Transformed {
    float y, slope;
};

template <Map MAP>
__device__ __forceinline__ Transformed transform(float z, float scale, float cap) {
    float y[1] = {z}, slope[1] = {1.f};
    transform<MAP, true>(y, slope, scale, cap);
    return {y[0], slope[0]};
}

// Columns of a group, which one load of 16 bytes brings: neighbouring threads read neighbouring
// groups, so that a request of a warp uses every sector that it touches.
template <typename T>
constexpr int WIDTH = 16 / (int)sizeof(T);

// Groups that a thread has in flight: 32 columns of any type.
template <typename T>
constexpr int UNROLL = 32 / WIDTH<T>;

template <typename T>
union Group {
    uint4 load;
    unsigned word[4];
    T value[WIDTH<T>];
};

// Column k of a group; of bfloat16, which is the upper half of a float32, by one instruction.
template <typename T>
__device__ __forceinline__ float column(const Group<T>& group, int k) {
    return widen(group.value[k]);
}
__device__ __forceinline__ float column(const Group<__nv_bfloat16>& group, int k) {
    const unsigned pair = group.word[k / 2];
    return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}

// A group of rounded values: two of half width by one instruction.
__device__ __forceinline__ void pack(const float (&of)[4], Group<float>& group) {
#pragma unroll
    for (int k = 0; k < 4; ++k) group.value[k] = of[k];
}
__device__ __forceinline__ void pack(const float (&of)[8], Group<__half>& group) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const __half2 pair = __floats2half2_rn(of[2 * k], of[2 * k + 1]);
        group.word[k] = reinterpret_cast<const unsigned&>(pair);
    }
}
__device__ __forceinline__ void pack(const float (&of)[8], Group<__nv_bfloat16>& group) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(of[2 * k], of[2 * k + 1]);
        group.word[k] = reinterpret_cast<const unsigned&>(pair);
    }
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* row) {
    return reinterpret_cast<unsigned long long>(row) % 16 == 0;
}

// Columns WIDTH*group and the following, all of which exist. ALIGNED is one for the whole row: an
// address that is not a multiple of 16 bytes changes how they are loaded, never by which thread.
// `LAST` says that nobody reads them again: without it the second-level cache keeps what was read
// last.
template <bool ALIGNED, bool LAST, typename T>
__device__ __forceinline__ Group<T> load_group(const T* row, int group) {
    Group<T> loaded;
    if (ALIGNED) {
        const uint4* const p = reinterpret_cast<const uint4*>(row) + group;
        loaded.load = LAST ? __ldcs(p) : *p;
    } else {
#pragma unroll
        for (int k = 0; k < WIDTH<T>; ++k)
            loaded.value[k] = row[(long long)WIDTH<T> * group + k];
    }
    return loaded;
}

// The first `count` columns of a group, and zeros.
template <typename T>
__device__ __forceinline__ Group<T> load_some(const T* row, int group, int count) {
    Group<T> loaded;
    loaded.load = {};
#pragma unroll
    for (int k = 0; k < WIDTH<T>; ++k)
        if (k < count) loaded.value[k] = row[(long long)WIDTH<T> * group + k];
    return loaded;
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store_group(T* row, int group, Group<T> stored) {
    if (ALIGNED) {
        __stcs(reinterpret_cast<uint4*>(row) + group, stored.load);
    } else {
#pragma unroll
        for (int k = 0; k < WIDTH<T>; ++k)
            row[(long long)WIDTH<T> * group + k] = stored.value[k];
    }
}

// The groups of a piece of a row: [first, last), of which those below `whole` have all columns.
struct Groups {
    int first, last, whole;

    template <typename T>
    static __device__ __forceinline__ Groups of(int columns, int piece, int pieces,
                                                int piece_columns) {
        const int each = piece_columns / WIDTH<T>, first = piece * each;
        const int all = (int)((columns + (WIDTH<T> - 1ll)) / WIDTH<T>);
        const int last = piece + 1 == pieces ? all : first + each;
        return {first, last, columns / WIDTH<T> < last ? columns / WIDTH<T> : last};
    }
};

struct Part {
    float max, rest;  // the target is in neither
    // Statistics alone: `sum` has the target, `before` is the maximum of the columns before it.
    float a, q, sum, before;
};

__device__ __forceinline__ Part empty_part() { return {-INFINITY, 0.f, 0.f, 0.f, 0.f, -INFINITY}; }

// How far a part lies below the joint maximum; 0 for a part of -inf alone, whose sums are 0
// whatever they are scaled by.
__device__ __forceinline__ float below(float max, float joint) {
    return max == -INFINITY ? 0.f : max - joint;
}

template <bool STATS>
__device__ __forceinline__ Part merge(Part one, Part two) {
    const float joint = fmaxf(one.max, two.max);
    const float d1 = below(one.max, joint), d2 = below(two.max, joint);
    const float k1 = exp_of(d1), k2 = exp_of(d2);
    Part both = empty_part();
    both.max = joint;
    both.rest = __fmaf_rn(k1, one.rest, __fmul_rn(k2, two.rest));
    if (STATS) {
        // exp(d) is 0 long before d is -inf; the clamp keeps 0 * d a 0.
        const float a1 = __fmaf_rn(one.rest, fmaxf(d1, -200.f), one.a);
        const float a2 = __fmaf_rn(two.rest, fmaxf(d2, -200.f), two.a);
        both.a = __fmaf_rn(k1, a1, __fmul_rn(k2, a2));
        both.q = __fmaf_rn(__fmul_rn(k1, k1), one.q, __fmul_rn(__fmul_rn(k2, k2), two.q));
        both.sum = one.sum + two.sum;
        both.before = fmaxf(one.before, two.before);
    }
    return both;
}

// Adds N values whose maximum is `max` to a part: one exp each, and one for what was there before.
template <bool STATS, int N>
__device__ __forceinline__ void add(Part& part, const float (&y)[N], float max) {
    const float joint = fmaxf(part.max, max), shift = joint == -INFINITY ? 0.f : joint;
    const float d = below(part.max, joint), k = exp_of(d);
    float rest[4] = {}, a[4] = {}, q[4] = {};  // four chains: one would wait for its own adds
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float from_max = y[i] - shift, e = exp_of(from_max);
        rest[i % 4] += e;
        if (STATS) {
            // e is 0 where the clamp acts: 0 * -inf would be NaN.
            a[i % 4] = __fmaf_rn(e, fmaxf(from_max, -200.f), a[i % 4]);
            q[i % 4] = __fmaf_rn(e, e, q[i % 4]);
        }
    }
    if (STATS) {
        const float moved = __fmaf_rn(part.rest, fmaxf(d, -200.f), part.a);
        part.a = __fmaf_rn(k, moved, (a[0] + a[1]) + (a[2] + a[3]));
        part.q = __fmaf_rn(__fmul_rn(k, k), part.q, (q[0] + q[1]) + (q[2] + q[3]));
    }
    part.rest = __fmaf_rn(k, part.rest, (rest[0] + rest[1]) + (rest[2] + rest[3]));
    part.max = joint;
}
