//! What the suites share.

#![allow(unused_macros, unused_imports)]

pub mod archives;
pub mod place;
pub mod postgres;

/// Of every database the same.
macro_rules! suite {
    ($($name:ident)* @sqlite $($sqlite:ident)* @postgres $($postgres:ident)*) => {
        mod on_sqlite {
            use crate::support::place::Place;

            $crate::support::suite! { @tests Place::sqlite(); $($name)* $($sqlite)* }
        }

        mod on_postgres {
            use crate::support::place::Place;

            $crate::support::suite! { @tests Place::postgres(); $($name)* $($postgres)* }
        }
    };
    (@tests $place:expr; $($name:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if let Some(place) = $place.await {
                super::$name(place).await;
            }
        })*
    };
}

pub(crate) use suite;
