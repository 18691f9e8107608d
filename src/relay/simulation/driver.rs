//! A relay of a run: the steps of `task`, `window` and `rerelay`, cut at each call. All decisions come from the real code.

use std::collections::VecDeque;

use uuid::Uuid;

use super::Wrong;
use super::origin::{Origin, Row};
use crate::relay::decide::{Next, Since, leave_last_seq, next_number, passed_through};
use crate::relay::position::{NOTHING, Position, Window};
use crate::relay::window::cut;
use crate::store::origin::{Identity, Place};

/// So that windows are large often.
const PAGE_ROWS: usize = 2;
const MANIFEST_ROWS: usize = 5;

/// The operation under way.
#[derive(Debug, Clone)]
enum Stage {
    /// To read the stored position.
    Begin,
    Open,
    Restamp,
    OpenAll,
    Mark(Identity, After),
    Window(Position, i64),
    /// Pages of a chunk, with the positions that each is appended with.
    Pages(VecDeque<(Position, Vec<Row>)>, Box<Stage>),
    /// An append's answer is waited for.
    Appending(Position, Box<Stage>),
}

/// The operation after the mark.
#[derive(Debug, Clone)]
enum After {
    Append(Vec<Row>),
    Large(String),
    Rerelay,
}

/// An append on its way to the broker's database.
#[derive(Debug, Clone)]
pub(super) struct Append {
    pub(super) epoch: i64,
    pub(super) from: i64,
    pub(super) to: i64,
    pub(super) position: String,
    pub(super) rows: Vec<Row>,
}

/// Its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Appended {
    Done,
    Fenced,
    Moved,
    /// Nobody knows.
    Unknown,
}

/// The driver's requests to the run.
pub(super) enum Asks {
    Nothing,
    Stored,
    Append(Append),
}

#[derive(Debug)]
pub(super) struct Driver {
    wrong: Option<Wrong>,
    pub(super) epoch: i64,
    /// Fenced: it waits for a lease.
    pub(super) is_out: bool,
    session: u64,
    stage: Stage,
    number: i64,
    position: Option<Position>,
    cursor: Option<String>,
    /// Found nothing at its last look.
    pub(super) is_resting: bool,
    marks: u128,
    pub(super) rerelays: u64,
    pub(super) large: u64,
}

impl Driver {
    pub(super) fn new(number: u128, wrong: Option<Wrong>) -> Self {
        Self {
            wrong,
            epoch: 0,
            is_out: true,
            session: 0,
            stage: Stage::Begin,
            number: 0,
            position: None,
            cursor: None,
            is_resting: false,
            marks: number << 64,
            rerelays: 0,
            large: 0,
        }
    }

    pub(super) fn lead(&mut self, epoch: i64) {
        self.epoch = epoch;
        self.is_out = false;
        self.begin();
    }

    /// From the stored position: nothing that was only in memory outlives a session.
    pub(super) fn begin(&mut self) {
        self.stage = Stage::Begin;
        self.is_resting = false;
        if self.wrong != Some(Wrong::CursorOutlivesSession) {
            self.cursor = None;
        }
    }

    pub(super) fn stored(&mut self, number: i64, text: Option<&str>, session: u64) {
        self.number = number;
        let read = |text| serde_json::from_str(text).expect("a stored position reads");
        self.position = text.map(read);
        self.session = session;
        self.stage = Stage::Open;
    }

    pub(super) fn appended(&mut self, outcome: Appended) {
        let Stage::Appending(position, next) = self.stage.clone() else {
            return;
        };
        match outcome {
            Appended::Done => {
                self.number = next_number(self.number, 0);
                self.position = Some(position);
                self.cursor = None;
                self.stage = *next;
            }
            Appended::Fenced => self.is_out = true,
            Appended::Moved | Appended::Unknown => self.begin(),
        }
    }

    /// One call further.
    pub(super) fn advance(&mut self, origin: &mut Origin, has: impl Fn(u64) -> bool) -> Asks {
        if matches!(self.stage, Stage::Begin) {
            return Asks::Stored;
        }
        if let Stage::Appending(..) = self.stage {
            return Asks::Nothing;
        }
        if let Stage::Pages(mut pages, then) = self.stage.clone() {
            return match pages.pop_front() {
                Some((position, rows)) => self.append(position, rows, Stage::Pages(pages, then)),
                None => {
                    self.stage = *then;
                    Asks::Nothing
                }
            };
        }
        if self.session != origin.session {
            self.begin();
            return Asks::Nothing;
        }
        match self.stage.clone() {
            Stage::Open => {
                self.open(origin);
                Asks::Nothing
            }
            Stage::Restamp => {
                if self.wrong != Some(Wrong::NoRestamp) {
                    origin.restamp();
                }
                self.stage = Stage::OpenAll;
                Asks::Nothing
            }
            Stage::OpenAll => {
                let (identity, _) = origin.open_window(NOTHING, None);
                self.stage = Stage::Mark(identity, After::Rerelay);
                Asks::Nothing
            }
            Stage::Mark(identity, after) => self.mark(origin, identity, after),
            Stage::Window(position, after) => {
                self.read_chunk(origin, position, after, has);
                Asks::Nothing
            }
            Stage::Begin | Stage::Pages(..) | Stage::Appending(..) => Asks::Nothing,
        }
    }

    fn open(&mut self, origin: &Origin) {
        let (now, _) = origin.open_window(NOTHING, None);
        if self.cursor.as_ref() == Some(&now.snapshot) {
            // Nothing can be new.
            self.is_resting = true;
            return;
        }
        let since = Since::of(self.position.as_ref(), self.cursor.as_deref());
        let last = since.snapshot.to_owned();
        let (mut identity, mut rows) = origin.open_window(&last, since.mark);
        if self.wrong == Some(Wrong::MarkIsNotAsked) {
            identity.has_mark = true;
        }
        if self.wrong == Some(Wrong::OneClusterIsAsGoodAsAnother)
            && let Some(position) = &self.position
        {
            identity
                .system_identifier
                .clone_from(&position.system_identifier);
            identity.has_mark = true;
        }
        let max = if since.reads_rows { PAGE_ROWS } else { 0 };
        let is_whole = rows.len() <= max;
        rows.truncate(max + 1);
        let numbers = (self.number, 0);
        let next = Next::of(
            self.position.as_ref(),
            numbers,
            &identity,
            (rows.len(), is_whole),
        );
        self.is_resting = next == Next::Rest;
        self.stage = match next {
            Next::Gap | Next::Rerelay(_) => {
                self.rerelays += 1;
                Stage::Restamp
            }
            Next::Resume => {
                let position = self.position.clone().expect("a window has a position");
                let after = self.after(&position);
                Stage::Window(position, after)
            }
            Next::Rest => {
                self.cursor = Some(identity.snapshot);
                Stage::Open
            }
            Next::Append => Stage::Mark(identity, After::Append(rows)),
            Next::Large => Stage::Mark(identity, After::Large(last)),
        };
    }

    fn after(&self, position: &Position) -> i64 {
        let window = position.window.as_ref();
        match self.wrong {
            Some(Wrong::WindowBeginsAgain) => i64::MIN,
            _ => window.map_or(i64::MIN, |window| window.after_seq),
        }
    }

    fn mark(&mut self, origin: &mut Origin, identity: Identity, after: After) -> Asks {
        self.marks += 1;
        let mark = Uuid::from_u128(self.marks);
        if self.wrong != Some(Wrong::NoMark) {
            origin.insert_mark(mark);
        }
        let mut position = Position {
            snapshot: identity.snapshot,
            window: None,
            mark: (self.wrong != Some(Wrong::NoMark)).then_some(mark),
            system_identifier: identity.system_identifier,
            timeline: identity.timeline,
            taken: Vec::new(),
            recheck: None,
            gaps: None,
        };
        match after {
            After::Append(rows) => self.append(position, rows, Stage::Open),
            After::Large(since) => {
                self.large += 1;
                position.window = Some(Window {
                    since,
                    after_seq: i64::MIN,
                    is_rerelay: false,
                    oldest: None,
                });
                self.stage = Stage::Window(position, i64::MIN);
                Asks::Nothing
            }
            After::Rerelay => {
                position.window = Some(Window {
                    since: NOTHING.to_owned(),
                    after_seq: i64::MIN,
                    is_rerelay: self.number != 0,
                    oldest: None,
                });
                let then = Stage::Window(position.clone(), i64::MIN);
                self.append(position, Vec::new(), then)
            }
        }
    }

    fn read_chunk(
        &mut self,
        origin: &Origin,
        position: Position,
        after: i64,
        has: impl Fn(u64) -> bool,
    ) {
        let Some(window) = position.window.clone() else {
            self.stage = Stage::Open;
            return;
        };
        let mut rows = origin.window(&window.since, &position.snapshot, after);
        rows.truncate(MANIFEST_ROWS);
        let is_last = rows.len() < MANIFEST_ROWS;
        if !is_last {
            leave_last_seq(&mut rows, |row| row.seq);
        }
        let through = rows.last().map_or(after, |row| row.seq);
        if window.is_rerelay && self.wrong != Some(Wrong::RerelaysWithoutLooking) {
            rows.retain(|row| !has(row.id));
        }
        let places = rows.iter().map(|row| Place {
            seq: row.seq,
            leaf: 0,
            block: 0,
            line: 1,
            bytes: 1,
        });
        let places: Vec<Place> = places.collect();
        let pages = cut(&places, PAGE_ROWS, usize::MAX);
        let count = pages.len();
        let pages = pages.into_iter().enumerate().map(|(index, page)| {
            let last = page.last().map_or(through, |place| place.seq);
            let passed = passed_through(last, index + 1 == count, through, is_last);
            let rows: Vec<Row> = rows.drain(..page.len()).collect();
            (position.passed(passed), rows)
        });
        let mut pages: VecDeque<_> = pages.collect();
        if pages.is_empty() && is_last {
            pages.push_back((position.passed(None), Vec::new()));
        }
        let then = match is_last {
            true => Stage::Open,
            false => Stage::Window(position, through),
        };
        self.stage = Stage::Pages(pages, Box::new(then));
    }

    fn append(&mut self, position: Position, rows: Vec<Row>, then: Stage) -> Asks {
        let append = Append {
            epoch: self.epoch,
            from: self.number,
            to: next_number(self.number, 0),
            position: position.to_text(),
            rows,
        };
        self.stage = Stage::Appending(position, Box::new(then));
        Asks::Append(append)
    }
}
