//! What stops the reading of a value, as structure: where, and of which kind. `sentence` words it.
//!
//! Invariant: nothing is known of a fault by its text. serde says what is wrong by the constructor that it
//! calls, and the reader says what was wanted by the method that was called on it.

use std::fmt;

use serde::de::{self, Expected, Unexpected};
use serde_json::{Number, Value};

/// Words of which one would have been right.
pub(crate) type Known = &'static [&'static str];

/// What serde stopped at.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{kind:?} at {steps:?}")]
pub(crate) struct Fault {
    /// From the root of what is read.
    pub steps: Vec<String>,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// The last step is no field here.
    UnknownField(Known),
    /// The last step is a field that is not there.
    MissingField,
    /// A word that is not one of a few.
    UnknownWord { word: String, known: Known },
    /// A value of another type, or out of the range of its type.
    Mismatch { found: Found, wanted: Wanted },
    /// A list with too many or too few items.
    Length { found: usize, wanted: String },
    /// What the type itself says, as a sentence.
    Said(String),
}

/// What stands there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    Nothing,
    List,
    Mapping,
    /// Its type and the value.
    Value(String),
}

/// What should stand there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Wanted {
    Boolean,
    U8,
    U16,
    Unsigned,
    Signed,
    Number,
    Text,
    List,
    Mapping,
    /// A mapping whose fields are known.
    Fields,
    /// As the type itself puts it.
    Other(String),
}

impl Fault {
    pub fn new(kind: Kind) -> Self {
        let steps = Vec::new();
        Self { steps, kind }
    }

    /// `found` where something else is wanted.
    pub fn mismatch(found: &Value, wanted: &str) -> Self {
        Self::new(Kind::Mismatch {
            found: Found::of(found),
            wanted: Wanted::Other(wanted.to_owned()),
        })
    }

    /// The same fault, seen from one level up.
    pub fn below(mut self, step: impl Into<String>) -> Self {
        self.steps.insert(0, step.into());
        self
    }

    /// Says what was wanted, if the fault is of this very value and a type did not say it.
    pub fn wanting(mut self, what: Wanted) -> Self {
        if let Kind::Mismatch { wanted, .. } = &mut self.kind
            && self.steps.is_empty()
            && matches!(wanted, Wanted::Other(_))
        {
            *wanted = what;
        }
        self
    }
}

impl Found {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Nothing,
            Value::Array(_) => Self::List,
            Value::Object(_) => Self::Mapping,
            Value::Bool(value) => Self::Value(format!("boolean `{value}`")),
            Value::Number(number) if number.is_f64() => {
                Self::Value(format!("floating point `{number}`"))
            }
            Value::Number(number) => Self::Value(format!("integer `{number}`")),
            Value::String(text) => Self::Value(format!("string {text:?}")),
        }
    }
}

impl From<Unexpected<'_>> for Found {
    fn from(unexpected: Unexpected<'_>) -> Self {
        match unexpected {
            Unexpected::Unit => Self::Nothing,
            Unexpected::Seq => Self::List,
            Unexpected::Map => Self::Mapping,
            Unexpected::Bool(value) => Self::of(&value.into()),
            Unexpected::Unsigned(number) => Self::of(&number.into()),
            Unexpected::Signed(number) => Self::of(&number.into()),
            Unexpected::Str(text) => Self::of(&text.into()),
            Unexpected::Float(number) => match Number::from_f64(number) {
                Some(number) => Self::of(&number.into()),
                None => Self::Value(format!("floating point `{number}`")),
            },
            // No tree of JSON holds the others.
            other => Self::Value(other.to_string()),
        }
    }
}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(sentence: T) -> Self {
        Self::new(Kind::Said(sentence.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::new(Kind::Mismatch {
            found: found.into(),
            wanted: Wanted::Other(wanted.to_string()),
        })
    }

    fn invalid_value(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::invalid_type(found, wanted)
    }

    fn invalid_length(found: usize, wanted: &dyn Expected) -> Self {
        let wanted = wanted.to_string();
        Self::new(Kind::Length { found, wanted })
    }

    fn unknown_variant(word: &str, known: Known) -> Self {
        let word = word.to_owned();
        Self::new(Kind::UnknownWord { word, known })
    }

    /// The step to the field is added by what reads the mapping.
    fn unknown_field(_: &str, known: Known) -> Self {
        Self::new(Kind::UnknownField(known))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Kind::MissingField).below(field)
    }
}
