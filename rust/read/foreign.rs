//! Files of other kinds, told by their first bytes: what they are, and what makes rows of them.

/// What a file is instead of text with rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Foreign {
    /// What it is, in words.
    pub(super) what: &'static str,
    /// What a reader of the error can do.
    pub(super) hint: &'static str,
}

const UNPACK: &str = "unpack it; what is read packed is gzip and zstd";
const ARCHIVE: &str = "unpack the archive, and name the files in it";
const RECODE: &str = "write it as UTF-8, as with `iconv -f UTF-16 -t UTF-8 FILE`";
const RECODE_32: &str = "write it as UTF-8, as with `iconv -f UTF-32 -t UTF-8 FILE`";
const PULL: &str = "`git lfs pull` fetches the file that it stands for";
const PAGE: &str = "a download gave a page instead of the file: look into it, and fetch it again";
const EXPORT: &str = "export it as JSON, one object a line";
const NO_ROWS: &str = "name the file that holds the rows";
const UNWRAP: &str = "unpack it once, and name what comes out";
const AGAIN: &str = "it was not written to the end: write or fetch it again";

/// Bytes, where they stand, what has them there, and what to do.
const SIGNATURES: &[(&[u8], usize, &str, &str)] = &[
    (b"\xfd7zXZ\0", 0, "an xz file", UNPACK),
    (b"\x5d\0\0", 0, "an lzma file", UNPACK),
    (b"LZIP\x01", 0, "an lzip file", UNPACK),
    (b"\x04\x22\x4d\x18", 0, "an lz4 file", UNPACK),
    (b"\x02\x21\x4c\x18", 0, "an lz4 file", UNPACK),
    (b"\xff\x06\0\0sNaPpY", 0, "a snappy file", UNPACK),
    (b"\x1f\x9d", 0, "a file of compress (.Z)", UNPACK),
    (b"PK\x03\x04", 0, "a zip archive (.zip, .npz, .xlsx, a checkpoint of torch)", ARCHIVE),
    (b"PK\x05\x06", 0, "an empty zip archive", ARCHIVE),
    (b"PK\x07\x08", 0, "a zip archive", ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", ARCHIVE),
    (b"Rar!\x1a\x07", 0, "a rar archive", ARCHIVE),
    // With their zeros, since a text may speak of mustard.
    (b"ustar\0", 257, "a tar archive", ARCHIVE),
    (b"ustar  \0", 257, "a tar archive", ARCHIVE),
    (b"version https://git-lfs.", 0, "a pointer of Git LFS", PULL),
    (b"version https://hawser.", 0, "a pointer of Git LFS", PULL),
    (b"/annex/objects/", 0, "a pointer of git-annex", "`git annex get` fetches the file"),
    (b"%PDF-", 0, "a PDF", EXPORT),
    (b"{\\rtf", 0, "a text in RTF", EXPORT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an old Office file", EXPORT),
    (b"SQLite format 3\0", 0, "an SQLite database", EXPORT),
    (b"\x93NUMPY", 0, "a NumPy array", EXPORT),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", EXPORT),
    (b"Obj\x01", 0, "an Avro file", EXPORT),
    (b"\x7fELF", 0, "a program", NO_ROWS),
    (b"\x89PNG\r\n\x1a\n", 0, "an image (PNG)", NO_ROWS),
    (b"\xff\xd8\xff", 0, "an image (JPEG)", NO_ROWS),
    (b"GIF87a", 0, "an image (GIF)", NO_ROWS),
    (b"GIF89a", 0, "an image (GIF)", NO_ROWS),
    (b"II*\0", 0, "an image (TIFF)", NO_ROWS),
    (b"MM\0*", 0, "an image (TIFF)", NO_ROWS),
    (b"OggS\0", 0, "a sound (Ogg)", NO_ROWS),
    (b"PAR1", 0, "Parquet", UNWRAP),
    (b"ARROW1\0\0", 0, "an Arrow file", UNWRAP),
    (b"\xff\xff\xff\xff", 0, "an Arrow stream", UNWRAP),
    (b"\x1f\x8b\x08", 0, "gzip", UNWRAP),
    (b"\x28\xb5\x2f\xfd", 0, "zstd", UNWRAP),
    // After the ones that begin alike.
    (b"\xff\xfe\0\0", 0, "text in UTF-32", RECODE_32),
    (b"\0\0\xfe\xff", 0, "text in UTF-32", RECODE_32),
    (b"\xff\xfe", 0, "text in UTF-16", RECODE),
    (b"\xfe\xff", 0, "text in UTF-16", RECODE),
];

/// A header of safetensors has at most so many bytes.
const SAFETENSORS_HEADER: u64 = 100_000_000;

/// What a file with these first bytes is, if it cannot be text with rows.
///
/// Nothing that begins like JSON, or like the header of a table, is ever named: each signature holds bytes that stand in
/// no such text, or more letters than chance would put there.
pub(super) fn foreign(head: &[u8]) -> Option<Foreign> {
    let at = |bytes: &[u8], from: usize| head.get(from..).is_some_and(|h| h.starts_with(bytes));
    let found = |what, hint| Some(Foreign { what, hint });
    for (bytes, from, what, hint) in SIGNATURES {
        if at(bytes, *from) {
            return found(what, hint);
        }
    }
    match head {
        [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', b'Y', b'&', b'S', b'Y', ..]
        | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, b'r', b'E', b'8', b'P', 0x90, ..] => {
            return found("a bzip2 file", UNPACK);
        }
        [0x80, 2..=5, ..] => return found("a Python pickle", EXPORT),
        [b'G', b'G', b'U', b'F', _, 0, ..] => return found("a model in GGUF", NO_ROWS),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
            return found("an image (WebP)", NO_ROWS);
        }
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => {
            return found("a sound (WAV)", NO_ROWS);
        }
        [0, 0, 0, _, b'f', b't', b'y', b'p', ..] => return found("a film (MP4)", NO_ROWS),
        [b'B', b'M', _, _, _, _, 0, 0, 0, 0, ..] => return found("an image (BMP)", NO_ROWS),
        _ => {}
    }
    if let Some((size, rest)) = head.split_first_chunk::<8>()
        && (2..=SAFETENSORS_HEADER).contains(&u64::from_le_bytes(*size))
        && rest.first() == Some(&b'{')
    {
        return found("a file of tensors (safetensors)", NO_ROWS);
    }
    // The first two characters of JSON and of a table are ASCII: RFC 4627, section 3.
    if let Some(four) = head.first_chunk::<4>() {
        match four.map(|byte| byte != 0) {
            [false, false, false, true] | [true, false, false, false] => {
                return found("text in UTF-32", RECODE_32);
            }
            [false, true, false, true] | [true, false, true, false] => {
                return found("text in UTF-16", RECODE);
            }
            [false, false, false, false] => return found("zeros", AGAIN),
            _ => {}
        }
    }
    markup(head)
}

/// HTML, XML and their kin, behind a byte-order mark and white space.
fn markup(head: &[u8]) -> Option<Foreign> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let (&first, rest) = text.split_first()?;
    if first != b'<' || !rest.first()?.is_ascii_alphabetic() && !b"!?".contains(rest.first()?) {
        return None;
    }
    let start = rest.get(..1024).unwrap_or(rest).to_ascii_lowercase();
    let has = |word: &[u8]| memchr::memmem::find(&start, word).is_some();
    let is_html =
        [&b"doctype html"[..], b"html", b"head>", b"body", b"script"].into_iter().any(has);
    // XHTML declares itself as XML and holds <html>.
    let what = if is_html { "a page in HTML" } else { "XML" };
    Some(Foreign { what, hint: if is_html { PAGE } else { EXPORT } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_that_begins_like_json_is_never_named(
            space in "[ \t\r\n]{0,3}",
            first in prop_oneof![Just("{"), Just("{\""), Just("["), Just("[{"), Just("\""), Just("1"), Just("null")],
            rest in "[^\\\\\0]{0,40}",
        ) {
            for bom in ["", "\u{feff}"] {
                prop_assert_eq!(foreign(format!("{bom}{space}{first}{rest}").as_bytes()), None);
            }
        }
    }
}
