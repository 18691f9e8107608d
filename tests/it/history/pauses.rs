//! A paused queue hands nothing out.

use super::*;

/// A paused queue hands nothing out.
pub fn check(history: &History, faults: &mut Vec<String>) {
    let turns = history.done.iter().filter_map(|done| match done.act {
        Act::Paused(is_paused) => Some((done.asked, is_paused)),
        _ => None,
    });
    let turns: Vec<_> = turns.collect();
    for (place, (asked, is_paused)) in turns.iter().enumerate() {
        if !is_paused {
            continue;
        }
        let until = turns.get(place + 1).map(|(asked, _)| asked.at);
        let during = |delivered: &&Delivered| {
            let is_before = until.is_none_or(|until| delivered.asked.answered < until);
            delivered.asked.at > asked.answered && is_before
        };
        if let Some(delivered) = history.delivered.iter().find(during) {
            faults.push(format!(
                "{} came while the queue was paused",
                delivered.offset
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{asked, done, finds, finds_nothing};
    use super::super::*;

    #[test]
    fn what_a_paused_queue_hands_out_is_found() {
        finds("6 came while the queue was paused", |history| {
            history.delivered.last_mut().unwrap().asked = asked(7_500);
        });
        finds_nothing(|history| {
            history.done.push(done(7_050, Act::Paused(false)));
            let last = history.delivered.last_mut().unwrap();
            last.asked = Asked {
                at: asked(5_500).at,
                answered: asked(6_000).answered,
            };
        });
    }
}
