//! The template of an attribute of a mapped message: text and columns of a row.

/// The longest identifier of Postgres, in bytes.
const IDENTIFIER_MAX_BYTES: usize = 63;

/// Part of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text as it stands.
    Text(String),
    /// The value of a column.
    Column(String),
}

/// The template of a message's attribute. It is null as soon as one of its columns is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value(pub Vec<Part>);

impl Value {
    /// The column that it is, if it is one and nothing else.
    #[must_use]
    pub fn column(&self) -> Option<&str> {
        match &self.0[..] {
            [Part::Column(name)] => Some(name),
            _ => None,
        }
    }

    /// The columns in it.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Column(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// Reads `text {column} text`; `{{` and `}}` are braces.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text.chars().peekable();
        while let Some(character) = rest.next() {
            match character {
                '{' | '}' if rest.peek() == Some(&character) => {
                    rest.next();
                    plain.push(character);
                }
                '{' => {
                    let mut name = String::new();
                    let is_closed = loop {
                        match rest.next() {
                            Some('}') => break true,
                            Some(character) => name.push(character),
                            None => break false,
                        }
                    };
                    if !is_closed {
                        return Err("has a `{` without its `}`; `{{` is a brace".to_owned());
                    }
                    check_identifier("names a column that", &name)?;
                    if !plain.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(Part::Column(name));
                }
                '}' => return Err("has a `}` without its `{`; `}}` is a brace".to_owned()),
                other => plain.push(other),
            }
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        if parts.is_empty() {
            return Err("is empty".to_owned());
        }
        Ok(Self(parts))
    }
}

/// Refuses what cannot be an identifier of Postgres; `what` begins the reason.
pub(super) fn check_identifier(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("{what} is empty"));
    }
    if name.len() > IDENTIFIER_MAX_BYTES {
        return Err(format!(
            "{what} is {} bytes long, at most {IDENTIFIER_MAX_BYTES} are allowed",
            name.len()
        ));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("{what} has a control character"));
    }
    Ok(())
}
