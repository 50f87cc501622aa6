//! Open sets of names, which grow without a new version: a reader keeps a name that it does not know,
//! and aggregates it separately.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Maximum length of an open name, in bytes.
pub const OPEN_NAME_LENGTH_MAX: usize = 32;

/// Whether a text is a name of lower-case letters, digits and one more character.
const fn is_valid(text: &str, also: u8) -> bool {
    let mut rest = text.as_bytes();
    let is_of_length = !rest.is_empty() && rest.len() <= OPEN_NAME_LENGTH_MAX;
    // A constant function has neither iterators nor closures.
    while let [byte, after @ ..] = rest {
        if !byte.is_ascii_lowercase() && !byte.is_ascii_digit() && *byte != also {
            return false;
        }
        rest = after;
    }
    is_of_length
}

/// Declares a type of open names with the names that this release knows.
macro_rules! open_name {
    (
        $(#[$doc:meta])* $name:ident, also $also:literal, $pattern:literal, $invalid:ident: $sentence:literal;
        $($(#[$known_doc:meta])* $constant:ident = $text:literal,)*
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Cow<'static, str>);

        /// The text is not a valid name.
        #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
        #[error($sentence)]
        pub struct $invalid(pub String);

        impl $name {
            $($(#[$known_doc])* pub const $constant: Self = Self(Cow::Borrowed($text));)*

            /// The names that this release knows.
            pub const KNOWN: &'static [Self] = &[$(Self::$constant),*];

            /// A name that is written in code, for tables of what has one: no other place has to declare it.
            /// In a constant or static, an invalid name does not compile.
            ///
            /// # Panics
            ///
            /// If the name is invalid, and this is called at run time.
            pub const fn from_static(text: &'static str) -> Self {
                assert!(is_valid(text, $also), "invalid name");
                Self(Cow::Borrowed(text))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = $invalid;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($text => return Ok(Self::$constant),)*
                    _ => {}
                }
                match is_valid(text, $also) {
                    true => Ok(Self(Cow::Owned(text.to_owned()))),
                    false => Err($invalid(text.to_owned())),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(serde::de::Error::custom)
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": "string", "pattern": $pattern, "examples": [$($text),*],
                })
            }
        }
    };
}

open_name! {
    /// The role under which requests are counted and instances are billed: 1 to 32 lower-case letters,
    /// digits and hyphens.
    Role, also b'-', "^[a-z0-9-]{1,32}$",
    InvalidRole: "`{0}` is not a role: use 1 to 32 lower-case letters, digits and hyphens";
    /// Answers clients.
    LIVE = "live",
    /// Receives copies of requests; its responses are discarded.
    SHADOW = "shadow",
    /// From the request of an instance to its first readiness.
    WARMUP = "warmup",
    /// Above the target, during a rollout or a replacement.
    SURGE = "surge",
    /// Ready, without requests.
    IDLE = "idle",
    /// Processes stored requests.
    BATCH = "batch",
}

open_name! {
    /// A duration measured per request and compared with thresholds, named like its metrics: 1 to 32
    /// lower-case letters, digits and underscores. Values are in microseconds.
    Measure, also b'_', "^[a-z0-9_]{1,32}$",
    InvalidMeasure: "`{0}` is not a measure: use 1 to 32 lower-case letters, digits and underscores";
    /// From the request's arrival to the last byte of the response.
    LATENCY = "latency",
    /// From the request's arrival to the first token of the response.
    TIME_TO_FIRST_TOKEN = "time_to_first_token",
    /// Between tokens of the response after the first, averaged over the response.
    TIME_PER_OUTPUT_TOKEN = "time_per_output_token",
}

open_name! {
    /// The kind of a source, which determines what it measures: 1 to 32 lower-case letters, digits and
    /// hyphens. Measurements of different kinds of sources are never added together.
    SourceKind, also b'-', "^[a-z0-9-]{1,32}$",
    InvalidSourceKind: "`{0}` is not a kind of source: use 1 to 32 lower-case letters, digits and hyphens";
    /// Requests, latencies, in-flight.
    GATEWAY = "gateway",
    /// CPU and memory of instances.
    NODE = "node",
}

open_name! {
    /// The name of a backend: 1 to 32 lower-case letters, digits and hyphens. Nodes report which backends
    /// they offer.
    BackendKind, also b'-', "^[a-z0-9-]{1,32}$",
    InvalidBackendKind: "`{0}` is not a valid backend name: use 1 to 32 lower-case letters, digits and hyphens";
    /// Local processes.
    PROCESS = "process",
    /// Instances that exist only as numbers.
    SIMULATED = "simulated",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_round_trips() {
        let role: Role = serde_json::from_str(r#""canary-2""#).unwrap();
        assert_eq!(role.as_str(), "canary-2");
        assert_eq!(serde_json::to_string(&role).unwrap(), r#""canary-2""#);
        assert_eq!("shadow".parse::<Role>().unwrap(), Role::SHADOW);
    }

    #[test]
    fn an_invalid_role_or_measure_is_rejected() {
        let longest = "a".repeat(OPEN_NAME_LENGTH_MAX);
        assert!(longest.parse::<Role>().is_ok());
        for text in ["", "Live", "a b", "a_b", "ü", &(longest + "a")] {
            assert_eq!(text.parse::<Role>(), Err(InvalidRole(text.to_owned())));
        }
        assert!("a-b".parse::<Measure>().is_err());
    }

    #[test]
    fn a_name_in_code_need_not_be_declared_here() {
        static TOY: BackendKind = BackendKind::from_static("toy");
        assert_eq!("toy".parse(), Ok(TOY.clone()));
        assert!(!BackendKind::KNOWN.contains(&TOY));
    }

    #[test]
    #[should_panic = "invalid name"]
    fn an_invalid_name_in_code_is_refused() {
        BackendKind::from_static("a_b");
    }

    #[test]
    fn sources_and_backends_of_a_later_release_round_trip() {
        let source: SourceKind = serde_json::from_str(r#""kafka-lag""#).unwrap();
        let backend: BackendKind = serde_json::from_str(r#""kubernetes""#).unwrap();
        assert!(!SourceKind::KNOWN.contains(&source) && !BackendKind::KNOWN.contains(&backend));
        assert_eq!(serde_json::to_string(&source).unwrap(), r#""kafka-lag""#);
        assert_eq!(serde_json::to_string(&backend).unwrap(), r#""kubernetes""#);
        assert!("No Source".parse::<SourceKind>().is_err());
    }
}
