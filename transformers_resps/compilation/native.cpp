// Operators for bfloat16 with AVX512-BF16, with or without AMX; weights may have 8 or 4 bits (with AVX512-VBMI).
// native.py says what they compute, and has packaged code call them. kernels.py compiles them, times and tests them.
// From `tiles_from` rows on, AMX's tiles multiply, if the process may use them. A row's bits do not depend on the other
// rows, but tiles give other bits than vectors.

#pragma GCC push_options
#pragma GCC optimize("O3")
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <unistd.h>

extern "C" {

#define RESPS_INLINE static inline __attribute__((always_inline))

enum {
    LANES = 16,  // floats in a vector; pairs of weights in a cache line of 64 bytes
    SUMS = 24,  // sums in vector registers at the same time; together with the factors they fill all registers
    NARROW = 2,  // vectors in a block
    BLOCK = NARROW * LANES,  // outputs whose weights are stored together
    BLOCK_ROWS = SUMS / NARROW,  // rows that are multiplied with a block at the same time
    WIDE = 4,  // vectors in a tile
    TILE = WIDE * LANES,  // keys that are read together
    TILE_ROWS = SUMS / WIDE,  // queries that attend to a tile at the same time
    AHEAD = 96 * LANES * 2,  // distance of the weights to prefetch from those in use: 6 KiB
    LINES = 16,  // lines of 64 bytes in an AMX tile: rows, or pairs of weights
    DEEP = 2 * LINES,  // inputs in one product of AMX tiles
    TILED_ROWS = 4 * LINES,  // rows that tiles multiply with weights while these are in a near cache
    CHUNK = 4 * DEEP,  // inputs whose codes are decoded together for tiles
    CODE_LINE = 64,  // bytes in a line of codes
    AHEAD_LINES = 96,  // distance of the lines to prefetch from those in use
};

typedef uint16_t Bf16;

RESPS_INLINE int64_t resps_least(int64_t one, int64_t other) { return one < other ? one : other; }

RESPS_INLINE __mmask16 resps_lanes(int64_t left) { return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

RESPS_INLINE __m512 resps_wide(__m256i read) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read), 16));
}

RESPS_INLINE __m512 resps_rounded(__m512 values) { return resps_wide((__m256i)_mm512_cvtneps_pbh(values)); }

// e to the power of numbers that are at most 0, by a polynomial of degree 5 (relative error below 3e-6).
RESPS_INLINE __m512 resps_exp(__m512 power) {
    const __m512 two = _mm512_mul_ps(_mm512_max_ps(power, _mm512_set1_ps(-200)), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(two, 0), rest = _mm512_sub_ps(two, whole);
    __m512 sum = _mm512_set1_ps(1.33335581e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.61812911e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.55041087e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40226507e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93147181e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1));
    return _mm512_scalef_ps(sum, whole);
}

// Adds the products of `count` rows with a block [pairs, vectors * LANES, 2] to sums [count, vectors]. Each pair also
// prefetches `fetched` lines, from `next` on. These numbers are constants wherever this is inlined. A sum is computed
// in the order of the pairs, so its bits do not depend on the other rows.
RESPS_INLINE void resps_multiply(
    __m512* sums, const int count, const int vectors, const Bf16* rows, int64_t stride, const Bf16* block,
    int64_t pairs, const Bf16* next, const int fetched) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh read[WIDE];
        for (int v = 0; v < vectors; ++v) {
            // into the L2 cache: L1 is too small
            if (v < fetched) __builtin_prefetch(next + (pair * fetched + v) * LANES * 2, 0, 2);
            read[v] = (__m512bh)_mm512_loadu_si512(block + (pair * vectors + v) * LANES * 2);
        }
        for (int i = 0; i < count; ++i) {
            int32_t two;
            __builtin_memcpy(&two, rows + i * stride + 2 * pair, sizeof two);
            const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
            for (int v = 0; v < vectors; ++v) {
                sums[i * vectors + v] = _mm512_dpbf16_ps(sums[i * vectors + v], inputs, read[v]);
            }
        }
    }
}

// Calls `function` with `count` rows as a constant.
#define RESPS_BY_SIX(function, count, ...)                   \
    switch (count) {                                         \
        case 1: function(1, __VA_ARGS__); break;             \
        case 2: function(2, __VA_ARGS__); break;             \
        case 3: function(3, __VA_ARGS__); break;             \
        case 4: function(4, __VA_ARGS__); break;             \
        case 5: function(5, __VA_ARGS__); break;             \
        default: function(6, __VA_ARGS__);                   \
    }
#define RESPS_BY_TWELVE(function, count, ...)                \
    switch (count) {                                         \
        case 7: function(7, __VA_ARGS__); break;             \
        case 8: function(8, __VA_ARGS__); break;             \
        case 9: function(9, __VA_ARGS__); break;             \
        case 10: function(10, __VA_ARGS__); break;           \
        case 11: function(11, __VA_ARGS__); break;           \
        case 12: function(12, __VA_ARGS__); break;           \
        default: RESPS_BY_SIX(function, count, __VA_ARGS__)  \
    }

// ---- codes of few bits

#pragma GCC push_options
#pragma GCC target("avx512vbmi")

// Lookup tables for codes: the bytes of 128 bf16 numbers, or 16 bf16 numbers twice.
RESPS_INLINE void resps_tables(const Bf16* table, __m512i* tables) {
    if (table) {
        const __m512i numbers = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)table));
        for (int i = 0; i < 4; ++i) tables[i] = numbers;
        return;
    }
    uint8_t bytes[4 * CODE_LINE];
    for (int i = 0; i < 2 * CODE_LINE; ++i) {
        const float value = (float)i + 0.5f;
        uint32_t bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        bytes[i] = (uint8_t)(bits >> 16), bytes[2 * CODE_LINE + i] = (uint8_t)(bits >> 24);
    }
    for (int i = 0; i < 4; ++i) tables[i] = _mm512_loadu_si512(bytes + i * CODE_LINE);
}

// Turns a line of codes into bf16 pairs: [2, LANES, 2] for 8 bits, [2, 2, LANES, 2] for 4 bits. A code of 8 bits has
// a sign bit and 7 bits for 0.5 to 127.5: so a number needs two lookups in 128 bytes.
RESPS_INLINE void resps_decode(const int width, const uint8_t* line, const __m512i* tables, __m512i* numbers) {
    const __m512i codes = _mm512_loadu_si512(line);
    if (width == 8) {
        const __m512i low = _mm512_permutex2var_epi8(tables[0], codes, tables[1]);
        const __m512i high = _mm512_permutex2var_epi8(tables[2], codes, tables[3]);
        const __m512i sign = _mm512_set1_epi8((char)0x80);
        const __m512i both = _mm512_ternarylogic_epi32(codes, sign, high, 0xea);  // codes & sign | high
        numbers[0] = _mm512_unpacklo_epi8(low, both);
        numbers[1] = _mm512_unpackhi_epi8(low, both);
        return;
    }
    numbers[0] = _mm512_permutexvar_epi16(codes, tables[0]);
    numbers[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), tables[0]);
    numbers[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), tables[0]);
    numbers[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), tables[0]);
}

#pragma GCC pop_options

// ---- tiles

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512vbmi")  // a processor with AMX has all of them

// AMX tiles are registers of 16 lines of 64 bytes. A product adds rows [lines, 16 pairs] times weights [16 pairs, 16,
// 2], in the layout of a block, to sums [lines, 16]. Tests emulate the tiles.
#ifdef RESPS_EMULATES_TILES

typedef struct { char lines[8][LINES][64]; } RespsTiles;
static __thread RespsTiles resps_tiles;
static __thread int resps_tile_lines[8];

static int resps_has_tiles(void) { return 1; }
static void resps_set_tiles(const uint8_t* lines) { for (int i = 0; i < 8; ++i) resps_tile_lines[i] = lines[i]; }
static void resps_tile_load(int tile, const void* start, int64_t stride) {
    for (int i = 0; i < resps_tile_lines[tile]; ++i) {
        __builtin_memcpy(resps_tiles.lines[tile][i], (const char*)start + i * stride, 64);
    }
}
static void resps_tile_store(int tile, void* start, int64_t stride) {
    for (int i = 0; i < resps_tile_lines[tile]; ++i) {
        __builtin_memcpy((char*)start + i * stride, resps_tiles.lines[tile][i], 64);
    }
}
static float resps_tile_value(int tile, int line, int place) {
    const uint32_t bits = (uint32_t)((const Bf16*)resps_tiles.lines[tile][line])[place] << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
static void resps_tile_multiply(int sums, int rows, int weights) {
    for (int i = 0; i < resps_tile_lines[sums]; ++i) {
        for (int column = 0; column < LANES; ++column) {
            float* sum = (float*)resps_tiles.lines[sums][i] + column;
            for (int k = 0; k < 2 * resps_tile_lines[weights]; ++k) {
                *sum += resps_tile_value(rows, i, k) * resps_tile_value(weights, k / 2, 2 * column + k % 2);
            }
        }
    }
}
static void resps_tile_zero(int tile) { __builtin_memset(resps_tiles.lines[tile], 0, sizeof resps_tiles.lines[tile]); }
static void resps_tile_release(void) {}

#else

enum { TILE_DATA = 18, ASK_FOR_STATE = 0x1023 };  // of Linux's `arch_prctl`

// A Linux process may use tiles after it has asked for them. It may ask again, for instance if oneDNN has asked before.
static int resps_has_tiles(void) {
    static int has = -1;  // no lock: threads that ask at the same time get the same answer
    if (has < 0) has = __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
    return has;
}

// Configures the tiles of this thread, in each call: we release them at its end, and oneDNN checks before each use.
static void resps_set_tiles(const uint8_t* lines) {
    struct __attribute__((packed)) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t lines[16]; } set;
    __builtin_memset(&set, 0, sizeof set);
    set.palette = 1;
    for (int i = 0; i < 8; ++i) set.bytes[i] = 64, set.lines[i] = lines[i];
    __asm__ volatile("" : : "r"(&set) : "memory");  // GCC does not know how many bytes are read
    _tile_loadconfig(&set);
}

#define resps_tile_load _tile_loadd
#define resps_tile_store _tile_stored
#define resps_tile_multiply _tile_dpbf16ps
#define resps_tile_zero _tile_zero
#define resps_tile_release _tile_release

#endif

// GCC does not know which memory tile loads read: without this barrier it may delay writes until after the loads.
#define RESPS_WRITTEN __asm__ volatile("" : : : "memory")

static __thread int resps_set;  // how many lines this thread's tiles have; 0 for none

// Tiles 0, 1 and 2, 3 take sums of two groups of rows, 4 and 5 the rows, 6 and 7 weights.
static void resps_prepare_tiles(int first, int second) {
    const int wanted = first * 32 + second;
    if (resps_set == wanted) return;
    const uint8_t one = (uint8_t)first, other = (uint8_t)(second ? second : 1);
    const uint8_t lines[8] = {one, one, other, other, one, other, LINES, LINES};
    resps_set_tiles(lines);
    resps_set = wanted;
}

static void resps_release_tiles(void) {
    if (resps_set) resps_tile_release();
    resps_set = 0;
}

// What tiles read meanwhile from memory: weights to prefetch, or codes to decode.
typedef struct {
    const uint8_t* next;
    const __m512i* tables;  // of codes, see `resps_tables`
    Bf16* weights;  // where decoded weights are written
    int64_t left;  // number of inputs whose codes are to be decoded
} RespsAhead;

// Prefetches the weights of DEEP inputs, if they have 16 bits, or decodes those of 8 or 4 bits while any are left.
RESPS_INLINE void resps_read_ahead(const int bits, RespsAhead* ahead) {
    if (bits == 16) {
        // into the L1 cache, a few KiB ahead: loads of tiles wait for it, and memory does not
        for (int line = 0; line < DEEP; ++line, ahead->next += CODE_LINE) __builtin_prefetch(ahead->next, 0, 3);
        return;
    }
    if (!ahead->left) return;
    const int vectors = 8 / bits * NARROW;
    const __m512i tables[4] = {ahead->tables[0], ahead->tables[1], ahead->tables[2], ahead->tables[3]};
    const uint8_t* codes = ahead->next;
    Bf16* weights = ahead->weights;
    for (int line = 0; line < DEEP * bits / 16; ++line, codes += CODE_LINE, weights += vectors * 2 * LANES) {
        __m512i numbers[2 * NARROW];
        __builtin_prefetch(codes + AHEAD_LINES * CODE_LINE, 0, 2);
        resps_decode(bits, codes, tables, numbers);
#pragma GCC unroll 4  // in a loop GCC calls memcpy, which takes four times as long
        for (int v = 0; v < vectors; ++v) _mm512_store_si512(weights + v * 2 * LANES, numbers[v]);
    }
    ahead->next = codes, ahead->weights = weights, ahead->left -= DEEP;
}

// Writes the products of up to 32 rows with a block of weights [depth / 2, BLOCK, 2] to `sums` [rows, BLOCK], or adds
// them with `adds`. Meanwhile reads ahead weights of `bits` bits, or nothing if these are 0.
RESPS_INLINE void resps_multiply_block(
    const int bits, float* sums, int adds, int count, const Bf16* rows, int64_t stride, int64_t depth,
    const Bf16* weights, RespsAhead* ahead) {
    const int first = count < LINES ? count : LINES, second = count - first;
    float* others = sums + LINES * BLOCK;
    resps_prepare_tiles(first, second);
    RESPS_WRITTEN;
    if (adds) {
        resps_tile_load(0, sums, BLOCK * sizeof *sums);
        resps_tile_load(1, sums + LANES, BLOCK * sizeof *sums);
        if (second) {
            resps_tile_load(2, others, BLOCK * sizeof *sums);
            resps_tile_load(3, others + LANES, BLOCK * sizeof *sums);
        }
    } else {
        resps_tile_zero(0);
        resps_tile_zero(1);
        resps_tile_zero(2);
        resps_tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += DEEP) {
        const Bf16* read = weights + k * BLOCK;
        if (bits) resps_read_ahead(bits, ahead);
        resps_tile_load(4, rows + k, stride * sizeof *rows);
        resps_tile_load(6, read, 2 * BLOCK * sizeof *read);
        resps_tile_multiply(0, 4, 6);
        resps_tile_load(7, read + 2 * LANES, 2 * BLOCK * sizeof *read);
        resps_tile_multiply(1, 4, 7);
        if (second) {
            resps_tile_load(5, rows + LINES * stride + k, stride * sizeof *rows);
            resps_tile_multiply(2, 5, 6);
            resps_tile_multiply(3, 5, 7);
        }
    }
    resps_tile_store(0, sums, BLOCK * sizeof *sums);
    resps_tile_store(1, sums + LANES, BLOCK * sizeof *sums);
    if (second) {
        resps_tile_store(2, others, BLOCK * sizeof *sums);
        resps_tile_store(3, others + LANES, BLOCK * sizeof *sums);
    }
    RESPS_WRITTEN;
}

// Adds the products of up to 16 rows [count, depth] with a block [depth / 2, TILE, 2] to `sums` [count, TILE].
static void resps_add_products(
    float* sums, int64_t written, int count, const Bf16* rows, int64_t stride, const Bf16* block, int64_t depth) {
    resps_prepare_tiles(count, count);
    RESPS_WRITTEN;
    resps_tile_load(0, sums, written * sizeof *sums);
    resps_tile_load(1, sums + LANES, written * sizeof *sums);
    resps_tile_load(2, sums + 2 * LANES, written * sizeof *sums);
    resps_tile_load(3, sums + 3 * LANES, written * sizeof *sums);
    for (int64_t k = 0; k < depth; k += DEEP) {
        const Bf16* read = block + k * TILE;
        resps_tile_load(4, rows + k, stride * sizeof *rows);
        resps_tile_load(6, read, 2 * TILE * sizeof *read);
        resps_tile_load(7, read + 2 * LANES, 2 * TILE * sizeof *read);
        resps_tile_multiply(0, 4, 6);
        resps_tile_multiply(1, 4, 7);
        resps_tile_load(6, read + 4 * LANES, 2 * TILE * sizeof *read);
        resps_tile_load(7, read + 6 * LANES, 2 * TILE * sizeof *read);
        resps_tile_multiply(2, 4, 6);
        resps_tile_multiply(3, 4, 7);
    }
    resps_tile_store(0, sums, written * sizeof *sums);
    resps_tile_store(1, sums + LANES, written * sizeof *sums);
    resps_tile_store(2, sums + 2 * LANES, written * sizeof *sums);
    resps_tile_store(3, sums + 3 * LANES, written * sizeof *sums);
}

#pragma GCC pop_options

// ---- linear layers

// Weights in few bits: a weight is its code's value times the scale, plus the offset, of its output and group of inputs.
typedef struct {
    const uint8_t* codes;  // [blocks, lines, 64]; a line has 32 outputs' codes for 2 inputs (8 bits) or 4 (4 bits)
    const float *scales, *offsets;  // [blocks, groups, BLOCK]; offsets may be null
    const Bf16* table;  // numbers of the 16 codes of 4 bits; null for 8 bits, whose codes stand for -127.5 to 127.5
    int64_t groups;
} RespsFewBits;

// Where a layer's queries, keys and values are written. Blocks of queries and keys have 16 numbers of a head's first
// half and 16 of its second half, which rotary embedding turns.
typedef struct {
    const Bf16 *cosines, *sines;  // [rows, width]
    const int64_t* slots;  // place of each row's key and value
    Bf16 *queries, *keys, *values;  // `queries` is [rows, heads, width]
    int64_t heads, key_heads, width, key_head, key_place, value_head, value_place;  // the last four are strides
} RespsRotated;

typedef struct {
    const Bf16 *rows, *packed, *bias;
    Bf16* result;
    int64_t count, depth, width;
    int is_gated;  // whether a block's first half has weights of the gate, and its second half those that are gated
    int64_t tiles_from;  // least number of rows for tiles
    RespsFewBits bits;  // in place of `packed`, which then is null
    const Bf16* added;  // [count, width], added to the rounded result; or null
    const RespsRotated* rotated;  // in place of `result`, which then is null
} RespsLinear;

// silu(gate) * up, rounded as PyTorch does after each operator.
RESPS_INLINE __m512 resps_gated(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1), input = resps_rounded(gate);
    const __m512 small = resps_exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(input)));
    const __mmask16 is_negative = _mm512_cmp_ps_mask(input, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 share = _mm512_div_ps(_mm512_mask_blend_ps(is_negative, one, small), _mm512_add_ps(one, small));
    return _mm512_mul_ps(resps_rounded(_mm512_mul_ps(input, share)), resps_rounded(up));
}

RESPS_INLINE __m512 resps_read_wide(const Bf16* place) {
    return resps_wide(_mm256_loadu_si256((const __m256i*)place));
}

RESPS_INLINE void resps_write_rounded(Bf16* place, __m512 values) {
    _mm256_storeu_si256((__m256i*)place, (__m256i)_mm512_cvtneps_pbh(values));
}

static void resps_write_rotated(const RespsLinear* of, int64_t row, int64_t block, const __m512* sums) {
    const RespsRotated* to = of->rotated;
    const int64_t half = to->width / 2, rotated = to->heads + to->key_heads;
    int64_t head = block * LANES / half, place = block * LANES % half, second = half;
    if (head >= rotated) head = block * BLOCK / to->width, place = block * BLOCK % to->width, second = LANES;
    __m512 one = sums[0], other = sums[1];
    if (of->bias) {
        const Bf16* bias = of->bias + head * to->width + place;
        one = _mm512_add_ps(one, resps_read_wide(bias)), other = _mm512_add_ps(other, resps_read_wide(bias + second));
    }
    Bf16* result = to->values + (head - rotated) * to->value_head + to->slots[row] * to->value_place;
    if (head < rotated) {
        const Bf16 *cosines = to->cosines + row * to->width + place, *sines = to->sines + row * to->width + place;
        const __m512 first = resps_rounded(one), last = resps_rounded(other);  // as PyTorch rounds, after each operator
        const __m512 across = resps_rounded(_mm512_mul_ps(last, resps_read_wide(sines)));
        one = _mm512_sub_ps(resps_rounded(_mm512_mul_ps(first, resps_read_wide(cosines))), across);
        const __m512 along = resps_rounded(_mm512_mul_ps(last, resps_read_wide(cosines + half)));
        other = _mm512_add_ps(along, resps_rounded(_mm512_mul_ps(first, resps_read_wide(sines + half))));
        result = to->keys + (head - to->heads) * to->key_head + to->slots[row] * to->key_place;
        if (head < to->heads) result = to->queries + (row * to->heads + head) * to->width;
    }
    resps_write_rounded(result + place, one);
    resps_write_rounded(result + place + second, other);
}

// Writes the results for one row and one block.
RESPS_INLINE void resps_write(const RespsLinear* of, int64_t row, int64_t block, const __m512* sums) {
    if (of->rotated) {
        resps_write_rotated(of, row, block, sums);
        return;
    }
    if (of->is_gated) {
        resps_write_rounded(of->result + row * of->width + block * LANES, resps_gated(sums[0], sums[1]));
        return;
    }
    const int64_t first = block * BLOCK;
    for (int v = 0; v < NARROW; ++v) {
        const __mmask16 written = resps_lanes(of->width - first - v * LANES);
        __m512 sum = sums[v];
        if (of->bias) {
            sum = _mm512_add_ps(sum, resps_wide(_mm256_maskz_loadu_epi16(written, of->bias + first + v * LANES)));
        }
        const int64_t place = row * of->width + first + v * LANES;
        if (of->added) {
            const __m512 added = resps_wide(_mm256_maskz_loadu_epi16(written, of->added + place));
            sum = _mm512_add_ps(resps_rounded(sum), added);
        }
        Bf16* result = of->result + place;
        _mm256_mask_storeu_epi16(result, written, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

RESPS_INLINE void resps_linear_rows(
    const int count, const RespsLinear* of, int64_t row, int64_t block, const Bf16* next, const int fetched) {
    __m512 sums[SUMS];
    for (int i = 0; i < count * NARROW; ++i) sums[i] = _mm512_setzero_ps();
    const Bf16* weights = of->packed + block * BLOCK * of->depth;
    resps_multiply(sums, count, NARROW, of->rows + row * of->depth, of->depth, weights, of->depth / 2, next, fetched);
    for (int i = 0; i < count; ++i) resps_write(of, row + i, block, sums + i * NARROW);
}

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512vbmi")

// Reading a block from memory takes as long as multiplying it with two tiles of rows, so the first two prefetch it, and
// as much of the next block while their results are written.
static void resps_linear_tiles(const RespsLinear* of, int64_t block) {
    __m512 sums[2 * LINES * NARROW];
    const Bf16* weights = of->packed + block * BLOCK * of->depth;
    RespsAhead ahead = {(const uint8_t*)(weights + 3 * DEEP * BLOCK), 0, 0, 0};
    for (int64_t row = 0; row < of->count; row += 2 * LINES) {
        const int count = (int)resps_least(of->count - row, 2 * LINES);
        const Bf16* rows = of->rows + row * of->depth;
        if (row) resps_multiply_block(0, (float*)sums, 0, count, rows, of->depth, of->depth, weights, 0);
        else resps_multiply_block(16, (float*)sums, 0, count, rows, of->depth, of->depth, weights, &ahead);
        for (int i = 0; i < count; ++i) {
            for (int line = 0; line < 2 && !row; ++line, ahead.next += CODE_LINE) __builtin_prefetch(ahead.next, 0, 2);
            resps_write(of, row + i, block, sums + i * NARROW);
        }
    }
}

#pragma GCC pop_options

// A block stays in a near cache while groups of rows are multiplied with it. Reading a block from memory takes as long
// as multiplying it with twelve to twenty rows, so memory must not idle: the first two groups prefetch one half each of
// the next block, and a single group prefetches weights a few KiB ahead.
static void resps_linear_vectors(const RespsLinear* of, int64_t block) {
    const int64_t groups = (of->count + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const Bf16* weights = of->packed + block * BLOCK * of->depth;
    for (int64_t group = 0; group < groups; ++group) {  // groups have about equally many rows
        const int64_t row = of->count * group / groups;
        const int count = (int)(of->count * (group + 1) / groups - row);
        if (groups == 1) {
            RESPS_BY_TWELVE(resps_linear_rows, count, of, row, block, weights + AHEAD, NARROW)
        } else {
            const Bf16* next = weights + BLOCK * of->depth + (group % NARROW) * LANES * of->depth;
            RESPS_BY_TWELVE(resps_linear_rows, count, of, row, block, next, 1)
        }
    }
}

RESPS_INLINE int64_t resps_blocks_of(const RespsLinear* of) {
    return ((of->is_gated ? 2 * of->width : of->width) + BLOCK - 1) / BLOCK;
}

// The part of `all` pieces of work that this thread of a team does.
typedef struct {
    int64_t first, end;
} RespsSpan;

static RespsSpan resps_span(int64_t all) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const RespsSpan span = {all * thread / threads, all * (thread + 1) / threads};
    return span;
}

RESPS_INLINE int resps_by_tiles(const RespsLinear* of) {
    const int64_t groups = of->packed ? 1 : of->bits.groups;
    return of->count >= of->tiles_from && of->depth / groups % DEEP == 0 && resps_has_tiles();
}

// Computes silu(gate) * up for rows [count, 2 * width] that hold gate and up. The width is a multiple of LANES.
static void resps_gate(const Bf16* both, Bf16* result, int64_t count, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t column = 0; column < width; column += LANES) {
            const Bf16* gate = both + 2 * row * width + column;
            const __m512 gated = resps_gated(resps_read_wide(gate), resps_read_wide(gate + width));
            resps_write_rounded(result + row * width + column, gated);
        }
    }
}

// ---- linear layers with weights in few bits

#pragma GCC push_options
#pragma GCC target("avx512vbmi")

// `resps_multiply` for a block of codes, with the same order of sums.
RESPS_INLINE void resps_multiply_codes(
    __m512* sums, const int count, const int width, const Bf16* rows, int64_t stride, const uint8_t* codes,
    int64_t lines, const __m512i* tables) {
    const int pairs = 8 / width;
    for (int64_t line = 0; line < lines; ++line) {
        __m512i numbers[2 * NARROW];
        __builtin_prefetch(codes + (line + AHEAD_LINES) * CODE_LINE, 0, 2);
        resps_decode(width, codes + line * CODE_LINE, tables, numbers);
        for (int pair = 0; pair < pairs; ++pair) {
            for (int i = 0; i < count; ++i) {
                int32_t two;
                __builtin_memcpy(&two, rows + i * stride + 2 * (line * pairs + pair), sizeof two);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
                for (int v = 0; v < NARROW; ++v) {
                    const __m512bh read = (__m512bh)numbers[pair * NARROW + v];
                    sums[i * NARROW + v] = _mm512_dpbf16_ps(sums[i * NARROW + v], inputs, read);
                }
            }
        }
    }
}

// The sum of each group of inputs of each row, [count, groups].
static void resps_sum_inputs(const RespsLinear* of, float* sums) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const int64_t inputs = of->depth / of->bits.groups;
    for (int64_t group = 0; group < of->count * of->bits.groups; ++group) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < inputs; k += 2 * LANES) {
            const __mmask32 read = inputs - k < 2 * LANES ? (1u << (inputs - k)) - 1 : 0xffffffffu;
            const __m512i values = _mm512_maskz_loadu_epi16(read, of->rows + group * inputs + k);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)values, ones);
        }
        sums[group] = _mm512_reduce_add_ps(sum);
    }
}

// Adds a group's sums of `count` rows [count, BLOCK] to the totals.
RESPS_INLINE void resps_add_group(
    __m512* totals, const __m512* sums, int count, const RespsLinear* of, int64_t row, int64_t block, int64_t group,
    const float* inputs) {
    const int64_t place = (block * of->bits.groups + group) * BLOCK;
    for (int v = 0; v < NARROW; ++v) {
        const __m512 scale = _mm512_loadu_ps(of->bits.scales + place + v * LANES);
        for (int i = 0; i < count; ++i) {
            totals[i * NARROW + v] = _mm512_fmadd_ps(sums[i * NARROW + v], scale, totals[i * NARROW + v]);
        }
        if (!of->bits.offsets) continue;
        const __m512 offset = _mm512_loadu_ps(of->bits.offsets + place + v * LANES);
        for (int i = 0; i < count; ++i) {
            const __m512 sum = _mm512_set1_ps(inputs[(row + i) * of->bits.groups + group]);
            totals[i * NARROW + v] = _mm512_fmadd_ps(sum, offset, totals[i * NARROW + v]);
        }
    }
}

RESPS_INLINE void resps_few_bits_rows(
    const int count, const RespsLinear* of, int64_t row, int64_t block, const __m512i* tables, const float* inputs) {
    const RespsFewBits* bits = &of->bits;
    const int64_t depth = of->depth / bits->groups, lines = bits->table ? depth / 4 : depth / 2;
    const uint8_t* codes = bits->codes + block * bits->groups * lines * CODE_LINE;
    const Bf16* rows = of->rows + row * of->depth;
    __m512 totals[SUMS], sums[SUMS];
    for (int i = 0; i < count * NARROW; ++i) totals[i] = _mm512_setzero_ps();
    for (int64_t group = 0; group < bits->groups; ++group, rows += depth, codes += lines * CODE_LINE) {
        for (int i = 0; i < count * NARROW; ++i) sums[i] = _mm512_setzero_ps();
        if (bits->table) resps_multiply_codes(sums, count, 4, rows, of->depth, codes, lines, tables);
        else resps_multiply_codes(sums, count, 8, rows, of->depth, codes, lines, tables);
        resps_add_group(totals, sums, count, of, row, block, group, inputs);
    }
    for (int i = 0; i < count; ++i) resps_write(of, row + i, block, totals + i * NARROW);
}

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

// Multiplies up to TILED_ROWS rows, from `row` on, with some blocks. Each chunk of inputs is decoded while tiles multiply
// the chunk before, whose weights are in the L1 cache.
RESPS_INLINE void resps_few_bits_tiles(
    const int width, const RespsLinear* of, int64_t row, RespsSpan span, const __m512i* tables, const float* inputs) {
    const int64_t all = resps_least(of->count - row, TILED_ROWS), depth = of->depth / of->bits.groups;
    const int64_t beginning = resps_least(depth, CHUNK);
    __m512 sums[TILED_ROWS * NARROW], totals[TILED_ROWS * NARROW];
    alignas(CODE_LINE) Bf16 weights[2][CHUNK * BLOCK];
    RespsAhead ahead = {of->bits.codes + span.first * BLOCK * of->depth * width / 8, tables, weights[0], beginning};
    int turn = 0;
    if (span.first == span.end) return;
    while (ahead.left) resps_read_ahead(width, &ahead);
    for (int64_t block = span.first; block < span.end; ++block) {
        for (int i = 0; i < all * NARROW; ++i) totals[i] = _mm512_setzero_ps();
        for (int64_t group = 0; group < of->bits.groups; ++group) {
            const int is_last = block + 1 == span.end && group + 1 == of->bits.groups;
            for (int64_t start = 0; start < depth; start += CHUNK, turn = !turn) {
                const int64_t end = resps_least(depth, start + CHUNK);
                ahead.weights = weights[!turn];
                ahead.left = end < depth ? resps_least(depth - end, CHUNK) : is_last ? 0 : beginning;
                for (int64_t first = 0; first < all; first += 2 * LINES) {
                    const int count = (int)resps_least(all - first, 2 * LINES);
                    const Bf16 *rows = of->rows + (row + first) * of->depth + group * depth + start, *read = weights[turn];
                    float* to = (float*)(sums + first * NARROW);
                    if (first) resps_multiply_block(0, to, start > 0, count, rows, of->depth, end - start, read, 0);
                    else resps_multiply_block(width, to, start > 0, count, rows, of->depth, end - start, read, &ahead);
                    if (end < depth) continue;
                    __m512* added = totals + first * NARROW;
                    resps_add_group(added, sums + first * NARROW, count, of, row + first, block, group, inputs);
                }
                while (ahead.left) resps_read_ahead(width, &ahead);
            }
        }
        for (int i = 0; i < all; ++i) resps_write(of, row + i, block, totals + i * NARROW);
    }
}

static void resps_share_by_tiles(const RespsLinear* of, RespsSpan span, const __m512i* tables, const float* inputs) {
    for (int64_t row = 0; row < of->count; row += TILED_ROWS) {
        if (of->bits.table) resps_few_bits_tiles(4, of, row, span, tables, inputs);
        else resps_few_bits_tiles(8, of, row, span, tables, inputs);
    }
}

#pragma GCC pop_options

// Multiplies this thread's share of the blocks. Codes are decoded for each group of rows, which takes less time than
// storing and loading their weights.
static void resps_share_few_bits(const RespsLinear* of, int by_tiles, float* inputs) {
    const int64_t groups = (of->count + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const RespsSpan span = resps_span(resps_blocks_of(of));
    if (of->bits.offsets) resps_sum_inputs(of, inputs);
    __m512i tables[4];
    resps_tables(of->bits.table, tables);
    if (by_tiles) {
        resps_share_by_tiles(of, span, tables, inputs);
        return;
    }
    for (int64_t block = span.first; block < span.end; ++block) {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = of->count * group / groups;
            const int count = (int)(of->count * (group + 1) / groups - row);
            RESPS_BY_TWELVE(resps_few_bits_rows, count, of, row, block, tables, inputs)
        }
    }
}

#pragma GCC pop_options

RESPS_INLINE int64_t resps_lines(int64_t bytes) { return (bytes + CODE_LINE - 1) / CODE_LINE * CODE_LINE; }

// The bytes of memory that each thread needs for a product.
static int64_t resps_memory(const RespsLinear* of) {
    return resps_lines(of->bits.offsets ? of->count * of->bits.groups * (int64_t)sizeof(float) : 0);
}

// Each thread of a team calls this, and multiplies its share of the blocks.
static void resps_share(const RespsLinear* of, uint8_t* memory) {
    const int by_tiles = resps_by_tiles(of);
    const RespsSpan span = resps_span(resps_blocks_of(of));
    if (!of->packed) {
        resps_share_few_bits(of, by_tiles, (float*)memory);
        return;
    }
    for (int64_t block = span.first; block < span.end; ++block) {
        if (by_tiles) resps_linear_tiles(of, block);
        else resps_linear_vectors(of, block);
    }
}

// Prefetches the first weights of this thread's share, so that memory does not idle before a product.
static void resps_fetch(const RespsLinear* of) {
    const int64_t bytes = of->packed ? (int64_t)sizeof(Bf16) * of->depth : of->bits.table ? of->depth / 2 : of->depth;
    const uint8_t* start = of->packed ? (const uint8_t*)of->packed : of->bits.codes;
    start += resps_span(resps_blocks_of(of)).first * BLOCK * bytes;
    for (int line = 0; line < AHEAD_LINES; ++line) __builtin_prefetch(start + line * CODE_LINE, 0, 2);
}

// Returns 0 if there is no memory.
static int resps_linear(const RespsLinear* of) {
    const int64_t threads = omp_get_max_threads(), own = resps_memory(of);
    uint8_t* memory = own ? (uint8_t*)_mm_malloc(threads * own, CODE_LINE) : 0;
    if (own && !memory) return 0;
#pragma omp parallel num_threads(threads)
    {
        resps_share(of, memory + omp_get_thread_num() * own);
        resps_release_tiles();
    }
    _mm_free(memory);
    return 1;
}

// ---- attention

enum {
    MOST_QUERIES = 60,  // maximum number of queries that read a tile of keys while it is in the L1 cache
    MEMBERS = 4,  // maximum number of nodes in a group, which reads a tile of its own
};

typedef struct {
    const Bf16* start;
    int64_t batch, head, place;  // strides
} RespsStates;

// Groups of nodes of a draft tree. All nodes read the shared keys; a group also reads a tile of keys of its own path.
typedef struct {
    int64_t count;  // number of groups
    const int64_t *nodes, *slots;  // [batch, count, MEMBERS], and the slots of own tiles' keys [batch, count, TILE]
    const Bf16* masks;  // [batch, count * MEMBERS, TILE]
    int64_t masks_batch;  // stride of `masks` between the rows of a batch
    const Bf16* sinks;  // [heads], scores that take a share of each query's weight; or null
} RespsGroups;

typedef struct {
    RespsStates query, key, value, mask;  // without a mask all keys are visible
    RespsGroups own;
    Bf16* result;
    float scale;
    int64_t mask_heads;  // heads of the mask for each key head; 0 if all key heads have the same mask
    int64_t batch, heads, key_heads, count, length, width, value_width;
    // Query heads for each key head, blocks of queries, shared tiles of keys, all tiles of keys, columns of outputs.
    int64_t sharing, blocks, shared, tiles, padded;
    int by_tiles;  // whether AMX's tiles multiply
} RespsAttention;

// Attention of queries to a part of the keys: weighted sums of values, the largest score, and the sum of all weights.
typedef struct {
    float *outputs, *most, *total;
} RespsSeen;

// The data of one thread: queries of heads that share keys, ordered by node.
typedef struct {
    Bf16 *queries, *keys, *values, *weights;
    RespsSeen of_tile, of_all;
    int64_t batch, key_head, node, nodes;  // `node` is the first node, `nodes` the number of nodes
    int count;  // number of queries
    int rows[MOST_QUERIES + 1];  // index of the first query of each node, and the number of all queries
    const Bf16* masks[MOST_QUERIES];  // mask of each query
    const Bf16* shown[MOST_QUERIES];  // the part of each mask for the present tile
    int64_t written[MOST_QUERIES];  // index of each query's result
} RespsQueries;

RESPS_INLINE float resps_exp_of(float power) { return _mm512_cvtss_f32(resps_exp(_mm512_set1_ps(power))); }

// Transposes pairs of numbers: [16 keys, 16 pairs] -> [16 pairs, 16 keys].
RESPS_INLINE void resps_transpose(const __m512i* rows, __m512i* columns) {
    __m512i twos[LANES], fours[LANES];
    for (int i = 0; i < LANES; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int half = 0; half < 2; ++half) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(twos[i + half], twos[i + half + 2]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(twos[i + half], twos[i + half + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
        const __m512i later_even = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512i later_odd = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
        columns[i] = _mm512_shuffle_i32x4(even, later_even, 0x88);
        columns[4 + i] = _mm512_shuffle_i32x4(odd, later_odd, 0x88);
        columns[8 + i] = _mm512_shuffle_i32x4(even, later_even, 0xdd);
        columns[12 + i] = _mm512_shuffle_i32x4(odd, later_odd, 0xdd);
    }
}

// The slot of a tile's key: from `slots` for a path of a tree; without `slots` keys are contiguous.
RESPS_INLINE int64_t resps_slot(const int64_t* slots, int64_t key) { return slots ? slots[key] : key; }

// Rearranges the keys of a tile to a block [width / 2, TILE, 2].
static void resps_pack_keys(
    Bf16* packed, const Bf16* keys, const Bf16* next, const int64_t* slots, int64_t stride, int64_t width,
    int64_t count) {
    for (int v = 0; v < WIDE; ++v) {
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            __m512i rows[LANES], columns[LANES];
            for (int i = 0; i < LANES; ++i) {
                const int64_t key = v * LANES + i;
                __builtin_prefetch(next + key * stride + column, 0, 2);
                rows[i] = _mm512_setzero_si512();
                if (key < count) rows[i] = _mm512_loadu_si512(keys + resps_slot(slots, key) * stride + column);
            }
            resps_transpose(rows, columns);
            for (int i = 0; i < LANES; ++i) {
                _mm512_storeu_si512(packed + ((column / 2 + i) * WIDE + v) * LANES * 2, columns[i]);
            }
        }
    }
}

// Rearranges the values of a tile to blocks [TILE / 2, TILE, 2], one for each TILE columns; the last may have fewer.
static void resps_pack_values(
    Bf16* packed, const Bf16* values, const Bf16* next, const int64_t* slots, int64_t stride, int64_t width,
    int64_t count) {
    static const Bf16 nothing[2 * LANES] = {0};
    __m512i order[2];
    for (int half = 0; half < 2; ++half) {
        Bf16 places[2 * LANES];
        for (int i = 0; i < LANES; ++i) places[2 * i] = half * LANES + i, places[2 * i + 1] = half * LANES + i + 2 * LANES;
        order[half] = _mm512_loadu_si512(places);
    }
    for (int pair = 0; pair < TILE / 2; ++pair) {
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            __builtin_prefetch(next + 2 * pair * stride + column, 0, 2);
            __builtin_prefetch(next + (2 * pair + 1) * stride + column, 0, 2);
            const Bf16 *one = nothing, *other = nothing;
            if (2 * pair < count) one = values + resps_slot(slots, 2 * pair) * stride + column;
            if (2 * pair + 1 < count) other = values + resps_slot(slots, 2 * pair + 1) * stride + column;
            const __m512i left = _mm512_loadu_si512(one), right = _mm512_loadu_si512(other);
            Bf16* block = packed + column / TILE * TILE * TILE + (pair * TILE + column % TILE) * 2;
            for (int half = 0; half < 2; ++half) {
                _mm512_storeu_si512(block + half * LANES * 2, _mm512_permutex2var_epi16(left, order[half], right));
            }
        }
    }
}

// Whether the mask shows any of `count` keys. It hides a key by -inf, by the dtype's minimum or by half of the minimum.
RESPS_INLINE int resps_sees(const Bf16* mask, int64_t count) {
    for (int64_t place = 0; place < count; place += LANES) {
        const __mmask16 read = resps_lanes(count - place);
        const __m512 added = resps_wide(_mm256_maskz_loadu_epi16(read, mask + place));
        if (_mm512_mask_cmp_ps_mask(read, added, _mm512_set1_ps(-1e38f), _CMP_GT_OQ)) return 1;
    }
    return 0;
}

// A hidden key has a score of half the dtype's minimum or less, and so no weight beside a visible key.
#define RESPS_LEAST (-3e38f)

// Computes the softmax weights of some queries for a tile with `keys` keys, from the scores [count, TILE] in `sums`.
RESPS_INLINE void resps_weigh(
    const int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t keys, const __m512* sums) {
    for (int i = 0; i < count; ++i) {
        const Bf16* mask = at->shown[row + i];
        __m512 scores[WIDE], most = _mm512_set1_ps(RESPS_LEAST), total = _mm512_setzero_ps();
        for (int v = 0; v < WIDE; ++v) {
            const __mmask16 read = resps_lanes(keys - v * LANES);
            __m512 added = _mm512_setzero_ps();
            if (mask) added = resps_wide(_mm256_maskz_loadu_epi16(read, mask + v * LANES));
            scores[v] = _mm512_fmadd_ps(sums[i * WIDE + v], _mm512_set1_ps(of->scale), added);
            scores[v] = _mm512_mask_blend_ps(read, _mm512_set1_ps(-__builtin_inff()), scores[v]);
            most = _mm512_max_ps(most, scores[v]);
        }
        const float largest = _mm512_reduce_max_ps(most);
        for (int v = 0; v < WIDE; ++v) {
            const __m512 weights = resps_exp(_mm512_sub_ps(scores[v], _mm512_set1_ps(largest)));
            total = _mm512_add_ps(total, weights);
            _mm256_storeu_si256((__m256i*)(at->weights + i * TILE + v * LANES), (__m256i)_mm512_cvtneps_pbh(weights));
        }
        at->of_tile.most[row + i] = largest;
        at->of_tile.total[row + i] = _mm512_reduce_add_ps(total);
    }
}

RESPS_INLINE void resps_look_at(
    const int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t keys) {
    __m512 sums[SUMS];
    for (int i = 0; i < count * WIDE; ++i) sums[i] = _mm512_setzero_ps();
    resps_multiply(sums, count, WIDE, at->queries + row * of->width, of->width, at->keys, of->width / 2, 0, 0);
    resps_weigh(count, of, at, row, keys, sums);
    for (int64_t column = 0; column < of->padded; column += TILE) {
        float* outputs = at->of_tile.outputs + row * of->padded + column;
        for (int i = 0; i < count * WIDE; ++i) sums[i] = _mm512_setzero_ps();
        resps_multiply(sums, count, WIDE, at->weights, TILE, at->values + column * TILE, TILE / 2, 0, 0);
        for (int i = 0; i < count; ++i) {
            for (int v = 0; v < WIDE; ++v) _mm512_storeu_ps(outputs + i * of->padded + v * LANES, sums[i * WIDE + v]);
        }
    }
}

static void resps_look_by_tiles(int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t keys) {
    __m512 sums[LINES * WIDE];
    for (int i = 0; i < count * WIDE; ++i) sums[i] = _mm512_setzero_ps();
    resps_add_products((float*)sums, TILE, count, at->queries + row * of->width, of->width, at->keys, of->width);
    resps_weigh(count, of, at, row, keys, sums);
    float* outputs = at->of_tile.outputs + row * of->padded;
    __builtin_memset(outputs, 0, count * of->padded * sizeof *outputs);
    for (int64_t column = 0; column < of->padded; column += TILE) {
        resps_add_products(outputs + column, of->padded, count, at->weights, TILE, at->values + column * TILE, TILE);
    }
}

// Lets the queries from `row` to `end` attend to the present tile.
static void resps_look(const RespsAttention* of, const RespsQueries* at, int row, int end, int64_t keys) {
    const int most = of->by_tiles ? LINES : TILE_ROWS, first = row, all = end - row, groups = (all + most - 1) / most;
    for (int group = 0; group < groups; ++group) {
        row = first + all * group / groups;
        const int count = first + all * (group + 1) / groups - row;
        if (of->by_tiles) {
            resps_look_by_tiles(count, of, at, row, keys);
        } else {
            RESPS_BY_SIX(resps_look_at, count, of, at, row, keys)
        }
    }
}

RESPS_INLINE const Bf16* resps_own_mask(const RespsAttention* of, int64_t batch, int64_t member) {
    return of->own.masks + batch * of->own.masks_batch + member * TILE;
}

// Whether a node sees any key in the own tile of a group.
static int resps_asks(const RespsAttention* of, int64_t batch, int64_t node) {
    const int64_t members = of->own.count * MEMBERS;
    for (int64_t member = 0; member < members; ++member) {
        const int is_it = of->own.nodes[batch * members + member] == node;
        if (is_it && resps_sees(resps_own_mask(of, batch, member), TILE)) return 1;
    }
    return 0;
}

// Copies the queries of an item that have a visible key, and writes zeros as the results of its other queries.
static void resps_begin(const RespsAttention* of, RespsQueries* at, int64_t item) {
    const int64_t block = item % of->blocks, every = of->sharing * of->count, first = every * block / of->blocks;
    at->key_head = item / of->blocks % of->key_heads;
    at->batch = item / of->blocks / of->key_heads;
    at->node = first / of->sharing;
    at->count = 0;
    for (int64_t query = first; query < every * (block + 1) / of->blocks; ++query) {
        const int64_t node = query / of->sharing, shared = query % of->sharing;
        const int64_t head = shared + at->key_head * of->sharing;
        const int64_t written = (at->batch * of->count + node) * of->heads + head;
        const Bf16* mask = of->mask.start + at->batch * of->mask.batch + node * of->mask.place +
                           (shared + at->key_head * of->mask_heads) * of->mask.head;
        if (query == first || !shared) at->rows[node - at->node] = at->count;
        at->nodes = node - at->node + 1;
        at->rows[at->nodes] = at->count;
        if (of->mask.start && !resps_sees(mask, of->length) && !resps_asks(of, at->batch, node)) {
            __builtin_memset(of->result + written * of->value_width, 0, of->value_width * sizeof *of->result);
            continue;
        }
        const Bf16* read =
            of->query.start + at->batch * of->query.batch + head * of->query.head + node * of->query.place;
        __builtin_memcpy(at->queries + at->count * of->width, read, of->width * sizeof *read);
        at->masks[at->count] = of->mask.start ? mask : 0;
        at->written[at->count++] = written;
        at->rows[at->nodes] = at->count;
    }
}

// The first of the keys or values that the queries of an item read.
RESPS_INLINE const Bf16* resps_start(const RespsAttention* of, const RespsStates* states, int64_t item) {
    const int64_t head = item / of->blocks;
    return states->start + head / of->key_heads * states->batch + head % of->key_heads * states->head;
}

// Attends to a shared tile, prefetching the next one; returns whether any query sees a key of the tile.
static int resps_shared_tile(const RespsAttention* of, RespsQueries* at, int64_t item, int64_t tile) {
    const int64_t key = tile * TILE, keys = resps_least(of->length - key, TILE);
    int is_seen = !of->mask.start;
    for (int row = 0; row < at->count; ++row) {
        at->shown[row] = at->masks[row] ? at->masks[row] + key : 0;
        is_seen = is_seen || resps_sees(at->shown[row], keys);
    }
    if (!is_seen) return 0;
    const Bf16* starts[2][2];
    for (int part = 0; part < 2; ++part) {
        const RespsStates* states = part ? &of->value : &of->key;
        const int is_last = tile + 1 == of->shared;
        starts[part][0] = resps_start(of, states, item) + key * states->place;
        starts[part][1] = is_last ? resps_start(of, states, item + 1) : starts[part][0] + TILE * states->place;
    }
    resps_pack_keys(at->keys, starts[0][0], starts[0][1], 0, of->key.place, of->width, keys);
    resps_pack_values(at->values, starts[1][0], starts[1][1], 0, of->value.place, of->value_width, keys);
    resps_look(of, at, 0, at->count, keys);
    return 1;
}

// Lets the nodes of a group attend to the group's own tile.
static void resps_own_tile(const RespsAttention* of, RespsQueries* at, int64_t item, int64_t group) {
    int first[MEMBERS], end[MEMBERS], is_seen = 0;
    for (int i = 0; i < MEMBERS; ++i) {
        const int64_t member = group * MEMBERS + i;
        const int64_t node = of->own.nodes[at->batch * of->own.count * MEMBERS + member] - at->node;
        const Bf16* mask = resps_own_mask(of, at->batch, member);
        first[i] = end[i] = 0;
        if (node < 0 || node >= at->nodes || !resps_sees(mask, TILE)) continue;
        first[i] = at->rows[node], end[i] = at->rows[node + 1];
        for (int row = first[i]; row < end[i]; ++row) at->shown[row] = mask;
        is_seen |= end[i] > first[i];
    }
    if (!is_seen) return;
    const int64_t* slots = of->own.slots + (at->batch * of->own.count + group) * TILE;
    const Bf16 *keys = resps_start(of, &of->key, item), *values = resps_start(of, &of->value, item);
    resps_pack_keys(at->keys, keys, keys, slots, of->key.place, of->width, TILE);
    resps_pack_values(at->values, values, values, slots, of->value.place, of->value_width, TILE);
    for (int i = 0; i < MEMBERS;) {
        const int row = first[i];
        int last = end[i++];
        for (; i < MEMBERS && first[i] == last && end[i] > last; ++i) last = end[i];
        resps_look(of, at, row, last, TILE);
    }
}

// Merges the attention to one tile, `seen`, into the attention to all tiles before: softmax in one pass over the keys
// (Milakov and Gimelshein 2018, section 3.1), always in the same order of tiles.
static void resps_merge(const RespsAttention* of, const RespsQueries* at, const RespsSeen* seen) {
    const RespsSeen* all = &at->of_all;
    for (int first = 0; first < at->count; first += LANES) {
        const __mmask16 lanes = resps_lanes(at->count - first);
        const __m512 totals = _mm512_maskz_loadu_ps(lanes, seen->total + first);
        const __mmask16 new_lanes = _mm512_cmp_ps_mask(totals, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 before = _mm512_maskz_loadu_ps(lanes, all->most + first);
        const __m512 after = _mm512_mask_loadu_ps(before, new_lanes, seen->most + first), most = _mm512_max_ps(before, after);
        const __m512 own = resps_exp(_mm512_sub_ps(before, most)), others = resps_exp(_mm512_sub_ps(after, most));
        const __m512 total = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, all->total + first), own);
        _mm512_mask_storeu_ps(all->most + first, lanes, most);
        _mm512_mask_storeu_ps(all->total + first, new_lanes, _mm512_fmadd_ps(totals, others, total));
        float kept[LANES], added[LANES];
        _mm512_storeu_ps(kept, own);
        _mm512_storeu_ps(added, others);
        for (int i = 0; i < LANES && first + i < at->count; ++i) {
            if (!(new_lanes >> i & 1)) continue;
            float* output = all->outputs + (first + i) * of->padded;
            const float* outputs = seen->outputs + (first + i) * of->padded;
            const __m512 share = _mm512_set1_ps(kept[i]), other = _mm512_set1_ps(added[i]);
            for (int64_t column = 0; column < of->padded; column += LANES) {
                const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(outputs + column), other);
                _mm512_storeu_ps(output + column, _mm512_fmadd_ps(_mm512_loadu_ps(output + column), share, sum));
            }
        }
    }
}

static void resps_begin_all(const RespsAttention* of, const RespsQueries* at) {
    for (int row = 0; row < at->count; ++row) {
        const Bf16* sinks = of->own.sinks;
        const int64_t head = at->written[row] % of->heads;
        at->of_all.most[row] = sinks ? _mm512_cvtss_f32(resps_wide(_mm256_set1_epi16((short)sinks[head]))) : RESPS_LEAST;
        at->of_all.total[row] = sinks ? 1 : 0;
    }
    __builtin_memset(at->of_all.outputs, 0, at->count * of->padded * sizeof *at->of_all.outputs);
}

// Writes the results of queries after their last tile.
static void resps_end(const RespsAttention* of, const RespsQueries* at) {
    for (int row = 0; row < at->count; ++row) {
        Bf16* result = of->result + at->written[row] * of->value_width;
        const __m512 share = _mm512_set1_ps(at->of_all.total[row] > 0 ? 1 / at->of_all.total[row] : 0);
        for (int64_t column = 0; column < of->value_width; column += LANES) {
            const __m512 output = _mm512_mul_ps(_mm512_loadu_ps(at->of_all.outputs + row * of->padded + column), share);
            _mm256_storeu_si256((__m256i*)(result + column), (__m256i)_mm512_cvtneps_pbh(output));
        }
    }
}

RESPS_INLINE RespsSeen resps_seen_at(float* place, int64_t rows, int64_t padded) {
    const RespsSeen seen = {place, place + rows * padded, place + rows * (padded + 1)};
    return seen;
}

// The number of floats of memory for attention: of each thread, and of tiles of an item that threads share.
typedef struct {
    int64_t rows, seen, own, kept;
} RespsRoom;

static RespsRoom resps_room(const RespsAttention* of, int64_t threads) {
    RespsRoom room;
    room.rows = resps_least(of->sharing * of->count, MOST_QUERIES);
    room.seen = (room.rows * (of->padded + 2) + LANES - 1) / LANES * LANES;
    const int64_t halves = (room.rows * of->width + TILE * (of->width + of->padded) + LINES * TILE) / 2;
    room.own = 2 * room.seen + (halves + LANES - 1) / LANES * LANES;
    room.kept = resps_least(threads - 1, of->batch * of->key_heads * of->blocks) * of->tiles * room.seen;
    return room;
}

// Each thread of a team calls this. An item is one block of queries of one key head in one row, with all its tiles. The
// tiles of all items, in order, are split evenly among the threads. Results of tiles are merged in the order of the
// tiles, whichever thread computed them, so the number of threads changes no bit. If several threads share an item,
// they keep the result of each tile, and the first of these threads merges all of them.
static void resps_share_attention(const RespsAttention* of, const RespsRoom room, float* memory, int64_t threads) {
    const int64_t rows = room.rows, seen = room.seen, items = of->batch * of->key_heads * of->blocks;
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads(), tiles = items * of->tiles;
    const int64_t first = resps_span(tiles).first, last = resps_span(tiles).end;
    float *place = memory + thread * room.own, *shared = 0;
    RespsQueries at;
    const RespsSeen scratch = resps_seen_at(place, rows, of->padded);
    at.of_all = resps_seen_at(place + seen, rows, of->padded);
    at.queries = (Bf16*)(place + 2 * seen);
    at.keys = at.queries + rows * of->width;
    at.values = at.keys + TILE * of->width;
    at.weights = at.values + TILE * of->padded;
    if (of->value_width < of->padded) __builtin_memset(at.values, 0, TILE * of->padded * sizeof *at.values);
    for (int64_t tile = first; tile < last;) {
        const int64_t item = tile / of->tiles, start = item * of->tiles, end = resps_least(start + of->tiles, last);
        const int64_t owner = ((start + 1) * count - 1) / tiles;  // the first thread of this item
        const int is_whole = tile == start && end == start + of->tiles;
        shared = is_whole ? 0 : memory + threads * room.own + resps_least(owner, item) * of->tiles * seen;
        resps_begin(of, &at, item);
        if (is_whole) resps_begin_all(of, &at);
        int is_first = is_whole && !of->own.sinks;  // the first tile needs no merging
        for (; tile < end; ++tile) {
            const int is_shared = tile - start < of->shared, is_all = is_first && is_shared;
            at.of_tile = is_whole ? scratch : resps_seen_at(shared + (tile - start) * seen, rows, of->padded);
            if (is_all) at.of_tile = at.of_all;
            for (int row = 0; row < at.count; ++row) at.of_tile.total[row] = 0;
            if (!is_shared) resps_own_tile(of, &at, item, tile - start - of->shared);
            else if (resps_shared_tile(of, &at, item, tile - start)) is_first = 0;
            if (is_whole && !is_all) resps_merge(of, &at, &scratch);
        }
        if (is_whole) resps_end(of, &at);
    }
    if (items % count == 0) return;  // no thread shares an item
#pragma omp barrier
    const int64_t start = last > first ? (last - 1) / of->tiles * of->tiles : 0;
    if (shared && first <= start && last < start + of->tiles) {
        resps_begin_all(of, &at);
        for (int64_t tile = 0; tile < of->tiles; ++tile) {
            const RespsSeen part = resps_seen_at(shared + tile * seen, rows, of->padded);
            resps_merge(of, &at, &part);
        }
        resps_end(of, &at);
    }
}

// The number of blocks of queries: the fewest possible, or a few more if items then divide evenly among the threads.
// Threads that share an item must merge its tiles, which takes as long as attending to them.
static int64_t resps_blocks(const RespsAttention* of) {
    const int64_t rows = of->sharing * of->count, threads = omp_get_max_threads(), items = of->batch * of->key_heads;
    const int64_t fewest = (rows + MOST_QUERIES - 1) / MOST_QUERIES;
    for (int64_t blocks = fewest; blocks < fewest + threads && rows >= blocks * TILE_ROWS; ++blocks) {
        if (items * blocks % threads == 0) return blocks;
    }
    return fewest;
}

static void resps_plan(RespsAttention* of, int64_t tiles_from) {
    of->sharing = of->heads / of->key_heads;
    of->blocks = resps_blocks(of);
    of->shared = (of->length + TILE - 1) / TILE;
    of->tiles = of->shared + of->own.count;
    of->padded = (of->value_width + TILE - 1) / TILE * TILE;
    of->by_tiles = of->sharing * of->count >= tiles_from && resps_has_tiles();
}

// Returns 0 if there is no memory.
static int resps_attend(RespsAttention* of, int64_t tiles_from) {
    resps_plan(of, tiles_from);
    const int64_t threads = omp_get_max_threads();
    const RespsRoom room = resps_room(of, threads);
    float* memory = (float*)_mm_malloc((threads * room.own + room.kept) * sizeof(float), CODE_LINE);
    if (!memory) return 0;
#pragma omp parallel num_threads(threads)
    {
        resps_share_attention(of, room, memory, threads);
        resps_release_tiles();
    }
    _mm_free(memory);
    return 1;
}

// ---- decoder layers

// x + attention(norm(x)), then x + MLP(norm(x)), for the rows of one text.
typedef struct {
    const Bf16 *rows, *norms[2];
    float epsilons[2];
    RespsLinear states, output, gated, down;  // without rows; `states` gives queries, keys and values
    RespsAttention attention;  // without queries
    RespsRotated rotated;  // without queries
} RespsLayer;

// RMSNorm of the rows from `first` to `end`, rounded as PyTorch does.
static void resps_normalize(
    Bf16* result, const Bf16* rows, const Bf16* weight, float epsilon, int64_t width, int64_t first, int64_t end) {
    for (int64_t place = first * width; place < end * width; place += width) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t column = 0; column < width; column += LANES) {
            const __mmask16 lanes = resps_lanes(width - column);
            const __m512 values = resps_wide(_mm256_maskz_loadu_epi16(lanes, rows + place + column));
            sum = _mm512_fmadd_ps(values, values, sum);
        }
        const float mean = _mm512_reduce_add_ps(sum) / (float)width;
        const __m512 factor = _mm512_set1_ps(1 / __builtin_sqrtf(mean + epsilon));
        for (int64_t column = 0; column < width; column += LANES) {
            const __mmask16 lanes = resps_lanes(width - column);
            const __m512 values = resps_wide(_mm256_maskz_loadu_epi16(lanes, rows + place + column));
            const __m512 scale = resps_wide(_mm256_maskz_loadu_epi16(lanes, weight + column));
            const __m512 scaled = _mm512_mul_ps(resps_rounded(_mm512_mul_ps(values, factor)), scale);
            _mm256_mask_storeu_epi16(result + place + column, lanes, (__m256i)_mm512_cvtneps_pbh(scaled));
        }
    }
}

// Each thread calls this. All normalize few rows, each in memory of its own, and together many rows.
static void resps_share_norm(Bf16* result, const Bf16* rows, const RespsLayer* of, int which, int is_own) {
    const RespsSpan all = {0, of->states.count}, span = is_own ? all : resps_span(all.end);
    resps_normalize(result, rows, of->norms[which], of->epsilons[which], of->states.depth, span.first, span.end);
    if (!is_own) {
#pragma omp barrier
    }
}

// The bytes of memory that a layer needs, and where its parts begin.
typedef struct {
    RespsRoom room;  // of attention, which comes first
    int64_t threads, scratch, own, norms, normed, middle, queries, attended, gated, end;
} RespsPlaces;

static RespsPlaces resps_places(const RespsLayer* of) {
    const RespsLinear* products[] = {&of->states, &of->output, &of->gated, &of->down};
    const int64_t count = of->states.count, size = sizeof(Bf16);
    RespsPlaces at;
    at.threads = omp_get_max_threads();
    at.room = resps_room(&of->attention, at.threads);
    at.own = 0;  // bytes that each thread needs for products
    for (int i = 0; i < 4; ++i) {
        const int64_t needed = resps_memory(products[i]);
        if (at.own < needed) at.own = needed;
    }
    at.norms = resps_lines(count * of->states.depth * size);
    at.scratch = resps_lines((at.threads * at.room.own + at.room.kept) * (int64_t)sizeof(float));
    at.normed = at.scratch + at.threads * at.own;
    at.middle = at.normed + (count <= LINES ? at.threads : 1) * at.norms;
    at.queries = at.middle + at.norms;
    at.attended = at.queries + resps_lines(count * of->output.depth * size);
    at.gated = at.attended + resps_lines(count * of->output.depth * size);
    at.end = at.gated + resps_lines(count * of->gated.width * size);
    return at;
}

// Prefetches the first tile of keys and values that this thread reads.
static void resps_fetch_tile(const RespsAttention* of) {
    const int64_t first = resps_span(of->batch * of->key_heads * of->blocks * of->tiles).first;
    const int64_t key = first % of->tiles * TILE, end = resps_least(of->length, key + TILE);
    for (int part = 0; part < 2; ++part) {
        const RespsStates* states = part ? &of->value : &of->key;
        const Bf16* start = resps_start(of, states, first / of->tiles);
        for (int64_t place = key * states->place; place < end * states->place; place += states->place) {
            for (int64_t column = 0; column < of->width; column += 2 * LANES) __builtin_prefetch(start + place + column, 0, 2);
        }
    }
}

// Each thread of a team calls this. There are four barriers, and those of attention and of norms of many rows.
static void resps_share_layer(RespsLayer of, const RespsPlaces* at, uint8_t* memory) {
    const int64_t thread = omp_get_thread_num(), is_own = of.states.count <= LINES;
    uint8_t* scratch = memory + at->scratch + thread * at->own;
    Bf16* normed = (Bf16*)(memory + at->normed + (is_own ? thread * at->norms : 0));
    Bf16 *middle = (Bf16*)(memory + at->middle), *queries = (Bf16*)(memory + at->queries);
    const RespsStates asked = {queries, 0, of.rotated.width, of.output.depth};
    of.rotated.queries = queries, of.states.rotated = &of.rotated, of.attention.query = asked;
    of.attention.result = (Bf16*)(memory + at->attended), of.gated.result = (Bf16*)(memory + at->gated);
    of.states.rows = of.gated.rows = normed, of.output.rows = of.attention.result, of.down.rows = of.gated.result;
    of.output.added = of.rows, of.output.result = middle, of.down.added = middle;
    resps_fetch(&of.states);
    resps_share_norm(normed, of.rows, &of, 0, is_own);
    resps_share(&of.states, scratch);
    resps_fetch_tile(&of.attention);
    resps_fetch(&of.output);
#pragma omp barrier
    resps_share_attention(&of.attention, at->room, (float*)memory, at->threads);
#pragma omp barrier
    resps_share(&of.output, scratch);
    resps_fetch(&of.gated);
#pragma omp barrier
    resps_share_norm(normed, middle, &of, 1, is_own);
    resps_share(&of.gated, scratch);
    resps_fetch(&of.down);
#pragma omp barrier
    resps_share(&of.down, scratch);
}

// Computes a layer in one parallel region; returns 0 if there is no memory.
static int resps_layer(RespsLayer* of, int64_t tiles_from) {
    resps_plan(&of->attention, tiles_from);
    const RespsPlaces at = resps_places(of);
    uint8_t* memory = (uint8_t*)_mm_malloc(at.end, CODE_LINE);
    if (!memory) return 0;
#pragma omp parallel num_threads(at.threads)
    {
        resps_share_layer(*of, &at, memory);
        resps_release_tiles();
    }
    _mm_free(memory);
    return 1;
}

// ---- functions that kernels.py calls

int resps_run_alone(
    const void* rows, const void* packed, const void* bias, void* result, int64_t count, int64_t depth, int64_t width,
    int is_gated, int64_t tiles_from) {
    const RespsLinear of = {(const Bf16*)rows, (const Bf16*)packed, (const Bf16*)bias, (Bf16*)result, count, depth,
                            width, is_gated, tiles_from, {0}};
    return resps_linear(&of);
}

int resps_run_few_bits_alone(
    const void* rows, const void* codes, const void* scales, const void* offsets, const void* table, const void* bias,
    void* result, int64_t count, int64_t depth, int64_t width, int64_t groups, int is_gated, int64_t tiles_from) {
    const RespsLinear of = {(const Bf16*)rows, 0, (const Bf16*)bias, (Bf16*)result, count, depth, width, is_gated, tiles_from,
                            {(const uint8_t*)codes, (const float*)scales, (const float*)offsets, (const Bf16*)table, groups}};
    return resps_linear(&of);
}

// Attends in one row, with contiguous states and without a mask.
int resps_attend_alone(
    const void* query, const void* key, const void* value, void* result, int64_t heads, int64_t key_heads,
    int64_t count, int64_t length, int64_t width, float scale, int64_t tiles_from) {
    RespsAttention of;
    __builtin_memset(&of, 0, sizeof of);
    const RespsStates queries = {(const Bf16*)query, 0, count * width, width};
    const RespsStates keys = {(const Bf16*)key, 0, length * width, width};
    const RespsStates values = {(const Bf16*)value, 0, length * width, width};
    of.query = queries, of.key = keys, of.value = values;
    of.result = (Bf16*)result, of.scale = scale;
    of.batch = 1, of.heads = heads, of.key_heads = key_heads, of.count = count, of.length = length;
    of.width = of.value_width = width;
    return resps_attend(&of, tiles_from);
}

// ---- functions that inductor's code calls

enum { MOST_DIMENSIONS = 8 };

static AOTITorchError resps_made(
    int64_t dimensions, const int64_t* sizes, int32_t dtype, AtenTensorHandle* result, void** start) {
    int64_t strides[MOST_DIMENSIONS], stride = 1;
    for (int64_t i = dimensions - 1; i >= 0; --i) strides[i] = stride, stride *= sizes[i];
    if (aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result)) {
        return AOTI_TORCH_FAILURE;
    }
    return aoti_torch_get_data_ptr(*result, start);
}

AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle rows, AtenTensorHandle weight, AtenTensorHandle* bias, const char* then, const double** scalars,
    int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);

static AOTITorchError resps_run_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, AtenTensorHandle* weight, int64_t width,
    int is_gated, int64_t tiles_from, int64_t library_from, AtenTensorHandle* result) {
    int64_t dimensions, *sizes, *blocks, shape[MOST_DIMENSIONS], count = 1;
    void *input, *weights, *output, *start = 0;
    if (aoti_torch_get_dim(rows, &dimensions) || dimensions < 1 || dimensions > MOST_DIMENSIONS ||
        aoti_torch_get_sizes(rows, &sizes) || aoti_torch_get_data_ptr(rows, &input) ||
        aoti_torch_get_sizes(packed, &blocks) || aoti_torch_get_data_ptr(packed, &weights) ||
        (bias && aoti_torch_get_data_ptr(*bias, &start)) || blocks[0] * BLOCK < (1 + is_gated) * width ||
        blocks[2] != BLOCK || blocks[1] * 2 != sizes[dimensions - 1]) {
        return AOTI_TORCH_FAILURE;
    }
    for (int64_t i = 0; i < dimensions - 1; ++i) shape[i] = sizes[i], count *= sizes[i];
    const int by_library = weight && count >= library_from;
    AtenTensorHandle both = 0;
    if (by_library) {
        AtenTensorHandle* made = is_gated ? &both : result;
        const AOTITorchError failed = aoti_torch_cpu__linear_pointwise(rows, *weight, bias, "none", 0, 0, 0, made);
        if (failed || !is_gated) return failed;
    }
    shape[dimensions - 1] = width;
    if (resps_made(dimensions, shape, aoti_torch_dtype_bfloat16(), result, &output)) return AOTI_TORCH_FAILURE;
    if (by_library) {
        if (aoti_torch_get_data_ptr(both, &input)) return AOTI_TORCH_FAILURE;
        resps_gate((const Bf16*)input, (Bf16*)output, count, width);
        return aoti_torch_delete_tensor_object(both);
    }
    const RespsLinear of = {(const Bf16*)input, (const Bf16*)weights, (const Bf16*)start, (Bf16*)output, count,
                            sizes[dimensions - 1], width, is_gated, tiles_from, {0}};
    return resps_linear(&of) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError aoti_torch_cpu_bf16_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, AtenTensorHandle* weight, int64_t width,
    int64_t tiles_from, int64_t library_from, AtenTensorHandle* result) {
    return resps_run_linear(rows, packed, bias, weight, width, 0, tiles_from, library_from, result);
}

// Numbers of codes of 4 bits, see few_bits.py: whole numbers from -8 on, and the quantiles of NF4, rounded to bf16.
static const Bf16 resps_numbers[2][LANES] = {
    {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
     0x40e0},
    {0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39,
     0x3f80},
};

AOTITorchError aoti_torch_cpu_packed_few_bits(
    AtenTensorHandle rows, AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle* offsets,
    AtenTensorHandle* bias, int64_t width, int64_t kind, int is_gated, int64_t tiles_from, AtenTensorHandle* result) {
    int64_t dimensions, *sizes, *lines, *groups, shape[MOST_DIMENSIONS], count = 1;
    void *input, *bytes, *scale, *offset = 0, *added = 0, *output;
    if (aoti_torch_get_dim(rows, &dimensions) || dimensions < 1 || dimensions > MOST_DIMENSIONS ||
        aoti_torch_get_sizes(rows, &sizes) || aoti_torch_get_data_ptr(rows, &input) ||
        aoti_torch_get_sizes(codes, &lines) || aoti_torch_get_data_ptr(codes, &bytes) ||
        aoti_torch_get_sizes(scales, &groups) || aoti_torch_get_data_ptr(scales, &scale) ||
        (offsets && aoti_torch_get_data_ptr(*offsets, &offset)) || (bias && aoti_torch_get_data_ptr(*bias, &added)) ||
        lines[0] * BLOCK < (1 + is_gated) * width || kind < 0 || kind > 2 ||
        lines[1] * (kind ? 4 : 2) != sizes[dimensions - 1] || sizes[dimensions - 1] % groups[1]) {
        return AOTI_TORCH_FAILURE;
    }
    for (int64_t i = 0; i < dimensions - 1; ++i) shape[i] = sizes[i], count *= sizes[i];
    shape[dimensions - 1] = width;
    if (resps_made(dimensions, shape, aoti_torch_dtype_bfloat16(), result, &output)) return AOTI_TORCH_FAILURE;
    const RespsLinear of = {
        (const Bf16*)input, 0, (const Bf16*)added, (Bf16*)output, count, sizes[dimensions - 1], width, is_gated, tiles_from,
        {(const uint8_t*)bytes, (const float*)scale, (const float*)offset, kind ? resps_numbers[kind - 1] : 0, groups[1]}};
    return resps_linear(&of) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError aoti_torch_cpu_bf16_gated(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* weight, int64_t width, int64_t tiles_from,
    int64_t library_from, AtenTensorHandle* result) {
    return resps_run_linear(rows, packed, 0, weight, width, 1, tiles_from, library_from, result);
}

static int resps_read(AtenTensorHandle tensor, RespsStates* states, int64_t** sizes) {
    void* start;
    int64_t *strides, dimensions;
    if (aoti_torch_get_dim(tensor, &dimensions) || dimensions != 4 || aoti_torch_get_sizes(tensor, sizes) ||
        aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &start)) {
        return 0;
    }
    int64_t steps[3];  // a dimension of size 1 is broadcast
    for (int i = 0; i < 3; ++i) steps[i] = (*sizes)[i] > 1 ? strides[i] : 0;
    const RespsStates read = {(const Bf16*)start, steps[0], steps[1], steps[2]};
    *states = read;
    return strides[3] == 1 || (*sizes)[3] == 1;
}

// Reads the inputs that both kinds of attention have, without the mask, and makes their result.
static AOTITorchError resps_prepare_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, double scale, RespsAttention* of,
    AtenTensorHandle* result) {
    int64_t *queries, *keys, *values;
    void* attended;
    __builtin_memset(of, 0, sizeof *of);
    if (!resps_read(query, &of->query, &queries) || !resps_read(key, &of->key, &keys) ||
        !resps_read(value, &of->value, &values) || queries[0] != keys[0] || values[0] != keys[0] ||
        queries[1] % keys[1] || values[1] != keys[1] || queries[3] != keys[3] || values[2] != keys[2] ||
        queries[3] % (2 * LANES) || values[3] % (2 * LANES)) {
        return AOTI_TORCH_FAILURE;
    }
    const int64_t shape[] = {queries[0], queries[2], queries[1], values[3]};
    if (resps_made(4, shape, aoti_torch_dtype_bfloat16(), result, &attended)) return AOTI_TORCH_FAILURE;
    of->result = (Bf16*)attended, of->scale = (float)scale;
    of->batch = queries[0], of->heads = queries[1], of->count = queries[2], of->width = queries[3];
    of->key_heads = keys[1], of->length = keys[2], of->value_width = values[3];
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_bf16_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, double scale,
    int64_t tiles_from, AtenTensorHandle* result) {
    RespsAttention of;
    int64_t* masks;
    if (resps_prepare_attention(query, key, value, scale, &of, result)) return AOTI_TORCH_FAILURE;
    const int64_t sharing = of.heads / of.key_heads;
    if (mask && (!resps_read(*mask, &of.mask, &masks) || (masks[0] != 1 && masks[0] != of.batch) ||
                 (masks[1] != 1 && masks[1] != sharing && masks[1] != of.heads) ||
                 (masks[2] != 1 && masks[2] != of.count) || masks[3] != of.length)) {
        return AOTI_TORCH_FAILURE;
    }
    if (mask && masks[1] == of.heads) of.mask_heads = sharing;
    return resps_attend(&of, tiles_from) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// Reads contiguous integers [batch, count, width]; returns 0 if sizes or strides differ.
static int resps_read_numbers(
    AtenTensorHandle tensor, int64_t batch, int64_t count, int64_t width, const int64_t** start) {
    void* read;
    int64_t *sizes, *strides, dimensions;
    if (aoti_torch_get_dim(tensor, &dimensions) || dimensions != 3 || aoti_torch_get_sizes(tensor, &sizes) ||
        aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &read)) {
        return 0;
    }
    *start = (const int64_t*)read;
    const int is_contiguous = strides[2] == 1 && strides[1] == width && (batch == 1 || strides[0] == count * width);
    return sizes[0] == batch && sizes[1] == count && sizes[2] == width && is_contiguous;
}

// Reads the groups of nodes of a tree, whose mask has the strides in `of->mask`; returns 0 if sizes do not fit.
static int resps_read_groups(
    RespsAttention* of, const int64_t* masks, AtenTensorHandle nodes, AtenTensorHandle slots) {
    int64_t* groups;
    if (aoti_torch_get_sizes(nodes, &groups)) return 0;
    of->own.count = groups[1];
    const int64_t shared = masks[2] - of->own.count * MEMBERS, length = shared / of->count * TILE;
    if (!resps_read_numbers(nodes, of->batch, of->own.count, MEMBERS, &of->own.nodes) ||
        !resps_read_numbers(slots, of->batch, of->own.count, TILE, &of->own.slots) || masks[0] != of->batch ||
        shared < 0 || shared % of->count || length > of->length || masks[3] != TILE || of->mask.place != TILE) {
        return 0;
    }
    of->own.masks = of->mask.start + shared * TILE, of->own.masks_batch = of->mask.batch;
    of->mask.place = of->length = length, of->mask.head = 0;
    return 1;
}

AOTITorchError aoti_torch_cpu_bf16_block_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask,
    AtenTensorHandle nodes, AtenTensorHandle slots, AtenTensorHandle* sinks, double scale, int64_t tiles_from,
    AtenTensorHandle* result) {
    RespsAttention of;
    void* scores = 0;
    int64_t* masks;
    if (resps_prepare_attention(query, key, value, scale, &of, result) || !resps_read(mask, &of.mask, &masks) ||
        !resps_read_groups(&of, masks, nodes, slots) || (sinks && aoti_torch_get_data_ptr(*sinks, &scores))) {
        return AOTI_TORCH_FAILURE;
    }
    of.own.sinks = (const Bf16*)scores;
    return resps_attend(&of, tiles_from) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// The start of a contiguous tensor with `count` numbers; null if it is another one.
static void* resps_flat(AtenTensorHandle tensor, int64_t count) {
    int64_t dimensions, *sizes, *strides, stride = 1;
    void* start;
    if (aoti_torch_get_dim(tensor, &dimensions) || aoti_torch_get_sizes(tensor, &sizes) ||
        aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &start)) {
        return 0;
    }
    for (int64_t i = dimensions - 1; i >= 0; stride *= sizes[i--]) {
        if (sizes[i] > 1 && strides[i] != stride) return 0;
    }
    return stride == count ? start : 0;
}

AOTITorchError aoti_torch_cpu_bf16_layer(
    AtenTensorHandle rows, AtenTensorHandle cosines, AtenTensorHandle sines, AtenTensorHandle slots,
    AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle mask, const AtenTensorHandle* groups, int64_t group_count,
    const AtenTensorHandle* norms, int64_t,
    const AtenTensorHandle* weights, int64_t, const AtenTensorHandle* factors, int64_t factor_count,
    AtenTensorHandle* bias, const int64_t* kinds, int64_t, int64_t heads, double epsilon, double last_epsilon,
    double scale, int64_t tiles_from, int64_t attention_tiles_from, AtenTensorHandle* result) {
    RespsLayer of;
    __builtin_memset(&of, 0, sizeof of);
    RespsAttention* at = &of.attention;
    int64_t dimensions, *sizes, *states, *others, *masks, *blocks[4], *parts[4];
    void *starts[4], *scales[4], *offsets[4] = {0}, *output, *added = 0;
    if (aoti_torch_get_dim(rows, &dimensions) || dimensions != 3 || aoti_torch_get_sizes(rows, &sizes) || sizes[0] != 1 ||
        !resps_read(keys, &at->key, &states) || !resps_read(values, &at->value, &others) ||
        !resps_read(mask, &at->mask, &masks) || (bias && aoti_torch_get_data_ptr(*bias, &added))) {
        return AOTI_TORCH_FAILURE;
    }
    for (int i = 0; i < 4; ++i) {
        if (aoti_torch_get_sizes(weights[i], &blocks[i]) || aoti_torch_get_data_ptr(weights[i], &starts[i]) ||
            (factor_count && (aoti_torch_get_sizes(factors[i], &parts[i]) || aoti_torch_get_data_ptr(factors[i], &scales[i]))) ||
            (factor_count > 4 && aoti_torch_get_data_ptr(factors[4 + i], &offsets[i]))) {
            return AOTI_TORCH_FAILURE;
        }
    }
    const int64_t count = sizes[1], width = sizes[2], head = states[3], inner = blocks[3][1] * (kinds[3] > 0 ? 4 : 2);
    const int64_t depths[] = {width, heads * head, width, inner};
    const int64_t widths[] = {(heads + 2 * states[1]) * head, width, inner, width};
    RespsLinear* products[] = {&of.states, &of.output, &of.gated, &of.down};
    for (int i = 0; i < 4; ++i) {
        RespsLinear* one = products[i];
        one->count = count, one->depth = depths[i], one->width = widths[i];
        one->is_gated = i == 2, one->tiles_from = tiles_from;
        if (kinds[i] < 0) {
            one->packed = (const Bf16*)starts[i];
        } else {
            const RespsFewBits bits = {(const uint8_t*)starts[i], (const float*)scales[i], (const float*)offsets[i],
                                       kinds[i] ? resps_numbers[kinds[i] - 1] : 0, parts[i][1]};
            one->bits = bits;
        }
        if (blocks[i][1] * (kinds[i] > 0 ? 4 : 2) != depths[i] || blocks[i][0] != resps_blocks_of(one)) return AOTI_TORCH_FAILURE;
    }
    of.states.bias = (const Bf16*)added;
    of.rows = (const Bf16*)resps_flat(rows, count * width);
    for (int i = 0; i < 2; ++i) of.norms[i] = (const Bf16*)resps_flat(norms[i], width);
    of.epsilons[0] = (float)epsilon, of.epsilons[1] = (float)last_epsilon;
    const RespsRotated rotated = {
        (const Bf16*)resps_flat(cosines, count * head), (const Bf16*)resps_flat(sines, count * head),
        (const int64_t*)resps_flat(slots, count), 0, (Bf16*)at->key.start, (Bf16*)at->value.start, heads, states[1], head,
        at->key.head, at->key.place, at->value.head, at->value.place};
    if (!of.rows || !of.norms[0] || !of.norms[1] || !rotated.cosines || !rotated.sines || !rotated.slots ||
        states[0] != 1 || others[0] != 1 || heads % states[1] || others[1] != states[1] || others[3] != head ||
        others[2] != states[2] || head % BLOCK || masks[0] != 1 || masks[1] != 1) {
        return AOTI_TORCH_FAILURE;
    }
    at->scale = (float)scale, at->batch = 1, at->heads = heads, at->key_heads = states[1], at->count = count;
    at->length = group_count ? states[2] : masks[3], at->width = at->value_width = head;
    const int is_read = group_count ? resps_read_groups(at, masks, groups[0], groups[1])
                                    : (masks[2] == 1 || masks[2] == count) && masks[3] <= states[2];
    if (!is_read || resps_made(3, sizes, aoti_torch_dtype_bfloat16(), result, &output)) return AOTI_TORCH_FAILURE;
    for (int64_t i = 0; i < count; ++i) {
        if (rotated.slots[i] < 0 || rotated.slots[i] >= states[2]) return AOTI_TORCH_FAILURE;
    }
    of.rotated = rotated, of.down.result = (Bf16*)output;
    return resps_layer(&of, attention_tiles_from) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

}

#pragma GCC pop_options
