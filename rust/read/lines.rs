//! Text as lines: one row each.

use super::block::{Block, Cursor, Line};

/// Cuts text at its newlines.
#[derive(Debug)]
pub(super) struct Lines {
    /// Bytes of one line.
    most: usize,
    /// Where the current line began, if it passed the limit and is thrown away.
    skipping: Option<u64>,
    number: u64,
    /// Offset of the current line.
    byte: u64,
}

impl Lines {
    pub(super) fn new(most: usize) -> Self {
        Self { most, skipping: None, number: 1, byte: 0 }
    }

    /// Notes the lines that end in the bytes not seen yet.
    pub(super) fn cut(&mut self, block: &mut Block, at: &mut Cursor) {
        while let Some(step) = memchr::memchr(b'\n', block.bytes.get(at.seen..).unwrap_or_default())
        {
            let end = at.seen + step;
            self.push(block, at.start, end, true);
            at.start = end + 1;
            at.seen = at.start;
        }
        at.seen = block.bytes.len();
        if self.skipping.is_none() && at.seen - at.start > self.most.saturating_add(1) {
            self.skipping = Some(self.byte);
        }
        if self.skipping.is_some() {
            // Nothing of an over-long line is kept.
            self.byte += (at.seen - at.start) as u64;
            block.bytes.truncate(at.start);
            at.seen = at.start;
        }
    }

    /// Notes the last line, if it has no newline.
    pub(super) fn end(&mut self, block: &mut Block, at: Cursor) {
        if at.start < block.bytes.len() || self.skipping.is_some() {
            let end = block.bytes.len();
            self.push(block, at.start, end, false);
        }
    }

    /// Notes the line `bytes[start..end]`, whose end is a newline unless it is the file's last.
    fn push(&mut self, block: &mut Block, start: usize, end: usize, newline: bool) {
        let number = self.number;
        let skipped = self.skipping.take();
        let byte = skipped.unwrap_or(self.byte);
        self.number += 1;
        self.byte += (end - start) as u64 + u64::from(newline);
        let text = block.bytes.get(start..end).unwrap_or_default();
        let mut end = if text.last() == Some(&b'\r') { end - 1 } else { end };
        let line_start = start;
        let mut start = start;
        if byte == 0 && text.starts_with(b"\xef\xbb\xbf") && skipped.is_none() {
            start = (start + 3).min(end);
        }
        let too_long = skipped.is_some() || end - start > self.most;
        if too_long {
            end = start;
        } else if block
            .bytes
            .get(start..end)
            .is_some_and(|text| text.iter().all(|b| matches!(b, b' ' | b'\t' | b'\r')))
        {
            if block.blank.0 == 0 {
                block.blank.1 = number;
            }
            block.blank.0 += 1;
            return;
        }
        block.lines.push(Line {
            start,
            end,
            number,
            row: None,
            byte: byte + (start - line_start) as u64,
            too_long,
        });
    }
}
