//! Strings and their escapes.

use std::borrow::Cow;

use super::fault::Fault;

/// A string, with `pos` on its opening quote; it ends behind the closing one.
pub(super) fn string<'a>(text: &'a str, pos: &mut usize) -> Result<Cow<'a, str>, Fault> {
    let bytes = text.as_bytes();
    *pos += 1;
    let mut start = *pos;
    let mut built: Option<String> = None;
    loop {
        let rest = bytes.get(*pos..).unwrap_or_default();
        *pos += plain_bytes(rest);
        let plain = text.get(start..*pos).unwrap_or_default();
        match bytes.get(*pos) {
            Some(b'"') => {
                *pos += 1;
                return Ok(match built {
                    None => Cow::Borrowed(plain),
                    Some(mut text) => {
                        text.push_str(plain);
                        Cow::Owned(text)
                    }
                });
            }
            Some(b'\\') => {}
            Some(byte) => {
                let message =
                    format!("expected an escape, found the raw control character 0x{byte:02x}");
                return Err(Fault::at(text, *pos, message));
            }
            None => return Err(Fault::expected(text, *pos, "`\"` at the end of the string")),
        }
        let out = built.get_or_insert_with(|| String::with_capacity(rest.len().min(4096)));
        out.push_str(plain);
        out.push(escape(text, pos)?);
        start = *pos;
    }
}

/// The character of one escape; `pos` is on the backslash and ends behind the escape.
fn escape(text: &str, pos: &mut usize) -> Result<char, Fault> {
    let bytes = text.as_bytes();
    let at = *pos;
    let fault = |pos: usize, message: &str| Err(Fault::at(text, pos, message));
    let kind = bytes.get(at + 1).copied();
    *pos = at + 2;
    let c = match kind {
        Some(b'"') => '"',
        Some(b'\\') => '\\',
        Some(b'/') => '/',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => {
            let Some(first) = hex4(bytes, at + 2) else {
                return fault(at, "expected four hexadecimal digits after `\\u`");
            };
            *pos = at + 6;
            let code = match first {
                0xd800..=0xdbff => {
                    let second = match bytes.get(at + 6..at + 8) {
                        Some(b"\\u") => hex4(bytes, at + 8),
                        _ => None,
                    };
                    let Some(second @ 0xdc00..=0xdfff) = second else {
                        return fault(at, "expected a pair of surrogates, found a lone one");
                    };
                    *pos = at + 12;
                    0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                }
                _ => first,
            };
            match char::from_u32(code) {
                Some(c) => c,
                None => return fault(at, "expected a pair of surrogates, found a lone one"),
            }
        }
        None => return fault(at + 1, "expected an escape, found the end of the line"),
        Some(_) => {
            return fault(
                at,
                "expected one of the escapes `\\\" \\\\ \\/ \\b \\f \\n \\r \\t \\u`",
            );
        }
    };
    Ok(c)
}

/// How many bytes at the start of `bytes` mean themselves inside a string: no quote, no backslash, no control character.
///
/// Same as `take_while`, eight bytes at a time: the pieces between escapes are too short for `memchr` to pay.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let zeros = |x: u64| x.wrapping_sub(ONES) & !x & HIGH;
    let mut at = 0;
    while let Some(eight) = bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        let eight = u64::from_le_bytes(*eight);
        let quotes = zeros(eight ^ (ONES * u64::from(b'"')));
        let backslashes = zeros(eight ^ (ONES * u64::from(b'\\')));
        let controls = eight.wrapping_sub(ONES * 0x20) & !eight & HIGH;
        // A borrow can only mark bytes above one that is rightly marked, and the lowest mark is what counts.
        let special = quotes | backslashes | controls;
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|b| !matches!(b, b'"' | b'\\' | 0..0x20)).count()
}

fn hex4(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 4)?;
    digits.iter().try_fold(0, |n, b| Some(n * 16 + char::from(*b).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn plain_bytes_equal_one_at_a_time(
            bytes in proptest::collection::vec(prop_oneof![8 => any::<u8>(), 1 => 0x1fu8..0x24, 1 => Just(b'\\')], 0..40),
            plain in 0usize..40,
        ) {
            let bytes = [vec![b'a'; plain], bytes].concat();
            let expected = bytes.iter().take_while(|b| !matches!(b, b'"' | b'\\' | 0..0x20)).count();
            prop_assert_eq!(plain_bytes(&bytes), expected);
        }
    }
}
