/*
segment_sum.cu: sums over the tokens of each sequence.

Math      sums[s] = sum over t in [seq_offsets[s], seq_offsets[s + 1]) of weights[t] * values[t]
Shapes    values (M) float32; weights (M) float32 or null = 1; seq_offsets (S + 1) int32; sums (S)
          float32
Launch    S blocks of 256 threads, one sequence a block, no dynamic shared memory
Traffic   reads 4*M bytes, with weights 8*M, and 8*S; writes 4*S
Numerics  float64 inside, rounded once; lane l adds tokens l, l + 256, ... in order, then a fixed
          binary tree: the bits of rust/logps/segment.rs, since the product of two float32 is exact
          in float64. A weight of exactly 0 leaves its token out, even a NaN. Offsets that fall or
          leave [0, M] give NaN for their sequence, and nothing is read
Source    float32 sums of 8192 log-probs are off by 0.01
*/
#include "reduce.cuh"

__global__ void __launch_bounds__(THREADS)
    segment_sum(const float* __restrict__ values, const float* __restrict__ weights,
                const int* __restrict__ seq_offsets, float* __restrict__ sums, long long tokens) {
    __shared__ double lanes[THREADS];
    const int me = threadIdx.x, first = seq_offsets[blockIdx.x],
              last = seq_offsets[blockIdx.x + 1ll];
    if (first < 0 || first > last || last > tokens) {  // the whole block agrees
        if (me == 0) sums[blockIdx.x] = NAN;
        return;
    }
    double sum = 0;
    for (long long t = first + (long long)me; t < last; t += THREADS) {
        if (!weights)
            sum += values[t];
        else if (weights[t] != 0.f)
            sum += (double)values[t] * weights[t];
    }
    lanes[me] = sum;
    for (int half = THREADS / 2; half >= 32; half /= 2) {
        __syncthreads();  // (1) the upper half has been written
        if (me < half) lanes[me] = sum = sum + lanes[me + half];
    }
    if (me >= 32) return;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
    if (me == 0) sums[blockIdx.x] = (float)sum;
}
