//! Generations: nothing of a former one is handed out, nothing of the next one too early, and receipts of a former one are `gone`.

use super::History;

/// Nothing of a former generation is handed out once another was told of, and its receipts are `gone` for ever.
pub fn check(history: &History, faults: &mut Vec<String>) {
    let renewals: Vec<_> = history.renewals().collect();
    for delivered in &history.delivered {
        let (offset, generation) = (delivered.offset, delivered.generation);
        for (asked, next, start) in &renewals {
            if generation < *next && delivered.asked.at > asked.answered {
                faults.push(format!(
                    "{offset} came in generation {generation} after {next} had begun"
                ));
            }
            if generation == *next && delivered.asked.answered < asked.at {
                faults.push(format!(
                    "{offset} came in generation {generation} before that"
                ));
            }
            let was_dead = history.deaths(offset).any(|death| death.generation < *next);
            if generation == *next && offset < *start && !was_dead {
                faults.push(format!(
                    "{offset} came in generation {generation}, which begins at {start}"
                ));
            }
        }
    }
    for settled in history
        .settled
        .iter()
        .filter(|settled| settled.told.is_some())
    {
        let later = renewals
            .iter()
            .filter(|(_, next, _)| settled.generation < *next);
        let (mut may_be, mut must_be) = (false, false);
        for (asked, _, _) in later {
            may_be |= asked.at <= settled.asked.answered;
            must_be |= asked.answered < settled.asked.at;
        }
        let is_gone = settled.is_told("gone");
        if is_gone && !may_be || !is_gone && must_be || settled.is_told("unknown") {
            faults.push(format!(
                "{}: a receipt was answered wrongly: {settled:?}",
                settled.offset
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{add, asked, delivered, find, finds, settled};
    use super::super::*;

    #[test]
    fn a_receipt_of_another_generation_is_found() {
        finds("a receipt was answered wrongly", |history| {
            history.settled.push(settled(500, Verb::Ack, 3, 1, "gone"));
        });
        finds("a receipt was answered wrongly", |history| {
            history
                .settled
                .push(settled(6_200, Verb::Nack, 6, 1, "stale"));
        });
        finds("6 came in generation 1 after 2 had begun", |history| {
            find(history, 6, 1).asked = asked(5_500)
        });
        finds("6 came in generation 2 before that", |history| {
            history.delivered.last_mut().unwrap().asked = asked(4_500);
        });
        finds("3 came in generation 2, which begins at 6", |history| {
            let third = Delivered {
                generation: 2,
                ..delivered(6_000, 3, 1, 1)
            };
            add(history, third);
        });
    }
}
