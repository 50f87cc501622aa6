//! `gateway-routes.json`: the last routes, saved so that a gateway can serve before control is
//! available. The file contains key hashes, so only its owner may read it. It is written to a
//! temporary file and renamed, so a crash leaves the old one intact.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::route::RouteUpdate;
use serde::{Deserialize, Serialize};

const FILE: &str = "gateway-routes.json";
const FORMAT: u32 = 1;

#[derive(Deserialize)]
struct SavedRoutes {
    format: u32,
    routes: Vec<RouteUpdate>,
}

#[derive(Serialize)]
struct SavedRoutesRef<'a> {
    format: u32,
    routes: Vec<&'a RouteUpdate>,
}

pub fn path(data: &Path) -> PathBuf {
    data.join(FILE)
}

/// Whether an earlier run left routes to serve from.
pub fn has_saved_routes(data: &Path) -> bool {
    path(data).exists()
}

/// Loads the saved routes. A file that cannot be read counts as empty: control sends the routes
/// again.
pub fn load(data: &Path) -> Vec<Arc<RouteUpdate>> {
    let path = path(data);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, effect = "waiting for control to send them", "cannot read the saved routes");
            return Vec::new();
        }
    };
    match serde_json::from_slice::<SavedRoutes>(&text) {
        Ok(saved) if saved.format == FORMAT => saved.routes.into_iter().map(Arc::new).collect(),
        Ok(saved) => {
            tracing::warn!(path = %path.display(), format = saved.format, effect = "waiting for control to send them", "unsupported format of the saved routes");
            Vec::new()
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, effect = "waiting for control to send them", "saved routes are corrupt");
            Vec::new()
        }
    }
}

pub fn save(data: &Path, routes: &[Arc<RouteUpdate>]) -> io::Result<()> {
    let saved = SavedRoutesRef {
        format: FORMAT,
        routes: routes.iter().map(AsRef::as_ref).collect(),
    };
    let text = serde_json::to_vec(&saved)?;
    let path = path(data);
    let temporary = path.with_extension("json.new");
    fs::create_dir_all(data)?;
    // Created fresh: an existing file might be readable by others.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(data)?.sync_all()
}
