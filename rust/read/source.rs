//! The text of one file: unpacked, within the limits, and not of another kind.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::foreign::{Foreign, foreign};
use super::limits::{EXPANSION_GRACE, Limits};
use super::packed::{self, Frames, Members};
use crate::error::{Error, Place, Reason, Result};

/// Bytes that are read at a time.
pub(super) const READ_BYTES: usize = 256 << 10;
const IS_A_DIRECTORY: i32 = 21;
/// What is expected of a file by the end of its name.
const BY_NAME: &[(&str, &str)] = &[
    ("gz", "gzip"),
    ("zst", "zstd"),
    ("parquet", "Parquet"),
    ("arrow", "Arrow"),
    ("feather", "Arrow"),
];

/// The text of one file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    limits: Limits,
    before: Metadata,
    packing: Packing,
    unpacked: u64,
}

#[derive(Debug)]
enum Packing {
    Plain(BufReader<File>),
    Gzip(Members),
    Zstd(Frames),
}

impl Packing {
    /// Its name, and what it consists of.
    fn name(&self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Plain(_) => None,
            Self::Gzip(_) => Some(("gzip", "member")),
            Self::Zstd(_) => Some(("zstd", "frame")),
        }
    }
}

impl Source {
    /// Opens a regular file and looks at its first bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; [`Error::Data`] for anything but a regular file, plain, gzip or zstd, and for
    /// one whose first bytes say that it holds no rows.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        let bad = |message: String| Error::Data {
            place: Place { path: Some(path.to_owned()), ..Place::default() },
            reason: Reason::BadInput,
            message,
        };
        // Before opening, since opening a FIFO waits for a writer.
        let metadata = std::fs::metadata(path).map_err(io_error)?;
        if metadata.is_dir() {
            return Err(io_error(io::Error::from_raw_os_error(IS_A_DIRECTORY)));
        }
        if !metadata.is_file() {
            return Err(bad(
                "expected a regular file, found a pipe, a socket or a device".to_owned()
            ));
        }
        let file = File::open(path).map_err(io_error)?;
        let before = file.metadata().map_err(io_error)?;
        let mut inner = BufReader::with_capacity(READ_BYTES, file);
        let head = inner.fill_buf().map_err(io_error)?;
        let packing = match head {
            [0x1f, 0x8b, ..] => Packing::Gzip(Members::new(inner)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Packing::Zstd(Frames::new(inner).map_err(io_error)?)
            }
            _ => {
                let expected = by_name(path);
                if let Some(Foreign { what, hint }) = foreign(head) {
                    let expected = expected.map_or("text, JSON or CSV".to_owned(), |name| {
                        format!("{name}, as the name says")
                    });
                    return Err(bad(format!("expected {expected}, found {what}\nhint: {hint}")));
                }
                if let Some(name @ ("gzip" | "zstd")) = expected.filter(|_| !head.is_empty()) {
                    return Err(bad(format!(
                        "expected {name}, as the name says, found other bytes"
                    )));
                }
                Packing::Plain(inner)
            }
        };
        Ok(Self { path: path.to_owned(), limits: limits.clone(), before, packing, unpacked: 0 })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file as it lies on disk.
    pub fn packed_bytes(&self) -> u64 {
        self.before.len()
    }

    /// Bytes of text so far.
    pub fn unpacked_bytes(&self) -> u64 {
        self.unpacked
    }

    /// The start of the text, which is read with it: so many bytes, or all there are.
    ///
    /// # Errors
    /// As [`Self::read`]; [`Error::Data`] if what is packed holds no rows.
    pub fn head(&mut self, bytes: usize) -> Result<Vec<u8>> {
        let head = self.read_all(Vec::new(), bytes)?;
        if let Some((packing, _)) = self.packing.name()
            && let Some(Foreign { what, hint }) = foreign(&head)
        {
            let message =
                format!("expected text, JSON or CSV, found {what} inside {packing}\nhint: {hint}");
            return Err(Error::Data { place: self.place(), reason: Reason::BadInput, message });
        }
        Ok(head)
    }

    /// The next bytes of the text; 0 at its end.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; [`Error::Data`] for a damaged file, and for one that changed since it was
    /// opened; [`Error::Limit`] for too much text.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let n = loop {
            let read = match &mut self.packing {
                Packing::Plain(inner) => inner.read(into),
                Packing::Gzip(inner) => inner.read(into),
                Packing::Zstd(inner) => inner.read(into),
            };
            match read {
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.read_error(e)),
            }
        };
        self.counted(n)
    }

    /// The same, at most so many bytes behind those that are there, none of which is written twice in a plain file.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_onto(&mut self, bytes: &mut Vec<u8>, most: usize) -> Result<usize> {
        if let Packing::Plain(inner) = &mut self.packing {
            return match inner.by_ref().take(most as u64).read_to_end(bytes) {
                Ok(n) => self.counted(n),
                Err(e) => Err(self.read_error(e)),
            };
        }
        let old = bytes.len();
        bytes.resize(old + most, 0);
        let read = self.read(bytes.get_mut(old..).unwrap_or_default());
        bytes.truncate(old + *read.as_ref().unwrap_or(&0));
        read
    }

    fn counted(&mut self, n: usize) -> Result<usize> {
        self.unpacked += n as u64;
        if n == 0 {
            self.changed()?;
        }
        self.expanded()?;
        Ok(n)
    }

    /// As many bytes of the text as make `most` with those that are `found` already, fewer at its end.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all(&mut self, mut found: Vec<u8>, most: usize) -> Result<Vec<u8>> {
        let mut end = found.len();
        found.resize(most.max(end), 0);
        while let Some(rest) = found.get_mut(end..).filter(|rest| !rest.is_empty()) {
            let n = self.read(rest)?;
            end += n;
            if n == 0 {
                break;
            }
        }
        found.truncate(end);
        Ok(found)
    }

    /// The file as a place.
    pub fn place(&self) -> Place {
        Place { path: Some(self.path.clone()), ..Place::default() }
    }

    fn read_error(&self, error: io::Error) -> Error {
        let packing = self.packing.name().filter(|_| error.raw_os_error().is_none());
        let Some((name, unit)) = packing else {
            return Error::Io { path: self.path.clone(), source: error };
        };
        if packed::is_window_too_large(&error) {
            let message = format!(
                "a zstd frame asks for a window of more than 2^{} bytes",
                packed::MAX_WINDOW_LOG
            );
            let field = Some("zstd_window".to_owned());
            return Error::Limit { place: Place { field, ..self.place() }, message };
        }
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                format!("expected a whole {name} {unit}, found the end of the file")
            }
            _ => format!("damaged {name}: {error}"),
        };
        Error::Data {
            place: Place { byte: Some(self.unpacked), ..self.place() },
            reason: Reason::BadInput,
            message,
        }
    }

    /// An error if the unpacked text passes a limit.
    fn expanded(&self) -> Result<()> {
        let limit = |name: &str, message: String| {
            let place = Place { field: Some(name.to_owned()), ..self.place() };
            Err(Error::Limit { place, message })
        };
        if let Some(most) = self.limits.max_unpacked_bytes
            && self.unpacked > most
        {
            return limit("max_unpacked_bytes", format!("the text has more than {most} bytes"));
        }
        let packed = self.before.len().max(1);
        let most = self.limits.max_expansion;
        if self.unpacked > EXPANSION_GRACE && self.unpacked / packed >= most {
            return limit(
                "max_expansion",
                format!("the text has more than {most} times the bytes of the file"),
            );
        }
        Ok(())
    }

    /// An error if the file is not what it was when it was opened.
    fn changed(&self) -> Result<()> {
        let (file, read) = match &self.packing {
            Packing::Plain(inner) => (Some(inner.get_ref()), Some(self.unpacked)),
            Packing::Gzip(inner) => (inner.file(), None),
            Packing::Zstd(inner) => (Some(inner.file()), None),
        };
        let Some(file) = file else { return Ok(()) };
        let after =
            file.metadata().map_err(|source| Error::Io { path: self.path.clone(), source })?;
        let same = after.len() == self.before.len()
            && after.modified().ok() == self.before.modified().ok()
            && read.is_none_or(|read| read == after.len());
        if same {
            return Ok(());
        }
        Err(Error::Data {
            place: self.place(),
            reason: Reason::BadInput,
            message: "the file changed while it was read".to_owned(),
        })
    }
}

fn by_name(path: &Path) -> Option<&'static str> {
    let end = path.extension()?;
    let (_, what) = BY_NAME.iter().find(|(name, _)| end.eq_ignore_ascii_case(name))?;
    Some(what)
}
