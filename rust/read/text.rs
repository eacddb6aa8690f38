//! Bytes as text.

use super::bad::Bad;
use crate::error::Reason;

/// The text of a line.
///
/// # Errors
/// A bad row if it is not UTF-8.
pub fn text(bytes: &[u8]) -> Result<&str, Bad> {
    simdutf8::compat::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        let found = bytes.get(at).copied().unwrap_or_default();
        Bad {
            reason: Reason::BadUtf8,
            field: None,
            byte: Some(at),
            message: format!("expected UTF-8, found the byte 0x{found:02x}"),
        }
    })
}
