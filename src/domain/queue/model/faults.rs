//! Wrong references, each wrong in one thing, because a model that never disagrees proves nothing. The machine is compared
//! with each, and the comparison must notice.

use super::{Mode, compare};

/// The fault of a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Later messages of a key do not wait for earlier ones that are not live.
    KeyDoesNotWait,
    LetterHoldsNothing,
    BatchInAnyOrder,
    LanesAreUneven,
    /// Messages that failed before do not let others go in between.
    FailedGoFirst,
    OneTooManyInFlight,
    /// From its third attempt after an expiry it does not go out alone.
    PoisonHasCompany,
    /// Deadlines do not move while Postgres is away.
    OutageCosts,
    UnwrittenCounts,
    RedriveRepeatsTheNumber,
    SeekForgetsLetters,
    /// Changed settings also apply to live deliveries.
    ChangesAtOnce,
    CrashForgetsDelays,
    /// A crash ends the order that keys are leaving.
    CrashEndsTheOrder,
    ExtendRevivesTheNacked,
    RevivedCountsTwice,
    LateNackCountsTwice,
    SecondNackMoves,
    /// The last delivery's ack, when it is a dead letter by then.
    LateAckIsRefused,
}

const FAULTS: &[(Fault, Mode)] = &[
    (Fault::KeyDoesNotWait, Mode::Keys),
    (Fault::LetterHoldsNothing, Mode::HeldKeys),
    (Fault::BatchInAnyOrder, Mode::KeyBatches),
    (Fault::LanesAreUneven, Mode::Lanes),
    (Fault::FailedGoFirst, Mode::Offsets),
    (Fault::OneTooManyInFlight, Mode::Offsets),
    (Fault::PoisonHasCompany, Mode::Offsets),
    (Fault::OutageCosts, Mode::Offsets),
    (Fault::UnwrittenCounts, Mode::Offsets),
    (Fault::RedriveRepeatsTheNumber, Mode::Offsets),
    (Fault::SeekForgetsLetters, Mode::Offsets),
    (Fault::ChangesAtOnce, Mode::Changing),
    (Fault::CrashForgetsDelays, Mode::Offsets),
    (Fault::CrashEndsTheOrder, Mode::Changing),
    (Fault::ExtendRevivesTheNacked, Mode::Offsets),
    (Fault::RevivedCountsTwice, Mode::Offsets),
    (Fault::LateNackCountsTwice, Mode::Offsets),
    (Fault::SecondNackMoves, Mode::Offsets),
    (Fault::LateAckIsRefused, Mode::Offsets),
];

#[test]
fn every_wrong_reference_is_found() {
    let agree = FAULTS
        .iter()
        .filter(|(fault, mode)| compare(*mode, Some(*fault)).is_ok());
    let agree: Vec<_> = agree.collect();
    assert!(agree.is_empty(), "the machine agrees with {agree:?}");
}
