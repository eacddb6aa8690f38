//! Packed files: all members of a gzip file, all frames of a zstd file, and nothing behind them.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;
use zstd::stream::read::Decoder;
use zstd::zstd_safe::zstd_sys::ZSTD_ErrorCode;

/// Windows above 2^27 bytes are refused: a header of a few bytes may ask for 2^31 and more.
pub(super) const MAX_WINDOW_LOG: u32 = 27;

/// All members of a gzip file, and nothing behind them but zeros.
#[derive(Debug)]
pub(super) struct Members {
    state: Member,
    is_first: bool,
}

#[derive(Debug)]
enum Member {
    Between(BufReader<File>),
    Inside(Box<GzDecoder<BufReader<File>>>),
    Gone,
}

impl Members {
    pub(super) fn new(inner: BufReader<File>) -> Self {
        Self { state: Member::Between(inner), is_first: true }
    }

    /// The file, unless reading failed.
    pub(super) fn file(&self) -> Option<&File> {
        match &self.state {
            Member::Between(inner) => Some(inner.get_ref()),
            Member::Inside(decoder) => Some(decoder.get_ref().get_ref()),
            Member::Gone => None,
        }
    }
}

impl Read for Members {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match std::mem::replace(&mut self.state, Member::Gone) {
                Member::Between(mut inner) => {
                    let head = inner.fill_buf()?;
                    match head.first() {
                        None => {
                            self.state = Member::Between(inner);
                            return Ok(0);
                        }
                        Some(0) if !self.is_first => {
                            padding(&mut inner)?;
                            self.state = Member::Between(inner);
                            return Ok(0);
                        }
                        Some(0x1f) => {
                            self.is_first = false;
                            self.state = Member::Inside(Box::new(GzDecoder::new(inner)));
                        }
                        Some(_) => {
                            return Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                "expected a gzip member or the end of the file, found other bytes",
                            ));
                        }
                    }
                }
                Member::Inside(mut decoder) => {
                    let n = decoder.read(buf)?;
                    if n > 0 {
                        self.state = Member::Inside(decoder);
                        return Ok(n);
                    }
                    self.state = Member::Between(decoder.into_inner());
                }
                Member::Gone => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "read after a failure"));
                }
            }
        }
    }
}

/// Zeros behind the last member, as tapes and some writers leave them, up to the end of the file.
fn padding(inner: &mut BufReader<File>) -> io::Result<()> {
    loop {
        let bytes = inner.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.iter().any(|b| *b != 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "expected only zeros behind the last gzip member, found other bytes",
            ));
        }
        let n = bytes.len();
        inner.consume(n);
    }
}

/// All frames of a zstd file, skippable ones passed over.
pub(super) struct Frames(Decoder<'static, BufReader<File>>);

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Frames").field(self.0.get_ref()).finish()
    }
}

impl Frames {
    pub(super) fn new(inner: BufReader<File>) -> io::Result<Self> {
        let mut decoder = Decoder::with_buffer(inner)?;
        decoder.window_log_max(MAX_WINDOW_LOG)?;
        Ok(Self(decoder))
    }

    pub(super) fn file(&self) -> &File {
        self.0.get_ref().get_ref()
    }
}

impl Read for Frames {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// Whether a frame was refused for its window.
pub(super) fn is_window_too_large(error: &io::Error) -> bool {
    let found = error.get_ref().and_then(|e| e.downcast_ref::<zstd::Error>());
    found.is_some_and(|e| e.is(ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge))
}
