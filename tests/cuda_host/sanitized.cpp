// Every kernel on many shapes, alignments and schedules against float64 loops, under ASan and UBSan.
// Buffers end with their last element, so both ends are guarded; what must not be read is NaN.
// Exit 1: wrong. Exit 2: emu::Fault. QUICK: bfloat16 alone, for planted faults.
#include "cuda_emu.h"

#include "logits_grad.cu"
#include "segment_sum.cu"
#include "token_stats.cu"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

static int seed = 0;  // of the next launch: no two share a schedule
static double worst = 0;

[[noreturn]] static void wrong(const char* what, int columns, int offset, int gap, int row, double got, double want) {
    std::printf("WRONG: %s, %d columns, offset %d, gap %d, row %d: %.9g, not %.9g\n", what, columns, offset, gap, row,
                got, want);
    std::exit(1);
}
static void compare(const char* what, int columns, int offset, int gap, int row, double got, double want, double by) {
    if (std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= by) return;
    wrong(what, columns, offset, gap, row, got, want);
}

// Memory of exactly `size` elements, all NaN where T has one.
template <class T> struct Exact {
    size_t size;
    T* data;
    explicit Exact(size_t n) : size(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {
        std::memset(static_cast<void*>(data), 0xff, n * sizeof(T));
    }
    Exact(const Exact&) = delete;
    ~Exact() { std::free(data); }
    T& operator[](size_t i) { return data[i]; }
};

template <class T, Map MAP, bool STATS> static void check(int columns, int offset, int gap, double unit) {
    constexpr int rows = 5, tokens = 5;
    // Short tiles, so that a row has several; of long rows one has all columns that a thread has in flight.
    const int tile_columns = (columns > 8192 ? 32 : 8) * THREADS;
    const long long stride = columns + gap;
    const int tiles = (columns + tile_columns - 1) / tile_columns;
    const float scale = MAP == PLAIN ? 1.f : 0.4f, cap = MAP == CAPPED ? 7.f : 1.f;
    Exact<T> memory(offset + (rows - 1) * stride + columns), fresh(rows * (long long)columns);
    T* const logits = memory.data + offset;
    // Token 1 is not scored, and its row stays NaN; row 3 has no token, and is NaN too; token 4 names no row.
    const long long logit_rows[tokens] = {2, 0, 4, 1, rows};
    const int targets[tokens] = {columns - 1, IGNORE, columns / 2, columns, 0};
    uint64_t random = columns * 31 + offset;
    for (int r : {1, 2, 4})
        for (int c = 0; c < columns; ++c) {
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            narrow((float)(random >> 40) / (1 << 20) - 8, logits[r * stride + c]);  // in [-8, 8)
        }

    Exact<float> logps(tokens), max(tokens), rest(tokens), entropy(tokens), mean(tokens), square(tokens);
    Exact<float> again(tokens), max2(tokens), rest2(tokens);
    Exact<unsigned char> top(tokens);
    Exact<Part> parts(tokens * tiles);
    emu::launch({tokens}, {THREADS}, 0, seed++, [&] {
        token_stats<T, MAP, STATS>(logits, logit_rows, targets, logps.data, max.data, rest.data, entropy.data,
                                   mean.data, square.data, top.data, nullptr, rows, stride, columns, tile_columns,
                                   tiles, scale, cap);
    });
    if (tiles > 1) {
        emu::launch({tokens, (unsigned)tiles}, {THREADS}, 0, seed++, [&] {
            token_stats<T, MAP, STATS>(logits, logit_rows, targets, again.data, max2.data, rest2.data, entropy.data,
                                       mean.data, square.data, top.data, parts.data, rows, stride, columns,
                                       tile_columns, tiles, scale, cap);
        });
        emu::launch({1}, {THREADS}, 0, seed++, [&] {
            token_stats_finish<T, MAP, STATS>(logits, logit_rows, targets, again.data, max2.data, rest2.data,
                                              entropy.data, mean.data, square.data, top.data, parts.data, tokens,
                                              rows, stride, columns, tiles, scale, cap);
        });
        for (int i = 0; i < tokens; ++i)
            if (std::memcmp(&again[i], &logps[i], 4)) wrong("split row", columns, offset, gap, i, again[i], logps[i]);
    }
    const auto y = [&](int r, int c) {
        const double z = widen(logits[r * stride + c]) * (double)scale;
        return MAP == CAPPED ? cap * std::tanh(z) : z;
    };
    compare("not scored", columns, offset, gap, 1, logps[1], 0, 0);
    compare("missing target", columns, offset, gap, 3, logps[3], NAN, 0);
    compare("missing row", columns, offset, gap, 4, logps[4], NAN, 0);
    double total[rows] = {}, high[rows];
    for (int i : {0, 2}) {
        const int r = (int)logit_rows[i];
        double a = 0, sum = 0, squares = 0;
        high[r] = -INFINITY;
        for (int c = 0; c < columns; ++c) high[r] = std::fmax(high[r], y(r, c));
        for (int c = 0; c < columns; ++c) {
            const double d = y(r, c) - high[r], e = std::exp(d);
            total[r] += e, a += e * d, squares += e * e, sum += y(r, c);
        }
        const double want = y(r, targets[i]) - high[r] - std::log(total[r]);
        worst = std::fmax(worst, std::fabs(logps[i] - want));
        compare("log-prob", columns, offset, gap, r, logps[i], want, 4e-6);
        if (!STATS) continue;
        compare("entropy", columns, offset, gap, r, entropy[i], std::log(total[r]) - a / total[r], 2e-5);
        compare("mean", columns, offset, gap, r, mean[i], sum / columns, 1e-5);
        compare("squares", columns, offset, gap, r, square[i], std::log(squares) - 2 * std::log(total[r]), 2e-5);
        bool first = y(r, targets[i]) == high[r];
        for (int c = 0; c < targets[i]; ++c) first = first && y(r, c) < high[r];
        compare("top-1", columns, offset, gap, r, top[i], first, 0);
    }

    const float grad[tokens] = {1.5f, 2.f, -0.25f, 1.f, 1.f};
    Exact<RowGrad> table(rows);  // 0xff: no row has a token yet
    emu::launch({1}, {THREADS}, 0, seed++, [&] {
        grad_rows<T, MAP>(logits, logit_rows, targets, max.data, rest.data, grad, table.data, tokens, rows, stride,
                          columns, scale, cap);
    });
    const int piece = (columns + 15) / 16 * 8, pieces = (columns + piece - 1) / piece;
    emu::launch({rows, (unsigned)pieces}, {THREADS}, 0, seed++, [&] {
        logits_grad<T, MAP>(logits, fresh.data, table.data, rows, stride, columns, columns, piece, scale, cap);
    });
    const double from[rows] = {0, NAN, grad[0], 0, grad[2]};
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) {
            const double got = widen(fresh[r * (long long)columns + c]);
            double want = from[r];
            if (want == want && want != 0) {
                const double t = y(r, c) / cap, slope = scale * (MAP == CAPPED ? cap * (1 - t * t) : 1);
                const int target = targets[r == 2 ? 0 : 2];
                want *= slope * ((c == target) - std::exp(y(r, c) - high[r]) / total[r]);
            }
            compare("gradient", columns, offset, gap, r, got, want, unit * std::fabs(want) + 1e-7);
        }
    emu::launch({rows}, {THREADS}, 0, seed++, [&] {
        logits_grad<T, MAP>(logits, logits, table.data, rows, stride, stride, columns, columns + 8, scale, cap);
    });
    for (int r = 0; r < rows; ++r) {
        if (std::memcmp(logits + r * stride, &fresh[r * (long long)columns], columns * sizeof(T)))
            wrong("in place", columns, offset, gap, r, 0, 0);
        for (int c = columns; c < stride && r + 1 < rows; ++c)
            if (!std::isnan(widen(logits[r * stride + c]))) wrong("gap written", columns, offset, gap, r, 0, NAN);
    }
}

// Rows more than 2^31 elements apart, in memory of which few pages are touched. All logits are 0, the targets' 1.
template <class T> struct Mapped {
    size_t bytes;
    T* data;
    explicit Mapped(size_t n) : bytes(n * sizeof(T)) {
        void* const at =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) std::perror("mmap"), std::exit(1);
        data = static_cast<T*>(at);
    }
    Mapped(const Mapped&) = delete;
    ~Mapped() { munmap(data, bytes); }
};
static void check_far() {
    using T = __nv_bfloat16;
    constexpr int columns = 2051, tile_columns = 8 * THREADS, tiles = 2;
    constexpr long long stride = (1ll << 31) + 5, rows = 2, tokens = 2;
    Mapped<T> memory(stride + columns), fresh(stride + columns);
    const long long logit_rows[tokens] = {1, 0};
    const int targets[tokens] = {columns - 1, 3};
    for (int i = 0; i < tokens; ++i) narrow(1.f, memory.data[logit_rows[i] * stride + targets[i]]);
    const double e = std::exp(1.), total = e + columns - 1;
    Exact<float> logps(tokens), max(tokens), rest(tokens), again(tokens);
    Exact<Part> parts(tokens * tiles);
    for (float* out : {logps.data, again.data}) {
        const bool split = out == again.data;
        emu::launch({tokens, split ? (unsigned)tiles : 1}, {THREADS}, 0, seed++, [&] {
            token_stats<T, PLAIN, false>(memory.data, logit_rows, targets, out, max.data, rest.data, nullptr, nullptr,
                                         nullptr, nullptr, split ? parts.data : nullptr, rows, stride, columns,
                                         tile_columns, tiles, 1, 1);
        });
        if (split)
            emu::launch({1}, {THREADS}, 0, seed++, [&] {
                token_stats_finish<T, PLAIN, false>(memory.data, logit_rows, targets, out, max.data, rest.data, nullptr,
                                                    nullptr, nullptr, nullptr, parts.data, tokens, rows, stride,
                                                    columns, tiles, 1, 1);
            });
        for (int i = 0; i < tokens; ++i) compare("far log-prob", columns, 0, 0, i, out[i], 1 - std::log(total), 4e-6);
    }
    const float grad[tokens] = {2, 1};
    Exact<RowGrad> table(rows);
    emu::launch({1}, {THREADS}, 0, seed++, [&] {
        grad_rows<T, PLAIN>(memory.data, logit_rows, targets, max.data, rest.data, grad, table.data, tokens, rows,
                            stride, columns, 1, 1);
    });
    for (T* out : {fresh.data, memory.data}) {
        emu::launch({rows}, {THREADS}, 0, seed++, [&] {
            logits_grad<T, PLAIN>(memory.data, out, table.data, rows, stride, stride, columns, columns + 8, 1, 1);
        });
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < columns; ++c) {
                const bool at = c == targets[1 - r];
                const double want = grad[1 - r] * (at - (at ? e : 1) / total);
                const double got = widen(out[r * stride + c]);
                compare("far gradient", columns, 0, 0, r, got, want, std::fabs(want) / 256);
            }
    }
    const long long last = (1ll << 31) - 1;
    Mapped<float> values(last);
    for (int t = 1; t <= 600; ++t) values.data[last - t] = 0.5f;
    const int offsets[2] = {(int)(last - 600), (int)last};
    float sum = NAN;
    emu::launch({1}, {THREADS}, 0, seed++, [&] { segment_sum(values.data, nullptr, offsets, &sum, last); });
    compare("far segment sum", 1, 0, 0, 0, sum, 300, 0);
}

static void check_segments() {
    constexpr int tokens = 1003, sequences = 6;
    Exact<float> values(tokens), weights(tokens), sums(sequences);
    const int offsets[sequences + 1] = {0, 0, 1, 600, tokens, 5, tokens + 1};
    for (int t = 0; t < tokens; ++t) {
        weights[t] = t % 7 ? 0.5f + t % 5 : 0;
        if (t % 7) values[t] = -0.01f * (t * 37 % 1000);  // else NaN
    }
    for (int weighted = 1; weighted >= 0; --weighted) {
        emu::launch({sequences}, {THREADS}, 0, seed++, [&] {
            segment_sum(values.data, weighted ? weights.data : nullptr, offsets, sums.data, tokens);
        });
        for (int s = 0; s < sequences; ++s) {
            double want = 0;
            for (int t = offsets[s]; t < offsets[s + 1] && t < tokens; ++t)
                want += weighted ? (weights[t] != 0 ? (double)weights[t] * values[t] : 0) : values[t];
            if (s >= 4) want = NAN;
            compare("segment sum", weighted, 0, 0, s, sums[s], (float)want, 0);
        }
        for (int t = 0; t < tokens; t += 7) values[t] = 1;
    }
}

int main() try {
    for (int columns : {1, 7, 8, 33, 1000, 2051, 8201})
        for (int offset : {0, 1, 5})
            for (int gap : {0, 3}) {
                if (columns > 3000 && gap != 3 * (offset == 1)) continue;
                check<__nv_bfloat16, PLAIN, true>(columns, offset, gap, 1. / 256);
#ifndef QUICK
                check<float, PLAIN, true>(columns, offset, gap, 5e-6);
                check<float, CAPPED, false>(columns, offset, gap, 5e-6);
                check<__half, CAPPED, true>(columns, offset, gap, 1. / 1024);
                check<__half, SCALED, false>(columns, offset, gap, 1. / 1024);
#endif
            }
    check_far();
    check_segments();
    std::printf("%d launches agree with float64, log-probs within %.1e\n", seed, worst);
} catch (const emu::Fault& fault) {
    std::printf("FAULT: %s\n", fault.what());
    return 2;
}
