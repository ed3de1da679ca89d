// Operators of bfloat16 for AVX512-BF16, with or without AMX, put into the C++ of packaged code by native.py, which says
// what they compute. kernels.py also compiles them alone, to time and to test them. From `tiles_from` rows on, AMX's
// tiles multiply, if the process may use them: a row gets the same bits whatever others there are, but other bits by
// tiles. Inductor declares what it finds here with "extern", inside extern "C": so a declaration comes first, and no
// template.
AOTITorchError aoti_torch_cpu_bf16_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, AtenTensorHandle* weight, int64_t width,
    int64_t tiles_from, int64_t library_from, AtenTensorHandle* result);

#pragma GCC push_options
#pragma GCC optimize("O3")
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RESPS_INLINE static inline __attribute__((always_inline))

enum {
    LANES = 16,  // floats of a vector, and pairs of weights of a line of 64 bytes
    SUMS = 24,  // vectors at once: with what is multiplied they fill the registers
    NARROW = 2,
    BLOCK = NARROW * LANES,  // outputs whose weights lie together
    BLOCK_ROWS = SUMS / NARROW,  // read a block at once
    WIDE = 4,
    TILE = WIDE * LANES,  // keys that are read together
    TILE_ROWS = SUMS / WIDE,  // queries look at a tile at once
    AHEAD = 96 * LANES * 2,  // of the weights that are multiplied, those to fetch: 6 KiB later
    LINES = 16,  // of a tile, each of 64 bytes: rows, or pairs of weights
    DEEP = 2 * LINES,  // inputs that one product of tiles takes
};

typedef uint16_t Bf16;

RESPS_INLINE int64_t resps_least(int64_t one, int64_t other) { return one < other ? one : other; }

RESPS_INLINE __mmask16 resps_lanes(int64_t left) { return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

RESPS_INLINE __m512 resps_wide(__m256i read) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read), 16));
}

RESPS_INLINE __m512 resps_rounded(__m512 values) { return resps_wide((__m256i)_mm512_cvtneps_pbh(values)); }

// e to the power of what is at most 0, by a polynomial of degree 5 (relative error below 3e-6).
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

// Adds the products of `count` rows with a block [pairs, vectors * LANES, 2] to sums [count, vectors]. For each pair so
// many lines are fetched, from `next` on. The numbers are constants where this is inlined. Each sum is taken in the
// order of its pairs, so it is the same whatever other rows there are.
RESPS_INLINE void resps_multiply(
    __m512* sums, const int count, const int vectors, const Bf16* rows, int64_t stride, const Bf16* block,
    int64_t pairs, const Bf16* next, const int fetched) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh read[WIDE];
        for (int v = 0; v < vectors; ++v) {
            // to the second cache: the nearest is too small
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

// Call `function` with a constant number of rows.
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

// ---- tiles

// Registers of 16 lines of 64 bytes. A product adds rows [lines, 16 pairs] times weights [16 pairs, 16, 2], as they lie
// in a block, to sums [lines, 16]. Tests emulate them.
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

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

enum { TILE_DATA = 18, ASK_FOR_STATE = 0x1023 };  // of Linux's `arch_prctl`

// Linux gives a process tiles when it asks for them, and again if oneDNN has asked before.
static int resps_has_tiles(void) {
    static int has = -1;  // threads that ask at once get the same answer
    if (has < 0) has = __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
    return has;
}

// Of each thread and each call: oneDNN compares what it finds with what it needs, and finds nothing when we are done.
static void resps_set_tiles(const uint8_t* lines) {
    struct __attribute__((packed)) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t lines[16]; } set;
    __builtin_memset(&set, 0, sizeof set);
    set.palette = 1;
    for (int i = 0; i < 8; ++i) set.bytes[i] = 64, set.lines[i] = lines[i];
    __asm__ volatile("" : : "r"(&set) : "memory");  // GCC does not know how much of it is read
    _tile_loadconfig(&set);
}

#define resps_tile_load _tile_loadd
#define resps_tile_store _tile_stored
#define resps_tile_multiply _tile_dpbf16ps
#define resps_tile_zero _tile_zero
#define resps_tile_release _tile_release

#endif

// GCC's loads of tiles do not tell what they read: without this it may write later what they shall find.
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

// Puts the products of up to 32 rows with a block of weights [depth / 2, BLOCK, 2] into [rows, BLOCK] sums.
static void resps_multiply_block(
    float* sums, int count, const Bf16* rows, int64_t depth, const Bf16* weights, int fetches) {
    const int first = count < LINES ? count : LINES, second = count - first;
    resps_prepare_tiles(first, second);
    RESPS_WRITTEN;
    resps_tile_zero(0);
    resps_tile_zero(1);
    resps_tile_zero(2);
    resps_tile_zero(3);
    for (int64_t k = 0; k < depth; k += DEEP) {
        const Bf16* read = weights + k * BLOCK;
        if (fetches) {
            for (int line = 0; line < DEEP; ++line) __builtin_prefetch(read + (4 * DEEP + line) * BLOCK, 0, 2);
        }
        resps_tile_load(4, rows + k, depth * sizeof *rows);
        resps_tile_load(6, read, 2 * BLOCK * sizeof *read);
        resps_tile_multiply(0, 4, 6);
        resps_tile_load(7, read + 2 * LANES, 2 * BLOCK * sizeof *read);
        resps_tile_multiply(1, 4, 7);
        if (second) {
            resps_tile_load(5, rows + LINES * depth + k, depth * sizeof *rows);
            resps_tile_multiply(2, 5, 6);
            resps_tile_multiply(3, 5, 7);
        }
    }
    resps_tile_store(0, sums, BLOCK * sizeof *sums);
    resps_tile_store(1, sums + LANES, BLOCK * sizeof *sums);
    if (second) {
        resps_tile_store(2, sums + LINES * BLOCK, BLOCK * sizeof *sums);
        resps_tile_store(3, sums + LINES * BLOCK + LANES, BLOCK * sizeof *sums);
    }
}

// Adds the products of up to 16 rows [count, depth] with a block [depth / 2, TILE, 2] to sums [count, TILE].
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

#ifndef RESPS_EMULATES_TILES
#pragma GCC pop_options
#endif

// ---- linear layers

typedef struct {
    const Bf16 *rows, *packed, *bias;
    Bf16* result;
    int64_t count, depth, width;
    int is_gated;  // whether the first half of a block is the gate's, and the other what it gates
    int64_t tiles_from;  // rows
} RespsLinear;

// silu(gate) * up, rounded as PyTorch does after each operator.
RESPS_INLINE __m512 resps_gated(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1), input = resps_rounded(gate);
    const __m512 small = resps_exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(input)));
    const __mmask16 is_negative = _mm512_cmp_ps_mask(input, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 share = _mm512_div_ps(_mm512_mask_blend_ps(is_negative, one, small), _mm512_add_ps(one, small));
    return _mm512_mul_ps(resps_rounded(_mm512_mul_ps(input, share)), resps_rounded(up));
}

// Writes the results of a row and a block.
RESPS_INLINE void resps_write(const RespsLinear* of, int64_t row, int64_t block, const __m512* sums) {
    if (of->is_gated) {
        Bf16* result = of->result + row * of->width + block * LANES;
        _mm256_storeu_si256((__m256i*)result, (__m256i)_mm512_cvtneps_pbh(resps_gated(sums[0], sums[1])));
        return;
    }
    const int64_t first = block * BLOCK;
    for (int v = 0; v < NARROW; ++v) {
        const __mmask16 written = resps_lanes(of->width - first - v * LANES);
        __m512 sum = sums[v];
        if (of->bias) {
            sum = _mm512_add_ps(sum, resps_wide(_mm256_maskz_loadu_epi16(written, of->bias + first + v * LANES)));
        }
        Bf16* result = of->result + row * of->width + first + v * LANES;
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

// Memory takes as long for a block as for two tiles of rows with it: while these are the only ones, they fetch ahead.
static void resps_linear_tiles(const RespsLinear* of, int64_t block) {
    __m512 sums[2 * LINES * NARROW];
    for (int64_t row = 0; row < of->count; row += 2 * LINES) {
        const int count = (int)resps_least(of->count - row, 2 * LINES);
        const Bf16* weights = of->packed + block * BLOCK * of->depth;
        resps_multiply_block((float*)sums, count, of->rows + row * of->depth, of->depth, weights, row == 0);
        for (int i = 0; i < count; ++i) resps_write(of, row + i, block, sums + i * NARROW);
    }
}

// A block stays in a near cache while groups of rows go over it. Memory takes as long for one as twelve to twenty rows
// do, so it must not rest: the first two groups fetch a half of the next block each, and a lone one what comes soon.
static void resps_linear_vectors(const RespsLinear* of, int64_t block) {
    const int64_t groups = (of->count + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const Bf16* weights = of->packed + block * BLOCK * of->depth;
    for (int64_t group = 0; group < groups; ++group) {  // of about as many rows each
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

static void resps_linear(const RespsLinear* of) {
    const int64_t columns = of->is_gated ? 2 * of->width : of->width, blocks = (columns + BLOCK - 1) / BLOCK;
    const int by_tiles = of->count >= of->tiles_from && of->depth % DEEP == 0 && resps_has_tiles();
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < blocks; ++block) {
            if (by_tiles) resps_linear_tiles(of, block);
            else resps_linear_vectors(of, block);
        }
        resps_release_tiles();
    }
}

// silu(gate) * up of rows [count, 2 * width] that hold both. The width is a multiple of LANES.
static void resps_gate(const Bf16* both, Bf16* result, int64_t count, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t column = 0; column < width; column += LANES) {
            const Bf16* gate = both + 2 * row * width + column;
            const __m512 gated = resps_gated(
                resps_wide(_mm256_loadu_si256((const __m256i*)gate)),
                resps_wide(_mm256_loadu_si256((const __m256i*)(gate + width))));
            _mm256_storeu_si256((__m256i*)(result + row * width + column), (__m256i)_mm512_cvtneps_pbh(gated));
        }
    }
}

// ---- attention

enum { MOST_QUERIES = 60 };  // that read a tile of keys while it is in the nearest cache

typedef struct {
    const Bf16* start;
    int64_t batch, head, place;  // strides
} RespsStates;

typedef struct {
    RespsStates query, key, value, mask;  // no mask: everything is seen
    Bf16* result;
    float* sums;  // the log-sum-exp of each query's scores, where it is asked for
    float scale;
    int64_t mask_heads;  // of the mask that are one key head's; 0 where all key heads have the same
    int64_t batch, heads, key_heads, count, length, width, value_width;
    int64_t sharing, blocks, tiles, padded;  // heads of one head of keys, blocks of queries, tiles of keys, columns
    int by_tiles;  // of AMX
} RespsAttention;

// What one thread works with: queries of heads that share keys, and what they have seen of some tiles.
typedef struct {
    Bf16 *queries, *keys, *values, *weights;
    float *outputs, *most, *total;
    int64_t batch, key_head;
    int count;
    const Bf16* masks[MOST_QUERIES];  // of each query, its own
    int64_t written[MOST_QUERIES];  // where the result of each goes
} RespsQueries;

RESPS_INLINE float resps_exp_of(float power) { return _mm512_cvtss_f32(resps_exp(_mm512_set1_ps(power))); }

// [16 keys, 16 pairs] -> [16 pairs, 16 keys].
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

// Keys as a block [width / 2, TILE, 2].
static void resps_pack_keys(
    Bf16* packed, const Bf16* keys, const Bf16* next, int64_t stride, int64_t width, int64_t count) {
    for (int v = 0; v < WIDE; ++v) {
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            __m512i rows[LANES], columns[LANES];
            for (int i = 0; i < LANES; ++i) {
                const int64_t key = v * LANES + i;
                __builtin_prefetch(next + key * stride + column, 0, 2);
                rows[i] = key < count ? _mm512_loadu_si512(keys + key * stride + column) : _mm512_setzero_si512();
            }
            resps_transpose(rows, columns);
            for (int i = 0; i < LANES; ++i) {
                _mm512_storeu_si512(packed + ((column / 2 + i) * WIDE + v) * LANES * 2, columns[i]);
            }
        }
    }
}

// Values as blocks [TILE / 2, TILE, 2], each of TILE of their `width`; the last one may end earlier.
static void resps_pack_values(
    Bf16* packed, const Bf16* values, const Bf16* next, int64_t stride, int64_t width, int64_t count) {
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
            const Bf16* one = 2 * pair < count ? values + 2 * pair * stride + column : nothing;
            const Bf16* other = 2 * pair + 1 < count ? values + (2 * pair + 1) * stride + column : nothing;
            const __m512i left = _mm512_loadu_si512(one), right = _mm512_loadu_si512(other);
            Bf16* block = packed + column / TILE * TILE * TILE + (pair * TILE + column % TILE) * 2;
            for (int half = 0; half < 2; ++half) {
                _mm512_storeu_si512(block + half * LANES * 2, _mm512_permutex2var_epi16(left, order[half], right));
            }
        }
    }
}

// Whether any of `count` keys is seen: a mask hides by the dtype's minimum or by infinity.
RESPS_INLINE int resps_sees(const Bf16* mask, int64_t count) {
    for (int64_t place = 0; place < count; place += LANES) {
        const __mmask16 read = resps_lanes(count - place);
        const __m256i values = _mm256_maskz_loadu_epi16(read, mask + place);
        const __mmask16 finite = _mm256_mask_cmpneq_epi16_mask(read, values, _mm256_set1_epi16((short)0xff80));
        if (_mm256_mask_cmpneq_epi16_mask(finite, values, _mm256_set1_epi16((short)0xff7f))) return 1;
    }
    return 0;
}

static int resps_is_seen(const RespsAttention* of, const RespsQueries* at, int64_t key, int64_t count) {
    int is_seen = !of->mask.start;
    for (int row = 0; row < at->count && !is_seen; ++row) is_seen = resps_sees(at->masks[row] + key, count);
    return is_seen;
}

// What some queries make of the scores [count, TILE] of a tile of keys, and by how much what they saw before shrinks:
// softmax in one pass over keys (Milakov and Gimelshein 2018, section 3).
RESPS_INLINE void resps_weigh(
    const int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t key, const __m512* sums,
    float* shrunk) {
    for (int i = 0; i < count; ++i) {
        const Bf16* mask = of->mask.start ? at->masks[row + i] + key : 0;
        __m512 scores[WIDE];
        __m512 most = _mm512_set1_ps(at->most[row + i]);
        for (int v = 0; v < WIDE; ++v) {
            const __mmask16 read = resps_lanes(of->length - key - v * LANES);
            __m512 added = _mm512_setzero_ps();
            if (mask) added = resps_wide(_mm256_maskz_loadu_epi16(read, mask + v * LANES));
            scores[v] = _mm512_fmadd_ps(sums[i * WIDE + v], _mm512_set1_ps(of->scale), added);
            scores[v] = _mm512_mask_blend_ps(read, _mm512_set1_ps(-__builtin_inff()), scores[v]);
            most = _mm512_max_ps(most, scores[v]);
        }
        const float largest = _mm512_reduce_max_ps(most);
        __m512 total = _mm512_setzero_ps();
        for (int v = 0; v < WIDE; ++v) {
            const __m512 weights = resps_exp(_mm512_sub_ps(scores[v], _mm512_set1_ps(largest)));
            total = _mm512_add_ps(total, weights);
            _mm256_storeu_si256((__m256i*)(at->weights + i * TILE + v * LANES), (__m256i)_mm512_cvtneps_pbh(weights));
        }
        shrunk[i] = resps_exp_of(at->most[row + i] - largest);
        at->most[row + i] = largest;
        at->total[row + i] = at->total[row + i] * shrunk[i] + _mm512_reduce_add_ps(total);
    }
}

RESPS_INLINE void resps_look(
    const int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t key) {
    float shrunk[TILE_ROWS];
    __m512 sums[SUMS];
    for (int i = 0; i < count * WIDE; ++i) sums[i] = _mm512_setzero_ps();
    resps_multiply(sums, count, WIDE, at->queries + row * of->width, of->width, at->keys, of->width / 2, 0, 0);
    resps_weigh(count, of, at, row, key, sums, shrunk);
    for (int64_t column = 0; column < of->padded; column += TILE) {
        float* outputs = at->outputs + row * of->padded + column;
        for (int i = 0; i < count; ++i) {
            for (int v = 0; v < WIDE; ++v) {
                const __m512 before = _mm512_loadu_ps(outputs + i * of->padded + v * LANES);
                sums[i * WIDE + v] = _mm512_mul_ps(before, _mm512_set1_ps(shrunk[i]));
            }
        }
        resps_multiply(sums, count, WIDE, at->weights, TILE, at->values + column * TILE, TILE / 2, 0, 0);
        for (int i = 0; i < count; ++i) {
            for (int v = 0; v < WIDE; ++v) _mm512_storeu_ps(outputs + i * of->padded + v * LANES, sums[i * WIDE + v]);
        }
    }
}

static void resps_look_by_tiles(int count, const RespsAttention* of, const RespsQueries* at, int row, int64_t key) {
    float shrunk[LINES];
    __m512 sums[LINES * WIDE];
    for (int i = 0; i < count * WIDE; ++i) sums[i] = _mm512_setzero_ps();
    resps_add_products((float*)sums, TILE, count, at->queries + row * of->width, of->width, at->keys, of->width);
    resps_weigh(count, of, at, row, key, sums, shrunk);
    for (int64_t column = 0; column < of->padded; column += TILE) {
        float* outputs = at->outputs + row * of->padded + column;
        for (int i = 0; i < count; ++i) {
            for (int v = 0; v < WIDE; ++v) {
                float* output = outputs + i * of->padded + v * LANES;
                _mm512_storeu_ps(output, _mm512_mul_ps(_mm512_loadu_ps(output), _mm512_set1_ps(shrunk[i])));
            }
        }
        resps_add_products(outputs, of->padded, count, at->weights, TILE, at->values + column * TILE, TILE);
    }
}

// What is hidden has a score of the dtype's minimum or less, and no weight beside this one.
#define RESPS_LEAST (-3e38f)

// Takes the queries of an item that see anything. The results of others are zeros.
static void resps_begin(const RespsAttention* of, RespsQueries* at, int64_t item) {
    const int64_t block = item % of->blocks, every = of->sharing * of->count;
    at->key_head = item / of->blocks % of->key_heads;
    at->batch = item / of->blocks / of->key_heads;
    at->count = 0;
    for (int64_t query = every * block / of->blocks; query < every * (block + 1) / of->blocks; ++query) {
        const int64_t shared = query / of->count, place = query % of->count;
        const int64_t head = shared + at->key_head * of->sharing;
        const int64_t written = (at->batch * of->count + place) * of->heads + head;
        const Bf16* mask = of->mask.start + at->batch * of->mask.batch + place * of->mask.place +
                           (shared + at->key_head * of->mask_heads) * of->mask.head;
        if (of->mask.start && !resps_sees(mask, of->length)) {
            __builtin_memset(of->result + written * of->value_width, 0, of->value_width * sizeof *of->result);
            if (of->sums) of->sums[written] = RESPS_LEAST;
            continue;
        }
        const Bf16* read =
            of->query.start + at->batch * of->query.batch + head * of->query.head + place * of->query.place;
        __builtin_memcpy(at->queries + at->count * of->width, read, of->width * sizeof *read);
        at->most[at->count] = RESPS_LEAST;
        at->total[at->count] = 0;
        at->masks[at->count] = mask;
        at->written[at->count++] = written;
    }
    __builtin_memset(at->outputs, 0, at->count * of->padded * sizeof *at->outputs);
}

// Where keys or values of a tile begin, of all tiles.
RESPS_INLINE const Bf16* resps_start(const RespsAttention* of, const RespsStates* states, int64_t tile) {
    const int64_t head = tile / of->tiles / of->blocks;
    return states->start + head / of->key_heads * states->batch + head % of->key_heads * states->head +
           tile % of->tiles * TILE * states->place;
}

// The next tile is fetched while this one is read.
static void resps_tile(const RespsAttention* of, const RespsQueries* at, int64_t tile) {
    const int64_t key = tile % of->tiles * TILE, count = resps_least(of->length - key, TILE);
    if (!resps_is_seen(of, at, key, count)) return;
    const RespsStates *keys = &of->key, *values = &of->value;
    resps_pack_keys(
        at->keys, resps_start(of, keys, tile), resps_start(of, keys, tile + 1), keys->place, of->width, count);
    resps_pack_values(
        at->values, resps_start(of, values, tile), resps_start(of, values, tile + 1), values->place, of->value_width,
        count);
    const int most = of->by_tiles ? LINES : TILE_ROWS, groups = (at->count + most - 1) / most;
    for (int group = 0; group < groups; ++group) {
        const int row = at->count * group / groups, rows = at->count * (group + 1) / groups - row;
        if (of->by_tiles) {
            resps_look_by_tiles(rows, of, at, row, key);
        } else {
            RESPS_BY_SIX(resps_look, rows, of, at, row, key)
        }
    }
}

// Writes the results of queries that have seen all that they may; of those that saw nothing, zeros.
static void resps_end(const RespsAttention* of, const RespsQueries* at) {
    for (int row = 0; row < at->count; ++row) {
        const int64_t written = at->written[row];
        if (of->sums) {
            of->sums[written] = at->total[row] > 0 ? at->most[row] + __builtin_logf(at->total[row]) : RESPS_LEAST;
        }
        Bf16* result = of->result + written * of->value_width;
        const __m512 share = _mm512_set1_ps(at->total[row] > 0 ? 1 / at->total[row] : 0);
        for (int64_t column = 0; column < of->value_width; column += LANES) {
            const __m512 output = _mm512_mul_ps(_mm512_loadu_ps(at->outputs + row * of->padded + column), share);
            _mm256_storeu_si256((__m256i*)(result + column), (__m256i)_mm512_cvtneps_pbh(output));
        }
    }
}

// Adds what another thread's queries, the same ones, have seen.
static void resps_merge(const RespsAttention* of, RespsQueries* at, const RespsQueries* other) {
    for (int row = 0; row < at->count; ++row) {
        const float largest = at->most[row] > other->most[row] ? at->most[row] : other->most[row];
        const float own = resps_exp_of(at->most[row] - largest), others = resps_exp_of(other->most[row] - largest);
        at->most[row] = largest;
        at->total[row] = at->total[row] * own + other->total[row] * others;
        for (int64_t column = 0; column < of->padded; ++column) {
            float* output = at->outputs + row * of->padded + column;
            *output = *output * own + other->outputs[row * of->padded + column] * others;
        }
    }
}

// Every thread takes as many tiles as the others, one after the other over all rows, heads and blocks of queries. So
// queries that it begins or ends with may be another's, too: it keeps these, and the first one of theirs merges them.
static int resps_attend_to_all(const RespsAttention* of) {
    const int threads = omp_get_max_threads();
    const int64_t rows = resps_least(of->sharing * of->count, MOST_QUERIES);
    const int64_t kept = (rows * (of->padded + 2) + LANES - 1) / LANES * LANES;  // floats of queries that two share
    const int64_t halves = (rows * of->width + TILE * (of->width + of->padded) + LINES * TILE) / 2;
    const int64_t own = 2 * kept + (halves + LANES - 1) / LANES * LANES;
    const int64_t items = of->batch * of->key_heads * of->blocks, tiles = items * of->tiles;
    float* memory = (float*)_mm_malloc(threads * own * sizeof(float), 64);
    if (!memory) return 0;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        const int64_t first = tiles * thread / count, last = tiles * (thread + 1) / count;
        float* place = memory + thread * own;
        RespsQueries at;
        at.queries = (Bf16*)(place + 2 * kept);
        at.keys = at.queries + rows * of->width;
        at.values = at.keys + TILE * of->width;
        at.weights = at.values + TILE * of->padded;
        if (of->value_width < of->padded) __builtin_memset(at.values, 0, TILE * of->padded * sizeof *at.values);
        for (int64_t tile = first; tile < last;) {
            const int64_t item = tile / of->tiles, end = resps_least((item + 1) * of->tiles, last);
            at.outputs = place + (tile == first ? 0 : kept);
            at.most = at.outputs + rows * of->padded;
            at.total = at.most + rows;
            resps_begin(of, &at, item);
            const int is_whole = tile == item * of->tiles && end == (item + 1) * of->tiles;
            for (; tile < end; ++tile) resps_tile(of, &at, tile);
            if (is_whole) resps_end(of, &at);
        }
        resps_release_tiles();
#pragma omp barrier
        const int64_t item = last > first ? (last - 1) / of->tiles : 0, end = (item + 1) * of->tiles;
        if (last > first && last < end && first <= item * of->tiles) {  // the first one of those that share it
            for (int64_t next = thread + 1; next < count && tiles * next / count < end; ++next) {
                RespsQueries other = at;
                other.outputs = memory + next * own;
                other.most = other.outputs + rows * of->padded;
                other.total = other.most + rows;
                if (tiles * (next + 1) / count > tiles * next / count) resps_merge(of, &at, &other);
            }
            resps_end(of, &at);
        }
    }
    _mm_free(memory);
    return 1;
}

static int resps_attend(RespsAttention* of, int64_t tiles_from) {
    of->sharing = of->heads / of->key_heads;
    of->blocks = (of->sharing * of->count + MOST_QUERIES - 1) / MOST_QUERIES;
    of->tiles = (of->length + TILE - 1) / TILE;
    of->padded = (of->value_width + TILE - 1) / TILE * TILE;
    of->by_tiles = of->sharing * of->count >= tiles_from && resps_has_tiles();
    return resps_attend_to_all(of);
}

#ifdef RESPS_ALONE

// ---- what kernels.py calls

int resps_run_alone(
    const void* rows, const void* packed, const void* bias, void* result, int64_t count, int64_t depth, int64_t width,
    int is_gated, int64_t tiles_from) {
    const RespsLinear of = {(const Bf16*)rows, (const Bf16*)packed, (const Bf16*)bias, (Bf16*)result, count, depth,
                            width, is_gated, tiles_from};
    resps_linear(&of);
    return 1;
}

// Of one row, whose states are contiguous; without a mask.
int resps_attend_alone(
    const void* query, const void* key, const void* value, void* result, int64_t heads, int64_t key_heads,
    int64_t count, int64_t length, int64_t width, float scale, int64_t tiles_from) {
    const RespsStates queries = {(const Bf16*)query, 0, count * width, width};
    const RespsStates keys = {(const Bf16*)key, 0, length * width, width};
    const RespsStates values = {(const Bf16*)value, 0, length * width, width}, none = {0, 0, 0, 0};
    RespsAttention of = {queries, keys, values, none, (Bf16*)result, 0, scale, 0, 1, heads, key_heads, count, length,
                         width, width};
    return resps_attend(&of, tiles_from);
}

#else

// ---- what inductor calls

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
                            sizes[dimensions - 1], width, is_gated, tiles_from};
    resps_linear(&of);
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_bf16_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, AtenTensorHandle* weight, int64_t width,
    int64_t tiles_from, int64_t library_from, AtenTensorHandle* result) {
    return resps_run_linear(rows, packed, bias, weight, width, 0, tiles_from, library_from, result);
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
    int64_t steps[3];  // a size of 1 is shown again and again
    for (int i = 0; i < 3; ++i) steps[i] = (*sizes)[i] > 1 ? strides[i] : 0;
    const RespsStates read = {(const Bf16*)start, steps[0], steps[1], steps[2]};
    *states = read;
    return strides[3] == 1 || (*sizes)[3] == 1;
}

static AOTITorchError resps_run_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, double scale,
    int64_t tiles_from, AtenTensorHandle* result, AtenTensorHandle* sums) {
    RespsAttention of;
    int64_t *queries, *keys, *values, *masks;
    void *attended, *summed = 0;
    of.mask.start = 0;
    of.mask_heads = 0;
    if (!resps_read(query, &of.query, &queries) || !resps_read(key, &of.key, &keys) ||
        !resps_read(value, &of.value, &values) || (mask && !resps_read(*mask, &of.mask, &masks)) ||
        (queries[0] != 1 && queries[0] != keys[0]) || values[0] != keys[0] || queries[1] % keys[1] ||
        values[1] != keys[1] ||
        queries[3] != keys[3] || values[2] != keys[2] || queries[3] % (2 * LANES) || values[3] % (2 * LANES)) {
        return AOTI_TORCH_FAILURE;
    }
    const int64_t sharing = queries[1] / keys[1];
    if (mask && ((masks[0] != 1 && masks[0] != keys[0]) ||
                 (masks[1] != 1 && masks[1] != sharing && masks[1] != queries[1]) ||
                 (masks[2] != 1 && masks[2] != queries[2]) || masks[3] != keys[2])) {
        return AOTI_TORCH_FAILURE;
    }
    if (mask && masks[1] == queries[1]) of.mask_heads = sharing;
    const int64_t shape[] = {keys[0], queries[2], queries[1], values[3]};
    if (resps_made(4, shape, aoti_torch_dtype_bfloat16(), result, &attended) ||
        (sums && resps_made(3, shape, aoti_torch_dtype_float32(), sums, &summed))) {
        return AOTI_TORCH_FAILURE;
    }
    of.result = (Bf16*)attended, of.sums = (float*)summed, of.scale = (float)scale;
    of.batch = keys[0], of.heads = queries[1], of.count = queries[2], of.width = queries[3];
    of.key_heads = keys[1], of.length = keys[2], of.value_width = values[3];
    return resps_attend(&of, tiles_from) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError aoti_torch_cpu_bf16_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, double scale,
    int64_t tiles_from, AtenTensorHandle* result) {
    return resps_run_attention(query, key, value, mask, scale, tiles_from, result, 0);
}

AOTITorchError aoti_torch_cpu_bf16_block_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask, double scale,
    int64_t tiles_from, AtenTensorHandle* result, AtenTensorHandle* sums) {
    return resps_run_attention(query, key, value, &mask, scale, tiles_from, result, sums);
}

#endif

#pragma GCC pop_options
