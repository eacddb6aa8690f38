// All kernels as one shared library: launch() takes a kernel by its name expression and an array of
// argument addresses, as the driver does, and runs it in the emulator.
#include "cuda_emu.h"

#include "logits_grad.cu"
#include "segment_sum.cu"
#include "token_stats.cu"

#include <cstdio>
#include <map>
#include <string>

struct Entry {
    std::string sizes;  // of each parameter in bytes, one digit each
    std::function<void(dim3, uint64_t, void**)> run;
};

template <class... A, size_t... I>
static Entry entry(void (*kernel)(A...), std::index_sequence<I...>) {
    std::string sizes;
    ((sizes += (char)('0' + sizeof(A))), ...);
    return {sizes, [kernel](dim3 grid, uint64_t seed, void** arguments) {
                emu::launch(grid, {THREADS}, 0, seed,
                            [&] { kernel(*static_cast<A*>(arguments[I])...); });
            }};
}
template <class... A>
static Entry entry(void (*kernel)(A...)) {
    return entry(kernel, std::index_sequence_for<A...>());
}

static const std::map<std::string, Entry>& kernels() {
    static const std::map<std::string, Entry> all = [] {
        std::map<std::string, Entry> m;
        m["segment_sum"] = entry(segment_sum);
#define GRAD(T, MAP)                                                 \
    m["grad_rows<" #T ", " #MAP ">"] = entry(grad_rows<T, MAP>);     \
    m["logits_grad<" #T ", " #MAP ">"] = entry(logits_grad<T, MAP>);
#define STATS(T, MAP, STATS)                                                             \
    m["token_stats<" #T ", " #MAP ", " #STATS ">"] = entry(token_stats<T, MAP, STATS>);  \
    m["token_stats_finish<" #T ", " #MAP ", " #STATS ">"] =                              \
        entry(token_stats_finish<T, MAP, STATS>);
#define MAPPED(T, MAP) GRAD(T, MAP) STATS(T, MAP, false) STATS(T, MAP, true)
#define ALL(T) MAPPED(T, PLAIN) MAPPED(T, SCALED) MAPPED(T, CAPPED)
        ALL(float) ALL(__half) ALL(__nv_bfloat16)
        return m;
    }();
    return all;
}

// 0, or 1 with the fault in `message`.
extern "C" int launch(const char* name, unsigned x, unsigned y, uint64_t seed, void** arguments,
                      char* message, size_t size) {
    try {
        kernels().at(name).run({x, y, 1}, seed, arguments);
        return 0;
    } catch (const std::exception& fault) {
        std::snprintf(message, size, "%s: %s", name, fault.what());
        return 1;
    }
}

// Bytes of each parameter, one digit each; null for an unknown kernel.
extern "C" const char* parameter_bytes(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : found->second.sizes.c_str();
}
