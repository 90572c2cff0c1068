// The few operations whose library versions would stall a GPU thread. A control step is one long
// chain of dependent arithmetic on one lane: CUDA's own double division, square root and sine each
// branch for operands that never occur here, and a branch keeps independent operations from
// overlapping. docs/design.md has the measurements.
#pragma once

#include "state.h"

namespace adaptlr {

#ifdef __CUDA_ARCH__
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
inline double inverse_square_root(double x) { return 1.0 / sqrt(x); }
inline double divide(double a, double b) { return a / b; }
inline double square_root(double x) { return sqrt(x); }
#endif

/// Of numbers: unlike fmax and fmin these need not look for NaN.
ADAPTLR_HOST_DEVICE inline double larger(double a, double b) { return a > b ? a : b; }
ADAPTLR_HOST_DEVICE inline double smaller(double a, double b) { return a < b ? a : b; }

/// sin(pi/2 x) for x in [-1, 1], to 4e-16. Its Taylor series; the first term left out is 1e-18.
ADAPTLR_HOST_DEVICE inline double sin_quarter_turns(double x) {
  constexpr double kCoefficients[] = {
      1.5707963267948966192,      -0.64596409750624625366,    0.079692626246167045121,
      -0.0046817541353186881007,  1.6044118478735982187e-4,   -3.5988432352120853405e-6,
      5.6921729219679268118e-8,   -6.6880351098114672325e-10, 6.0669357311061956671e-12,
      -4.3770654673137422772e-14, 2.5714228928604738662e-16,
  };
  // Estrin's scheme: short chains side by side rather than Horner's single long one.
  const auto& c = kCoefficients;
  const double x2 = x * x, x4 = x2 * x2, x8 = x4 * x4;
  const double low = (c[0] + c[1] * x2) + (c[2] + c[3] * x2) * x4;
  const double middle = (c[4] + c[5] * x2) + (c[6] + c[7] * x2) * x4;
  const double high = (c[8] + c[9] * x2) + c[10] * x4;
  return x * (low + (middle + high * x8) * x8);
}

} // namespace adaptlr
