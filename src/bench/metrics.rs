//! The broker's metrics, as far as the bench compares them between two moments.

use std::collections::HashMap;

/// Counters and histograms of one scrape.
#[derive(Debug, Clone, Default)]
pub(super) struct Scrape {
    values: HashMap<String, f64>,
    /// Cumulated counts by upper bound, in the order of the page.
    buckets: HashMap<String, Vec<(f64, f64)>>,
}

/// A histogram's change between two scrapes.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub(super) struct Times {
    pub(super) count: f64,
    pub(super) mean_ms: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
}

impl Scrape {
    /// Reads the text format. Series with labels other than a bucket's bound are left out.
    pub(super) fn parse(text: &str) -> Self {
        let mut scrape = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let Ok(value) = value.parse::<f64>() else {
                continue;
            };
            match name.split_once("_bucket{le=\"") {
                Some((histogram, bound)) => {
                    let bound = bound.trim_end_matches("\"}");
                    let bound = bound.parse::<f64>().unwrap_or(f64::INFINITY);
                    let buckets = scrape.buckets.entry(histogram.to_owned()).or_default();
                    buckets.push((bound, value));
                }
                None if name.contains('{') => {}
                None => {
                    scrape.values.insert(name.to_owned(), value);
                }
            }
        }
        scrape
    }

    pub(super) fn value(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// How much a counter rose since an earlier scrape.
    pub(super) fn since(&self, earlier: &Self, name: &str) -> Option<f64> {
        Some(self.value(name)? - earlier.value(name)?)
    }

    /// The values that a histogram recorded since an earlier scrape; None if there are none. Quantiles are interpolated inside
    /// buckets.
    pub(super) fn times_since(&self, earlier: &Self, name: &str) -> Option<Times> {
        let count = self.since(earlier, &format!("{name}_count"))?;
        let sum = self.since(earlier, &format!("{name}_sum"))?;
        if count <= 0.0 {
            return None;
        }
        let before = earlier.buckets.get(name).map_or(&[][..], Vec::as_slice);
        let buckets: Vec<(f64, f64)> = self
            .buckets
            .get(name)?
            .iter()
            .enumerate()
            .map(|(place, (bound, value))| {
                (
                    *bound,
                    value - before.get(place).map_or(0.0, |(_, value)| *value),
                )
            })
            .collect();
        Some(Times {
            count,
            mean_ms: sum / count * 1e3,
            p50_ms: quantile(&buckets, 0.5) * 1e3,
            p99_ms: quantile(&buckets, 0.99) * 1e3,
        })
    }
}

fn quantile(buckets: &[(f64, f64)], quantile: f64) -> f64 {
    let wanted = buckets.last().map_or(0.0, |(_, count)| *count) * quantile;
    let (mut low, mut below) = (0.0, 0.0);
    for (bound, count) in buckets {
        if *count >= wanted {
            if bound.is_infinite() || *count <= below {
                return low;
            }
            return low + (bound - low) * (wanted - below) / (count - below);
        }
        (low, below) = (*bound, *count);
    }
    low
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn counters_and_histograms_are_compared() {
        let before = Scrape::parse(
            "# HELP x y\na_total 5\nh_sum 1.0\nh_count 10\nh_bucket{le=\"0.001\"} 10\nh_bucket{le=\"0.002\"} 10\nh_bucket{le=\"+Inf\"} 10\n",
        );
        let after = Scrape::parse(
            "a_total 9\nother{queue=\"q\"} 1\nh_sum 1.3\nh_count 110\nh_bucket{le=\"0.001\"} 60\nh_bucket{le=\"0.002\"} 110\nh_bucket{le=\"+Inf\"} 110\n# EOF\n",
        );
        assert_eq!(after.since(&before, "a_total"), Some(4.0));
        assert_eq!(after.value("other"), None);
        let times = after.times_since(&before, "h").unwrap();
        assert_eq!(times.count, 100.0);
        assert!((times.mean_ms - 3.0).abs() < 1e-9);
        assert!((times.p50_ms - 1.0).abs() < 1e-9);
        assert!((times.p99_ms - 1.98).abs() < 1e-9);
        assert_eq!(after.times_since(&after, "h"), None);
        assert_eq!(after.times_since(&before, "absent"), None);
    }
}
