// cuda_emu.h: runs a CUDA C++ kernel on the host, so that its logic is tested under sanitizers where there is no GPU.
//
// Each CUDA thread of a block is a fiber. A fiber runs until it waits (barrier, warp operation) or ends; then a
// scheduler driven by a seed chooses who runs next. Warps have random priorities, redrawn after turns of very different
// length, so some run far ahead of others: this makes a missing barrier visible. Blocks run one by one, in any order.
//
// emu::Fault is thrown for: a __syncthreads() that only some threads reach, or that they reach on different lines
// (stricter than hardware, where exited threads do not count); lanes that disagree on a warp operation; a shuffle that
// reads a lane outside its mask, or one that has exited; a launch that the driver would refuse.
//
// Not modelled: weak memory order, races inside one stretch between two waits, inline PTX (give it a second body under
// #ifdef EMU_HOST), clusters, asynchronous copies, approximate intrinsics, -ftz, fused multiply-add, speed.
//
// Shared memory: `__shared__ T a[N];` becomes a static. It keeps what the last block left in it, and only UBSan checks
// its bound. g++ has no `extern __shared__`: write EMU_DYNAMIC_SHARED(T, name), and give that macro its CUDA meaning in
// the kernel file. That memory has its exact size, so ASan guards it, and is filled with NaN before every block.
#pragma once
#ifndef __FLT16_MAX__
#error "cuda_emu.h needs _Float16: g++ 12 or newer"
#endif
#define EMU_HOST 1
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

// ---- the language -------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define EMU_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::block->shared.data())

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

template <class To, class From> inline To emu_cast(From from) {
    static_assert(sizeof(To) >= sizeof(From), "no bit is lost");
    To to{};
    std::memcpy(&to, &from, sizeof from);
    return to;
}
inline float __int_as_float(int i) { return emu_cast<float>(i); }
inline float __uint_as_float(unsigned u) { return emu_cast<float>(u); }
inline float __half2float(__half h) { return (float)emu_cast<_Float16>(h); }
inline __half __float2half_rn(float f) { return emu_cast<__half>((_Float16)f); }
inline float __bfloat162float(__nv_bfloat16 h) { return emu_cast<float>((uint32_t)h.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {  // to nearest, ties to even; every NaN becomes 0x7fff
    const uint32_t u = emu_cast<uint32_t>(f);
    return {(uint16_t)(f != f ? 0x7fff : (u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
inline void __threadfence() {}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// ---- blocks, warps, fibers ----------------------------------------------------------------------------------------
namespace emu {

struct Fault : std::runtime_error { using std::runtime_error::runtime_error; };
template <class... Parts> [[noreturn]] inline void fault(Parts... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Fault(text.str());
}

enum class State { ready, at_warp_op, at_barrier, exited };
enum class Op { sync, shuffle, ballot };
constexpr size_t stack_bytes = 64 << 10;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    dim3 index;
    unsigned warp, lane;
    State state;
    int line;                               // where it waits
    Op op; uint32_t mask; uint64_t value;   // what it brings to a warp operation ...
    unsigned source; uint64_t result;       // ... whose value it wants, and what it gets
};
struct Warp { uint32_t ready = 0, live = 0; uint64_t priority = 0; };

struct Block {
    dim3 grid, size, index;
    std::vector<unsigned char> shared;
    uint64_t seed, turn_left;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    ucontext_t scheduler;
    const std::function<void()>* kernel = nullptr;

    uint64_t random() { return (seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33; }
    void set(Thread& t, State s) {
        uint32_t bit = 1u << t.lane, &ready = warps[t.warp].ready, &live = warps[t.warp].live;
        t.state = s;
        ready = s == State::ready ? ready | bit : ready & ~bit;
        live = s == State::exited ? live & ~bit : live | bit;
    }
    Thread* choose();
    void finish_warp_op(const Thread& t), open_barrier(), run(dim3 where, const std::function<void()>& body);
};
inline Block* block = nullptr;  // what runs now
inline Thread* self = nullptr;

inline Thread* Block::choose() {  // any ready lane of the ready warp with the highest priority
    if (turn_left-- == 0) {
        for (Warp& w : warps) w.priority = random();
        turn_left = 16ull << random() % 10;
    }
    Warp* best = nullptr;
    for (Warp& w : warps) if (w.ready && (!best || w.priority > best->priority)) best = &w;
    if (!best) return nullptr;
    unsigned lane = random() % 32;
    while (!(best->ready >> lane & 1u)) lane = (lane + 1) % 32;
    return &threads[(best - warps.data()) * 32 + lane];
}

inline void Block::finish_warp_op(const Thread& t) {  // if every live lane of its mask has come
    if (t.state != State::at_warp_op) return;
    const uint32_t mask = t.mask, group = mask & warps[t.warp].live;
    if (!(mask >> t.lane & 1u)) fault("line ", t.line, ": lane ", t.lane, " is not in the mask it passes");
    Thread* lanes = &threads[t.warp * 32];
    uint32_t votes = 0;
    for (uint32_t g = group; g; g &= g - 1) {
        const Thread& u = lanes[__builtin_ctz(g)];
        if (u.state != State::at_warp_op || u.mask != mask) return;
        votes |= (u.value != 0 ? 1u : 0u) << u.lane;
    }
    for (uint32_t g = group; g; g &= g - 1) {
        Thread& u = lanes[__builtin_ctz(g)];
        if (u.op != t.op) fault("lanes of one mask wait for different operations: lines ", t.line, " and ", u.line);
        if (u.op == Op::shuffle && !(group >> u.source & 1u))
            fault("line ", u.line, ": lane ", u.lane, " reads lane ", u.source, ", not in its mask or exited");
        u.result = u.op == Op::shuffle ? lanes[u.source].value : votes;
    }
    for (uint32_t g = group; g; g &= g - 1) set(lanes[__builtin_ctz(g)], State::ready);
}

inline void Block::open_barrier() {  // nobody can run: either all wait at one __syncthreads(), or this is a fault
    size_t waiting = 0, exited = 0;
    int line = 0;
    for (const Thread& t : threads) {
        exited += t.state == State::exited;
        if (t.state != State::at_barrier) continue;
        if (waiting++ && t.line != line) fault("divergent barrier: __syncthreads() on lines ", line, " and ", t.line);
        line = t.line;
    }
    if (waiting < threads.size())
        fault("divergent barrier: ", waiting, " of ", threads.size(), " threads wait at __syncthreads() on line ", line,
              ", ", exited, " have exited, ", threads.size() - waiting - exited, " wait in a warp operation");
    for (Thread& t : threads) set(t, State::ready);
}

inline void wait(State s, int line) {  // called by a fiber: back to the scheduler, until it says go on
    self->line = line;
    block->set(*self, s);
    swapcontext(&self->context, &block->scheduler);
}

inline void Block::run(dim3 where, const std::function<void()>& body) {
    index = where, kernel = &body, block = this;
    std::fill(shared.begin(), shared.end(), 0xff);
    for (Thread& t : threads) {
        set(t, State::ready);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = stack_bytes;
        makecontext(&t.context, [] { (*block->kernel)(); wait(State::exited, 0); }, 0);
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(t.stack.get(), stack_bytes);
        t.context.uc_stack.ss_size = 0;  // or ASan would forget the red zones of this stack at every switch
#endif
    }
    for (size_t left = threads.size(); left;) {
        self = choose();
        if (!self) { open_barrier(); continue; }
        swapcontext(&scheduler, &self->context);
        finish_warp_op(*self);
        if (self->state != State::exited) continue;
        --left;
        for (Thread& t : threads) if (t.warp == self->warp) finish_warp_op(t);  // who waited for this lane alone
    }
}

// Runs `kernel()` once per thread of the grid. The same seed gives the same schedule.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel) {
    const size_t n = (size_t)size.x * size.y * size.z;
    if (n < 1 || n > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 ||
        shared_bytes > 227 << 10) fault("the driver would refuse this launch");
    Block b{grid, size, {}, std::vector<unsigned char>(shared_bytes), seed, 0, std::vector<Thread>(n),
            std::vector<Warp>((n + 31) / 32), {}};
    const auto place = [](unsigned i, dim3 in) { return dim3{i % in.x, i / in.x % in.y, i / in.x / in.y}; };
    for (unsigned i = 0; i < n; ++i)
        b.threads[i].index = place(i, size), b.threads[i].warp = i / 32, b.threads[i].lane = i % 32;
    std::vector<dim3> order;
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) order.push_back(place(i, grid));
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[b.random() % i]);
    for (dim3 where : order) b.run(where, kernel);
}

inline uint64_t warp_op(Op op, uint32_t mask, uint64_t value, unsigned source, int line) {
    self->op = op, self->mask = mask, self->value = value, self->source = source;
    wait(State::at_warp_op, line);
    return self->result;
}
template <class T> inline T shuffle(uint32_t mask, T v, unsigned source, int line) {
    const uint64_t bits = warp_op(Op::shuffle, mask, emu_cast<uint64_t>(v), source, line);
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

}  // namespace emu

// ---- what a kernel calls ------------------------------------------------------------------------------------------
#define threadIdx (emu::self->index)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->size)
#define gridDim (emu::block->grid)

inline void __syncthreads(int line = __builtin_LINE()) { emu::wait(emu::State::at_barrier, line); }
inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) {
    emu::warp_op(emu::Op::sync, mask, 0, 0, line);
}
template <class T> inline T __shfl_sync(uint32_t mask, T v, int from, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle(mask, v, (emu::self->lane & -width) + (from & (width - 1)), line);
}
template <class T> inline T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = emu::self->lane, from = lane ^ bits;
    return emu::shuffle(mask, v, (from & -width) > (lane & -width) ? lane : from, line);
}
template <class T> inline T __shfl_down_sync(uint32_t mask, T v, int by, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = emu::self->lane, from = lane + by;
    return emu::shuffle(mask, v, (from & -width) == (lane & -width) ? from : lane, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, int line = __builtin_LINE()) {
    return (uint32_t)emu::warp_op(emu::Op::ballot, mask, p != 0, 0, line);
}
inline int __any_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, !p, line) == 0; }
