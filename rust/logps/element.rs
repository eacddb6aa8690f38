//! The element types of logits, and their conversion to and from float32 by integer operations that vectorise.

#![allow(clippy::inline_always)] // inside loops that must vectorise

/// An element type of logits. Half-width types travel as their bits, because neither Rust nor `NumPy` knows bfloat16.
pub trait Element: Send + Sync + 'static {
    /// What a slice of logits holds.
    type Bits: Copy + Default + Send + Sync + 'static;

    /// Whether widening costs enough that a block is better widened once and kept than twice.
    const COSTLY: bool = false;

    /// The value as float32; exact.
    fn widen(bits: Self::Bits) -> f32;

    /// The nearest element, ties to even; a NaN stays one, and what is too large becomes infinite.
    fn narrow(value: f32) -> Self::Bits;

    /// [`Self::narrow`] in fewer instructions, where the lower half of a NaN's bits is 0: so it is of a NaN that
    /// arithmetic makes, or hands on from an element or from `plain_nan`.
    #[inline(always)]
    fn narrow_computed(value: f32) -> Self::Bits {
        Self::narrow(value)
    }
}

/// The value, and for any NaN the one whose lower bits are 0.
pub(super) const fn plain_nan(value: f32) -> f32 {
    if value.is_nan() { f32::NAN } else { value }
}

/// The bits of an infinite binary32; larger ones are NaN.
const INFINITE: u32 = 0x7f80_0000;

/// IEEE binary32.
pub struct Float32;
/// The upper half of a binary32.
pub struct BFloat16;
/// IEEE binary16.
pub struct Float16;

impl Element for Float32 {
    type Bits = f32;

    #[inline(always)]
    fn widen(bits: f32) -> f32 {
        bits
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }
}

impl Element for BFloat16 {
    type Bits = u16;

    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        // Minima in place of a choice: with AVX-512 a choice of a constant becomes a masked load of it, which takes an
        // assist for every vector, for ever, once the system has dropped that page of this library.
        let bits = value.to_bits();
        let (sign, magnitude) = (bits & 0x8000_0000, bits & 0x7fff_ffff);
        let rounded = magnitude.wrapping_add(0x7fff + ((magnitude >> 16) & 1)) >> 16;
        let quiet = (magnitude.saturating_sub(INFINITE) << 6).min(0x40); // 0 but for NaN
        (rounded.wrapping_add(quiet).min(0x7fff) | sign >> 16) as u16
    }

    #[inline(always)]
    fn narrow_computed(value: f32) -> u16 {
        let bits = value.to_bits();
        (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
    }
}

impl Element for Float16 {
    type Bits = u16;
    const COSTLY: bool = true;

    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        // The exponent moves from bias 15 to bias 127 by one exact multiplication, which also normalises subnormals.
        let bits = u32::from(bits);
        let shifted = (bits & 0x7fff) << 13;
        let finite = (f32::from_bits(shifted) * f32::from_bits((127 + 112) << 23)).to_bits();
        let special = shifted | 0x7f80_0000;
        let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
        f32::from_bits(magnitude | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        const SUBNORMAL: u32 = (127 - 14) << 23; // 2^-14, the smallest normal binary16
        const ALIGN: u32 = (127 - 15 + 23 - 10 + 1) << 23; // one unit in its last place is 2^-24
        let bits = value.to_bits();
        let (sign, magnitude) = (bits & 0x8000_0000, bits & 0x7fff_ffff);
        // Adding ALIGN leaves the rounded subnormal in the low bits of the sum.
        let aligned = f32::from_bits(magnitude) + f32::from_bits(ALIGN);
        let subnormal = aligned.to_bits().wrapping_sub(ALIGN);
        let rounding = 0xfff + ((magnitude >> 13) & 1);
        let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(rounding) >> 13;
        let quiet = (magnitude.saturating_sub(INFINITE) << 9).min(0x200); // 0 but for NaN
        let normal = normal.min(0x7c00) | quiet;
        let half = if magnitude < SUBNORMAL { subnormal } else { normal };
        (half | sign >> 16) as u16
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]

    use super::*;

    #[test]
    fn every_half_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            for (wide, back) in [
                (Float16::widen(bits), Float16::narrow(Float16::widen(bits))),
                (BFloat16::widen(bits), BFloat16::narrow(BFloat16::widen(bits))),
            ] {
                assert!(back == bits || wide.is_nan(), "{bits:#06x} -> {wide} -> {back:#06x}");
            }
        }
        assert!(Float16::widen(0x7c01).is_nan() && Float16::widen(0xfe00).is_nan());
        assert_eq!(Float16::widen(0xfc00).to_bits(), f32::NEG_INFINITY.to_bits());
    }

    #[test]
    fn what_arithmetic_makes_is_narrowed_in_fewer_instructions() {
        let everywhere = (0..=u32::MAX).step_by(4099).map(f32::from_bits);
        let edges = [0.0, -0.0, 1e-45, f32::MAX, -f32::MAX, f32::INFINITY, f32::NEG_INFINITY];
        for v in everywhere.chain(edges).filter(|v| !v.is_nan()) {
            assert_eq!(BFloat16::narrow_computed(v), BFloat16::narrow(v), "{v}");
            assert_eq!(Float16::narrow_computed(v), Float16::narrow(v), "{v}");
        }
        let payloads = [0x7fff_ffff, 0xffff_ffff, 0x7f80_0001].map(f32::from_bits).map(plain_nan);
        let elements = [0x7fff, 0xffff, 0x7f81].map(BFloat16::widen);
        for nan in payloads.into_iter().chain(elements).chain([f32::NAN, -f32::NAN]) {
            for made in [nan, nan * 2.0, 1.0 - nan, nan.mul_add(0.5, nan)] {
                assert!(BFloat16::widen(BFloat16::narrow_computed(made)).is_nan(), "{nan}");
                assert!(Float16::widen(Float16::narrow_computed(made)).is_nan(), "{nan}");
            }
        }
    }

    /// The nearest finite value by search, ties to the even bits: what `narrow` must agree with.
    fn nearest<E: Element<Bits = u16>>(value: f32, infinity: u16) -> u16 {
        let value = f64::from(value);
        let (mut best, mut distance) = (0, f64::INFINITY);
        for bits in 0..infinity {
            let d = (f64::from(E::widen(bits)) - value).abs();
            if d < distance || (d == distance && bits % 2 == 0) {
                (best, distance) = (bits, d);
            }
        }
        best
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        let halves = [0x0000_u16, 0x0001, 0x0002, 0x03ff, 0x0400, 0x0401, 0x3bff, 0x3c00, 0x7bfe];
        for bits in halves {
            let (low, high) = (Float16::widen(bits), Float16::widen(bits + 1));
            let middle = f32::midpoint(low, high);
            for v in [
                low,
                middle,
                high,
                middle.next_up(),
                middle.next_down(),
                middle.next_down().next_down(),
            ] {
                assert_eq!(Float16::narrow(v), nearest::<Float16>(v, 0x7c00), "{v}");
                assert_eq!(Float16::narrow(-v), Float16::narrow(v) | 0x8000, "-{v}");
            }
        }
        assert_eq!(
            [65519.9, 65520.0, 1e9, f32::INFINITY].map(Float16::narrow),
            [0x7bff, 0x7c00, 0x7c00, 0x7c00]
        );
        assert_eq!([1e-8, 2.9e-8, 3.0e-8, 1e-40].map(Float16::narrow), [0, 0, 1, 0]);
        for v in [1.0, 1.0 + 0.003_906_25, 1.0 + 0.011_718_75, 3.389_5e38, 1e-40, 7.3] {
            assert_eq!(BFloat16::narrow(v), nearest::<BFloat16>(v, 0x7f80), "{v}");
        }
        for bits in [0x7f80_0001, 0x7f80_8000, 0x7fbf_ffff, 0x7fc0_0000, 0x7fff_7fff, 0x7fff_ffff] {
            for nan in [f32::from_bits(bits), f32::from_bits(bits | 0x8000_0000)] {
                let (b, h) = (BFloat16::narrow(nan), Float16::narrow(nan));
                assert!(BFloat16::widen(b).is_nan() && Float16::widen(h).is_nan(), "{bits:#x}");
                assert!(b & 0x40 != 0 && h & 0x200 != 0, "{bits:#x} is quiet");
            }
        }
        let signs = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::MAX, -0.0];
        assert_eq!(signs.map(BFloat16::narrow), [0x7f80, 0xff80, 0x7f80, 0xff80, 0x8000]);
        assert_eq!(signs.map(Float16::narrow), [0x7c00, 0xfc00, 0x7c00, 0xfc00, 0x8000]);
    }
}
