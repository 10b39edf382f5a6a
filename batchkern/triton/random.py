"""Philox4x32-10 words, masks and normals for blocks of rows and columns: the numbers of ``csrc/philox.h``.

Elementary functions are polynomials in float32, because the hardware's approximations (``lg2.approx``, ``sin.approx``)
are too coarse for normals that agree with those of the CPU to 1e-6. The coefficients are near-minimax (Chebyshev) fits
for the ranges given.
"""

import triton
import triton.language as tl


@triton.jit
def random_words(seed, rows, quads):
    """Four words ``(R, N)`` uint32 for rows ``(R,)`` int64 and quads ``(N,)`` int32 of columns.

    The numbers of ``tl.philox``, with one 64-bit product instead of two instructions for its halves.
    """
    c0, c1 = rows.to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    c2 = quads.to(tl.uint32)[None, :]
    c3 = tl.zeros_like(c2)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def interleave(a, b, c, d):
    """Puts the elements of a quad next to each other: four ``(R, N)`` -> ``(R, 4 N)``."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def dropout_factors(seed, rows, quads, threshold, scale):
    """``scale`` if a column is kept, 0 if its word is below the threshold: ``(R, 4 N)`` float32."""
    a, b, c, d = random_words(seed, rows, quads)
    least = threshold.to(tl.uint32, bitcast=True)
    return interleave(
        tl.where(a >= least, scale, 0.0),
        tl.where(b >= least, scale, 0.0),
        tl.where(c >= least, scale, 0.0),
        tl.where(d >= least, scale, 0.0),
    )


@triton.jit
def clipped_normals(seed, rows, quads, sigma, tau):
    """``clip(sigma * z, -tau, tau)`` for standard normals z: ``(R, 4 N)`` float32."""
    a, b, c, d = random_words(seed, rows, quads)
    x0, x1 = box_muller(a, b, sigma)
    x2, x3 = box_muller(c, d, sigma)
    return tl.clamp(interleave(x0, x1, x2, x3), -tau, tau)


@triton.jit
def uniform(word, scale: tl.constexpr):
    """``scale``, a power of two, times u = (upper 23 bits + 1/2) / 2^23, exact: 1 + u - 2^-24 has the bits for it."""
    bits = (word >> 9) | 0x3F800000
    return tl.fma(bits.to(tl.float32, bitcast=True), scale, -0.999999940395355224609375 * scale)


@triton.jit
def box_muller(a, b, sigma):
    """Two normals of standard deviation ``sigma`` from two words."""
    # -2 log u = -2 e log 2 - 2 log(1 + f), with 1 + f in [sqrt(1/2), sqrt(2)); h = -2 f.
    bits = uniform(a, 1.0).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    h = tl.fma((bits - (e << 23)).to(tl.float32, bitcast=True), -2.0, 2.0)
    p = tl.fma(h, 0.0001536458514532278, 0.0005008495853892894)
    p = tl.fma(h, p, 0.0010235651426272314)
    p = tl.fma(h, p, 0.0022170312976037116)
    p = tl.fma(h, p, 0.005196125011775434)
    p = tl.fma(h, p, 0.012501230563184567)
    p = tl.fma(h, p, 0.031250965258729176)
    p = tl.fma(h, p, 0.08333330364777214)
    p = tl.fma(h, p, 0.24999998830925269)
    square = tl.fma(e.to(tl.float32), -1.3862943611198906, tl.fma(h * h, p, h))
    # One Newton step for the root: the error of sqrt.approx is twice as large.
    inverse = tl.rsqrt(square)
    root = square * inverse
    radius = sigma * tl.fma(0.5 * inverse, tl.fma(-root, root, square), root)

    # cos and sin of 2 pi u from those of r quarter turns, with r in [-1/2, 1/2]. Adding 1.5 * 2^23 rounds to an integer
    # in the low bits.
    turns = uniform(b, 4.0)
    shifted = turns + 12582912.0
    quadrant = shifted.to(tl.int32, bitcast=True)
    r = turns - (shifted - 12582912.0)
    z = r * r
    s = tl.fma(z, -0.004602163104755583, 0.07968022285810314)
    s = tl.fma(z, s, -0.6459634781534168)
    s = tl.fma(z, s, 1.5707963219600274) * r
    c = tl.fma(z, 0.0009067417198105395, -0.020861529025332864)
    c = tl.fma(z, c, 0.25366941042116803)
    c = tl.fma(z, c, -1.2337005493751103)
    c = tl.fma(z, c, 1.0)
    odd = (quadrant & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return radius * flip_sign(cosine, (quadrant + 1) & 2), radius * flip_sign(sine, quadrant & 2)


@triton.jit
def flip_sign(x, two):
    """-x if ``two`` is 2, x if it is 0."""
    return (x.to(tl.int32, bitcast=True) ^ (two << 30)).to(tl.float32, bitcast=True)
