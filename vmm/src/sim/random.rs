//! Numbers that a seed repeats: whatever a simulated machine leaves to chance is drawn here.

/// A source of numbers (Steele and others, "Fast Splittable Pseudorandom Number Generators").
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The source number `stream` of `seed`: each user has one of its own, so that what one draws
    /// changes nothing for another.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed);
        Self(mixed.word() ^ stream.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    /// A word.
    #[inline]
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `limit`; 0 for a limit of 0.
    #[inline]
    pub fn below(&mut self, limit: u64) -> u64 {
        // The high word of a product; a bias of one in 2^64 / limit does not matter here.
        ((u128::from(self.word()) * u128::from(limit)) >> 64) as u64
    }

    /// True once in `times`, on average.
    #[inline]
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A length from 1 to 2^`bits`, short ones as likely as long ones.
    pub fn length(&mut self, bits: u64) -> u64 {
        let size = self.below(bits);
        (1 << size) + self.below(1 << size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_streams_differ() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.word(), random.word()]
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
    }

    #[test]
    fn numbers_stay_below_their_limit_and_reach_all_of_it() {
        let mut random = Random::new(1, 0);
        let mut seen = [0_u32; 6];
        for _ in 0..600 {
            seen[random.below(6) as usize] += 1;
        }
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
        assert_eq!(random.below(0), 0);
        assert!((0..1000).all(|_| (1..=16).contains(&random.length(4))));
    }
}
