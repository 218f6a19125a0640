// AMX: eight tile registers of 16 rows of 64 bytes, and their products.
//
// BITWATT_EMULATE_AMX puts plain loops in the instructions' place, so that what is written in terms
// of tiles can be tested on machines that have none. The instructions themselves are tested there by
// tests/kernels/cpu/run_on_emulated_amx.sh, in an emulator of the whole machine.

#pragma once

#include "simd.h"

#if defined(BITWATT_EMULATE_AMX)
#define BW_AMX 1
#elif defined(__AMX_INT8__)
#define BW_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(BW_AMX)

namespace bitwatt {
namespace BITWATT_ISA {

constexpr int kAmxRows = 16, kAmxRowBytes = 64;

#if defined(BITWATT_EMULATE_AMX)

struct AmxTile {
    uint8_t bytes[kAmxRows][kAmxRowBytes];
};
static thread_local AmxTile amx_tiles[8];

BW_INLINE bool request_tiles() { return true; }
BW_INLINE void configure_tiles() {}
BW_INLINE void release_tiles() {}
template <int tile>
BW_INLINE void zero_tile() { amx_tiles[tile] = {}; }
template <int tile>
BW_INLINE void load_tile(const void* p, size_t stride) {
    for (int r = 0; r < kAmxRows; ++r)
        __builtin_memcpy(amx_tiles[tile].bytes[r], static_cast<const char*>(p) + r * stride,
                         kAmxRowBytes);
}
template <int tile>
BW_INLINE void store_tile(int32_t* p) { __builtin_memcpy(p, &amx_tiles[tile], sizeof(AmxTile)); }
// Stands for the processor, so it isn't itself under test: instrumented, a product takes 20 times
// as long. What it reads and writes are the registers above.
template <int sum, int a, int b>
#if defined(BITWATT_SANITIZE)
__attribute__((no_sanitize("address", "undefined"), optimize("O3")))
#endif
static void multiply_tiles() {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            int32_t s;
            __builtin_memcpy(&s, &amx_tiles[sum].bytes[m][4 * n], 4);
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 4; ++i)
                    s += static_cast<int8_t>(amx_tiles[a].bytes[m][4 * k + i]) *
                         amx_tiles[b].bytes[k][4 * n + i];
            __builtin_memcpy(&amx_tiles[sum].bytes[m][4 * n], &s, 4);
        }
}

#else

// Linux hands out the tiles' state on request, once for the process (Documentation/arch/x86/xstate).
static bool request_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
BW_INLINE void configure_tiles() {
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(Config) == 64, "as ldtilecfg reads it");
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = kAmxRowBytes;
        config.rows[i] = kAmxRows;
    }
    // GCC 12's _tile_loadconfig names 8 of the 64 bytes as its input and lets the stores to the
    // others be dropped.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}
BW_INLINE void release_tiles() { _tile_release(); }
// The intrinsics are macros that want a literal tile number.
#define BW_EACH_TILE(action) \
    if constexpr (tile == 0) action(0); \
    if constexpr (tile == 1) action(1); \
    if constexpr (tile == 2) action(2); \
    if constexpr (tile == 3) action(3); \
    if constexpr (tile == 4) action(4); \
    if constexpr (tile == 5) action(5); \
    if constexpr (tile == 6) action(6); \
    if constexpr (tile == 7) action(7)
template <int tile>
BW_INLINE void zero_tile() {
#define BW_ZERO(n) _tile_zero(n)
    BW_EACH_TILE(BW_ZERO);
#undef BW_ZERO
}
template <int tile>
BW_INLINE void load_tile(const void* p, size_t stride) {
#define BW_LOAD(n) _tile_loadd(n, p, stride)
    BW_EACH_TILE(BW_LOAD);
#undef BW_LOAD
}
template <int tile>
BW_INLINE void store_tile(int32_t* p) {
#define BW_STORE(n) _tile_stored(n, p, kAmxRowBytes)
    BW_EACH_TILE(BW_STORE);
#undef BW_STORE
}
#undef BW_EACH_TILE
// Signed activations in tile a, unsigned codes in tile b.
template <int sum, int a, int b>
BW_INLINE void multiply_tiles() {
    static_assert(a == 4 || a == 5, "activations are in tiles 4 and 5");
    static_assert(b == 6 || b == 7, "codes are in tiles 6 and 7");
    if constexpr (sum == 0 && a == 4 && b == 6) _tile_dpbsud(0, 4, 6);
    if constexpr (sum == 1 && a == 4 && b == 7) _tile_dpbsud(1, 4, 7);
    if constexpr (sum == 2 && a == 5 && b == 6) _tile_dpbsud(2, 5, 6);
    if constexpr (sum == 3 && a == 5 && b == 7) _tile_dpbsud(3, 5, 7);
}

#endif

}  // namespace BITWATT_ISA
}  // namespace bitwatt

#endif
