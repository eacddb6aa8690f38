/*
logits_grad.cu: gradient of the log-probs by the logits, in place or into a buffer of its own.

Math      dz_v = g * ([v == t] - exp(y_v - m)/S) * dy/dz, S = rest + exp(y_t - m); at the target g
          * rest/S * dy/dz; 0 in every row that no scored token names, and where g is 0 (0 * NaN is
          0 here: a weight of 0 selects nothing)
Shapes    logits (R, V) T, row stride >= V; out (R, V) T, may be logits; logit_rows (M) int64;
          targets (M) int32; row_max, row_rest, grad (M) float32; table (R) RowGrad, filled with
          0xff bytes by the caller
Launch    grad_rows: ceil(M / 256) blocks of 256 threads, one token a thread; then logits_grad: (R,
          pieces) blocks of 256 threads, one piece of a row a block, its columns a multiple of 8; no
          shared memory
Traffic   reads M*V*sizeof(T) + 28*M + 16*R bytes, writes R*V*sizeof(T) + 16*M; a row that is not
          scored is not read
Numerics  float32 for every T, rounded once; elementwise, so the bits do not depend on the launch.
          A target outside [0, V) gives a row of NaN. Everything that needs the target's logit is
          done by grad_rows, before the first write: in place, a block could otherwise find another
          block's gradient there
Source    d log softmax / d z = onehot - softmax, by hand; streaming stores, rows from
          the last: what the forward pass read last, without a hint, may still be in the cache
*/
#include "reduce.cuh"

constexpr int ZERO = -1, MISSING = -2;  // targets of rows of 0 and of NaN

struct alignas(16) RowGrad {
    int target;
    float shift, coefficient, at_target;
};

template <typename T, bool CAP>
__global__ void __launch_bounds__(THREADS)
    grad_rows(const T* __restrict__ logits, const long long* __restrict__ logit_rows,
              const int* __restrict__ targets, const float* __restrict__ row_max,
              const float* __restrict__ row_rest, const float* __restrict__ grad,
              RowGrad* __restrict__ table, long long tokens, long long rows, long long stride,
              int columns, float scale, float cap) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens) return;
    const int target = targets[i];
    const long long r = logit_rows[i];
    const float g = grad[i];
    if (target == IGNORE || g == 0.f || r < 0 || r >= rows) return;
    if (target < 0 || target >= columns) {
        table[r] = {MISSING, NAN, NAN, NAN};
        return;
    }
    const Transformed at = transform<CAP>(widen(logits[r * stride + target]), scale, cap);
    const float max = row_max[i], rest = row_rest[i], total = rest + exp_of(at.y - max);
    const float factor = __fmul_rn(g, CAP ? __fmul_rn(scale, cap) : scale);
    table[r] = {target, max, -factor / total, factor * (rest / total) * at.slope};
}

// A group: the gradient of each, and the target's in its place.
template <bool CAP, typename T>
__device__ __forceinline__ void differentiate(Group<T>& loaded, int group, const RowGrad& row,
                                              float scale, float cap) {
    const int at = row.target - WIDTH<T> * group;
#pragma unroll
    for (int k = 0; k < WIDTH<T>; ++k) {
        const Transformed of = transform<CAP>(widen(loaded.value[k]), scale, cap);
        float dz = __fmul_rn(row.coefficient, exp_of(of.y - row.shift));
        if (CAP) dz = __fmul_rn(dz, of.slope);
        if (k == at) dz = row.at_target;
        narrow(dz, loaded.value[k]);
    }
}

// Groups me, me + THREADS, ... of [first, last). `in` may be `out`: a thread writes only columns
// that it has read.
template <bool CAP, typename T>
__device__ __forceinline__ void write_piece(const T* in, T* out, int first, int last, int columns,
                                            const RowGrad& row, float scale, float cap) {
    const bool aligned = is_aligned(in) && is_aligned(out);
    const int whole = columns / WIDTH<T> < last ? columns / WIDTH<T> : last;
    int group = first + threadIdx.x;
    for (; group + (UNROLL<T> - 1) * THREADS < whole; group += UNROLL<T> * THREADS) {
        Group<T> loaded[UNROLL<T>];
#pragma unroll
        for (int u = 0; u < UNROLL<T>; ++u)
            loaded[u] = load_group<true>(in, group + u * THREADS, aligned);
#pragma unroll
        for (int u = 0; u < UNROLL<T>; ++u) {
            differentiate<CAP>(loaded[u], group + u * THREADS, row, scale, cap);
            store_group(out, group + u * THREADS, loaded[u], aligned);
        }
    }
    for (; group < last; group += THREADS) {
        const int count = group < whole ? WIDTH<T> : columns - WIDTH<T> * group;
        Group<T> loaded = {};
#pragma unroll
        for (int k = 0; k < WIDTH<T>; ++k)
            if (k < count) loaded.value[k] = in[(long long)WIDTH<T> * group + k];
        differentiate<CAP>(loaded, group, row, scale, cap);
#pragma unroll
        for (int k = 0; k < WIDTH<T>; ++k)
            if (k < count) out[(long long)WIDTH<T> * group + k] = loaded.value[k];
    }
}

template <typename T>
__device__ __forceinline__ void write_zeros(T* out, int first, int last, int columns) {
    const bool aligned = is_aligned(out);
    const int whole = columns / WIDTH<T> < last ? columns / WIDTH<T> : last;
    Group<T> zeros;
    zeros.load = {};
    for (int group = first + threadIdx.x; group < last; group += THREADS) {
        if (group < whole) {
            store_group(out, group, zeros, aligned);
        } else {
            for (int k = 0; k < columns - WIDTH<T> * group; ++k)
                narrow(0.f, out[(long long)WIDTH<T> * group + k]);
        }
    }
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(THREADS)
    logits_grad(const T* logits, T* out, const RowGrad* __restrict__ table, long long rows,
                long long stride, long long out_stride, int columns, int piece_columns, float scale,
                float cap) {
    // From the last row: what the forward pass read last may still be in the second-level cache.
    const long long r = rows - 1 - blockIdx.x;
    const RowGrad row = table[r];
    // 64-bit: rows * columns passes 2^31 at everyday sizes.
    const T* const from = logits + r * stride;
    T* const to = out + r * out_stride;
    const int groups = (int)((columns + (WIDTH<T> - 1ll)) / WIDTH<T>);
    const int piece_groups = piece_columns / WIDTH<T>, first = (int)blockIdx.y * piece_groups;
    const int last = blockIdx.y + 1 == gridDim.y ? groups : first + piece_groups;
    if (row.target == ZERO) {
        write_zeros(to, first, last, columns);
    } else {
        write_piece<CAP>(from, to, first, last, columns, row, scale, cap);
    }
}
