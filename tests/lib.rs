//! Tests that span crates; see `simulation`, and `e2e` and `crash`, which are built with the binary.
