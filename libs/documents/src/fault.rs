//! A fault that stops deserialization, as structured data: its location and kind. `message` turns it
//! into a sentence.
//!
//! Invariant: no fault is classified by its text. The kind follows from the error constructor that serde
//! calls, and the expected type from the deserializer method that was called.

use std::fmt;

use serde::de::{self, Expected, Unexpected};
use serde_json::{Number, Value};

/// The names that are accepted.
pub(crate) type KnownNames = &'static [&'static str];

/// The fault at which deserialization stopped.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{kind:?} at {steps:?}")]
pub(crate) struct Fault {
    /// The path from the root of the value.
    pub steps: Vec<String>,
    pub kind: FaultKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum FaultKind {
    /// The last step is not a known field. Holds the known ones.
    UnknownField(KnownNames),
    /// The last step is a required field that is missing.
    MissingField,
    /// A name that is not one of an enum's variants.
    UnknownVariant { variant: String, known: KnownNames },
    /// A value of another type, or out of the range of its type.
    Mismatch {
        actual: ActualValue,
        expected: ExpectedType,
    },
    /// A list with too many or too few items.
    Length { actual: usize, expected: String },
    /// A sentence from the type itself.
    Custom(String),
}

/// The value that was found.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ActualValue {
    Null,
    List,
    Mapping,
    /// Its type and the value.
    Value(String),
}

/// The type that was expected.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ExpectedType {
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
    /// A description from the type itself.
    Other(String),
}

impl Fault {
    pub fn new(kind: FaultKind) -> Self {
        let steps = Vec::new();
        Self { steps, kind }
    }

    /// `actual` in place of a value of the expected type.
    pub fn mismatch(actual: &Value, expected: &str) -> Self {
        Self::new(FaultKind::Mismatch {
            actual: ActualValue::of(actual),
            expected: ExpectedType::Other(expected.to_owned()),
        })
    }

    /// Prepends a step to the path.
    pub fn nested_in(mut self, step: impl Into<String>) -> Self {
        self.steps.insert(0, step.into());
        self
    }

    /// Sets the expected type, if the fault is in this very value and no method has set it yet.
    pub fn expecting(mut self, ty: ExpectedType) -> Self {
        if let FaultKind::Mismatch { expected, .. } = &mut self.kind
            && self.steps.is_empty()
            && matches!(expected, ExpectedType::Other(_))
        {
            *expected = ty;
        }
        self
    }
}

impl ActualValue {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
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

impl From<Unexpected<'_>> for ActualValue {
    fn from(unexpected: Unexpected<'_>) -> Self {
        match unexpected {
            Unexpected::Unit => Self::Null,
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
            // A JSON tree holds none of the others.
            other => Self::Value(other.to_string()),
        }
    }
}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(FaultKind::Custom(message.to_string()))
    }

    fn invalid_type(actual: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(FaultKind::Mismatch {
            actual: actual.into(),
            expected: ExpectedType::Other(expected.to_string()),
        })
    }

    fn invalid_value(actual: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(actual, expected)
    }

    fn invalid_length(actual: usize, expected: &dyn Expected) -> Self {
        let expected = expected.to_string();
        Self::new(FaultKind::Length { actual, expected })
    }

    fn unknown_variant(variant: &str, known: KnownNames) -> Self {
        let variant = variant.to_owned();
        Self::new(FaultKind::UnknownVariant { variant, known })
    }

    /// The map deserializer adds the step to the field.
    fn unknown_field(_: &str, known: KnownNames) -> Self {
        Self::new(FaultKind::UnknownField(known))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(FaultKind::MissingField).nested_in(field)
    }
}
