// Ternary weights (2 bits) times int8 activations, summed in int32; plain C interface for kernels/ternary.py.
//
// Codes are t + 1 in {0, 1, 2}, planar in blocks of 256 inputs: byte j of a block's 64 holds the inputs j, j + 64,
// j + 128 and j + 192 in bits 0-1, 2-3, 4-5 and 6-7. So `codes & 0x0c` is 64 weights at once, 4 times too large, and
// no shift is needed: every plane has a sum of its own, which is divided by 4, 16 or 64 at the end, exactly.
// The + 1 of the codes is taken off as the sum of the activations. All paths give the same integers: the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))  // plain loops, compiled for each of these
#else
#define CLONES
#endif

namespace {

enum Isa { SCALAR, AVX2, AVX512, NEON };

int best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return AVX2;
#elif defined(__aarch64__)
    return NEON;
#endif
    return SCALAR;
}

// Each dot: sums of code * q over n_blocks blocks of 256 inputs for R <= 4 rows, `stride` bytes apart. sums[r] is that
// of row r; with halves, sums[4 h + r] is that of its h-th 128 inputs.

void dot_scalar(const uint8_t* codes, int64_t stride, int R, const int8_t* q, int64_t n_blocks, bool halves,
                int32_t* sums) {
    for (int r = 0; r < R; r++, codes += stride, sums++) {
        int32_t total = 0;
        for (int64_t b = 0; b < n_blocks; b++) {
            int32_t half[2] = {};
            for (int plane = 0; plane < 4; plane++)
                for (int j = 0; j < 64; j++)
                    half[plane / 2] += (codes[64 * b + j] >> 2 * plane & 3) * q[256 * b + 64 * plane + j];
            if (halves) sums[8 * b] = half[0], sums[8 * b + 4] = half[1];
            total += half[0] + half[1];
        }
        if (!halves) sums[0] = total;
    }
}

#if defined(__x86_64__)
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// the sums of a, b, c and d
VNNI inline __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
    a = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    c = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    a = _mm512_add_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int R>
VNNI void dot_avx512(const uint8_t* codes, int64_t stride, const int8_t* q, int64_t n_blocks, bool halves,
                     int32_t* sums) {
    const __m512i m0 = _mm512_set1_epi8(0x03), m1 = _mm512_set1_epi8(0x0c), m2 = _mm512_set1_epi8(0x30),
                  m3 = _mm512_set1_epi8((char)0xc0), zero = _mm512_setzero_si512();
    __m512i a0[4], a1[4], a2[4], a3[4];
    for (int r = 0; r < 4; r++) a0[r] = a1[r] = a2[r] = a3[r] = zero;
    auto low = [&](int r) VNNI { return _mm512_add_epi32(a0[r], _mm512_srai_epi32(a1[r], 2)); };
    auto high = [&](int r) VNNI { return _mm512_add_epi32(_mm512_srai_epi32(a2[r], 4), _mm512_srai_epi32(a3[r], 6)); };
    for (int64_t b = 0; b < n_blocks; b++) {
        const __m512i x0 = _mm512_loadu_si512(q + 256 * b), x1 = _mm512_loadu_si512(q + 256 * b + 64),
                      x2 = _mm512_loadu_si512(q + 256 * b + 128), x3 = _mm512_loadu_si512(q + 256 * b + 192);
        for (int r = 0; r < R; r++) {
            const __m512i c = _mm512_loadu_si512(codes + r * stride + 64 * b);
            a0[r] = _mm512_dpbusd_epi32(a0[r], _mm512_and_si512(c, m0), x0);
            a1[r] = _mm512_dpbusd_epi32(a1[r], _mm512_and_si512(c, m1), x1);
            a2[r] = _mm512_dpbusd_epi32(a2[r], _mm512_and_si512(c, m2), x2);
            a3[r] = _mm512_dpbusd_epi32(a3[r], _mm512_and_si512(c, m3), x3);
        }
        if (halves) {
            _mm_storeu_si128((__m128i*)(sums + 8 * b), sum4(low(0), low(1), low(2), low(3)));
            _mm_storeu_si128((__m128i*)(sums + 8 * b + 4), sum4(high(0), high(1), high(2), high(3)));
            for (int r = 0; r < R; r++) a0[r] = a1[r] = a2[r] = a3[r] = zero;
        }
    }
    if (halves) return;
    for (int r = 0; r < 4; r++) a0[r] = _mm512_add_epi32(low(r), high(r));
    _mm_storeu_si128((__m128i*)sums, sum4(a0[0], a0[1], a0[2], a0[3]));
}

__attribute__((target("avx2"))) int32_t sum_avx2(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// maddubs adds two products in 16 bits: at most 2 * 128 * 127 = 32512, which fits, as no code is 3 and no q is -128
__attribute__((target("avx2"))) void dot_avx2(const uint8_t* codes, int64_t stride, int R, const int8_t* q,
                                              int64_t n_blocks, bool halves, int32_t* sums) {
    const __m256i m0 = _mm256_set1_epi8(0x03), m1 = _mm256_set1_epi8(0x0c), m2 = _mm256_set1_epi8(0x30),
                  m3 = _mm256_set1_epi8((char)0xc0), ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    for (int r = 0; r < R; r++, codes += stride, sums++) {
        __m256i a0 = zero, a1 = zero, a2 = zero, a3 = zero;
        auto low = [&]() __attribute__((target("avx2"))) { return _mm256_add_epi32(a0, _mm256_srai_epi32(a1, 2)); };
        auto high = [&]() __attribute__((target("avx2"))) {
            return _mm256_add_epi32(_mm256_srai_epi32(a2, 4), _mm256_srai_epi32(a3, 6));
        };
        for (int64_t b = 0; b < n_blocks; b++) {
            for (int side = 0; side < 64; side += 32) {
                const __m256i c = _mm256_loadu_si256((const __m256i*)(codes + 64 * b + side));
                const __m256i* x = (const __m256i*)(q + 256 * b + side);
                const __m256i p0 = _mm256_maddubs_epi16(_mm256_and_si256(c, m0), _mm256_loadu_si256(x)),
                              p1 = _mm256_maddubs_epi16(_mm256_and_si256(c, m1), _mm256_loadu_si256(x + 2)),
                              p2 = _mm256_maddubs_epi16(_mm256_and_si256(c, m2), _mm256_loadu_si256(x + 4)),
                              p3 = _mm256_maddubs_epi16(_mm256_and_si256(c, m3), _mm256_loadu_si256(x + 6));
                a0 = _mm256_add_epi32(a0, _mm256_madd_epi16(p0, ones));
                a1 = _mm256_add_epi32(a1, _mm256_madd_epi16(p1, ones));
                a2 = _mm256_add_epi32(a2, _mm256_madd_epi16(p2, ones));
                a3 = _mm256_add_epi32(a3, _mm256_madd_epi16(p3, ones));
            }
            if (halves) {
                sums[8 * b] = sum_avx2(low()), sums[8 * b + 4] = sum_avx2(high());
                a0 = a1 = a2 = a3 = zero;
            }
        }
        if (!halves) sums[0] = sum_avx2(_mm256_add_epi32(low(), high()));
    }
}
#elif defined(__aarch64__)
inline int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vpadalq_s16(sum, vmull_s8(vget_high_s8(a), vget_high_s8(b)));
#endif
}

void dot_neon(const uint8_t* codes, int64_t stride, int R, const int8_t* q, int64_t n_blocks, bool halves,
              int32_t* sums) {
    const uint8x16_t three = vdupq_n_u8(3);
    for (int r = 0; r < R; r++, codes += stride, sums++) {
        int32x4_t low = vdupq_n_s32(0), high = low;
        for (int64_t b = 0; b < n_blocks; b++) {
            for (int j = 0; j < 64; j += 16) {
                const uint8x16_t c = vld1q_u8(codes + 64 * b + j);
                const int8_t* x = q + 256 * b + j;
                low = dot4(low, vreinterpretq_s8_u8(vandq_u8(c, three)), vld1q_s8(x));
                low = dot4(low, vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(c, 2), three)), vld1q_s8(x + 64));
                high = dot4(high, vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(c, 4), three)), vld1q_s8(x + 128));
                high = dot4(high, vreinterpretq_s8_u8(vshrq_n_u8(c, 6)), vld1q_s8(x + 192));
            }
            if (halves) {
                sums[8 * b] = vaddvq_s32(low), sums[8 * b + 4] = vaddvq_s32(high);
                low = high = vdupq_n_s32(0);
            }
        }
        if (!halves) sums[0] = vaddvq_s32(vaddq_s32(low, high));
    }
}
#endif

void dot_rows(int isa, const uint8_t* codes, int64_t stride, int R, const int8_t* q, int64_t n_blocks, bool halves,
              int32_t* sums) {
#if defined(__x86_64__)
    if (isa == AVX2) return dot_avx2(codes, stride, R, q, n_blocks, halves, sums);
    if (isa == AVX512) {
        auto dot = R == 4 ? dot_avx512<4> : R == 3 ? dot_avx512<3> : R == 2 ? dot_avx512<2> : dot_avx512<1>;
        return dot(codes, stride, q, n_blocks, halves, sums);
    }
#elif defined(__aarch64__)
    if (isa == NEON) return dot_neon(codes, stride, R, q, n_blocks, halves, sums);
#endif
    dot_scalar(codes, stride, R, q, n_blocks, halves, sums);
}

// A token's activations: q = round(127 x / max|x|), padded with 0 to whole blocks, and the sums that the codes' + 1
// adds.
template <class Real>
struct Rounded {
    std::vector<int8_t> q;
    std::vector<int32_t> sums;                             // of each 128 inputs
    int32_t total;                                         // of all
    Real scale;                                            // 127 / max|x|; NaN where an input is not finite
};

// max |x|, or an infinity or NaN of x, by their bits: the order of floating-point numbers is that of their bits
CLONES float largest(const float* x, int64_t n) {
    uint32_t top = 0, bits;
    for (int64_t i = 0; i < n; i++) std::memcpy(&bits, x + i, 4), top = std::max(top, bits & 0x7fffffffu);
    float result;
    std::memcpy(&result, &top, 4);
    return result;
}

CLONES double largest(const double* x, int64_t n) {
    uint64_t top = 0, bits;
    for (int64_t i = 0; i < n; i++) std::memcpy(&bits, x + i, 8), top = std::max(top, bits & 0x7fffffffffffffffu);
    double result;
    std::memcpy(&result, &top, 8);
    return result;
}

CLONES void round_into(const float* x, int64_t n, float scale, int8_t* q) {
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)(int)__builtin_nearbyintf(x[i] * scale);
}

CLONES void round_into(const double* x, int64_t n, double scale, int8_t* q) {
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)(int)__builtin_nearbyint(x[i] * scale);
}

CLONES int32_t sum(const int8_t* q) {
    int32_t total = 0;
    for (int64_t i = 0; i < 128; i++) total += q[i];
    return total;
}

template <class Real>
void round_row(const Real* x, int64_t n, Rounded<Real>& r) {
    const int64_t padded = (n + 255) / 256 * 256;
    r.q.resize(padded);
    r.sums.resize(padded / 128);
    std::fill(r.q.begin() + n, r.q.end(), 0);
    const Real top = largest(x, n);
    r.scale = 1 / std::max(top, (Real)1e-5) * 127;         // in the order in which torch computes 127 / x
    if (!std::isfinite(top)) {
        r.scale = std::numeric_limits<Real>::quiet_NaN();
        std::fill(r.q.begin(), r.q.end(), 0);
    } else {
        round_into(x, n, r.scale, r.q.data());
    }
    r.total = 0;
    for (int64_t i = 0; i < padded / 128; i++) r.total += r.sums[i] = sum(r.q.data() + 128 * i);
}

struct Matrix {
    const uint8_t* codes;                                  // (N, blocks * 64)
    const float* scales;                                   // one, or (K / group, N)
};

// y[i] for rows begin..end of N: sum * (scale / r.scale); by groups (sum_0 * scale_0 + sum_1 * scale_1 + ...) / r.scale
template <class Real>
void multiply(const Matrix& w, int64_t begin, int64_t end, int64_t N, int64_t K, int64_t group, const Rounded<Real>& r,
              Real* y, int isa) {
    const int64_t n_blocks = (K + 255) / 256, per_group = group / 128;
    static thread_local std::vector<int32_t> buffer;
    buffer.resize(8 * n_blocks);
    int32_t* sums = buffer.data();
    const Real factor = w.scales[0] / r.scale;
    for (int64_t i = begin; i < end; i += 4) {
        const int R = (int)std::min<int64_t>(4, end - i);
        dot_rows(isa, w.codes + i * n_blocks * 64, n_blocks * 64, R, r.q.data(), n_blocks, group, sums);
        if (!group) {
            for (int j = 0; j < R; j++) y[i + j] = (Real)(sums[j] - r.total) * factor;
            continue;
        }
        Real total[4] = {};
        for (int64_t g = 0; g < K / group; g++) {
            int32_t s[4] = {};
            for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
                for (int j = 0; j < 4; j++) s[j] += sums[4 * h + j] - r.sums[h];
            if (R == 4)
                for (int j = 0; j < 4; j++) total[j] += (Real)s[j] * w.scales[g * N + i + j];
            else
                for (int j = 0; j < R; j++) total[j] += (Real)s[j] * w.scales[g * N + i + j];
        }
        for (int j = 0; j < R; j++) y[i + j] = total[j] / r.scale;
    }
}

}  // namespace

extern "C" int thimble_best_isa() { return best_isa(); }

// x (M, K), codes (N, ceil(K / 256) * 64) -> y (M, N). group is 0 or a multiple of 128 that divides K.
extern "C" void thimble_linear(const float* x, const uint8_t* codes, const float* scales, float* y, int64_t M,
                               int64_t N, int64_t K, int64_t group, int isa, int n_threads) {
    static thread_local std::vector<Rounded<float>> rows;         // keeps its memory from call to call
    if ((int64_t)rows.size() < M) rows.resize(M);
    const Rounded<float>* rounded = rows.data();               // the threads below have `rows` of their own
    for (int64_t m = 0; m < M; m++) round_row(x + m * K, K, rows[m]);
    const Matrix w{codes, scales};
    const int64_t chunk = 64;                              // rows whose codes stay in the first cache for all tokens
    [[maybe_unused]] const bool worth = M * N * K >= 1 << 22;  // less is done before a second thread wakes up
#pragma omp parallel for num_threads(n_threads) if (worth && n_threads > 1)
    for (int64_t i = 0; i < N; i += chunk)
        for (int64_t m = 0; m < M; m++)
            multiply(w, i, std::min(N, i + chunk), N, K, group, rounded[m], y + m * N, isa);
}

// ---- Model.step of a packed model in one call, for one row
//
// Its floating-point parts are in double. In float, two ways to add up the same numbers differ in the last bit; now and
// then that tips the rounding of an activation, which moves all that comes after by a visible amount. In double they
// agree.

namespace {

CLONES double dot(const double* a, const double* b, int64_t n) {
    double acc[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) acc[j] += a[i + j] * b[i + j];
    double sum = 0;
    for (; i < n; i++) sum += a[i] * b[i];
    for (int j = 0; j < 16; j++) sum += acc[j];
    return sum;
}

float to_float(uint16_t half) {
    const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    float magnitude = std::ldexp((float)(exponent ? fraction | 1024 : fraction), exponent ? (int)exponent - 25 : -24);
    return half >> 15 ? -magnitude : magnitude;            // no infinities: weights are finite
}

// The head: nothing is rounded after it, so float will do.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) float dot_half_avx512(const uint16_t* a, const float* b, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(a + i)));
        sum = _mm512_fmadd_ps(wide, _mm512_loadu_ps(b + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx2,f16c"))) float dot_half_avx2(const uint16_t* a, const float* b, int64_t n) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8)
        sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(a + i))),
                                               _mm256_loadu_ps(b + i)));
    float parts[8], total = 0;
    _mm256_storeu_ps(parts, sum);
    for (float part : parts) total += part;
    return total;
}
#endif

float dot_half(const uint16_t* a, const float* b, int64_t n, int isa) {
    float sum = 0;
#if defined(__x86_64__)
    if (isa == AVX512 && n % 16 == 0) return dot_half_avx512(a, b, n);
    if (isa >= AVX2 && n % 8 == 0) return dot_half_avx2(a, b, n);
#elif defined(__aarch64__)
    for (int64_t i = 0; i < n; i++) sum += (float)*(const __fp16*)(a + i) * b[i];
    return sum;
#endif
    for (int64_t i = 0; i < n; i++) sum += to_float(a[i]) * b[i];
    return sum;
}

CLONES void add_scaled(double* y, double w, const double* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += w * x[i];
}

CLONES void scale_by(double* y, const double* x, double r, const double* gain, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * gain[i];
}

void rms_norm(double* y, const double* x, const double* gain, int64_t n, double eps) {
    scale_by(y, x, 1 / std::sqrt(dot(x, x, n) / n + eps), gain, n);
}

void softmax(double* x, int64_t n) {
    double top = *std::max_element(x, x + n), sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] = std::exp(x[i] - top);
    for (int64_t i = 0; i < n; i++) x[i] /= sum;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Streams { const double *bias, *gain, *proj, *scale; };  // proj and what it needs: null where static

struct Layer {                                             // in the order in which kernels/ternary.py lists them
    const double* attn_norm;
    Matrix q, k, v, o;
    const double* attn_sub_norm;                           // null: none
    Streams attn_streams;
    const double* mlp_norm;
    Matrix gate, up, down;
    const double* mlp_sub_norm;
    Streams mlp_streams;
    double *keys, *values;                                 // the cache, (K, max_len, D) each
};

struct Shape {
    int64_t n_layer, n_head, n_kv_head, n_embd, n_hidden, vocab_size, group_size, n_streams, relu2, max_len;
};

// H_pre, H_post and H_res of mHC-lite for one token x (n, C); see Streams in ternary.py
void coefficients(const Streams& w, const double* x, int64_t n, int64_t C, double eps, double* pre, double* post,
                  double* res) {
    int64_t n_perm = n == 2 ? 2 : 24, n_all = 2 * n + n_perm;
    double logits[32];
    if (w.proj) {
        double r = 1 / std::sqrt(dot(x, x, n * C) / (n * C) + eps);
        std::vector<double> h(n * C);
        scale_by(h.data(), x, r, w.gain, n * C);
        for (int64_t i = 0; i < n_all; i++)
            logits[i] = w.bias[i] + w.scale[i < n ? 0 : i < 2 * n ? 1 : 2] * dot(w.proj + i * n * C, h.data(), n * C);
    } else {
        std::copy(w.bias, w.bias + 2 * n, logits);
        logits[2 * n] = 0;
        std::copy(w.bias + 2 * n, w.bias + n_all - 1, logits + 2 * n + 1);
    }
    softmax(logits + 2 * n, n_perm);
    std::fill(res, res + n * n, 0.);
    int order[4] = {0, 1, 2, 3};
    for (int64_t k = 0; k < n_perm; k++, std::next_permutation(order, order + n))
        for (int64_t s = 0; s < n; s++) res[s * n + order[s]] += logits[2 * n + k];
    for (int64_t s = 0; s < n; s++) pre[s] = sigmoid(logits[s]), post[s] = 2 * sigmoid(logits[n + s]);
}

// x (n, C) <- the streams mixed, plus what f makes of the layer's input
template <class F>
void around(const Streams& w, double* x, int64_t n, int64_t C, double eps, double* h, double* y, double* mixed, F f) {
    if (n == 1) {
        f(x, y);
        add_scaled(x, 1, y, C);
        return;
    }
    double pre[4], post[4], res[16];
    coefficients(w, x, n, C, eps, pre, post, res);
    std::fill(h, h + C, 0.);
    std::fill(mixed, mixed + n * C, 0.);
    for (int64_t s = 0; s < n; s++) {
        add_scaled(h, pre[s], x + s * C, C);
        for (int64_t t = 0; t < n; t++) add_scaled(mixed + t * C, res[s * n + t], x + s * C, C);
    }
    f(h, y);
    for (int64_t t = 0; t < n; t++) add_scaled(mixed + t * C, post[t], y, C);
    std::copy(mixed, mixed + n * C, x);
}

}  // namespace

// T tokens at positions pos, pos + 1, ... -> logits (V) after the last. embed (V, C) is float16; cos, sin (max_len, D)
// begin at pos.
extern "C" void thimble_step(const Shape* shape, const Layer* layers, const uint16_t* embed, const double* norm,
                             const double* cos, const double* sin, double eps, const int64_t* tokens, int64_t T,
                             int64_t pos, float* logits, int isa, int n_threads) {
    const auto [L, H, K, C, M, V, group, n, relu2, max_len] = *shape;
    const int64_t D = C / H, wide = std::max(C, M);
    static thread_local std::vector<double> buffer;
    static thread_local Rounded<double> rounded;
    buffer.resize(2 * n * C + 8 * wide + pos + T);
    double *x = buffer.data(), *mixed = x + n * C, *in = mixed + n * C, *h = in + wide, *y = h + wide, *q = y + wide,
           *att = q + wide, *gate = att + wide, *up = gate + wide, *turned = up + wide, *scores = turned + wide;
    const Rounded<double>& r = rounded;                    // for all threads: `rounded` is this one's
    auto product = [&](const Matrix& w, int64_t rows, int64_t cols, double* out) {
        [[maybe_unused]] const bool worth = n_threads > 1 && rows * cols >= 1 << 21;
#pragma omp parallel for num_threads(n_threads) if (worth)
        for (int64_t i = 0; i < rows; i += 64) multiply(w, i, std::min(rows, i + 64), rows, cols, group, r, out, isa);
    };
    for (int64_t t = 0; t < T; t++, pos++, cos += D, sin += D) {
        for (int64_t i = 0; i < n * C; i++) x[i] = to_float(embed[tokens[t] * C + i % C]);
        auto rotate = [&](double* head) {                  // sin has the sign of the first half in it
            for (int64_t i = 0; i < D; i++) turned[i] = head[i] * cos[i] + head[(i + D / 2) % D] * sin[i];
            std::copy(turned, turned + D, head);
        };
        for (const Layer* w = layers; w < layers + L; w++) {
            around(w->attn_streams, x, n, C, eps, in, y, mixed, [&](const double* in, double* out) {
                rms_norm(h, in, w->attn_norm, C, eps);
                round_row(h, C, rounded);
                double *k = gate, *v = up;
                product(w->q, C, C, q);
                product(w->k, K * D, C, k);
                product(w->v, K * D, C, v);
                for (int64_t i = 0; i < H; i++) rotate(q + i * D);
                for (int64_t i = 0; i < K; i++) {
                    rotate(k + i * D);
                    std::copy(k + i * D, k + i * D + D, w->keys + (i * max_len + pos) * D);
                    std::copy(v + i * D, v + i * D + D, w->values + (i * max_len + pos) * D);
                }
                std::fill(att, att + C, 0.);
                for (int64_t i = 0; i < H; i++) {
                    const int64_t kv = i / (H / K) * max_len * D;
                    for (int64_t s = 0; s <= pos; s++)
                        scores[s] = dot(q + i * D, w->keys + kv + s * D, D) / std::sqrt((double)D);
                    softmax(scores, pos + 1);
                    for (int64_t s = 0; s <= pos; s++) add_scaled(att + i * D, scores[s], w->values + kv + s * D, D);
                }
                if (w->attn_sub_norm) rms_norm(att, att, w->attn_sub_norm, C, eps);
                round_row(att, C, rounded);
                product(w->o, C, C, out);
            });
            around(w->mlp_streams, x, n, C, eps, in, y, mixed, [&](const double* in, double* out) {
                rms_norm(h, in, w->mlp_norm, C, eps);
                round_row(h, C, rounded);
                product(w->gate, M, C, gate);
                product(w->up, M, C, up);
                for (int64_t i = 0; i < M; i++) {
                    const double g = gate[i], positive = std::max(g, 0.);
                    gate[i] = (relu2 ? positive * positive : g * sigmoid(g)) * up[i];
                }
                if (w->mlp_sub_norm) rms_norm(gate, gate, w->mlp_sub_norm, M, eps);
                round_row(gate, M, rounded);
                product(w->down, C, M, out);
            });
        }
    }
    std::vector<float> last(C);
    for (int64_t s = 0; s < n; s++) {
        rms_norm(h, x + s * C, norm, C, eps);
        for (int64_t i = 0; i < C; i++) last[i] += (float)h[i];
    }
    const float* final = last.data();
    [[maybe_unused]] const bool worth = n_threads > 1 && V * C >= 1 << 21;
#pragma omp parallel for num_threads(n_threads) if (worth)
    for (int64_t i = 0; i < V; i++) logits[i] = dot_half(embed + i * C, final, C, isa);
}
