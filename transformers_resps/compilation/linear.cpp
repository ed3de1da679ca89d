// Linear layers of bfloat16 for AVX512-BF16, read into packaged code by linear.py, which says how weights are laid out.
// Inductor declares what it finds here with "extern" inside extern "C": so a declaration comes first, and no template.
AOTITorchError aoti_torch_cpu_bf16_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, int64_t width, AtenTensorHandle* result);

#pragma GCC push_options
#pragma GCC optimize("O3")
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")

#include <immintrin.h>

#define RESPS_INLINE static inline __attribute__((always_inline))
enum { RESPS_LANES = 16, RESPS_VECTORS = 4, RESPS_ROWS = 6 };  // 24 sums, 4 weights and an input fill the registers

typedef struct {
    const uint16_t *rows, *packed, *bias;
    uint16_t* result;
    int64_t count, depth, width;
} RespsLinear;

// `count` rows, a constant where this is inlined, by one block of columns. Each output is one sum in the order of the
// depth, so it is the same whatever other rows there are.
RESPS_INLINE void resps_block(const RespsLinear* of, const int count, int64_t row, int64_t block) {
    const int64_t first = block * RESPS_LANES * RESPS_VECTORS;
    const uint16_t* weights = of->packed + first * of->depth;
    const uint16_t* rows = of->rows + row * of->depth;
    __mmask16 written[RESPS_VECTORS];
    __m512 sums[RESPS_ROWS][RESPS_VECTORS];
    for (int vector = 0; vector < RESPS_VECTORS; ++vector) {
        const int64_t left = of->width - first - vector * RESPS_LANES;
        written[vector] = left >= RESPS_LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        __m512 start = _mm512_setzero_ps();
        if (of->bias) {
            const uint16_t* bias = of->bias + first + vector * RESPS_LANES;
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(written[vector], bias));
            start = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        }
        for (int i = 0; i < count; ++i) sums[i][vector] = start;
    }
    for (int64_t pair = 0; pair < of->depth / 2; ++pair) {
        __m512bh read[RESPS_VECTORS];
        for (int vector = 0; vector < RESPS_VECTORS; ++vector) {
            read[vector] = (__m512bh)_mm512_loadu_si512(weights + (pair * RESPS_VECTORS + vector) * RESPS_LANES * 2);
        }
        for (int i = 0; i < count; ++i) {
            int32_t two;
            __builtin_memcpy(&two, rows + i * of->depth + 2 * pair, sizeof two);
            const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
            for (int vector = 0; vector < RESPS_VECTORS; ++vector) {
                sums[i][vector] = _mm512_dpbf16_ps(sums[i][vector], inputs, read[vector]);
            }
        }
    }
    for (int i = 0; i < count; ++i) {
        uint16_t* result = of->result + (row + i) * of->width + first;
        for (int vector = 0; vector < RESPS_VECTORS; ++vector) {
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[i][vector]);
            _mm256_mask_storeu_epi16(result + vector * RESPS_LANES, written[vector], rounded);
        }
    }
}

static void resps_rows(const RespsLinear* of, int count, int64_t row, int64_t block) {
    switch (count) {
        case 1: resps_block(of, 1, row, block); break;
        case 2: resps_block(of, 2, row, block); break;
        case 3: resps_block(of, 3, row, block); break;
        case 4: resps_block(of, 4, row, block); break;
        case 5: resps_block(of, 5, row, block); break;
        default: resps_block(of, RESPS_ROWS, row, block);
    }
}

static void resps_linear(const RespsLinear* of) {
    const int64_t columns = RESPS_LANES * RESPS_VECTORS;
    const int64_t blocks = (of->width + columns - 1) / columns, groups = (of->count + RESPS_ROWS - 1) / RESPS_ROWS;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t group = 0; group < groups; ++group) {  // of about as many rows each; the block stays in the cache
            const int64_t row = of->count * group / groups;
            resps_rows(of, (int)(of->count * (group + 1) / groups - row), row, block);
        }
    }
}

AOTITorchError aoti_torch_cpu_bf16_linear(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle* bias, int64_t width, AtenTensorHandle* result) {
    enum { MOST_DIMENSIONS = 8 };
    RespsLinear of = {0, 0, 0, 0, 1, 0, width};
    int64_t dimensions, *sizes, shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS], stride = 1;
    void *input, *weights, *start = 0, *output;
    if (aoti_torch_get_dim(rows, &dimensions) || dimensions < 1 || dimensions > MOST_DIMENSIONS ||
        aoti_torch_get_sizes(rows, &sizes) || aoti_torch_get_data_ptr(rows, &input) ||
        aoti_torch_get_data_ptr(packed, &weights) || (bias && aoti_torch_get_data_ptr(*bias, &start))) {
        return AOTI_TORCH_FAILURE;
    }
    for (int64_t i = dimensions - 1; i >= 0; --i) {
        shape[i] = i == dimensions - 1 ? width : sizes[i];
        strides[i] = stride;
        stride *= shape[i];
        of.count *= i == dimensions - 1 ? 1 : sizes[i];
    }
    if (aoti_torch_empty_strided(dimensions, shape, strides, aoti_torch_dtype_bfloat16(),
                                 aoti_torch_device_type_cpu(), 0, result) ||
        aoti_torch_get_data_ptr(*result, &output)) {
        return AOTI_TORCH_FAILURE;
    }
    of.rows = (const uint16_t*)input;
    of.packed = (const uint16_t*)weights;
    of.bias = (const uint16_t*)start;
    of.result = (uint16_t*)output;
    of.depth = sizes[dimensions - 1];
    resps_linear(&of);
    return AOTI_TORCH_SUCCESS;
}

#pragma GCC pop_options
