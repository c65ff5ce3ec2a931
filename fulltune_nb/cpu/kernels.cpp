// Element-wise work of a training step on float32 arrays in main memory, each function on a range of elements or rows.
// Compiled by `kernels.py` when a training run begins.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

// Sums are made in lanes that a processor adds at once, in float32, and from block to block in float64.
constexpr std::size_t LANES = 32, BLOCK = 2048;

// exp of x <= 0, as in `fast_math.py`: range reduction and a polynomial; 0 below -87.
inline float exp_of_negative(float x) {
    x = x < -88.0f ? -88.0f : x;
    const float shifted = x * 1.4426950408889634f + 12583039.0f;
    const float k = shifted - 12583039.0f;
    const float r = x - k * 0.693359375f - k * -2.12194440e-4f;
    const float square = r * r;
    const float polynomial =
        ((0.008312520571053028f * r + 0.04189015552401543f) * square + (0.16667114198207855f * r + 0.499992311000824f)) * square +
        (r + 1.0f);
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float two_to_k;
    std::memcpy(&two_to_k, &bits, 4);
    return polynomial * two_to_k;
}

inline float total(const float *lanes) {
    float sum = 0;
    for (std::size_t lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

// The largest of `count` >= 1 numbers; NaN if the first one is.
inline float largest(const float *x, std::size_t count) {
    float lanes[LANES], found = x[0];
    for (std::size_t lane = 0; lane < LANES; lane++)
        lanes[lane] = x[0];
    std::size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (std::size_t lane = 0; lane < LANES; lane++)
            lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    for (std::size_t lane = 0; lane < LANES; lane++)
        found = lanes[lane] > found ? lanes[lane] : found;
    for (; i < count; i++)
        found = x[i] > found ? x[i] : found;
    return found;
}

// x becomes exp(x - maximum); returns the sum.
inline double exponentials(float *__restrict x, std::size_t count, float maximum) {
    float lanes[LANES] = {};
    std::size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (std::size_t lane = 0; lane < LANES; lane++) {
            x[i + lane] = exp_of_negative(x[i + lane] - maximum);
            lanes[lane] += x[i + lane];
        }
    for (std::size_t lane = 0; i < count; i++, lane++)
        lanes[lane] += x[i] = exp_of_negative(x[i] - maximum);
    return total(lanes);
}

inline double squares(const float *x, std::size_t count) {
    float lanes[LANES] = {};
    std::size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (std::size_t lane = 0; lane < LANES; lane++)
            lanes[lane] += x[i + lane] * x[i + lane];
    for (std::size_t lane = 0; i < count; i++, lane++)
        lanes[lane] += x[i] * x[i];
    return total(lanes);
}

} // namespace

extern "C" {

// Adam's update in place; the arithmetic of `training/rules.py` in the same order of operations, so the same bits.
void adam(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, std::size_t count,
          float keep_m, float take_m, float keep_v, float take_v, float scale, float keep_p, float rate, float root, float eps) {
    for (std::size_t i = 0; i < count; i++) {
        const float scaled = g[i] * scale;
        m[i] = keep_m * m[i] + take_m * g[i];
        v[i] = keep_v * v[i] + take_v * (scaled * scaled);
        p[i] = keep_p * p[i] - rate * m[i] / (std::sqrt(v[i]) * root + eps);
    }
}

// Cross-entropy of rows of logits (rows, width), which become their gradients: weight * (softmax - one_hot(target)).
// `losses` (rows,) become weight * -log p(target).
void cross_entropy(float *__restrict logits, std::size_t rows, std::size_t width, const std::int32_t *targets, const float *weights,
                   float *losses) {
    for (std::size_t row = 0; row < rows; row++) {
        float *__restrict x = logits + row * width;
        const float at_target = x[targets[row]], maximum = largest(x, width);
        double sum = 0;
        for (std::size_t begin = 0; begin < width; begin += BLOCK)
            sum += exponentials(x + begin, width - begin < BLOCK ? width - begin : BLOCK, maximum);
        losses[row] = weights[row] * (maximum + std::log(float(sum)) - at_target);
        const float share = weights[row] / float(sum);
        for (std::size_t i = 0; i < width; i++)
            x[i] *= share;
        x[targets[row]] -= weights[row];
    }
}

double sum_of_squares(const float *x, std::size_t count) {
    double sum = 0;
    for (std::size_t begin = 0; begin < count; begin += BLOCK)
        sum += squares(x + begin, count - begin < BLOCK ? count - begin : BLOCK);
    return sum;
}
}
