//! Finds import cycles between modules of a crate, by parsing the source.
//!
//! A module and its children may import each other. Between siblings imports must be acyclic; everything
//! below a child counts as the child's. A name that is imported through another module's `use` counts as
//! imported from where it is defined.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// `["sql", "postgres"]`; the crate itself is empty.
type Module = Vec<String>;

/// An import from elsewhere in the crate, as a path from the crate root.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    path: Vec<String>,
    /// The name under which it is re-exported, if it is; `*` stands for all names of a module.
    reexported_as: Option<String>,
}

#[derive(Default)]
pub struct Crate {
    imports: BTreeMap<Module, Vec<Import>>,
    /// Names that each module defines itself.
    defined: BTreeMap<Module, BTreeSet<String>>,
}

impl Crate {
    /// Adds a file by its path below `src`. `code` is without comments and tests.
    pub fn add(&mut self, path: &Path, code: &str) {
        let module = module_of(path);
        let imports = imports(&module, code);
        let defined = self.defined.entry(module.clone()).or_default();
        defined.extend(defined_in(code));
        self.imports.entry(module).or_default().extend(imports);
    }

    /// The cycles, each as `a -> b -> a` with the imports that cause it.
    pub fn cycles(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (parent, edges) in self.edges_between_children() {
            for cycle in cycles_of(&edges) {
                found.push(describe(&parent, &cycle, &edges));
            }
        }
        found
    }

    /// For each module, which child imports which other, with an example: file and name.
    fn edges_between_children(&self) -> BTreeMap<Module, Edges> {
        let mut all: BTreeMap<Module, Edges> = BTreeMap::new();
        for (module, imports) in &self.imports {
            for import in imports {
                let to = self.owner(&import.path, &mut BTreeSet::new());
                let common_prefix_len = common_prefix_len(module, &to);
                // One is an ancestor of the other.
                let (Some(from), Some(into)) =
                    (module.get(common_prefix_len), to.get(common_prefix_len))
                else {
                    continue;
                };
                let edges = all.entry(module[..common_prefix_len].to_vec()).or_default();
                let example = (module.join("::"), import.path.join("::"));
                let edge = edges.entry(from.clone()).or_default();
                edge.entry(into.clone()).or_insert(example);
            }
        }
        all
    }

    /// The module that defines the item of a path.
    fn owner(&self, path: &[String], seen: &mut BTreeSet<Vec<String>>) -> Module {
        let depth = (0..=path.len()).rev();
        let module = depth.map(|end| &path[..end]);
        let mut module = module.filter(|module| self.imports.contains_key(*module));
        let module = module.next().unwrap_or(&[]);
        let Some(name) = path.get(module.len()) else {
            return module.to_vec();
        };
        if !seen.insert(path.to_vec()) {
            return module.to_vec();
        }
        for import in self.imports.get(module).into_iter().flatten() {
            match import.reexported_as.as_deref() {
                Some(reexported) if reexported == name => {
                    return self.owner(&import.path, seen);
                }
                Some("*") => {
                    let through = [&import.path[..], &path[module.len()..]].concat();
                    if self.has(&through) {
                        return self.owner(&through, seen);
                    }
                }
                _ => {}
            }
        }
        module.to_vec()
    }

    fn has(&self, path: &[String]) -> bool {
        let Some((name, module)) = path.split_last() else {
            return false;
        };
        let defines = self
            .defined
            .get(module)
            .is_some_and(|names| names.contains(name));
        let imports = self.imports.get(module).into_iter().flatten();
        let mut reexported =
            imports.filter_map(|import| Some((import, import.reexported_as.as_deref()?)));
        defines
            || reexported.any(|(import, alias)| match alias {
                "*" => {
                    import.path != module
                        && self.has(&[&import.path[..], std::slice::from_ref(name)].concat())
                }
                alias => alias == name,
            })
    }
}

/// Names of definitions in the code.
fn defined_in(code: &str) -> impl Iterator<Item = String> {
    const BEGIN: &[&str] = &[
        "struct",
        "enum",
        "fn",
        "type",
        "trait",
        "const",
        "static",
        "macro_rules!",
    ];
    let words = code.split_whitespace();
    words
        .clone()
        .zip(words.skip(1))
        .filter_map(|(begin, name)| {
            let end = name.find(|c| !is_in_name(c)).unwrap_or(name.len());
            BEGIN.contains(&begin).then(|| name[..end].to_owned())
        })
}

/// For each child, the other children it imports, with an example.
type Edges = BTreeMap<String, BTreeMap<String, (String, String)>>;

fn module_of(path: &Path) -> Module {
    let path = path.with_extension("");
    let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
    let mut module: Module = parts.collect();
    if module.last().is_some_and(|last| last == "mod")
        || matches!(&module[..], [only] if only == "lib" || only == "main")
    {
        module.pop();
    }
    module
}

fn common_prefix_len(one: &[String], other: &[String]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

/// All paths that begin with `crate` or `super`, and what every `use` brings into scope: children import it
/// from there too, public or not.
fn imports(module: &Module, code: &str) -> Vec<Import> {
    let mut found = Vec::new();
    for (at, _) in code
        .match_indices("crate::")
        .chain(code.match_indices("super::"))
    {
        let before = &code[..at];
        if !before.ends_with(is_in_name) && !before.ends_with("::") {
            for (path, _) in leaves(&code[at..]) {
                found.extend(from_root(module, &path).map(|path| Import {
                    path,
                    reexported_as: None,
                }));
            }
        }
    }
    for line in code.split(';') {
        let Some((_, tree)) = line.rsplit_once("use ") else {
            continue;
        };
        for (path, name) in leaves(tree) {
            let absolute = match path.first().map(String::as_str) {
                Some("crate" | "super" | "self") => from_root(module, &path),
                _ => Some([&module[..], &path[..]].concat()),
            };
            found.extend(absolute.map(|path| Import {
                path,
                reexported_as: Some(name),
            }));
        }
    }
    found
}

fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn from_root(module: &Module, path: &[String]) -> Option<Vec<String>> {
    let mut base = module.clone();
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        match first.as_str() {
            "crate" => base.clear(),
            "super" => {
                base.pop()?;
            }
            "self" => {}
            _ => break,
        }
        rest = after;
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// The paths of an import tree (`a::{b, c::{self, d as e}, f::*}`), each with its local name. For `*` the
/// path is the module.
fn leaves(text: &str) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    parse_tree(text.trim_start(), &[], &mut found);
    found
}

/// Parses a tree; returns the rest of the text.
fn parse_tree<'t>(
    text: &'t str,
    before: &[String],
    found: &mut Vec<(Vec<String>, String)>,
) -> &'t str {
    let mut path = before.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(after) = rest.strip_prefix('{') {
            rest = after;
            loop {
                rest = rest.trim_start();
                if rest.is_empty() {
                    return rest;
                }
                if let Some(after) = rest.strip_prefix('}') {
                    return after;
                }
                rest = parse_tree(rest, &path, found).trim_start();
                rest = rest.strip_prefix(',').unwrap_or(rest);
            }
        }
        if let Some(after) = rest.strip_prefix('*') {
            found.push((path, "*".to_owned()));
            return after;
        }
        let end = rest.find(|c| !is_in_name(c)).unwrap_or(rest.len());
        if end == 0 {
            // Not an import: skip a character to make progress.
            return rest.get(1..).unwrap_or_default();
        }
        let (name, after) = rest.split_at(end);
        if name != "self" || path.is_empty() {
            path.push(name.to_owned());
        }
        match after.strip_prefix("::") {
            Some(after) if !after.starts_with('<') => rest = after,
            _ => {
                let (alias, after) = parse_name(after, &path);
                found.push((path, alias));
                return after;
            }
        }
    }
}

/// The name after ` as `, or the last segment.
fn parse_name<'t>(rest: &'t str, path: &[String]) -> (String, &'t str) {
    if let Some(name) = rest.trim_start().strip_prefix("as ") {
        let end = name.find(|c| !is_in_name(c)).unwrap_or(name.len());
        return (name[..end].to_owned(), &name[end..]);
    }
    (path.last().cloned().unwrap_or_default(), rest)
}

/// The shortest cycle through each module that is in one, without duplicates.
fn cycles_of(edges: &Edges) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    for start in edges.keys() {
        let is_known = found.iter().any(|cycle| cycle.contains(start));
        if !is_known && let Some(cycle) = cycle_through(edges, start) {
            found.push(cycle);
        }
    }
    found
}

fn cycle_through(edges: &Edges, start: &str) -> Option<Vec<String>> {
    let mut paths = vec![vec![start.to_owned()]];
    let mut seen = BTreeSet::new();
    while !paths.is_empty() {
        let mut longer = Vec::new();
        for path in &paths {
            for next in edges.get(path.last()?).into_iter().flat_map(BTreeMap::keys) {
                let extended = [&path[..], std::slice::from_ref(next)].concat();
                if next == start {
                    return Some(extended);
                }
                if seen.insert(next.clone()) {
                    longer.push(extended);
                }
            }
        }
        paths = longer;
    }
    None
}

fn describe(parent: &Module, cycle: &[String], edges: &Edges) -> String {
    let full = |child: &String| {
        [&parent[..], std::slice::from_ref(child)]
            .concat()
            .join("::")
    };
    let path: Vec<String> = cycle.iter().map(full).collect();
    let imports = cycle.windows(2).filter_map(|pair| {
        let (file, path) = edges.get(&pair[0])?.get(&pair[1])?;
        Some(format!("{file} uses {path}"))
    });
    let imports: Vec<String> = imports.collect();
    format!("{} ({})", path.join(" -> "), imports.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycles(files: &[(&str, &str)]) -> Vec<String> {
        let mut graph = Crate::default();
        for (path, code) in files {
            graph.add(Path::new(path), code);
        }
        graph.cycles()
    }

    #[test]
    fn two_modules_that_use_each_other_are_named_with_the_imports() {
        let found = cycles(&[
            ("lib.rs", "mod a;\nmod b;\nmod c;\n"),
            ("a.rs", "use crate::b::{self, Two};\n"),
            ("b.rs", "fn f() -> super::c::Three {}\n"),
            ("c.rs", "use std::fs;\nuse crate::{\n    a::One,\n};\n"),
        ]);
        assert_eq!(
            found,
            ["a -> b -> c -> a (a uses b; b uses c::Three; c uses a::One)"]
        );
    }

    #[test]
    fn parents_and_children_may_use_each_other() {
        let found = cycles(&[
            ("lib.rs", "mod a;\nfn f() { crate::a::g() }\n"),
            ("a/mod.rs", "mod b;\npub use b::Two;\nuse crate::Root;\n"),
            ("a/b.rs", "use super::One;\nuse crate::a::One;\n"),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn cycles_between_folders_may_go_through_different_files() {
        let found = cycles(&[
            ("lib.rs", ""),
            ("a/mod.rs", ""),
            ("a/one.rs", "use crate::b::one::X;\n"),
            ("a/two.rs", ""),
            ("b/mod.rs", ""),
            ("b/one.rs", ""),
            ("b/two.rs", "use crate::a::two::Y;\n"),
        ]);
        assert_eq!(
            found,
            ["a -> b -> a (a::one uses b::one::X; b::two uses a::two::Y)"]
        );
    }

    #[test]
    fn a_reexported_name_counts_as_imported_from_where_it_is_defined() {
        for reexported in [
            "pub use b::Two;",
            "use b::Two;",
            "pub use b::*;",
            "pub use b::Second as Two;",
        ] {
            let found = cycles(&[
                ("lib.rs", reexported),
                ("a.rs", "use crate::Two;\n"),
                (
                    "b.rs",
                    "use crate::a::One;\npub struct Two;\npub struct Second;\n",
                ),
            ]);
            assert_eq!(found.len(), 1, "{reexported}: {found:?}");
        }
    }

    #[test]
    fn a_name_that_a_module_defines_is_not_taken_for_a_reexport() {
        let found = cycles(&[
            ("lib.rs", "pub use b::*;\npub struct Three;\n"),
            ("a.rs", "use crate::Three;\n"),
            ("b.rs", "use crate::a::One;\n"),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }
}
