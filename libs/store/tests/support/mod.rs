//! Shared by all test suites.

#![allow(unused_macros, unused_imports)]

pub mod archives;
pub mod database;
pub mod postgres;

/// Runs the same tests on either database.
macro_rules! suite {
    ($($name:ident)* @sqlite $($sqlite:ident)* @postgres $($postgres:ident)*) => {
        mod on_sqlite {
            use crate::support::database::TestDatabase;

            $crate::support::suite! { @tests TestDatabase::sqlite(); $($name)* $($sqlite)* }
        }

        mod on_postgres {
            use crate::support::database::TestDatabase;

            $crate::support::suite! { @tests TestDatabase::postgres(); $($name)* $($postgres)* }
        }
    };
    (@tests $db:expr; $($name:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if let Some(db) = $db.await {
                super::$name(db).await;
            }
        })*
    };
}

pub(crate) use suite;
