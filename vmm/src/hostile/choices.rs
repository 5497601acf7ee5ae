//! Bytes as choices: whatever they are, each has a meaning; past their end all choices are 0.

/// A source of choices.
pub(super) struct Choices<'b>(&'b [u8]);

impl<'b> Choices<'b> {
    pub(super) const fn new(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(super) fn flag(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// A number below `bound`, which is at most 256 and not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.byte()) % bound
    }

    /// A number below 65536.
    pub(super) fn short(&mut self) -> u64 {
        u64::from(self.byte()) | u64::from(self.byte()) << 8
    }

    pub(super) fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number that something may depend on: small, near a border, or any.
    pub(super) fn number(&mut self) -> u64 {
        match self.below(8) {
            0..=3 => u64::from(self.byte()),
            4 => self.short(),
            5 => u64::MAX - u64::from(self.byte()),
            6 => 1_u64.rotate_left(u32::from(self.byte())),
            _ => self.word(),
        }
    }
}
