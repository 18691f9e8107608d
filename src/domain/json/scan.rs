//! The pass over the bytes of a JSON text: grammar, nesting, and what parsers refuse.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::step;

/// The longest number, in characters.
pub(super) const NUMBER_MAX_CHARS: usize = 300;
/// The longest name, in bytes, which are not fewer than its characters.
pub(super) const NAME_MAX_BYTES: usize = 50_000;
/// The largest exponent, either way. A double ends at 308 and at -324; `0e999999999` is finite, and still not read everywhere.
const EXPONENT_MAX: u32 = 400;
/// Names of one object that are compared one by one as they come. More are sorted once the object ends.
const COMPARED_MAX: usize = 16;

/// The reason why a scan ended. The scan's open arrays and objects show where.
#[derive(Debug)]
pub(super) enum Fault {
    Syntax,
    TooDeep,
    /// The name.
    Duplicate(String),
    /// In a value.
    Value(&'static str),
    /// In a name, which is not among the names yet.
    Name(&'static str),
}

/// The pass over the bytes.
pub(super) struct Scan<'t> {
    pub(super) text: &'t str,
    bytes: &'t [u8],
    /// The byte that comes next.
    pub(super) at: usize,
    depth_max: usize,
    /// The arrays and objects that are open, from outside in.
    levels: Vec<Level>,
    /// The names of all open objects, those of the outer ones first.
    names: Vec<Cow<'t, str>>,
}

/// An array or object that is open.
struct Level {
    is_object: bool,
    /// The index of its first name among all names.
    names_from: usize,
    /// Elements before the current one.
    index: usize,
}

impl<'t> Scan<'t> {
    pub(super) fn new(text: &'t str, depth_max: usize) -> Self {
        Self {
            text,
            bytes: text.as_bytes(),
            at: 0,
            depth_max,
            levels: Vec::with_capacity(8),
            names: Vec::with_capacity(COMPARED_MAX),
        }
    }

    /// Goes over all of it.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        loop {
            self.skip_space();
            match self.peek() {
                Some(b'{') => {
                    self.open(true)?;
                    if self.peek() != Some(b'}') {
                        self.name()?;
                        continue;
                    }
                }
                Some(b'[') => {
                    self.open(false)?;
                    if self.peek() != Some(b']') {
                        continue;
                    }
                }
                Some(b'"') => {
                    self.string()
                        .map_err(|what| what.map_or(Fault::Syntax, Fault::Value))?;
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.literal(b"true")?,
                Some(b'f') => self.literal(b"false")?,
                Some(b'n') => self.literal(b"null")?,
                _ => return Err(Fault::Syntax),
            }
            if self.after_value()? {
                return Ok(());
            }
        }
    }

    /// Closes what ends here. Whether that was all; otherwise a value comes next.
    fn after_value(&mut self) -> Result<bool, Fault> {
        loop {
            self.skip_space();
            let Some(level) = self.levels.last_mut() else {
                return match self.peek() {
                    None => Ok(true),
                    Some(_) => Err(Fault::Syntax),
                };
            };
            match (self.bytes.get(self.at), level.is_object) {
                (Some(b','), true) => {
                    self.at += 1;
                    self.skip_space();
                    self.name()?;
                    return Ok(false);
                }
                (Some(b','), false) => {
                    level.index += 1;
                    self.at += 1;
                    return Ok(false);
                }
                (Some(b'}'), true) | (Some(b']'), false) => {
                    let names_from = level.names_from;
                    self.at += 1;
                    self.close(names_from)?;
                }
                _ => return Err(Fault::Syntax),
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    fn open(&mut self, is_object: bool) -> Result<(), Fault> {
        if self.levels.len() >= self.depth_max {
            return Err(Fault::TooDeep);
        }
        self.levels.push(Level {
            is_object,
            names_from: self.names.len(),
            index: 0,
        });
        self.at += 1;
        self.skip_space();
        Ok(())
    }

    /// Ends the innermost level, and looks for names that were too many to be compared as they came.
    fn close(&mut self, names_from: usize) -> Result<(), Fault> {
        let names = &mut self.names[names_from..];
        if names.len() > COMPARED_MAX {
            names.sort_unstable();
            if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Fault::Duplicate(pair[0].to_string()));
            }
        }
        self.names.truncate(names_from);
        self.levels.pop();
        Ok(())
    }

    /// A member's name and the colon.
    fn name(&mut self) -> Result<(), Fault> {
        let start = self.at;
        if self.peek() != Some(b'"') {
            return Err(Fault::Syntax);
        }
        let is_plain = self
            .string()
            .map_err(|what| what.map_or(Fault::Syntax, Fault::Name))?;
        let name = match is_plain {
            true => Cow::Borrowed(&self.text[start + 1..self.at - 1]),
            false => match serde_json::from_str(&self.text[start..self.at]) {
                Ok(name) => Cow::Owned(name),
                Err(_) => return Err(Fault::Syntax),
            },
        };
        if name.len() > NAME_MAX_BYTES {
            return Err(Fault::Name("a name of more than 50,000 bytes"));
        }
        let names_from = self.levels.last().map_or(0, |level| level.names_from);
        let earlier = &self.names[names_from..];
        if earlier.len() <= COMPARED_MAX && earlier.contains(&name) {
            return Err(Fault::Duplicate(name.into_owned()));
        }
        self.names.push(name);
        self.skip_space();
        if self.peek() != Some(b':') {
            return Err(Fault::Syntax);
        }
        self.at += 1;
        Ok(())
    }

    /// A string, from its first quote to behind its last. Whether it has no escapes; a fault says what no parser reads, if it is one of those.
    fn string(&mut self) -> Result<bool, Option<&'static str>> {
        let mut is_plain = true;
        self.at += 1;
        loop {
            self.skip_plain();
            let byte = self.peek().ok_or(None)?;
            self.at += 1;
            match byte {
                b'"' => return Ok(is_plain),
                b'\\' => {
                    is_plain = false;
                    self.escape()?;
                }
                0..0x20 => return Err(None),
                _ => {}
            }
        }
    }

    /// Passes over characters that stand for themselves, so many at a time that the compiler looks at them at once.
    fn skip_plain(&mut self) {
        const CHUNK: usize = 16;
        let is_plain = |byte: &u8| (*byte >= 0x20) & (*byte != b'"') & (*byte != b'\\');
        while let Some(chunk) = self.bytes.get(self.at..self.at + CHUNK)
            && chunk.iter().fold(true, |all, byte| all & is_plain(byte))
        {
            self.at += CHUNK;
        }
    }

    /// The character behind a backslash.
    fn escape(&mut self) -> Result<(), Option<&'static str>> {
        const HALF: &str = "half a surrogate pair";
        let byte = self.peek().ok_or(None)?;
        self.at += 1;
        match byte {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(()),
            b'u' => match self.hex()? {
                0 => Err(Some("the character U+0000")),
                0xd800..=0xdbff => {
                    if self.bytes.get(self.at..self.at + 2) != Some(b"\\u") {
                        return Err(Some(HALF));
                    }
                    self.at += 2;
                    match self.hex()? {
                        0xdc00..=0xdfff => Ok(()),
                        _ => Err(Some(HALF)),
                    }
                }
                0xdc00..=0xdfff => Err(Some(HALF)),
                _ => Ok(()),
            },
            _ => Err(None),
        }
    }

    fn hex(&mut self) -> Result<u32, Option<&'static str>> {
        let digits = self.bytes.get(self.at..self.at + 4).ok_or(None)?;
        let mut code = 0;
        for digit in digits {
            code = code * 16 + char::from(*digit).to_digit(16).ok_or(None)?;
        }
        self.at += 4;
        Ok(code)
    }

    fn number(&mut self) -> Result<(), Fault> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        let exponent = match self.peek() {
            Some(b'e' | b'E') => {
                self.at += 1;
                if let Some(b'+' | b'-') = self.peek() {
                    self.at += 1;
                }
                let start = self.at;
                self.digits()?;
                Some(&self.text[start..self.at])
            }
            _ => None,
        };
        let number = &self.text[start..self.at];
        if number.len() > NUMBER_MAX_CHARS {
            return Err(Fault::Value("a number of more than 300 characters"));
        }
        // Of so few digits all are finite.
        let Some(exponent) = exponent else {
            return Ok(());
        };
        let is_small = exponent
            .parse::<u32>()
            .is_ok_and(|exponent| exponent <= EXPONENT_MAX);
        if is_small && number.parse().is_ok_and(f64::is_finite) {
            return Ok(());
        }
        Err(Fault::Value("a number too large for a double"))
    }

    /// One digit or more.
    fn digits(&mut self) -> Result<(), Fault> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at == start {
            return Err(Fault::Syntax);
        }
        Ok(())
    }

    fn literal(&mut self, literal: &[u8]) -> Result<(), Fault> {
        if self.bytes.get(self.at..self.at + literal.len()) != Some(literal) {
            return Err(Fault::Syntax);
        }
        self.at += literal.len();
        Ok(())
    }

    /// The JSON pointer of where the scan stands, without the innermost `left_out` of the levels that are open.
    pub(super) fn pointer(&self, left_out: usize) -> String {
        let mut pointer = String::new();
        let levels = self.levels.len().saturating_sub(left_out);
        for (number, level) in self.levels.iter().enumerate().take(levels) {
            if !level.is_object {
                let _ = write!(pointer, "/{}", level.index);
                continue;
            }
            let next = self.levels.get(number + 1);
            let end = next.map_or(self.names.len(), |next| next.names_from);
            if let Some(name) = self.names[level.names_from..end].last() {
                pointer.push('/');
                pointer.push_str(&step(name));
            }
        }
        pointer
    }
}
