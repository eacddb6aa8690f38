/*
logits_grad.cu: gradient of the log-probs by the logits, in place or into a buffer of its own.

Math      dz_v = g * ([v == t] - exp(y_v - m)/S) * dy/dz, S = rest + exp(y_t - m); at the target g
          * rest/S * dy/dz; 0 in every row that no scored token names, and where g is 0 (0 * NaN is
          0 here: a weight of 0 selects nothing)
Shapes    logits (R, V) T, row stride >= V; out (R, V) T, may be logits; logit_rows (M) int64;
          targets (M) int32; row_max, row_rest, grad (M) float32; table (R) RowGrad, filled with
          0xff bytes by the caller
Launch    grad_rows: ceil(M / 256) blocks of 256 threads, one token a thread; then logits_grad: (R,
          pieces) blocks of 256 threads, one piece of a row a block; no shared memory
Traffic   reads M*V*sizeof(T) + 28*M + 16*R bytes, writes R*V*sizeof(T) + 16*M; a row that is not
          scored is not read
Numerics  float32 for every T, rounded once; elementwise, so the bits do not depend on the launch.
          A target outside [0, V) gives a row of NaN. Everything that needs the target's logit is
          done by grad_rows, before the first write: in place, a block could otherwise find another
          block's gradient there
Source    d log softmax / d z = onehot - softmax, by hand; streaming stores, rows from
          the last: what the forward pass read last is still in the cache
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

// 8 columns: the gradient of each, and the target's in its place.
template <bool CAP, typename T>
__device__ __forceinline__ void differentiate(Eight<T>& eight, int group, const RowGrad& row,
                                              float scale, float cap) {
    const int at = row.target - 8 * group;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const Transformed of = transform<CAP>(widen(eight.value[k]), scale, cap);
        float dz = __fmul_rn(row.coefficient, exp_of(of.y - row.shift));
        if (CAP) dz = __fmul_rn(dz, of.slope);
        if (k == at) dz = row.at_target;
        narrow(dz, eight.value[k]);
    }
}

// Groups me, me + THREADS, ... of [first, last). `in` may be `out`: a thread writes only columns
// that it has read.
template <bool CAP, typename T>
__device__ __forceinline__ void write_piece(const T* in, T* out, int first, int last, int columns,
                                            const RowGrad& row, float scale, float cap) {
    const bool aligned = is_aligned(in) && is_aligned(out);
    const int whole = columns / 8 < last ? columns / 8 : last;
    int group = first + threadIdx.x;
    for (; group + (UNROLL - 1) * THREADS < whole; group += UNROLL * THREADS) {
        Eight<T> eight[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) eight[u] = load_eight(in, group + u * THREADS, aligned);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            differentiate<CAP>(eight[u], group + u * THREADS, row, scale, cap);
            store_eight(out, group + u * THREADS, eight[u], aligned);
        }
    }
    for (; group < last; group += THREADS) {
        const int count = group < whole ? 8 : columns - 8 * group;
        Eight<T> eight = {};
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < count) eight.value[k] = in[8ll * group + k];
        differentiate<CAP>(eight, group, row, scale, cap);
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < count) out[8ll * group + k] = eight.value[k];
    }
}

template <typename T>
__device__ __forceinline__ void write_zeros(T* out, int first, int last, int columns) {
    const bool aligned = is_aligned(out);
    const int whole = columns / 8 < last ? columns / 8 : last;
    Eight<T> zeros;
#pragma unroll
    for (int k = 0; k < 8; ++k) narrow(0.f, zeros.value[k]);
    for (int group = first + threadIdx.x; group < last; group += THREADS) {
        if (group < whole) {
            store_eight(out, group, zeros, aligned);
        } else {
            for (int k = 0; k < columns - 8 * group; ++k) out[8ll * group + k] = zeros.value[k];
        }
    }
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(THREADS)
    logits_grad(const T* logits, T* out, const RowGrad* __restrict__ table, long long rows,
                long long stride, long long out_stride, int columns, int piece_groups, float scale,
                float cap) {
    // From the last row: what the forward pass read last may still be in the second-level cache.
    const long long r = rows - 1 - blockIdx.x;
    const RowGrad row = table[r];
    // 64-bit: rows * columns passes 2^31 at everyday sizes.
    const T* const from = logits + r * stride;
    T* const to = out + r * out_stride;
    const int groups = (int)((columns + 7ll) / 8), first = (int)blockIdx.y * piece_groups;
    const int last = blockIdx.y + 1 == gridDim.y ? groups : first + piece_groups;
    if (row.target == ZERO) {
        write_zeros(to, first, last, columns);
    } else {
        write_piece<CAP>(from, to, first, last, columns, row, scale, cap);
    }
}
