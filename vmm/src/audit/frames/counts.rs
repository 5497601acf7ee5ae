//! How often each CPU has each frame open: once, mostly.

use super::words::bits;

/// A bit for each frame and CPU, and numbers only for what a CPU has open more than once.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    cpus: usize,
    /// Frames that a CPU has open, 64 to a word; the words of all CPUs lie together.
    open: Vec<u64>,
    /// For each CPU, how often it has each frame open beyond the first time. It is touched only where
    /// a frame was opened twice.
    beyond: Vec<Vec<u8>>,
    /// Opens beyond the first, over all frames and CPUs.
    repeated: u64,
}

impl Counts {
    /// Nothing is open; frames lie in `words` words.
    pub(super) fn new(cpus: usize, words: usize) -> Self {
        let beyond = (0..cpus).map(|_| vec![0; words * 64]).collect();
        Self { cpus, open: vec![0; words * cpus], beyond, repeated: 0 }
    }

    /// Whether there is such a CPU.
    pub(super) fn knows(&self, cpu: u8) -> bool {
        usize::from(cpu) < self.cpus
    }

    /// Frames of a word that a CPU has open.
    #[inline]
    pub(super) fn some(&self, at: usize, cpu: u8) -> u64 {
        self.slot(at, cpu).map_or(0, |slot| self.open[slot])
    }

    /// Frames of a word that any CPU has open.
    #[inline]
    pub(super) fn anywhere(&self, at: usize) -> u64 {
        self.open[at * self.cpus..(at + 1) * self.cpus].iter().fold(0, |all, open| all | open)
    }

    /// How often a CPU has the frame of this one bit open.
    pub(super) fn of(&self, (at, mask): (usize, u64), cpu: u8) -> u8 {
        if self.some(at, cpu) & mask == 0 {
            return 0;
        }
        bits(mask).next().map_or(0, |bit| self.beyond(at, bit, cpu).saturating_add(1))
    }

    /// Whether a CPU can open these frames once more.
    #[inline]
    pub(super) fn has_room(&self, (at, mask): (usize, u64), cpu: u8) -> bool {
        self.repeated == 0
            || bits(self.some(at, cpu) & mask)
                .all(|bit| self.beyond(at, bit, cpu).saturating_add(1) < u8::MAX)
    }

    /// A CPU opens these frames.
    #[inline]
    pub(super) fn add(&mut self, (at, mask): (usize, u64), cpu: u8) {
        let Some(slot) = self.slot(at, cpu) else { return };
        let twice = self.open[slot] & mask;
        self.open[slot] |= mask;
        for bit in bits(twice) {
            if let Some(count) = self.beyond_mut(at, bit, cpu)
                && *count < u8::MAX - 1
            {
                *count += 1;
                self.repeated += 1;
            }
        }
    }

    /// It takes one open of each back, of those that it has open.
    #[inline]
    pub(super) fn take(&mut self, (at, mask): (usize, u64), cpu: u8) {
        let Some(slot) = self.slot(at, cpu) else { return };
        let mut last = self.open[slot] & mask;
        if self.repeated > 0 {
            for bit in bits(last) {
                if let Some(count) = self.beyond_mut(at, bit, cpu)
                    && *count > 0
                {
                    *count -= 1;
                    self.repeated -= 1;
                    last &= !(1 << bit);
                }
            }
        }
        self.open[slot] &= !last;
    }

    #[inline]
    fn slot(&self, at: usize, cpu: u8) -> Option<usize> {
        self.knows(cpu).then(|| at * self.cpus + usize::from(cpu))
    }

    fn beyond(&self, at: usize, bit: u64, cpu: u8) -> u8 {
        let counts = self.beyond.get(usize::from(cpu));
        counts.and_then(|counts| counts.get(place(at, bit)?)).copied().unwrap_or(0)
    }

    fn beyond_mut(&mut self, at: usize, bit: u64, cpu: u8) -> Option<&mut u8> {
        self.beyond.get_mut(usize::from(cpu))?.get_mut(place(at, bit)?)
    }
}

/// Number of the frame of a bit.
fn place(at: usize, bit: u64) -> Option<usize> {
    Some(at * 64 + usize::try_from(bit).ok()?)
}
