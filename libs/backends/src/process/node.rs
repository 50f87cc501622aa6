//! The id of this node: a file of the data folder, which outlives the process.
//!
//! Invariant: while instances of a node run, the process that has their data folder is that node.

use std::fs;
use std::io;
use std::path::Path;

use uuid::Uuid;

use super::os;
use super::record::{FOLDER, InstanceRecord, read_or_create, read_record};

/// Returns the id of this node, created once. Whoever has the data folder acts as the node. If its file is
/// gone while instances of the node still run, it is that node again, so that they keep serving.
///
/// # Errors
///
/// If the folder cannot be read or written.
#[expect(clippy::disallowed_methods, reason = "created once for a data folder")]
pub fn node_id(data: &Path) -> io::Result<String> {
    read_or_create(data, "node", || {
        running_node(data).unwrap_or_else(|| {
            let unique = Uuid::new_v4().simple().to_string();
            format!("node-{}", &unique[..12])
        })
    })
}

/// The node of the instances in this folder that still run, if any do. A process of this boot proves that
/// the folder is not a copy from another machine, whose node may run there.
fn running_node(data: &Path) -> Option<String> {
    let boot_id = os::boot_id().ok()?;
    let folders = fs::read_dir(data.join(FOLDER)).ok()?.flatten();
    let records = folders.filter_map(|folder| read_record(&folder.path()).ok()?);
    let is_running = |record: &InstanceRecord| {
        let process = record.process.as_ref();
        process.is_some_and(|process| os::is_running(process, &boot_id).unwrap_or(false))
    };
    let mut running = records.filter(|record| !record.node.is_empty() && is_running(record));
    running.next().map(|record| record.node)
}
