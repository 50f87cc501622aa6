//! What is replaced in the command of an instance and in the values of its environment.

use std::collections::BTreeSet;

use super::{DeploymentSpec, EnvValue};

/// Replaced by the port that an instance must listen on.
pub const PORT: &str = "{port}";
/// Replaced by the address that an instance must listen on.
pub const HOST: &str = "{host}";
/// Replaced by the folder of an instance, which is created for it and removed with it.
pub const FOLDER: &str = "{folder}";

/// The beginning of a placeholder of a further port, up to its name.
const NAMED_PORT: &str = "{port:";
/// The beginning of the variable that has a further port, up to its name.
const PORT_VARIABLE: &str = "PORT_";
/// Longest name of a further port.
const NAME_BYTES_MAX: usize = 16;

/// The placeholder of a further port, such as `{port:grpc}`.
pub fn port_placeholder(name: &str) -> String {
    format!("{NAMED_PORT}{name}}}")
}

/// The variable that has a further port, such as `PORT_GRPC`.
pub fn port_variable(name: &str) -> String {
    let name = name.replace('-', "_").to_ascii_uppercase();
    format!("{PORT_VARIABLE}{name}")
}

/// The names of all placeholders of further ports in a text; one that is not a valid name is an error.
pub fn port_names(text: &str) -> impl Iterator<Item = Result<&str, &str>> {
    text.split(NAMED_PORT).skip(1).map(|rest| {
        let (name, is_closed) = rest
            .split_once('}')
            .map_or((rest, false), |(name, _)| (name, true));
        match is_closed && is_port_name(name) {
            true => Ok(name),
            false => Err(name),
        }
    })
}

/// The names of the further ports of a deployment's instances: those of placeholders, and of variables in
/// its command, which a shell replaces. A variable that the deployment sets itself is not a port.
pub fn named_ports(spec: &DeploymentSpec) -> BTreeSet<String> {
    let values = spec.env.values().filter_map(|value| match value {
        EnvValue::Plain(text) => Some(text),
        EnvValue::Secret(_) => None,
    });
    let texts = spec.command.iter().chain(values);
    let placeholders = texts.flat_map(|text| port_names(text).flatten().map(str::to_owned));
    let variables = spec.command.iter().flat_map(|text| variables(text));
    let ports = variables
        .filter(|variable| !spec.env.contains_key(*variable))
        .filter_map(|variable| {
            let name = variable.strip_prefix(PORT_VARIABLE)?;
            let name = name.replace('_', "-").to_ascii_lowercase();
            (is_port_name(&name) && port_variable(&name) == variable).then_some(name)
        });
    placeholders.chain(ports).collect()
}

/// Whether a command has the variable of the port that an instance must listen on, which a shell replaces.
pub fn has_port_variable(text: &str) -> bool {
    variables(text).any(|variable| variable == "PORT")
}

/// The names of the variables in a text that a shell would replace.
fn variables(text: &str) -> impl Iterator<Item = &str> {
    text.split('$').skip(1).map(|rest| {
        let name = rest.strip_prefix('{').unwrap_or(rest);
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        &name[..end.unwrap_or(name.len())]
    })
}

fn is_port_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: &[&str], env: &[(&str, &str)]) -> Vec<String> {
        let spec = serde_json::json!({
            "backend": "process", "instanceType": "t", "command": command,
            "env": env.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
        });
        let spec: DeploymentSpec = serde_json::from_value(spec).unwrap_or_else(|e| panic!("{e}"));
        named_ports(&spec).into_iter().collect()
    }

    #[test]
    fn ports_are_named_by_placeholders_in_command_and_environment() {
        let env = [
            ("METRICS", "http://{host}:{port:metrics}/"),
            ("A", "{port}"),
        ];
        let command = ["./serve", "--grpc={port:grpc-2},{port:b}", "{port:grpc-2}"];
        assert_eq!(names(&command, &env), ["b", "grpc-2", "metrics"]);
    }

    #[test]
    fn ports_are_named_by_variables_of_a_shell_but_not_by_the_deployments_own() {
        let command = [
            "sh",
            "-c",
            "exec ./serve $PORT ${PORT_GRPC} $PORT_A_B/ $PORT_OWN $PORT_",
        ];
        assert_eq!(names(&command, &[("PORT_OWN", "1")]), ["a-b", "grpc"]);
        assert_eq!(port_variable("a-b"), "PORT_A_B");
    }

    #[test]
    fn a_name_is_short_and_lowercase() {
        let long = "a".repeat(NAME_BYTES_MAX);
        let valid = ["a", "grpc", "a-1", &long];
        let too_long = format!("{long}a");
        let invalid = ["", "BAD", "bad name", "1a", "a-", "-a", "a_b", &too_long];
        for (names, is_valid) in [(&valid[..], true), (&invalid[..], false)] {
            for name in names {
                let text = port_placeholder(name);
                let expected = if is_valid { Ok(*name) } else { Err(*name) };
                assert_eq!(port_names(&text).collect::<Vec<_>>(), [expected]);
            }
        }
        let unclosed: Vec<_> = port_names("{port:a").collect();
        assert_eq!(unclosed, [Err("a")]);
    }

    #[test]
    fn a_longer_name_is_not_the_variable_of_the_port() {
        assert!(has_port_variable("serve $PORT") && has_port_variable("${PORT}:x"));
        assert!(has_port_variable("${PORT:-8080}"));
        assert!(!has_port_variable("$PORT_GRPC") && !has_port_variable("PORT"));
    }
}
