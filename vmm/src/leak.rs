//! Looks for the bytes of a secret input where they must not be.
//!
//! The VMM keeps no copy of the input: only keyed hashes of its runs of 16 bytes. A run with few
//! distinct bytes (zeroes, a fill pattern) says nothing about the input and is left out.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// Bytes of a run.
pub const RUN: usize = 16;
/// Fewest distinct bytes of a run that is looked for.
const MIN_DISTINCT: usize = 4;
/// Fewest bits of the filter in front of the set, as a power of two.
const MIN_FILTER_BITS: u32 = 20;
/// Largest input that is remembered: its runs take some 20 bytes each.
pub const MAX_SECRET: u64 = 4 << 20;

/// Knows an input by the hashes of its runs.
pub struct LeakScanner {
    key: [u64; 2],
    filter_bits: u32,
    filter: Vec<u64>,
    hashes: HashSet<u64>,
}

impl LeakScanner {
    /// Remembers the runs of `input`.
    #[must_use]
    pub fn new(input: &[u8]) -> Self {
        let random = RandomState::new();
        let key = [random.hash_one(0_u8), random.hash_one(1_u8) | 1];
        // Eight bits a run keep the filter nearly empty.
        let bits = (8 * input.len()).next_power_of_two().trailing_zeros();
        let filter_bits = bits.max(MIN_FILTER_BITS);
        let filter = vec![0; 1 << (filter_bits - 6)];
        let mut scanner = Self { key, filter_bits, filter, hashes: HashSet::new() };
        for run in input.windows(RUN) {
            let mut seen = [false; 256];
            let distinct =
                run.iter().filter(|b| !std::mem::replace(&mut seen[usize::from(**b)], true));
            if distinct.count() >= MIN_DISTINCT {
                let value = run.iter().fold(0, |value, byte| value << 8 | u128::from(*byte));
                let hash = scanner.hash(value);
                let (word, bit) = scanner.place(hash);
                scanner.filter[word] |= bit;
                scanner.hashes.insert(hash);
            }
        }
        scanner
    }

    /// Number of distinct runs that are looked for; 0 for an input that is too short or too plain.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.hashes.len()
    }

    /// Starts a search through consecutive bytes.
    #[must_use]
    pub const fn search(&self) -> Search<'_> {
        // Zeroes are never looked for.
        Search { scanner: self, value: 0, filled: 0, absent: 0 }
    }

    /// Offset behind the first run of the input in `bytes`.
    #[must_use]
    pub fn find(&self, bytes: &[u8]) -> Option<usize> {
        self.search().feed(bytes)
    }

    fn hash(&self, value: u128) -> u64 {
        let low = value as u64 ^ self.key[0];
        let high = (value >> 64) as u64 ^ self.key[1];
        let product = u128::from(low).wrapping_mul(u128::from(high | 1));
        let mixed = product as u64 ^ (product >> 64) as u64 ^ high.rotate_left(23);
        mixed.wrapping_mul(self.key[1])
    }

    /// Word and bit of a hash in the filter.
    const fn place(&self, hash: u64) -> (usize, u64) {
        let index = hash >> (64 - self.filter_bits);
        ((index >> 6) as usize, 1 << (index & 63))
    }

    fn holds(&self, value: u128) -> bool {
        let hash = self.hash(value);
        let (word, bit) = self.place(hash);
        self.filter[word] & bit != 0 && self.hashes.contains(&hash)
    }
}

/// A search through bytes that come in pieces.
pub struct Search<'s> {
    scanner: &'s LeakScanner,
    value: u128,
    filled: usize,
    /// The run that was last looked up in vain: memory is full of equal bytes, and looking them up
    /// each time is slow where they happen to pass the filter.
    absent: u128,
}

impl Search<'_> {
    /// Goes on with `bytes`; the offset in them behind the first run found. The rest of `bytes` is
    /// then not looked at.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<usize> {
        for (offset, byte) in bytes.iter().enumerate() {
            self.value = self.value << 8 | u128::from(*byte);
            self.filled += 1;
            if self.filled >= RUN && self.value != self.absent {
                if self.scanner.holds(self.value) {
                    return Some(offset + 1);
                }
                self.absent = self.value;
            }
        }
        None
    }

    /// What follows is not consecutive to what came before.
    pub const fn restart(&mut self) {
        self.filled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"The quick brown fox jumps over the lazy dog.";

    #[test]
    fn a_run_is_found_wherever_it_lies() {
        let scanner = LeakScanner::new(SECRET);
        let mut memory = vec![0; 5000];
        assert_eq!(scanner.find(&memory), None);
        memory[4001..4017].copy_from_slice(&SECRET[7..23]);
        assert_eq!(scanner.find(&memory), Some(4017));
    }

    #[test]
    fn fifteen_bytes_are_not_a_run_and_sixteen_are() {
        let scanner = LeakScanner::new(SECRET);
        assert_eq!(scanner.find(&SECRET[3..18]), None);
        assert_eq!(scanner.find(&SECRET[3..19]), Some(16));
    }

    #[test]
    fn a_run_across_two_pieces_is_found_unless_they_are_apart() {
        let scanner = LeakScanner::new(SECRET);
        let mut search = scanner.search();
        assert_eq!(search.feed(&SECRET[..10]), None);
        assert_eq!(search.feed(&SECRET[10..20]), Some(6));
        let mut search = scanner.search();
        assert_eq!(search.feed(&SECRET[..10]), None);
        search.restart();
        assert_eq!(search.feed(&SECRET[10..20]), None);
    }

    #[test]
    fn a_run_is_found_behind_bytes_that_pass_the_filter_for_nothing() {
        let mut scanner = LeakScanner::new(SECRET);
        scanner.filter.fill(u64::MAX);
        for fill in [0, 0xa5] {
            let mut memory = vec![fill; 4 << 20];
            assert_eq!(scanner.find(&memory), None);
            memory.extend(&SECRET[..RUN]);
            assert_eq!(scanner.find(&memory), Some(memory.len()));
        }
        // The same run twice, and another in between, is looked up each time.
        let mut search = scanner.search();
        for _ in 0..2 {
            assert_eq!(search.feed(&[7; 40]), None);
            assert_eq!(search.feed(&SECRET[..RUN]), Some(RUN));
        }
    }

    #[test]
    fn plain_runs_are_not_looked_for() {
        assert_eq!(LeakScanner::new(&[0; 100]).runs(), 0);
        assert_eq!(LeakScanner::new(&[0xa5; 100]).runs(), 0);
        assert_eq!(LeakScanner::new(b"too short").runs(), 0);
        let mut half = [0; 64];
        half[30..38].copy_from_slice(b"passw0rd");
        let scanner = LeakScanner::new(&half);
        assert!(scanner.runs() > 0);
        assert_eq!(scanner.find(&[0; 4096]), None);
    }
}
