//! The list of read models.
//!
//! Invariant: code that writes, reads, rebuilds or compares rows takes the model from here; names
//! are plain text only in the store, whose rows may be of any model. The one exception is
//! `runtime::parking::PARKED`: each consumer writes its own rows of what it has parked, which no fold of
//! the log gives, so a rebuild or comparison leaves them alone.

/// Declares the read models with their properties, so that none can lack one.
macro_rules! read_models {
    ($($(#[$doc:meta])* $variant:ident = $name:literal written once: $once:literal,)*) => {
        /// A read model written by [`Projection`](super::Projection).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum ReadModel { $($(#[$doc])* $variant,)* }

        impl ReadModel {
            /// All models of this release.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in its rows.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Whether each row is written by one record and never changed.
            pub const fn is_written_once(self) -> bool {
                match self { $(Self::$variant => $once,)* }
            }
        }

        /// The names of all models.
        pub const MODELS: &[&str] = &[$($name),*];
    };
}

read_models! {
    /// Endpoints, by key.
    Endpoints = "endpoints" written once: false,
    /// Deployments, by key and name.
    Deployments = "deployments" written once: false,
    /// Autoscale settings, by key and name of the deployment.
    Autoscales = "autoscales" written once: false,
    /// Instances, including the most recently ended ones.
    Instances = "instances" written once: false,
    /// Decisions, by the id of their event.
    Decisions = "decisions" written once: true,
    /// Tokens, by name.
    Access = "access" written once: false,
    /// Closed minutes and their corrections, by the id of their event.
    Usage = "usage" written once: true,
}

impl ReadModel {
    /// Returns the model with this name, or `None` if this release does not know it.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|model| model.name() == name)
    }
}

#[cfg(test)]
mod tests {
    /// A release with another read model.
    mod toy {
        read_models! {
            /// Toys, by name.
            Toys = "toys" written once: false,
        }
    }

    #[test]
    fn a_line_makes_a_read_model() {
        let model = toy::ReadModel::Toys;
        assert_eq!(toy::ReadModel::ALL, [model]);
        assert_eq!((model.name(), model.is_written_once()), ("toys", false));
        assert_eq!(toy::MODELS, ["toys"]);
    }
}
