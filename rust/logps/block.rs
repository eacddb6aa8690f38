//! The loops over one block of columns, compiled for AVX-512, AVX2 and the baseline and chosen at run time.
//!
//! Every loop adds into [`LANES`] partial sums, column `j` of the block into lane `j % LANES`, and merges them in one
//! fixed tree; where multiply and add are one rounding they are so everywhere. So the bits depend neither on the vector
//! width nor on threads. (A processor without fused multiply-add computes the same bits, slowly, in software.)

// What these loops call must be compiled with the features of the loop, so inlined; names are those of the formulas; and
// the polynomial's coefficients are not the constants that they resemble.
#![allow(clippy::inline_always, clippy::many_single_char_names, clippy::approx_constant)]

use multiversion::multiversion;

use super::element::Element;
use super::prefetch::ahead_of;

/// Columns of one block: float32 values of a block fit into the first-level cache.
pub(super) const BLOCK: usize = 2048;
const LANES: usize = 16;

/// The transform of a logit: plain, times `scale`, or `cap * tanh(scale * z)`. Chosen per call, so that the plain path
/// costs nothing.
pub(super) const PLAIN: u8 = 0;
pub(super) const SCALED: u8 = 1;
pub(super) const CAPPED: u8 = 2;

/// `y = z`, `scale * z` or `cap * tanh(scale * z)`; the derivative of the last is `cap * scale * (1 - tanh^2)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Map {
    pub(super) kind: u8,
    pub(super) scale: f32,
    pub(super) cap: f32,
}

/// 2^x for x <= 3; 0 below -127, NaN stays NaN, relative error 1.6e-7.
///
/// Minimax polynomial on [-1/2, 1/2] with value 1 at 0 (error 9e-8), times a power of two put together from its bits. A
/// conversion from float to int would saturate and cost three times as much.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // 1.5 * 2^23 + 127: adding it leaves the nearest integer, with the bias of an exponent, in the low bits.
    const MAGIC: f32 = 12_583_039.0;
    let x = if x < -127.0 { -127.0 } else { x };
    let shifted = x + MAGIC;
    let f = x - (shifted - MAGIC);
    let p = 1.326_472_7e-3_f32.mul_add(f, 9.671_513e-3);
    let p = p.mul_add(f, 5.550_733_6e-2);
    let p = p.mul_add(f, 0.240_222_43);
    let p = p.mul_add(f, 0.693_147);
    let p = p.mul_add(f, 1.0);
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// e^x for x <= 2.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    exp2(x * std::f32::consts::LOG2_E)
}

/// tanh(u), and its derivative free of cancellation: with E = exp(-2|u|), `4E / (1 + E)^2`.
#[inline(always)]
fn tanh(u: f32) -> (f32, f32) {
    let a = u.abs();
    let e = exp(-2.0 * a);
    let far = (1.0 - e) / (1.0 + e);
    // Near 0 the quotient cancels. Cephes' tanhf: a + a^3 * polynomial(a^2) below 0.625.
    let z = a * a;
    let p = (-5.704_988_7e-3_f32).mul_add(z, 2.063_909e-2);
    let p = p.mul_add(z, -5.373_971_6e-2);
    let p = p.mul_add(z, 0.133_314_42);
    let p = p.mul_add(z, -0.333_332_8);
    let near = (p * z).mul_add(a, a);
    let t = if a < 0.625 { near } else { far };
    (t.copysign(u), 4.0 * e / ((1.0 + e) * (1.0 + e)))
}

impl Map {
    #[inline(always)]
    pub(super) fn apply<const KIND: u8>(self, z: f32) -> f32 {
        match KIND {
            PLAIN => z,
            SCALED => self.scale * z,
            _ => self.cap * tanh(self.scale * z).0,
        }
    }
}

/// The larger one; a NaN in `b` is passed over.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Merges the lanes in one fixed tree.
#[inline(always)]
fn tree(mut lanes: [f32; LANES], merge: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = merge(lanes[l], lanes[l + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Runs `add(lane, column value)` over the block in the fixed order.
#[inline(always)]
fn each_lane<T: Copy>(block: &[T], mut add: impl FnMut(usize, T)) {
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        ahead_of(chunk);
        for (l, &v) in chunk.iter().enumerate() {
            add(l, v);
        }
    }
    for (l, &v) in rest.iter().enumerate() {
        add(l, v);
    }
}

/// Writes the transformed block to `y`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn load<E: Element, const KIND: u8>(z: &[E::Bits], map: Map, y: &mut [f32]) {
    for (y, &z) in y.iter_mut().zip(z) {
        *y = map.apply::<KIND>(E::widen(z));
    }
}

/// The largest value of the block, NaN passed over; -inf if there is none.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn max<E: Element>(z: &[E::Bits]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    each_lane(z, |l, v| lanes[l] = larger(lanes[l], E::widen(v)));
    tree(lanes, larger)
}

/// Sum of the block.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn sum(y: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    each_lane(y, |l, v| lanes[l] += v);
    tree(lanes, |a, b| a + b)
}

/// Maximum, NaN passed over, and `sum exp(z - shift)` of the block in one read; the sum is right if `shift` is not below
/// the maximum, and to be thrown away otherwise.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn max_and_sum<E: Element>(z: &[E::Bits], shift: f32) -> (f32, f32) {
    let (mut max, mut sum) = ([f32::NEG_INFINITY; LANES], [0.0; LANES]);
    each_lane(z, |l, v| {
        let v = E::widen(v);
        max[l] = larger(max[l], v);
        sum[l] += exp(v - shift);
    });
    (tree(max, larger), tree(sum, |a, b| a + b))
}

/// `sum e`, `sum e * (y - shift)`, `sum e * e` with `e = exp(y - shift)`; where e is 0 the second adds 0, even for -inf.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn sum_stats(y: &[f32], shift: f32) -> [f32; 3] {
    let (mut s, mut a, mut q) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    each_lane(y, |l, v| {
        let d = v - shift;
        let d = if d < -100.0 { -100.0 } else { d };
        let e = exp(d);
        s[l] += e;
        a[l] = e.mul_add(d, a[l]);
        q[l] = e.mul_add(e, q[l]);
    });
    [s, a, q].map(|lanes| tree(lanes, |a, b| a + b))
}

/// What the gradient of a row needs: `dz = coefficient * exp(y - shift) * y'(z)` for every column but the target. A NaN
/// among them has zeros for lower bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slope {
    pub(super) map: Map,
    pub(super) shift: f32,
    pub(super) coefficient: f32,
}

impl Slope {
    #[inline(always)]
    fn at<E: Element, const KIND: u8>(self, z: E::Bits) -> E::Bits {
        let z = E::widen(z);
        E::narrow_computed(match KIND {
            PLAIN => self.coefficient * exp(z - self.shift),
            SCALED => self.coefficient * exp(self.map.scale * z - self.shift),
            _ => {
                let (t, slope) = tanh(self.map.scale * z);
                self.coefficient * exp(self.map.cap * t - self.shift) * slope
            }
        })
    }

    /// `y'(z)` without the constant factors.
    pub(super) fn inner(self, z: f32) -> f32 {
        if self.map.kind == CAPPED { tanh(self.map.scale * z).1 } else { 1.0 }
    }
}

/// The gradient of a row into a buffer of its own.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn gradient<E: Element, const KIND: u8>(
    z: &[E::Bits],
    slope: Slope,
    dz: &mut [E::Bits],
) {
    let (to, to_rest) = dz.as_chunks_mut::<LANES>();
    let (from, from_rest) = z.as_chunks::<LANES>();
    for (dz, z) in to.iter_mut().zip(from) {
        ahead_of(z);
        for (dz, &z) in dz.iter_mut().zip(z) {
            *dz = slope.at::<E, KIND>(z);
        }
    }
    for (dz, &z) in to_rest.iter_mut().zip(from_rest) {
        *dz = slope.at::<E, KIND>(z);
    }
}

/// The gradient of a row over its logits.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn gradient_in_place<E: Element, const KIND: u8>(z: &mut [E::Bits], slope: Slope) {
    let (chunks, rest) = z.as_chunks_mut::<LANES>();
    for chunk in chunks {
        ahead_of(chunk);
        for z in chunk {
            *z = slope.at::<E, KIND>(*z);
        }
    }
    for z in rest {
        *z = slope.at::<E, KIND>(*z);
    }
}
