//! Runs of the pure state machines by seed, for their tests.
//!
//! A run is a function of its seed alone: same seed, same run. Every day a few thousand seeds are run; `POSTROAD_TEST_SEEDS=100000` sets how
//! many, `POSTROAD_TEST_SEED=17` runs the one. A failure prints its seed and the command that repeats it.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::domain::queue::Random;

/// A run's random choices.
#[derive(Debug, Clone)]
pub(crate) struct Dice(Random);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // Seeds that follow one another begin far apart.
        let begin = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
        Self(Random::new(begin))
    }

    /// 0 to `sides` - 1.
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0.next_bits() % sides
    }

    /// A place in something of this length.
    pub(crate) fn place(&mut self, length: usize) -> usize {
        self.roll(length as u64) as usize
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.roll(times) == 0
    }
}

/// A fault that a run found.
pub(crate) type Fault = String;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn judge(seed: u64, run: &impl Fn(u64) -> Result<(), Fault>) -> Result<(), Fault> {
    catch_unwind(AssertUnwindSafe(|| run(seed))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| "a panic".to_owned()))
    })
}

/// Runs seeds, `everyday` of them unless the environment says another number. `name` is the test's path.
pub(crate) fn seeds(name: &str, everyday: u64, run: impl Fn(u64) -> Result<(), Fault>) {
    let one = number("POSTROAD_TEST_SEED");
    let count = number("POSTROAD_TEST_SEEDS").unwrap_or(everyday);
    let range = one.map_or(0..count, |seed| seed..seed + 1);
    let began = Instant::now();
    for seed in range.clone() {
        if let Err(fault) = judge(seed, &run) {
            panic!(
                "seed {seed}: {fault}\nagain: POSTROAD_TEST_SEED={seed} cargo test --features failpoints --lib {name} -- --nocapture"
            );
        }
    }
    println!("{name}: seeds {range:?} in {:?}", began.elapsed());
}

/// Wrong variants of the machine: one of the first `most` seeds must find each.
pub(crate) fn are_found<W: Copy + Debug>(
    variants: &[W],
    most: u64,
    run: impl Fn(u64, W) -> Result<(), Fault>,
) {
    for &wrong in variants {
        let run = |seed| run(seed, wrong);
        let found = (0..most).find_map(|seed| Some((seed, judge(seed, &run).err()?)));
        match found {
            Some((seed, fault)) => println!("{wrong:?}: found by seed {seed}: {fault}"),
            None => panic!("{wrong:?}: not found in {most} seeds"),
        }
    }
}
