// The few operations whose library versions would stall a GPU thread. A control step is one long
// chain of dependent arithmetic on one lane: CUDA's own double division, square root and sine each
// branch for operands that never occur here, and a branch keeps independent operations from
// overlapping. docs/design.md has the measurements.
#pragma once

#include "state.h"

namespace adaptlr {

#ifdef __CUDA_ARCH__
__device__ inline int64_t bits_of(double x) { return __double_as_longlong(x); }
__device__ inline double from_bits(int64_t bits) { return __longlong_as_double(bits); }

/// 1 / x for a normal x: the hardware's 20 bits, tripled by one step of third order.
__device__ inline double reciprocal(double x) {
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  const double error = fma(-x, r, 1.0);
  return fma(r, fma(error, error, error), r);
}

/// 1 / sqrt(x) for a normal x > 0, likewise.
__device__ inline double inverse_square_root(double x) {
  double r;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  const double error = fma(-x * r, r, 1.0);
  return fma(r * error, fma(0.375, error, 0.5), r);
}

/// a / b for a normal b, to the last bit or two.
__device__ inline double divide(double a, double b) { return a * reciprocal(b); }

/// Of x >= 0; what is not normal comes out next to 0.
__device__ inline double square_root(double x) {
  return x * inverse_square_root(x > 1e-300 ? x : 1e-300);
}
#else
inline int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double from_bits(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline double inverse_square_root(double x) { return 1.0 / sqrt(x); }
inline double divide(double a, double b) { return a / b; }
inline double square_root(double x) { return sqrt(x); }
#endif

/// Of numbers: unlike fmax and fmin these need not look for NaN.
ADAPTLR_HOST_DEVICE inline double larger(double a, double b) { return a > b ? a : b; }
ADAPTLR_HOST_DEVICE inline double smaller(double a, double b) { return a < b ? a : b; }

/// The polynomial with these coefficients, lowest power first. Estrin's scheme: short chains side
/// by side rather than Horner's single long one.
ADAPTLR_HOST_DEVICE inline double polynomial(const double (&c)[11], double x) {
  const double x2 = x * x, x4 = x2 * x2;
  const double low = (c[0] + c[1] * x) + (c[2] + c[3] * x) * x2;
  const double middle = (c[4] + c[5] * x) + (c[6] + c[7] * x) * x2;
  const double high = (c[8] + c[9] * x) + c[10] * x2;
  return low + (middle + high * x4) * x4;
}

/// sin(pi/2 x) for x in [-1, 1], to 4e-16. Its Taylor series; the first term left out is 1e-18.
ADAPTLR_HOST_DEVICE inline double sin_quarter_turns(double x) {
  constexpr double kCoefficients[] = {
      1.5707963267948966192,      -0.64596409750624625366,    0.079692626246167045121,
      -0.0046817541353186881007,  1.6044118478735982187e-4,   -3.5988432352120853405e-6,
      5.6921729219679268118e-8,   -6.6880351098114672325e-10, 6.0669357311061956671e-12,
      -4.3770654673137422772e-14, 2.5714228928604738662e-16,
  };
  return x * polynomial(kCoefficients, x * x);
}

/// ln x of a normal x > 0, to 7e-16 of itself. With x = 2^k m and m within a root of 2 of 1,
/// ln x = k ln 2 + 2 atanh s, s = (m - 1) / (m + 1): |s| < 0.172, and the first term of the series
/// that is left out is 1e-18.
ADAPTLR_HOST_DEVICE inline double logarithm(double x) {
  constexpr double kCoefficients[] = {
      2.0,        2.0 / 3.0,  2.0 / 5.0,  2.0 / 7.0,  2.0 / 9.0,  2.0 / 11.0,
      2.0 / 13.0, 2.0 / 15.0, 2.0 / 17.0, 2.0 / 19.0, 2.0 / 21.0,
  };
  constexpr int64_t kRootHalf = 0x3fe6a09e00000000; // bits of sqrt(1/2), from below
  const int64_t k = (bits_of(x) - kRootHalf) >> 52;
  const double m = from_bits(bits_of(x) - k * (int64_t{1} << 52));
  const double s = divide(m - 1.0, m + 1.0);
  return static_cast<double>(static_cast<int32_t>(k)) * 0.69314718055994530942 +
         s * polynomial(kCoefficients, s * s);
}

} // namespace adaptlr
