//! The read models, a row each.
//!
//! Invariant: whoever writes, reads, rebuilds or compares rows takes the model from here; its name is
//! text only in the store, whose rows are of any model.

/// Declares the read models, with all that is known of each, so that none can lack a part of it.
macro_rules! read_models {
    ($($(#[$doc:meta])* $variant:ident = $name:literal written once: $once:literal,)*) => {
        /// A read model that [`Projection`](super::Projection) writes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum ReadModel { $($(#[$doc])* $variant,)* }

        impl ReadModel {
            /// All of this release.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As its rows name it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Each of its rows is written by one record and never changed: what happened stays so.
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
    /// Instances, with the last ones that are over.
    Instances = "instances" written once: false,
    /// Decisions, by the id of their event.
    Decisions = "decisions" written once: true,
    /// Tokens, by name.
    Access = "access" written once: false,
    /// Closed minutes and their corrections, by the id of their event.
    Usage = "usage" written once: true,
}

impl ReadModel {
    /// The model of this name; none of one that this release does not know.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|model| model.name() == name)
    }
}
