// What a CPU runs natively: choosing, packing and unpacking 2:4 FP8 weights (any CPU), and products with few rows of
// activations that read the packed weight as it is (AVX-512 with VBMI2 and BF16). `cpu24.py` compiles this file for
// the CPU it runs on, and says what the ops do. Loops are written without branches so that compilers vectorise them;
// every rounding is that of the plain-torch definitions, so nothing may be contracted to fused multiply-adds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && \
    defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
#define EXPAND24
#include <immintrin.h>
#endif

namespace {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t WEIGHTS_PER_THREAD = 1 << 15;  // fewer are not worth waking a thread for

int64_t rows_per_thread(int64_t cols) { return std::max<int64_t>(1, WEIGHTS_PER_THREAD / std::max<int64_t>(cols, 1)); }

template <typename T>
const T* data_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "cpu24: an argument is not contiguous");
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* data_of(const MaybeTensor& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// calls f with a null pointer of the C++ type of a floating dtype
template <typename F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    default: STD_TORCH_CHECK(false, "cpu24: bfloat16, float16 or float32 is wanted");
  }
}

// ---- e4m3

float e4m3_to_float(uint8_t byte) {
  int exponent = byte >> 3 & 15, mantissa = byte & 7;
  float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return float_of(((byte & 0x7f) == 0x7f ? 0x7fc00000u : bits_of(value)) | uint32_t(byte & 0x80) << 24);
}

// Rounds |f| <= 448 to the nearest, ties to even; -0 becomes +0.
uint8_t e4m3_of(float f) {
  uint32_t bits = bits_of(f), a = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  uint32_t normal = (a + 0x7ffffu + (a >> 20 & 1u) - (120u << 23)) >> 20;  // exponent bias 127 becomes 7
  uint32_t tiny = bits_of(float_of(a) + 16384.0f) - bits_of(16384.0f);     // whose last bit is 2^-9
  uint32_t magnitude = a < 121u << 23 ? tiny : normal;
  return magnitude ? magnitude | sign : 0;
}

// ---- scores: the elementwise parts of `saliency.py`, in the same order of operations

enum Saliency : int64_t { CONTRIBUTION, RANK_ONE, RELATIVE, MAGNITUDE };

struct Terms {
  const float *channel, *row, *column, *whole;
};

// bits of the largest magnitude; above 0x7f7fffff: not finite
uint32_t largest(const float* __restrict x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

void score_row(const float* __restrict w, int64_t n, int64_t saliency, const Terms& terms, int64_t row,
               float* __restrict out) {
  int exponent;
  std::frexp(float_of(largest(w, n)), &exponent);
  int half = -exponent >> 1;
  const float first = float_of(uint32_t(half + 127) << 23), second = float_of(uint32_t(-exponent - half + 127) << 23);
  const float* __restrict channel = terms.channel;
  if (saliency == CONTRIBUTION) {
    for (int64_t i = 0; i < n; ++i) {
      float unit = w[i] * first * second;
      out[i] = unit * unit * channel[i];
    }
  } else if (saliency == RANK_ONE) {
    for (int64_t i = 0; i < n; ++i) {
      float unit = w[i] * first * second;
      out[i] = unit * unit / channel[i];
    }
  } else if (saliency == RELATIVE) {
    const float sum = terms.row[row], third = terms.whole[0], fourth = terms.whole[1];
    const float* __restrict column = terms.column;
    for (int64_t i = 0; i < n; ++i) {
      float by_row = std::fabs(w[i] * first * second) / sum, by_column = std::fabs(w[i] * third * fourth) / column[i];
      out[i] = (by_row + by_column) * channel[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = std::fabs(w[i] * first * second);
  }
}

// ---- which two of four; a group's choice is four bytes 0 or 1 in one word, as torch.bool lies in memory

uint32_t two_of(uint32_t x, uint32_t y, uint32_t z) { return (x & y) | (z & (x | y)); }

void best_two(const float* __restrict scores, int64_t groups, uint32_t* __restrict keep) {
  for (int64_t j = 0; j < groups; ++j) {
    float a = scores[4 * j], b = scores[4 * j + 1], c = scores[4 * j + 2], d = scores[4 * j + 3];
    uint32_t ab = -(a >= b), ac = -(a >= c), ad = -(a >= d), bc = -(b >= c), bd = -(b >= d), cd = -(c >= d);
    keep[j] = (two_of(ab, ac, ad) & 1u) | (two_of(~ab, bc, bd) & 1u << 8) | (two_of(~ac, ~bc, cd) & 1u << 16) |
              (two_of(~ad, ~bd, ~cd) & 1u << 24);
  }
}

struct Rates {
  float mean, dev, lambda;
  const float* decay;  // [2, levels]: of the mean and of the deviation
  int64_t levels, tree, level;  // tree: a power of two, 2^level
};

// State before each entry of the recurrence y = decay * y + step, by the tree of `ewma.py`: steps [size] into states
// [size], `carry` enters. Returns what the whole tree adds to the state it hands on. `work`: 2 * size.
float states_of(const float* __restrict steps, int64_t size, const float* decay, float carry, float* __restrict states,
                float* __restrict work) {
  if (size == 1) {
    states[0] = carry;
    return steps[0];
  }
  const int64_t half = size / 2;
  float *pairs = work, *__restrict entering = work + half;
  const float by = decay[0];
  for (int64_t i = 0; i < half; ++i) pairs[i] = steps[2 * i] * by + steps[2 * i + 1];
  const float total = states_of(pairs, half, decay + 1, carry, entering, work + size);
  for (int64_t i = 0; i < half; ++i) {
    states[2 * i] = entering[i];
    states[2 * i + 1] = entering[i] * by + steps[2 * i];
  }
  return total;
}

// As `ewma._before`: steps [n], n a multiple of the tree, lose their first entry to the seed.
void before(float* steps, int64_t n, float seed, const float* decay, const Rates& rates, float* states, float* work) {
  steps[0] = seed;
  float carry = 0;
  for (int64_t at = 0; at < n; at += rates.tree) {
    const float total = states_of(steps + at, rates.tree, decay, carry, states + at, work);
    carry = carry * decay[rates.level] + total;
  }
  states[0] = seed;
}

// How many groups the threshold settles.
int64_t settled_of(const float* __restrict scores, int64_t groups, const Rates& rates, std::vector<float>& buffer) {
  const int64_t n = (groups + rates.tree - 1) / rates.tree * rates.tree;
  buffer.resize(4 * n + 2 * rates.tree);
  float *__restrict x = buffer.data(), *__restrict steps = x + n, *__restrict mean = x + 2 * n,
        *__restrict dev = x + 3 * n, *work = x + 4 * n;
  for (int64_t j = 0; j < groups; ++j)
    x[j] = ((scores[4 * j] + scores[4 * j + 1]) + (scores[4 * j + 2] + scores[4 * j + 3])) * 0.25f;
  std::fill(x + groups, x + n, 0.0f);
  for (int64_t j = 0; j < n; ++j) steps[j] = x[j] * rates.mean;
  before(steps, n, x[0], rates.decay, rates, mean, work);
  for (int64_t j = 0; j < n; ++j) steps[j] = std::fabs(x[j] - mean[j]) * rates.dev;
  before(steps, n, x[0] / 2, rates.decay + rates.levels, rates, dev, work);
  int32_t settled = 0;
  for (int64_t j = 0; j < groups; ++j) {
    float threshold = mean[j] + rates.lambda * dev[j];
    int32_t above = (scores[4 * j] > threshold) + (scores[4 * j + 1] > threshold) + (scores[4 * j + 2] > threshold) +
                    (scores[4 * j + 3] > threshold);
    settled += above == 2;
  }
  return settled;
}

// ---- packing

// whether every group keeps exactly two
bool is_24(const uint32_t* __restrict keep, int64_t groups) {
  uint32_t wrong = 0;
  for (int64_t j = 0; j < groups; ++j) wrong |= (keep[j] * 0x01010101u >> 24) ^ 2u;
  return wrong == 0;
}

// the two kept values of every group, and its nibble (`pack24.py`)
void compact(const float* __restrict w, const uint32_t* __restrict keep, int64_t groups, float* __restrict kept,
             uint8_t* __restrict nibble) {
  for (int64_t j = 0; j < groups; ++j) {
    uint32_t a = -(keep[j] & 1u), b = -(keep[j] >> 8 & 1u), c = -(keep[j] >> 16 & 1u), d = -(keep[j] >> 24 & 1u);
    uint32_t first_b = b & ~a, first_c = ~(a | b), second_c = c & ~d, second_b = ~(c | d);
    kept[2 * j] = float_of((bits_of(w[4 * j]) & a) | (bits_of(w[4 * j + 1]) & first_b) |
                           (bits_of(w[4 * j + 2]) & first_c));
    kept[2 * j + 1] = float_of((bits_of(w[4 * j + 3]) & d) | (bits_of(w[4 * j + 2]) & second_c) |
                               (bits_of(w[4 * j + 1]) & second_b));
    nibble[j] = (first_b & 1u) | (first_c & 2u) | (d & 12u) | (second_c & 8u) | (second_b & 4u);
  }
}

void quantize(const float* __restrict kept, float scale, int64_t n, uint8_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    float v = kept[i] / scale;
    v = v > 448.0f ? 448.0f : v;
    v = v < -448.0f ? -448.0f : v;
    out[i] = e4m3_of(v);
  }
}

void join(const uint8_t* __restrict nibble, int64_t n, uint8_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = nibble[2 * i] | nibble[2 * i + 1] << 4;
}

// a row as float32: itself, or converted into `buffer`
const float* as_float(const float* row, int64_t, std::vector<float>&) { return row; }

const float* as_float(const BFloat16* row, int64_t n, std::vector<float>& buffer) {
  buffer.resize(n);
  const uint16_t* __restrict in = reinterpret_cast<const uint16_t*>(row);
  float* __restrict out = buffer.data();
  for (int64_t i = 0; i < n; ++i) out[i] = float_of(uint32_t(in[i]) << 16);
  return out;
}

const float* as_float(const Half* row, int64_t n, std::vector<float>& buffer) {
  buffer.assign(row, row + n);
  return buffer.data();
}

std::tuple<Tensor, Tensor> cpu_select24(const Tensor& weight, int64_t saliency, const MaybeTensor& channel,
                                        const MaybeTensor& row, const MaybeTensor& column, const MaybeTensor& whole,
                                        const MaybeTensor& decays, double mean_rate, double dev_rate, double lambda,
                                        int64_t tree) {
  const int64_t rows = weight.size(0), cols = weight.size(1), groups = cols / 4;
  const Terms terms{data_of<float>(channel), data_of<float>(row), data_of<float>(column), data_of<float>(whole)};
  Rates rates{float(mean_rate), float(dev_rate), float(lambda), data_of<float>(decays), 0, tree, 0};
  if (decays) rates.levels = decays->size(1);
  while (int64_t(1) << rates.level < tree) ++rates.level;
  Tensor mask = torch::stable::new_empty(weight, {rows, cols}, ScalarType::Bool);
  Tensor settled = torch::stable::new_empty(weight, {rows}, ScalarType::Int);
  auto* keep = static_cast<uint32_t*>(mask.data_ptr());
  auto* counts = static_cast<int32_t*>(settled.data_ptr());
  with_type(weight.scalar_type(), [&](auto* type) {
    const auto* data = data_of<std::remove_pointer_t<decltype(type)>>(weight);
    torch::stable::parallel_for(0, rows, rows_per_thread(cols), [&](int64_t begin, int64_t end) {
      std::vector<float> wide, scores(cols), buffer;
      for (int64_t n = begin; n < end; ++n) {
        score_row(as_float(data + n * cols, cols, wide), cols, saliency, terms, n, scores.data());
        best_two(scores.data(), groups, keep + n * groups);
        counts[n] = rates.decay ? settled_of(scores.data(), groups, rates, buffer) : 0;
      }
    });
  });
  return {mask, settled};
}

// A row whose mask is not 2:4 gets NaN for its scale.
std::tuple<Tensor, Tensor, Tensor> cpu_prune_pack24(const Tensor& weight, const MaybeTensor& mask, int64_t saliency,
                                                    const MaybeTensor& channel, const MaybeTensor& row,
                                                    const MaybeTensor& column, const MaybeTensor& whole) {
  const int64_t rows = weight.size(0), cols = weight.size(1), groups = cols / 4;
  const Terms terms{data_of<float>(channel), data_of<float>(row), data_of<float>(column), data_of<float>(whole)};
  Tensor qdata = torch::stable::new_empty(weight, {rows, cols / 2}, ScalarType::Float8_e4m3fn);
  Tensor metadata = torch::stable::new_empty(weight, {rows, cols / 8}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(weight, {rows, 1}, ScalarType::Float);
  const auto* given = data_of<uint32_t>(mask);
  auto* values = static_cast<uint8_t*>(qdata.data_ptr());
  auto* indices = static_cast<uint8_t*>(metadata.data_ptr());
  auto* scales = static_cast<float*>(scale.data_ptr());
  with_type(weight.scalar_type(), [&](auto* type) {
    const auto* data = data_of<std::remove_pointer_t<decltype(type)>>(weight);
    torch::stable::parallel_for(0, rows, rows_per_thread(cols), [&](int64_t begin, int64_t end) {
      std::vector<float> wide, scores(given ? 0 : cols), kept(cols / 2);
      std::vector<uint32_t> chosen(given ? 0 : groups);
      std::vector<uint8_t> nibble(groups);
      for (int64_t n = begin; n < end; ++n) {
        const float* w = as_float(data + n * cols, cols, wide);
        const uint32_t* keep = given ? given + n * groups : chosen.data();
        if (!given) {
          score_row(w, cols, saliency, terms, n, scores.data());
          best_two(scores.data(), groups, chosen.data());
        } else if (!is_24(keep, groups)) {
          scales[n] = float_of(0x7fc00000u);
          continue;
        }
        compact(w, keep, groups, kept.data(), nibble.data());
        scales[n] = std::max(float_of(largest(kept.data(), cols / 2)) / 448.0f, 0x1p-126f);
        quantize(kept.data(), scales[n], cols / 2, values + n * (cols / 2));
        join(nibble.data(), cols / 8, indices + n * (cols / 8));
      }
    });
  });
  return {qdata, metadata, scale};
}

Tensor cpu_unpack24(const Tensor& qdata, const Tensor& metadata, const MaybeTensor& scale, ScalarType dtype) {
  const int64_t rows = qdata.size(0), half = qdata.size(1);
  Tensor dense = torch::stable::new_empty(qdata, {rows, 2 * half}, dtype);
  const auto* values = data_of<uint8_t>(qdata);
  const auto* indices = data_of<uint8_t>(metadata);
  const auto* scales = data_of<float>(scale);
  float table[256];
  for (int i = 0; i < 256; ++i) table[i] = e4m3_to_float(i);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* out = static_cast<T*>(dense.data_ptr());
    torch::stable::parallel_for(0, rows, rows_per_thread(2 * half), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float by = scales ? scales[n] : 1.0f;
        T row_table[256];
        for (int i = 0; i < 256; ++i) row_table[i] = T(table[i] * by);
        std::memset(static_cast<void*>(out + n * 2 * half), 0, 2 * half * sizeof(T));
        for (int64_t j = 0; j < half / 2; ++j) {
          const int nibble = indices[n * (half / 4) + j / 2] >> (j % 2 * 4) & 15;
          T* group = out + n * 2 * half + 4 * j;
          group[nibble & 3] = row_table[values[n * half + 2 * j]];
          group[nibble >> 2] = row_table[values[n * half + 2 * j + 1]];
        }
      }
    });
  });
  return dense;
}

// ---- products with few rows of x

#ifdef EXPAND24

constexpr int BLOCK = 512;        // weights whose 64 bytes of metadata one vector holds
constexpr int STEP = 64;          // weights that one vector of bytes holds
constexpr int PREFETCH = 4096;    // bytes ahead in qdata: measured best of 0 to 8192, and twice as fast as 0

// e4m3 to bfloat16 by two lookups of 128 bytes, one for each byte of the result
struct DecodeTable {
  alignas(64) uint8_t high[128], low[128];

  DecodeTable() {
    for (int i = 0; i < 128; ++i) {
      uint32_t bits = bits_of(e4m3_to_float(i));
      high[i] = bits >> 24;
      low[i] = bits >> 16;
    }
  }
};

const DecodeTable decode_table;

struct Decoder {
  __m512i high[2], low[2];

  Decoder()
      : high{_mm512_load_si512(decode_table.high), _mm512_load_si512(decode_table.high + 64)},
        low{_mm512_load_si512(decode_table.low), _mm512_load_si512(decode_table.low + 64)} {}
};

struct Pair {
  __m512i a, b;
};

// 64 e4m3 to 64 bfloat16: `a` holds bytes 0 to 7 of every 16, `b` bytes 8 to 15
inline Pair decode(const Decoder& decoder, __m512i bytes) {
  __m512i high = _mm512_permutex2var_epi8(decoder.high[0], bytes, decoder.high[1]);
  __m512i low = _mm512_permutex2var_epi8(decoder.low[0], bytes, decoder.low[1]);
  high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(char(0x80)), 0xF8);  // high | (bytes & sign)
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// metadata of up to 512 weights -> a bit for each, set where it is kept; none beyond `bytes`
inline void keep_bits(const uint8_t* metadata, int64_t bytes, uint64_t* bits) {
  const __m512i of_nibble = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0));
  const __m512i four = _mm512_set1_epi8(15);
  __m512i m = _mm512_maskz_loadu_epi8(first_bytes(bytes), metadata);
  __m512i low = _mm512_shuffle_epi8(of_nibble, _mm512_and_si512(m, four));
  __m512i high = _mm512_shuffle_epi8(of_nibble, _mm512_and_si512(_mm512_srli_epi16(m, 4), four));
  _mm512_store_si512(bits, _mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
}

// Accumulators of M rows of x, several for each so that the sums need not wait for one another. X: what x is kept in.
template <int M, typename X>
struct Sums;

template <int M>
struct Sums<M, uint16_t> {
  static constexpr int EACH = M <= 4 ? 4 : 2;
  __m512 sum[M][EACH];

  inline void add(int m, int i, const Pair& w, const uint16_t* x) {
    __m512 &s = sum[m][2 * i % EACH], &t = sum[m][(2 * i + 1) % EACH];
    s = _mm512_dpbf16_ps(s, (__m512bh)w.a, (__m512bh)_mm512_loadu_si512(x));
    t = _mm512_dpbf16_ps(t, (__m512bh)w.b, (__m512bh)_mm512_loadu_si512(x + 32));
  }
};

template <int M>
struct Sums<M, float> {
  static constexpr int EACH = M <= 4 ? 4 : 2;
  __m512 sum[M][EACH];

  inline void add(int m, int i, const Pair& w, const float* x) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    const __m512i parts[4] = {_mm512_slli_epi32(w.a, 16), _mm512_and_si512(w.a, upper), _mm512_slli_epi32(w.b, 16),
                              _mm512_and_si512(w.b, upper)};
    for (int part = 0; part < 4; ++part) {
      __m512& s = sum[m][part % EACH];
      s = _mm512_fmadd_ps(_mm512_castsi512_ps(parts[part]), _mm512_loadu_ps(x + 16 * part), s);
    }
  }
};

// y[m] = sum over k of W[k] x[m, k], for one row of W; x in `order_of`'s order, `stride` apart, zero beyond K
template <int M, typename X>
void row_product(const uint8_t* values, const uint8_t* metadata, int64_t cols, const X* x, int64_t stride, float* y) {
  const Decoder decoder;
  Sums<M, X> sums;
  for (auto& row : sums.sum)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  alignas(64) uint64_t bits[BLOCK / STEP];
  int64_t k = 0;
  for (; k + BLOCK <= cols; k += BLOCK) {
    for (int i = 0; i < BLOCK / 2; i += 64) _mm_prefetch(values + k / 2 + PREFETCH + i, _MM_HINT_T0);
    _mm_prefetch(metadata + k / 8 + PREFETCH / 4, _MM_HINT_T0);
    keep_bits(metadata + k / 8, BLOCK / 8, bits);
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK / STEP; ++i) {
      __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k / 2 + i * STEP / 2));
      Pair w = decode(decoder, _mm512_maskz_expand_epi8(bits[i], _mm512_castsi256_si512(packed)));
      for (int m = 0; m < M; ++m) sums.add(m, i, w, x + m * stride + k + i * STEP);
    }
  }
  if (k < cols) {
    keep_bits(metadata + k / 8, (cols - k) / 8, bits);
    for (int i = 0; k < cols; ++i, k += STEP) {
      __m512i packed = _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(STEP, cols - k) / 2), values + k / 2);
      Pair w = decode(decoder, _mm512_maskz_expand_epi8(bits[i], packed));
      for (int m = 0; m < M; ++m) sums.add(m, 0, w, x + m * stride + k);
    }
  }
  for (int m = 0; m < M; ++m) {
    __m512 sum = sums.sum[m][0];
    for (int i = 1; i < Sums<M, X>::EACH; ++i) sum = _mm512_add_ps(sum, sums.sum[m][i]);
    y[m] = _mm512_reduce_add_ps(sum);
  }
}

template <typename X>
void row_products(const uint8_t* values, const uint8_t* metadata, int64_t cols, const X* x, int64_t stride,
                  int64_t rows, float* y) {
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    const X* from = x + m * stride;
    if (left >= 8) row_product<8>(values, metadata, cols, from, stride, y + m), m += 8;
    else if (left >= 4) row_product<4>(values, metadata, cols, from, stride, y + m), m += 4;
    else if (left >= 2) row_product<2>(values, metadata, cols, from, stride, y + m), m += 2;
    else row_product<1>(values, metadata, cols, from, stride, y + m), m += 1;
  }
}

// where in its 64 the i-th number that `Sums` multiplies lies
void order_of(const uint16_t*, uint8_t* order) {
  for (int i = 0; i < STEP; ++i) order[i] = i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
}

void order_of(const float*, uint8_t* order) {
  uint8_t words[STEP];
  order_of(static_cast<const uint16_t*>(nullptr), words);
  for (int i = 0; i < STEP; ++i) order[i] = words[i / 32 * 32 + i % 16 * 2 + i / 16 % 2];
}

// x [M, K] as rows of X in `order_of`'s order, padded with zeros to whole steps
template <typename X, typename From, typename Convert>
std::vector<X> ordered(const From* x, int64_t rows, int64_t cols, int64_t stride, Convert convert) {
  std::vector<X> out(rows * stride);
  uint8_t order[STEP];
  order_of(out.data(), order);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < stride; k += STEP)
      for (int i = 0; i < STEP; ++i) {
        const int64_t at = k + order[i];
        out[m * stride + k + i] = at < cols ? convert(x[m * cols + at]) : X(0);
      }
  return out;
}

Tensor expand24(const Tensor& x, const MaybeTensor& x_scale, const Tensor& qdata, const Tensor& metadata,
                const Tensor& scale, const MaybeTensor& bias, ScalarType out_dtype) {
  const int64_t rows = x.size(0), cols = x.size(1), outputs = qdata.size(0), stride = (cols + STEP - 1) / STEP * STEP;
  Tensor y = torch::stable::new_empty(x, {rows, outputs}, out_dtype);
  const auto* values = data_of<uint8_t>(qdata);
  const auto* indices = data_of<uint8_t>(metadata);
  const auto *scales = data_of<float>(scale), *x_scales = data_of<float>(x_scale), *biases = data_of<float>(bias);
  const auto run = [&](const auto& x_ordered, auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    auto* out = static_cast<Out*>(y.data_ptr());
    torch::stable::parallel_for(0, outputs, rows_per_thread(cols * std::max<int64_t>(rows, 1)),
                                [&](int64_t begin, int64_t end) {
      std::vector<float> sums(rows);
      for (int64_t n = begin; n < end; ++n) {
        row_products(values + n * (cols / 2), indices + n * (cols / 8), cols, x_ordered.data(), stride, rows,
                     sums.data());
        for (int64_t m = 0; m < rows; ++m) {
          float sum = sums[m] * (x_scales ? x_scales[m] : 1.0f) * scales[n];
          out[m * outputs + n] = Out(biases ? sum + biases[n] : sum);
        }
      }
    });
  };
  with_type(out_dtype, [&](auto* type) {
    switch (x.scalar_type()) {
      case ScalarType::Float8_e4m3fn: {
        uint16_t table[256];
        for (int i = 0; i < 256; ++i) table[i] = bits_of(e4m3_to_float(i)) >> 16;
        const auto convert = [&](uint8_t v) { return table[v]; };
        return run(ordered<uint16_t>(data_of<uint8_t>(x), rows, cols, stride, convert), type);
      }
      case ScalarType::BFloat16:
        return run(ordered<uint16_t>(data_of<uint16_t>(x), rows, cols, stride, [](uint16_t v) { return v; }), type);
      case ScalarType::Half:
        return run(ordered<float>(data_of<Half>(x), rows, cols, stride, [](Half v) { return float(v); }), type);
      default:
        return run(ordered<float>(data_of<float>(x), rows, cols, stride, [](float v) { return v; }), type);
    }
  });
  return y;
}

#endif  // EXPAND24

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hwpq_fx, m) {
  m.def("cpu_select24(Tensor weight, int saliency, Tensor? channel, Tensor? row, Tensor? column, Tensor? whole, "
        "Tensor? decays, float mean_rate, float dev_rate, float lam, int tree) -> (Tensor, Tensor)");
  m.def("cpu_prune_pack24(Tensor weight, Tensor? mask, int saliency, Tensor? channel, Tensor? row, Tensor? column, "
        "Tensor? whole) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hwpq_fx, CPU, m) {
  m.impl("cpu_select24", TORCH_BOX(&cpu_select24));
  m.impl("cpu_prune_pack24", TORCH_BOX(&cpu_prune_pack24));
  m.impl("cpu_unpack24", TORCH_BOX(&cpu_unpack24));
#ifdef EXPAND24
  m.impl("expand24", TORCH_BOX(&expand24));
#endif
}
