//! Direct paging: writes to page tables as gate calls.
//!
//! With [`crate::boot::FEATURE_DIRECT_PAGING`] the table pool is mapped nowhere in the guest. It reads
//! entries in a copy that the host keeps ([`crate::layout::TABLE_COPY`]), and has the host write them by
//! [`crate::gate::Call::Tables`]: first the words of the call page with count and site, then for each
//! operation a head (kind, level, number of entries) and its words.

use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::event::{EntryWrite, TableFill};
use crate::gate::{ARGS_WORD, COUNT_WORD, Full, PAGE_WORDS};
use crate::paging::{Entry, Level};

/// Word of the call page that holds the site of the code that asks
/// ([`crate::event::Record::site`]).
pub const SITE_WORD: usize = ARGS_WORD;
/// First word of the operations.
pub const OPS_WORD: usize = SITE_WORD + 1;

const KIND_WRITE: u64 = 1;
const KIND_FILL: u64 = 2;
const WRITE_WORDS: usize = 6;
const FILL_WORDS: usize = 3;
const PCID_MASK: u64 = 0xfff;

/// Most operations in one call.
pub const MAX_OPS: usize = (PAGE_WORDS - OPS_WORD) / FILL_WORDS;
/// Operations that fit in one call, whichever they are.
pub const CALL_OPS: usize = (PAGE_WORDS - OPS_WORD) / WRITE_WORDS;

/// One write to page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableOp {
    /// A run of entries of one table, each by one store.
    Write {
        /// Place of the first entry.
        at: Gpa,
        /// What is written. Of a table that no root reaches, root and address are those that it is
        /// built for.
        write: EntryWrite,
    },
    /// All entries of a table that no root reaches.
    Fill(TableFill),
}

impl TableOp {
    /// The page that is written to.
    #[must_use]
    pub const fn table(&self) -> Gpa {
        match self {
            Self::Write { at, .. } => at.align_down(PAGE_SIZE),
            Self::Fill(fill) => fill.table,
        }
    }

    /// Entries that are written.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        match self {
            Self::Write { write, .. } => write.count as u64,
            Self::Fill(_) => crate::paging::ENTRIES,
        }
    }
}

/// Lists of operations as words.
#[derive(Debug)]
pub struct TableWriter<S> {
    store: S,
    next: usize,
}

impl<S: FnMut(usize, u64)> TableWriter<S> {
    /// Starts a list whose words are stored by `store(word, value)`, for the code at `site`.
    pub fn new(mut store: S, site: u32) -> Self {
        store(SITE_WORD, site.into());
        store(COUNT_WORD, OPS_WORD as u64);
        Self { store, next: OPS_WORD }
    }

    /// Adds an operation.
    ///
    /// # Errors
    /// [`Full`]; the list stays as it is.
    pub fn push(&mut self, op: &TableOp) -> Result<(), Full> {
        match *op {
            TableOp::Write { at, write } => {
                let EntryWrite { root, pcid, va, level, count, old, new, .. } = write;
                let head = head(KIND_WRITE, level, count);
                let root = root.0 | u64::from(pcid);
                self.put(&[head, at.0, root, va.0, old.0, new.0])
            }
            TableOp::Fill(TableFill { table, level, first }) => {
                self.put(&[head(KIND_FILL, level, 0), table.0, first.0])
            }
        }
    }

    fn put(&mut self, words: &[u64]) -> Result<(), Full> {
        if self.next + words.len() > PAGE_WORDS {
            return Err(Full);
        }
        for word in words {
            (self.store)(self.next, *word);
            self.next += 1;
        }
        (self.store)(COUNT_WORD, self.next as u64);
        Ok(())
    }
}

const fn head(kind: u64, level: Level, count: u32) -> u64 {
    kind | (level as u64) << 8 | (count as u64) << 32
}

/// Reads a list of operations from a copy of the call page, or of as much of it as the list takes,
/// whatever it holds: the site of the code that asks. The words' count ends the list.
///
/// # Errors
/// The index of the first word that makes no sense.
pub fn read_table_ops(page: &[u64], mut each: impl FnMut(TableOp)) -> Result<u32, usize> {
    let end = page.get(COUNT_WORD).and_then(|end| usize::try_from(*end).ok());
    let end = end.filter(|end| *end >= OPS_WORD && *end <= page.len()).ok_or(COUNT_WORD)?;
    let site = page.get(SITE_WORD).and_then(|site| u32::try_from(*site).ok()).ok_or(SITE_WORD)?;
    let mut next = OPS_WORD;
    while next < end {
        let [kind, level, z0, z1, c0, c1, c2, c3] = page[next].to_le_bytes();
        let level = Level::from_number(level).filter(|_| [z0, z1] == [0; 2]).ok_or(next)?;
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let words = &page[next + 1..end];
        let (op, len) = match (u64::from(kind), words) {
            (KIND_WRITE, [at, root, va, old, new, ..]) => {
                let write = EntryWrite {
                    root: Gpa(root & !PCID_MASK),
                    pcid: u16::try_from(root & PCID_MASK).unwrap_or(0),
                    va: Gva(*va),
                    level,
                    count,
                    old: Entry(*old),
                    new: Entry(*new),
                    grant: 0,
                };
                let at = Gpa(*at);
                let sound =
                    write.is_well_formed() && write.place_in(at.align_down(PAGE_SIZE)) == at;
                (sound.then_some(TableOp::Write { at, write }), WRITE_WORDS)
            }
            (KIND_FILL, [table, first, ..]) if count == 0 => {
                let fill = TableFill { table: Gpa(*table), level, first: Entry(*first) };
                (fill.is_well_formed().then_some(TableOp::Fill(fill)), FILL_WORDS)
            }
            _ => return Err(next),
        };
        each(op.ok_or(next)?);
        next += len;
    }
    Ok(site)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn write() -> EntryWrite {
        EntryWrite {
            root: Gpa(0x40_0000),
            pcid: 5,
            va: Gva(0xffff_9100_0000_3000),
            level: Level::Pt,
            count: 7,
            old: Entry::EMPTY,
            new: Entry(0x1_0000_0063),
            grant: 0,
        }
    }

    fn ops() -> [TableOp; 2] {
        let table = Gpa(0x41_0000);
        [
            TableOp::Fill(TableFill { table, level: Level::Pt, first: Entry(3) }),
            TableOp::Write { at: table.wrapping_add(24), write: write() },
        ]
    }

    fn written(ops: &[TableOp]) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
        let mut writer = TableWriter::new(|word, value| page[word] = value, 77);
        ops.iter().for_each(|op| writer.push(op).unwrap());
        page
    }

    fn read(page: &[u64]) -> Result<(u32, Vec<TableOp>), usize> {
        let mut ops = Vec::new();
        read_table_ops(page, |op| ops.push(op)).map(|site| (site, ops))
    }

    #[test]
    fn a_list_keeps_its_order_and_the_site() {
        assert_eq!(read(&written(&ops())), Ok((77, ops().to_vec())));
        assert_eq!(read(&written(&[])), Ok((77, Vec::new())));
        assert_eq!([ops()[0].entries(), ops()[1].entries()], [512, 7]);
        assert_eq!([ops()[0].table(), ops()[1].table()], [Gpa(0x41_0000); 2]);
    }

    #[test]
    fn a_full_page_is_said_and_stays_readable() {
        let mut page = [0; PAGE_WORDS];
        let mut writer = TableWriter::new(|word, value| page[word] = value, 0);
        let mut pushed = 0;
        while writer.push(&ops()[0]).is_ok() {
            pushed += 1;
        }
        assert_eq!(read(&page).unwrap().1.len(), pushed);
        assert_eq!(pushed, MAX_OPS);
    }

    #[test]
    fn nonsense_is_named_by_its_word() {
        let good = written(&ops());
        let with = |word: usize, value| {
            let mut page = good;
            page[word] = value;
            read(&page).unwrap_err()
        };
        assert_eq!(with(COUNT_WORD, 513), COUNT_WORD);
        assert_eq!(with(COUNT_WORD, 2), COUNT_WORD);
        assert_eq!(with(COUNT_WORD, 5), OPS_WORD);
        assert_eq!(with(SITE_WORD, 1 << 32), SITE_WORD);
        assert_eq!(with(OPS_WORD, 9), OPS_WORD);
        assert_eq!(with(OPS_WORD, good[OPS_WORD] | 1 << 32), OPS_WORD);
        assert_eq!(with(OPS_WORD + 1, 12), OPS_WORD);
        let second = OPS_WORD + FILL_WORDS;
        // A run that leaves its table; a place that is not that of the address.
        assert_eq!(with(second, KIND_WRITE | 1 << 8 | 600 << 32), second);
        assert_eq!(with(second + 1, 0x41_0020), second);
        assert_eq!(with(second + 1, 0x41_0019), second);
        assert_eq!(with(second, KIND_WRITE | 9 << 8 | 1 << 32), second);
    }

    proptest! {
        #[test]
        fn any_page_is_read_or_refused(words in prop::collection::vec(any::<u64>(), 0..64)) {
            let mut page = [0; PAGE_WORDS];
            page[..words.len()].copy_from_slice(&words);
            if words.len() > OPS_WORD {
                page[COUNT_WORD] %= 600;
                page[SITE_WORD] &= 0xffff_ffff;
                page[OPS_WORD] &= 0xffff_ffff_0000_0303;
            }
            let mut count = 0;
            let _ = read_table_ops(&page, |_| count += 1);
            prop_assert!(count <= MAX_OPS);
        }
    }
}
