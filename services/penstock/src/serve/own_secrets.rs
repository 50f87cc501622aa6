//! The sources of this process's own secrets: settings, what they reference, and what the PostgreSQL
//! client reads.

use std::ffi::OsString;
use std::path::Path;

use contract::own_secrets::OwnSecrets;

use super::args::ServeArgs;

/// Options of the store and bus URLs whose values are files. Other values may be references.
const FILE_OPTIONS: &[&str] = &["ca", "cert", "key", "sslrootcert", "sslcert", "sslkey"];
/// Environment variables whose values are files.
const FILE_VARIABLES: &[&str] = &["PGPASSFILE", "PGSSLKEY", "PENSTOCK_CONFIG"];
/// Suffixes of the files of an SQLite database.
const SQLITE_SUFFIXES: &[&str] = &["", "-wal", "-shm", "-journal"];

/// Collects the secrets of the settings and the environment.
pub fn own_secrets(args: &ServeArgs, variable: impl Fn(&str) -> Option<OsString>) -> OwnSecrets {
    let mut own = OwnSecrets::default();
    add_path(&mut own, &args.data);
    for file in args.config.iter() {
        add_path(&mut own, file);
    }
    for reference in args.seal_key.iter().chain(&args.internal_token) {
        add_reference(&mut own, reference);
    }
    for url in args.store.iter().chain([&args.bus]) {
        add_url(&mut own, url);
    }
    for name in FILE_VARIABLES {
        if let Some(file) = variable(name) {
            add_path(&mut own, Path::new(&file));
        }
    }
    if let Some(home) = variable("HOME") {
        add_path(&mut own, &Path::new(&home).join(".pgpass"));
    }
    own
}

fn add_url(own: &mut OwnSecrets, url: &str) {
    let (location, options) = url.split_once('?').unwrap_or((url, ""));
    if let Some(path) = location.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        for suffix in SQLITE_SUFFIXES {
            add_path(own, Path::new(&format!("{path}{suffix}")));
        }
    }
    for (option, value) in form_urlencoded::parse(options.as_bytes()) {
        match FILE_OPTIONS.contains(&&*option) {
            true => add_path(own, Path::new(&*value)),
            false => add_reference(own, &value),
        }
    }
}

fn add_reference(own: &mut OwnSecrets, reference: &str) {
    match reference.strip_prefix("file:") {
        Some(path) => add_path(own, Path::new(path)),
        None => own.add_reference(reference),
    }
}

/// Adds a path both as given and canonicalized. An empty path is ignored: it does not mean the working
/// directory.
fn add_path(own: &mut OwnSecrets, path: &Path) {
    if path.as_os_str().is_empty() {
        return;
    }
    let names = [std::path::absolute(path), path.canonicalize()];
    for name in names.into_iter().flatten() {
        own.add_path(&name);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn own(arguments: &[&str], environment: &[(&str, &str)]) -> OwnSecrets {
        let arguments = ["serve"].iter().chain(arguments);
        let args = Command::parse_from(arguments).args;
        own_secrets(&args, |name| {
            let found = environment.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn every_setting_that_references_a_secret_makes_it_our_own() {
        let here = std::env::current_dir().unwrap();
        let relative = format!("file:{}/secrets/token", here.display());
        let bus = "--bus=kafka://a:1,b:2/p?ca=/k/ca&cert=/k/cert&key=/k/key&sasl=plain&user=env:KAFKA_USER&password=file:%2Fk%2Fpassword";
        let store = "--store=postgres://db/p?sslrootcert=/s/ca&sslcert=/s/cert&sslkey=/s/key";
        for (argument, reference) in [
            ("--data=/d", "file:/d/client.json"),
            ("--data=/d", "file:/d/instances/a"),
            ("--config=/c/serve.yaml", "file:/c/serve.yaml"),
            ("--seal-key=file:/x/seal", "file:/x/seal"),
            ("--seal-key=env:SEAL", "env:SEAL"),
            ("--internal-token=file:secrets/token", &relative),
            ("--internal-token=env:TOKEN", "env:TOKEN"),
            ("--store=sqlite:/q/log.db", "file:/q/log.db"),
            ("--store=sqlite:///q/log.db?mode=rwc", "file:/q/log.db-wal"),
            (bus, "file:/k/ca"),
            (bus, "file:/k/cert"),
            (bus, "file:/k/key"),
            (bus, "file:/k/password"),
            (bus, "env:KAFKA_USER"),
            (store, "file:/s/ca"),
            (store, "file:/s/cert"),
            (store, "file:/s/key"),
        ] {
            let refusal = own(&[argument], &[]).refusal(reference);
            assert!(refusal.is_some(), "{argument} {reference}");
            let refusal = own(&["--data=/else"], &[]).refusal(reference);
            assert_eq!(refusal, None, "{reference}");
        }
    }

    #[test]
    fn files_named_by_environment_variables_are_our_own() {
        let environment = [
            ("PGPASSFILE", "/s/pgpass"),
            ("PGSSLKEY", "/s/key"),
            ("PENSTOCK_CONFIG", "/s/client.json"),
            ("HOME", "/home/me"),
        ];
        let own = own(&[], &environment);
        for path in ["/s/pgpass", "/s/key", "/s/client.json", "/home/me/.pgpass"] {
            assert!(own.has_path(Path::new(path)), "{path}");
        }
        assert!(!own.has_path(Path::new("/home/me/models/key")));
    }
}
