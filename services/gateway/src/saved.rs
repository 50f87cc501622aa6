//! `gateway-routes.json`: the last routes, kept so that a gateway serves before control is there.
//! It holds hashes of keys, so only its owner may read it; it is written beside and renamed, so a
//! crash leaves the old one whole.

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
struct Saved {
    format: u32,
    routes: Vec<RouteUpdate>,
}

#[derive(Serialize)]
struct Saving<'a> {
    format: u32,
    routes: Vec<&'a RouteUpdate>,
}

pub fn path(data: &Path) -> PathBuf {
    data.join(FILE)
}

/// Whether an earlier life has left routes to serve by.
pub fn has_saved_routes(data: &Path) -> bool {
    path(data).exists()
}

/// The saved routes. A file that cannot be read is as none: control sends the routes again.
pub fn load(data: &Path) -> Vec<Arc<RouteUpdate>> {
    let path = path(data);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the saved routes cannot be read; serving starts when control sends them");
            return Vec::new();
        }
    };
    match serde_json::from_slice::<Saved>(&text) {
        Ok(saved) if saved.format == FORMAT => saved.routes.into_iter().map(Arc::new).collect(),
        Ok(saved) => {
            tracing::warn!(path = %path.display(), format = saved.format, "the saved routes are of another version; serving starts when control sends them");
            Vec::new()
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the saved routes are damaged; serving starts when control sends them");
            Vec::new()
        }
    }
}

pub fn save(data: &Path, routes: &[Arc<RouteUpdate>]) -> io::Result<()> {
    let saving = Saving {
        format: FORMAT,
        routes: routes.iter().map(AsRef::as_ref).collect(),
    };
    let text = serde_json::to_vec(&saving)?;
    let path = path(data);
    let beside = path.with_extension("json.new");
    fs::create_dir_all(data)?;
    // Not opened for an existing file, which might be readable by others.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&beside, &path)?;
    File::open(data)?.sync_all()
}
