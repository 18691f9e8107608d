//! Choices that the same seed repeats.

/// SplitMix64: small, and good enough to choose products and refusals.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// A generator for one task: the same seed and task give the same choices.
    pub(super) const fn new(seed: u64, task: u64) -> Self {
        Self(seed ^ task.wrapping_mul(0xa076_1d64_78bd_642f))
    }

    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `below` - 1.
    pub(super) const fn below(&mut self, below: u32) -> u32 {
        (((self.next() >> 32) * below as u64) >> 32) as u32
    }

    /// True in about one of `n` calls.
    pub(super) const fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_choices_and_tasks_differ() {
        let draw = |seed, task| {
            let mut random = Random::new(seed, task);
            (0..32).map(|_| random.below(100)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
    }

    #[test]
    fn about_one_in_ten_is_about_one_in_ten() {
        let mut random = Random::new(7, 0);
        let hits = (0..10_000).filter(|_| random.one_in(10)).count();
        assert!((900..1_100).contains(&hits), "{hits}");
    }
}
