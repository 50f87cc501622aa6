//! The one binary of Penstock: `serve`, and the command line client.
#[allow(dead_code, unused_imports)]
mod load;
fn main() {}
