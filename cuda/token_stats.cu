/*
token_stats.cu: log-prob of one target token a row, and on request four statistics, in one read. No
softmax is stored.

Math      y = scale*z or cap*tanh(scale*z); m = max_v y_v; rest = sum over v != t of exp(y_v - m);
          S = rest + exp(y_t - m); logp = (y_t - m) - log S, and -log1p(rest) where y_t == m;
          entropy = log S - a/S; mean_logit = sum/V; log_sum_sq = log q - 2 log S; is_top1: t is
          the first argmax
Shapes    logits (R, V) T, row stride >= V; logit_rows (M) int64; targets (M) int32, -100 = not
          scored; logps, row_max, row_rest, entropy, mean_logit, log_sum_sq (M) float32; is_top1
          (M) bool; parts (M, tiles) Part, of the split form alone
Launch    (M, 1) blocks of 256 threads, one row a block; or, for few rows, (M, tiles) blocks, one
          tile a block, then token_stats_finish with ceil(M / 256) blocks of 256 threads; no
          dynamic shared memory
Traffic   reads M*V*sizeof(T) + 12*M bytes, the target's logit first, writes 12*M, with
          STATS 25*M; a row that is not scored is not read
Numerics  float32 for every T. A row is cut into tiles by V alone, column j belongs to thread (j/W)
          mod 256 whatever the alignment, W = 8 in half width and 4 in float32, and tiles merge in
          order: the same bits alone, in a batch, split or not, at any address. NaN in a row that is
          read, a target outside [0, V) or a row outside [0, R) give NaN; -inf at the target -inf
Source    Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3; the
          target is left out of the sum, so that 1 - p keeps its digits
*/
#include "reduce.cuh"

enum class Place { not_scored, missing, found };

__device__ __forceinline__ Place place(long long row, int target, long long rows, int columns) {
    if (target == IGNORE) return Place::not_scored;
    return row >= 0 && row < rows && target >= 0 && target < columns ? Place::found
                                                                     : Place::missing;
}

// The target of a row, as a thread sees it.
struct Target {
    int group, place;  // the column `place` of `group`
    int mine;          // `group` if this thread has it, or -1

    template <typename T>
    static __device__ __forceinline__ Target of(int target) {
        const int group = target / WIDTH<T>;  // tiles begin with thread 0
        return {group, target % WIDTH<T>, group % THREADS == (int)threadIdx.x ? group : -1};
    }
};

// Adds N groups, `group`, `group + THREADS`, ..., of which the first `count` columns of each exist.
template <Map MAP, bool STATS, int N, typename T>
__device__ __forceinline__ void add_groups(Part& part, const Group<T>* loaded, int group,
                                           int count, Target target, float scale, float cap) {
    constexpr int W = WIDTH<T>;
    float y[N * W], largest = -INFINITY;
#pragma unroll
    for (int u = 0; u < N; ++u) {
        float of_group[W], slope[W], sum[2] = {};
#pragma unroll
        for (int k = 0; k < W; ++k) of_group[k] = column(loaded[u], k);
        transform<MAP, false>(of_group, slope, scale, cap);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            y[W * u + k] = k < count ? of_group[k] : -INFINITY;
            sum[k % 2] += k < count ? of_group[k] : 0.f;
        }
        if (STATS) part.sum += sum[0] + sum[1];
    }
    if ((unsigned)(target.mine - group) < (unsigned)(N * THREADS)) {
        // A branch that one warp of a row takes once.
        const int at = (target.mine - group) / THREADS * W + target.place;
#pragma unroll
        for (int k = 0; k < N * W; ++k) {
            if (STATS && k < at && k / W == at / W) part.before = fmaxf(part.before, y[k]);
            if (k == at) y[k] = -INFINITY;
        }
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
        float max = y[W * u];
#pragma unroll
        for (int k = 1; k < W; ++k) max = fmaxf(max, y[W * u + k]);
        if (STATS && group + u * THREADS < target.group) part.before = fmaxf(part.before, max);
        largest = fmaxf(largest, max);
    }
    add<STATS>(part, y, largest);
}

// This thread's columns of one tile: groups me, me + THREADS, ... of it.
template <Map MAP, bool STATS, bool ALIGNED, typename T>
__device__ __forceinline__ Part read_tile(const T* row, Groups groups, int columns, Target target,
                                          float scale, float cap) {
    constexpr int N = UNROLL<T>, W = WIDTH<T>;
    Part part = empty_part();
    int group = groups.first + threadIdx.x;
    for (; group + (N - 1) * THREADS < groups.whole; group += N * THREADS) {
        Group<T> loaded[N];
#pragma unroll
        for (int u = 0; u < N; ++u)
            loaded[u] = load_group<ALIGNED, false>(row, group + u * THREADS);
        add_groups<MAP, STATS, N>(part, loaded, group, W, target, scale, cap);
    }
    for (; group < groups.last; group += THREADS) {
        const int count = group < groups.whole ? W : columns - W * group;
        const Group<T> loaded = count == W ? load_group<ALIGNED, false>(row, group)
                                           : load_some(row, group, count);
        add_groups<MAP, STATS, 1>(part, &loaded, group, count, target, scale, cap);
    }
    return part;
}

template <bool STATS>
__device__ __forceinline__ Part merge_warp(Part part) {  // lane 0 ends with all of them
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        Part other = empty_part();
        other.max = __shfl_down_sync(0xffffffffu, part.max, by);
        other.rest = __shfl_down_sync(0xffffffffu, part.rest, by);
        if (STATS) {
            other.a = __shfl_down_sync(0xffffffffu, part.a, by);
            other.q = __shfl_down_sync(0xffffffffu, part.q, by);
            other.sum = __shfl_down_sync(0xffffffffu, part.sum, by);
            other.before = __shfl_down_sync(0xffffffffu, part.before, by);
        }
        part = merge<STATS>(part, other);
    }
    return part;
}

struct Outputs {
    float *logps, *row_max, *row_rest, *entropy, *mean_logit, *log_sum_sq;
    unsigned char* is_top1;

    template <bool STATS>
    __device__ __forceinline__ void fill(long long i, float value) const {
        logps[i] = row_max[i] = row_rest[i] = value;
        if (STATS) entropy[i] = mean_logit[i] = log_sum_sq[i] = value, is_top1[i] = 0;
    }

    // Adds the target to what is known of all other columns.
    template <bool STATS>
    __device__ __forceinline__ void finish(long long i, Part part, float y_target,
                                           int columns) const {
        const float max = fmaxf(part.max, y_target), d = y_target - max, e = exp_of(d);
        const float moved = below(part.max, max), k = exp_of(moved);
        const float rest = __fmul_rn(k, part.rest), total = rest + e, log_total = logf(total);
        logps[i] = d == 0.f ? 0.f - log1pf(rest) : d - log_total;
        row_max[i] = max;
        row_rest[i] = rest;
        if (STATS) {
            const float others = __fmul_rn(k, __fmaf_rn(part.rest, fmaxf(moved, -200.f), part.a));
            const float a = __fmaf_rn(e, fmaxf(d, -200.f), others);
            entropy[i] = log_total - a / total;
            mean_logit[i] = part.sum / columns;
            log_sum_sq[i] =
                logf(__fmaf_rn(__fmul_rn(k, k), part.q, __fmul_rn(e, e))) - 2.f * log_total;
            is_top1[i] = d == 0.f && part.before < y_target && total == total;
        }
    }
};

template <typename T, Map MAP, bool STATS>
__global__ void __launch_bounds__(THREADS, 3)
    token_stats(const T* __restrict__ logits, const long long* __restrict__ logit_rows,
                const int* __restrict__ targets, float* __restrict__ logps,
                float* __restrict__ row_max, float* __restrict__ row_rest,
                float* __restrict__ entropy, float* __restrict__ mean_logit,
                float* __restrict__ log_sum_sq, unsigned char* __restrict__ is_top1,
                Part* __restrict__ parts, long long rows, long long stride, int columns,
                int tile_columns, int tiles, float scale, float cap) {
    __shared__ Part of_warp[MAX_TILES][THREADS / 32];
    __shared__ Part of_tile[MAX_TILES];
    const Outputs out = {logps, row_max, row_rest, entropy, mean_logit, log_sum_sq, is_top1};
    const long long i = blockIdx.x, r = logit_rows[i];
    const int target = targets[i], me = threadIdx.x, lane = me % 32, warp = me / 32;
    const bool split = gridDim.y > 1;

    const Place where = place(r, target, rows, columns);
    if (where != Place::found) {  // the whole block agrees, and has not touched the row
        if (me == 0 && !split) out.fill<STATS>(i, where == Place::missing ? NAN : 0.f);
        return;
    }
    // 64-bit: rows * columns passes 2^31 at everyday sizes.
    const T* const row = logits + r * stride;
    // Asked for first: behind the last merge the block would wait for it with nothing else to do.
    const T z_target = row[target];
    const bool aligned = is_aligned(row);
    const Target at = Target::of<T>(target);
    const int first_tile = split ? blockIdx.y : 0, last_tile = split ? first_tile + 1 : tiles;
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const Groups groups = Groups::of<T>(columns, tile, tiles, tile_columns);
        Part part;
        if (aligned)
            part = read_tile<MAP, STATS, true>(row, groups, columns, at, scale, cap);
        else
            part = read_tile<MAP, STATS, false>(row, groups, columns, at, scale, cap);
        part = merge_warp<STATS>(part);
        if (lane == 0) of_warp[tile - first_tile][warp] = part;
    }
    __syncthreads();  // (1) every warp has written before warp 0 reads
    if (warp != 0) return;
    for (int tile = lane; tile < last_tile - first_tile; tile += 32) {
        Part part = of_warp[tile][0];
        for (int w = 1; w < THREADS / 32; ++w) part = merge<STATS>(part, of_warp[tile][w]);
        of_tile[tile] = part;
    }
    __syncwarp();  // (2) every lane has written before lane 0 reads
    if (lane != 0) return;
    if (split) {
        parts[i * tiles + blockIdx.y] = of_tile[0];
        return;
    }
    Part part = of_tile[0];
    for (int tile = 1; tile < tiles; ++tile) part = merge<STATS>(part, of_tile[tile]);
    out.finish<STATS>(i, part, transform<MAP>(widen(z_target), scale, cap).y, columns);
}

template <typename T, Map MAP, bool STATS>
__global__ void __launch_bounds__(THREADS, 3)
    token_stats_finish(const T* __restrict__ logits, const long long* __restrict__ logit_rows,
                       const int* __restrict__ targets, float* __restrict__ logps,
                       float* __restrict__ row_max, float* __restrict__ row_rest,
                       float* __restrict__ entropy, float* __restrict__ mean_logit,
                       float* __restrict__ log_sum_sq, unsigned char* __restrict__ is_top1,
                       const Part* __restrict__ parts, long long tokens, long long rows,
                       long long stride, int columns, int tiles, float scale, float cap) {
    const Outputs out = {logps, row_max, row_rest, entropy, mean_logit, log_sum_sq, is_top1};
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= tokens) return;
    const long long r = logit_rows[i];
    const int target = targets[i];
    const Place where = place(r, target, rows, columns);
    if (where != Place::found) {
        out.fill<STATS>(i, where == Place::missing ? NAN : 0.f);
        return;
    }
    Part part = parts[i * tiles];
    for (int tile = 1; tile < tiles; ++tile) part = merge<STATS>(part, parts[i * tiles + tile]);
    out.finish<STATS>(i, part, transform<MAP>(widen(logits[r * stride + target]), scale, cap).y,
                      columns);
}
