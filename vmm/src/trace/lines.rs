//! The lines of a file, decompressed, with bounds on their length and number of bytes.

use super::error::{Problem, TraceError};
use super::{MAX_BYTES, MAX_LINE};
use flate2::read::MultiGzDecoder;
use std::io::{self, BufRead, BufReader, Cursor, Read};

/// First bytes of a gzip file (RFC 1952, "Member header and trailer").
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Reads line by line.
pub(super) struct Lines<'a> {
    reader: BufReader<Box<dyn Read + 'a>>,
    gzip: bool,
    line: Vec<u8>,
    number: u64,
    bytes_left: u64,
}

impl<'a> Lines<'a> {
    /// The lines of `reader`, which is decompressed if it starts like a gzip file.
    pub(super) fn new(mut reader: impl Read + 'a) -> Result<Self, TraceError> {
        let mut head = Vec::new();
        let mut start = reader.by_ref().take(GZIP_MAGIC.len() as u64);
        start.read_to_end(&mut head).map_err(Problem::Read)?;
        let gzip = head == GZIP_MAGIC;
        let whole = Cursor::new(head).chain(reader);
        let reader: Box<dyn Read + 'a> =
            if gzip { Box::new(MultiGzDecoder::new(whole)) } else { Box::new(whole) };
        Ok(Self {
            reader: BufReader::new(reader),
            gzip,
            line: Vec::new(),
            number: 0,
            bytes_left: MAX_BYTES,
        })
    }

    /// The next line that is not blank, trimmed, and its number; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &[u8])>, TraceError> {
        loop {
            self.line.clear();
            self.number += 1;
            // One byte more than allowed tells a line of the longest length from a longer one.
            let mut part = self.reader.by_ref().take(MAX_LINE + 1);
            let len = part.read_until(b'\n', &mut self.line);
            let len = len.map_err(|error| self.refusal(error))? as u64;
            if len == 0 {
                return Ok(None);
            }
            if len > MAX_LINE {
                return Err(Problem::LineTooLong.at(self.number));
            }
            self.bytes_left = self.bytes_left.checked_sub(len).ok_or(Problem::TooLong)?;
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some((self.number, self.line.trim_ascii())));
            }
        }
    }

    fn refusal(&self, error: io::Error) -> TraceError {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        if self.gzip && matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof) {
            return Problem::Damaged(error).into();
        }
        Problem::Read(error).at(self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(mut lines: Lines<'_>) -> Result<u64, Problem> {
        let mut count = 0;
        while lines.next().map_err(|error| error.problem)?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    #[test]
    fn a_line_of_the_longest_length_passes_and_one_byte_more_does_not() {
        let line = |len: u64| io::repeat(b'x').take(len - 1).chain(&b"\n"[..]);
        let lines = |len| Lines::new(line(MAX_LINE).chain(line(len))).unwrap();
        assert_eq!(count(lines(MAX_LINE)).unwrap(), 2);
        assert!(matches!(count(lines(MAX_LINE + 1)), Err(Problem::LineTooLong)));
    }

    #[test]
    fn the_total_is_bounded_even_if_every_line_is_short() {
        let text = b"a\n\nb\n";
        for (bytes_left, fits) in [(5, true), (4, false)] {
            let lines = Lines { bytes_left, ..Lines::new(&text[..]).unwrap() };
            match count(lines) {
                Ok(count) => assert!(fits && count == 2),
                Err(problem) => assert!(!fits && matches!(problem, Problem::TooLong)),
            }
        }
    }

    #[test]
    fn numbers_count_blank_lines_too() {
        let mut lines = Lines::new(&b"\n a \r\n\r\nb"[..]).unwrap();
        assert_eq!(lines.next().unwrap(), Some((2, &b"a"[..])));
        assert_eq!(lines.next().unwrap(), Some((4, &b"b"[..])));
        assert_eq!(lines.next().unwrap(), None);
    }
}
