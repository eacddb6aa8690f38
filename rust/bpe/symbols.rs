//! The characters that stand for bytes.

/// GPT-2's printable characters of the 256 bytes.
///
/// Source: openai/gpt-2, `src/encoder.py`, `bytes_to_unicode`.
pub(super) struct Symbols {
    pub(super) of_byte: [char; 256],
    /// By code point: the last one is below 2^9.
    byte_of: [Option<u8>; 512],
}

impl Symbols {
    pub(super) fn new() -> Self {
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut others = (256u32..).filter_map(char::from_u32);
        let mut symbols = Self { of_byte: ['\0'; 256], byte_of: [None; 512] };
        for byte in 0..=255u8 {
            let other = if printable(byte) { None } else { others.next() };
            let symbol = other.unwrap_or(char::from(byte));
            symbols.of_byte[byte as usize] = symbol;
            symbols.byte_of[symbol as usize] = Some(byte);
        }
        symbols
    }

    /// The bytes of a token, if it is made of symbols.
    pub(super) fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.byte(c)).collect()
    }

    /// The byte that a character stands for.
    pub(super) fn byte(&self, c: char) -> Option<u8> {
        self.byte_of.get(c as usize).copied().flatten()
    }
}
