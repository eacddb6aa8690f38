/*
logits_grad.cu: gradient of the log-probs by the logits, in place or into a buffer of its own.

Math      dz_v = g * ([v == t] - exp(y_v - m)/S) * dy/dz, S = rest + exp(y_t - m); at the target g
          * rest/S * dy/dz; 0 in every row that no scored token names, and where g is 0 (0 * NaN is
          0 here: a weight of 0 selects nothing)
Shapes    logits (R, V) T, row stride >= V; out (R, V) T, may be logits; logit_rows (M) int64, or
          null where token i has row i; targets (M) int32; row_max, row_rest, grad (M) float32;
          table (R) RowGrad, filled with 0xff bytes by the caller, unless logit_rows is null
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

template <typename T, Map MAP>
__global__ void __launch_bounds__(THREADS)
    grad_rows(const T* __restrict__ logits, const long long* __restrict__ logit_rows,
              const int* __restrict__ targets, const float* __restrict__ row_max,
              const float* __restrict__ row_rest, const float* __restrict__ grad,
              RowGrad* __restrict__ table, long long tokens, long long rows, long long stride,
              int columns, float scale, float cap) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens) return;
    const int target = targets[i];
    const long long r = logit_rows ? logit_rows[i] : i;
    const float g = grad[i];
    if (r < 0 || r >= rows) return;
    if (!logit_rows) table[r].target = ZERO;
    if (target == IGNORE || g == 0.f) return;
    if (target < 0 || target >= columns) {
        table[r] = {MISSING, NAN, NAN, NAN};
        return;
    }
    const Transformed at = transform<MAP>(widen(logits[r * stride + target]), scale, cap);
    const float max = row_max[i], rest = row_rest[i], total = rest + exp_of(at.y - max);
    const float factor = __fmul_rn(g, MAP == CAPPED ? __fmul_rn(scale, cap) : scale);
    table[r] = {target, max, -factor / total, factor * (rest / total) * at.slope};
}

// The gradients in the place of a group, as if the target were elsewhere.
template <Map MAP, typename T>
__device__ __forceinline__ void differentiate(Group<T>& group, const RowGrad& row, float scale,
                                              float cap) {
    float y[WIDTH<T>], slope[WIDTH<T>], dz[WIDTH<T>];
#pragma unroll
    for (int k = 0; k < WIDTH<T>; ++k) y[k] = column(group, k);
    transform<MAP, true>(y, slope, scale, cap);
#pragma unroll
    for (int k = 0; k < WIDTH<T>; ++k) {
        dz[k] = __fmul_rn(row.coefficient, exp_of(y[k] - row.shift));
        if (MAP == CAPPED) dz[k] = __fmul_rn(dz[k], slope[k]);
    }
    pack(dz, group);
}

// Groups me, me + THREADS, ... of a piece. `in` may be `out`: a thread writes only columns that it
// has read, and the target's twice.
template <Map MAP, bool ALIGNED, typename T>
__device__ __forceinline__ void write_piece(const T* in, T* out, Groups groups, int columns,
                                            const RowGrad& row, float scale, float cap) {
    constexpr int N = UNROLL<T>;
    const int me = threadIdx.x, of_target = row.target / WIDTH<T>;
    int group = groups.first + me;
    for (; group + (N - 1) * THREADS < groups.whole; group += N * THREADS) {
        Group<T> loaded[N];
#pragma unroll
        for (int u = 0; u < N; ++u)
            loaded[u] = load_group<ALIGNED, true>(in, group + u * THREADS);
#pragma unroll
        for (int u = 0; u < N; ++u) {
            differentiate<MAP>(loaded[u], row, scale, cap);
            store_group<ALIGNED>(out, group + u * THREADS, loaded[u]);
        }
    }
    for (; group < groups.whole; group += THREADS) {
        Group<T> loaded = load_group<ALIGNED, true>(in, group);
        differentiate<MAP>(loaded, row, scale, cap);
        store_group<ALIGNED>(out, group, loaded);
    }
    if (group < groups.last) {  // the last group of a row, of fewer columns
        const int count = columns - WIDTH<T> * group;
        Group<T> some = load_some(in, group, count);
        differentiate<MAP>(some, row, scale, cap);
#pragma unroll
        for (int k = 0; k < WIDTH<T>; ++k)
            if (k < count) out[(long long)WIDTH<T> * group + k] = some.value[k];
    }
    // By the thread that wrote its group, so behind that.
    if (row.target >= 0 && of_target >= groups.first && of_target < groups.last &&
        (of_target - groups.first) % THREADS == me)
        narrow(row.at_target, out[row.target]);
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void write_zeros(T* out, Groups groups, int columns) {
    Group<T> zeros;
    zeros.load = {};
    for (int group = groups.first + threadIdx.x; group < groups.last; group += THREADS) {
        if (group < groups.whole) {
            store_group<ALIGNED>(out, group, zeros);
        } else {
            for (int k = 0; k < columns - WIDTH<T> * group; ++k)
                narrow(0.f, out[(long long)WIDTH<T> * group + k]);
        }
    }
}

template <typename T, Map MAP>
__global__ void __launch_bounds__(THREADS, 4)
    logits_grad(const T* logits, T* out, const RowGrad* __restrict__ table, long long rows,
                long long stride, long long out_stride, int columns, int piece_columns, float scale,
                float cap) {
    // From the last row: what the forward pass read last may still be in the second-level cache.
    const long long r = rows - 1 - blockIdx.x;
    const RowGrad row = table[r];
    // 64-bit: rows * columns passes 2^31 at everyday sizes.
    const T* const from = logits + r * stride;
    T* const to = out + r * out_stride;
    const Groups groups = Groups::of<T>(columns, blockIdx.y, gridDim.y, piece_columns);
    if (row.target == ZERO && is_aligned(to)) {
        write_zeros<true>(to, groups, columns);
    } else if (row.target == ZERO) {
        write_zeros<false>(to, groups, columns);
    } else if (is_aligned(from) && is_aligned(to)) {
        write_piece<MAP, true>(from, to, groups, columns, row, scale, cap);
    } else {
        write_piece<MAP, false>(from, to, groups, columns, row, scale, cap);
    }
}
