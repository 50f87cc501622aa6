//! Tests that span crates; see also `simulation`, and `e2e` and `crash`, which are built with the binary.
