//! What kind of pages a free list holds: migratetype and flags.

/// How pages may be moved or given back, as the one who asks for them says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Migratetype {
    /// They stay where they are.
    Unmovable = 0,
    /// Their contents can be moved elsewhere.
    Movable = 1,
    /// They can be dropped.
    Reclaimable = 2,
}

impl Migratetype {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Unmovable, Self::Movable, Self::Reclaimable];

    /// The migratetype with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Whose free lists to try next when the own ones are empty, best first.
    #[must_use]
    pub const fn fallbacks(self) -> [Self; 2] {
        match self {
            Self::Unmovable => [Self::Reclaimable, Self::Movable],
            Self::Movable => [Self::Reclaimable, Self::Unmovable],
            Self::Reclaimable => [Self::Unmovable, Self::Movable],
        }
    }
}

/// Number of freetypes: each has free lists of its own.
pub const FREETYPES: usize = 2 * Migratetype::ALL.len();

/// A migratetype with the flag `UNMAPPED`: what free lists and pageblocks are labelled with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Freetype {
    /// The migratetype.
    pub migratetype: Migratetype,
    /// The pages are absent from the direct map, and secret.
    pub unmapped: bool,
}

impl Freetype {
    /// Pages of the direct map.
    #[must_use]
    pub const fn mapped(migratetype: Migratetype) -> Self {
        Self { migratetype, unmapped: false }
    }

    /// Pages absent from the direct map.
    #[must_use]
    pub const fn unmapped(migratetype: Migratetype) -> Self {
        Self { migratetype, unmapped: true }
    }

    /// Number of the freetype, below [`FREETYPES`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.migratetype as usize + if self.unmapped { Migratetype::ALL.len() } else { 0 }
    }

    /// The freetype with this number; `None` if it is none.
    #[must_use]
    pub const fn from_index(index: usize) -> Option<Self> {
        let unmapped = index >= Migratetype::ALL.len();
        let migratetype = match index % Migratetype::ALL.len() {
            0 => Migratetype::Unmovable,
            1 => Migratetype::Movable,
            _ => Migratetype::Reclaimable,
        };
        if index < FREETYPES { Some(Self { migratetype, unmapped }) } else { None }
    }

    /// The freetypes whose lists may serve in place of this one, best first. The flag stays: a
    /// page never changes sides without a flip.
    pub fn fallbacks(self) -> impl Iterator<Item = Self> {
        let unmapped = self.unmapped;
        self.migratetype.fallbacks().into_iter().map(move |m| Self { migratetype: m, unmapped })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fallbacks_never_change_sides_and_name_every_other_migratetype() {
        for index in 0..FREETYPES {
            let own = Freetype::from_index(index).unwrap();
            let mut seen = 1 << own.migratetype as u8;
            for other in own.fallbacks() {
                assert_eq!(other.unmapped, own.unmapped);
                seen |= 1 << other.migratetype as u8;
            }
            assert_eq!(seen, 0b111, "{own:?}");
        }
    }

    #[test]
    fn numbers_of_migratetypes_are_those_of_the_abi() {
        assert_eq!(Migratetype::from_number(0), Some(Migratetype::Unmovable));
        assert_eq!(Migratetype::from_number(1), Some(Migratetype::Movable));
        assert_eq!(Migratetype::from_number(2), Some(Migratetype::Reclaimable));
        assert_eq!(Migratetype::from_number(3), None);
    }
}
