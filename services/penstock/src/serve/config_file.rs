//! `--config FILE`: the flags of `serve` in a file, one `name: value` per line, names as on the command
//! line without the dashes. The command line takes precedence, then the environment, then the file.

use std::path::Path;

use anyhow::{Context, bail};
use clap::{CommandFactory, Parser};

use super::args::ServeArgs;

#[derive(Parser)]
#[command(name = "serve", args_override_self = true)]
struct Command {
    #[command(flatten)]
    args: ServeArgs,
}

/// The arguments merged with those of the file they name, if any.
pub fn with_file(args: ServeArgs) -> anyhow::Result<ServeArgs> {
    let Some(path) = args.config.clone() else {
        return Ok(args);
    };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    let command_line = std::env::args()
        .skip_while(|argument| argument != "serve")
        .skip(1);
    let arguments = ["serve".to_owned()]
        .into_iter()
        .chain(flags(&text, &path)?)
        .chain(command_line);
    Ok(Command::try_parse_from(arguments)
        .with_context(|| format!("in {} or on the command line", path.display()))?
        .args)
}

fn flags(text: &str, path: &Path) -> anyhow::Result<Vec<String>> {
    let mut flags = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once(':') else {
            bail!(
                "{}:{}: expected `name: value`, such as `data: /var/lib/penstock`",
                path.display(),
                index + 1
            );
        };
        match (name.trim(), value.trim()) {
            ("config", _) => bail!(
                "{}:{}: `config` is not allowed in a configuration file",
                path.display(),
                index + 1
            ),
            (_, "false") => {}
            (name, _) if is_set_in_environment(name) => {}
            (name, "true") => flags.push(format!("--{name}")),
            (name, value) => flags.push(format!("--{name}={value}")),
        }
    }
    Ok(flags)
}

fn is_set_in_environment(flag: &str) -> bool {
    let command = Command::command();
    let argument = command
        .get_arguments()
        .find(|argument| argument.get_long() == Some(flag));
    let variable = argument.and_then(|argument| argument.get_env());
    variable.is_some_and(|variable| std::env::var_os(variable).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_flags() {
        let text =
            "# where\ndata: /var/lib/penstock\nkeep-instances: true\n\ncontrol-addr: 127.0.0.1:0\n";
        let flags = flags(text, Path::new("p")).unwrap();
        assert_eq!(
            flags,
            [
                "--data=/var/lib/penstock",
                "--keep-instances",
                "--control-addr=127.0.0.1:0"
            ]
        );
    }

    #[test]
    fn a_line_that_is_not_a_setting_is_refused_with_its_line_number() {
        let error = flags("data /x", Path::new("p.yaml"))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("p.yaml:1:"), "{error}");
    }
}
