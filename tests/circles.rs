//! Finds modules of one crate that import each other in a circle, by reading the source.
//!
//! A module may use its children, and they it. Between the children of one module imports go one way; what
//! stands anywhere below a child counts as the child's. A name that is imported from where it is only
//! passed on (`pub use`) counts as imported from where it is defined.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// `["sql", "postgres"]`; the crate itself is empty.
type Module = Vec<String>;

/// A use of something elsewhere in the crate: from the crate's root, each segment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    path: Vec<String>,
    /// What others call it here, where it is passed on; `*` stands for all names of a module.
    passed_on_as: Option<String>,
}

#[derive(Default)]
pub struct Crate {
    imports: BTreeMap<Module, Vec<Import>>,
    /// Names of what each module defines itself.
    defined: BTreeMap<Module, BTreeSet<String>>,
}

impl Crate {
    /// Takes in one file, by its path below `src`. Only lines of code, without tests.
    pub fn add(&mut self, path: &Path, code: &str) {
        let module = module_of(path);
        let imports = imports(&module, code);
        let defined = self.defined.entry(module.clone()).or_default();
        defined.extend(defined_in(code));
        self.imports.entry(module).or_default().extend(imports);
    }

    /// Each as `a -> b -> a`, with the imports that make it.
    pub fn circles(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (parent, edges) in self.edges_between_children() {
            for circle in circles_of(&edges) {
                found.push(told(&parent, &circle, &edges));
            }
        }
        found
    }

    /// For each module, which of its children imports which other, and an example: file and name.
    fn edges_between_children(&self) -> BTreeMap<Module, Edges> {
        let mut all: BTreeMap<Module, Edges> = BTreeMap::new();
        for (module, imports) in &self.imports {
            for import in imports {
                let to = self.owner(&import.path, &mut BTreeSet::new());
                let shared = shared(module, &to);
                // One of them is above the other.
                let (Some(from), Some(into)) = (module.get(shared), to.get(shared)) else {
                    continue;
                };
                let edges = all.entry(module[..shared].to_vec()).or_default();
                let example = (module.join("::"), import.path.join("::"));
                let edge = edges.entry(from.clone()).or_default();
                edge.entry(into.clone()).or_insert(example);
            }
        }
        all
    }

    /// The module that defines what a path names.
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
            match import.passed_on_as.as_deref() {
                Some(passed_on) if passed_on == name => {
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
        let mut passed_on =
            imports.filter_map(|import| Some((import, import.passed_on_as.as_deref()?)));
        defines
            || passed_on.any(|(import, called)| match called {
                "*" => {
                    import.path != module
                        && self.has(&[&import.path[..], std::slice::from_ref(name)].concat())
                }
                called => called == name,
            })
    }
}

/// Names that stand after what begins a definition.
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

/// What each child imports of which other.
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

fn shared(one: &[String], other: &[String]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

/// Paths that begin with `crate` or `super`, wherever they stand, and what is passed on of children.
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
                    passed_on_as: None,
                }));
            }
        }
    }
    for line in code.split(';') {
        let Some((before, tree)) = line.rsplit_once("use ") else {
            continue;
        };
        let visibility = before.rsplit('\n').next().unwrap_or_default().trim();
        if !visibility.starts_with("pub") {
            continue;
        }
        for (path, name) in leaves(tree) {
            let absolute = match path.first().map(String::as_str) {
                Some("crate" | "super" | "self") => from_root(module, &path),
                _ => Some([&module[..], &path[..]].concat()),
            };
            found.extend(absolute.map(|path| Import {
                path,
                passed_on_as: Some(name),
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

/// The paths of a tree of imports (`a::{b, c::{self, d as e}, f::*}`), each with what it is called. A `*`
/// is the module before it.
fn leaves(text: &str) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    take_tree(text.trim_start(), &[], &mut found);
    found
}

/// Gives what stands after the tree.
fn take_tree<'t>(
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
                rest = take_tree(rest, &path, found).trim_start();
                rest = rest.strip_prefix(',').unwrap_or(rest);
            }
        }
        if let Some(after) = rest.strip_prefix('*') {
            found.push((path, "*".to_owned()));
            return after;
        }
        let end = rest.find(|c| !is_in_name(c)).unwrap_or(rest.len());
        if end == 0 {
            // What is no import after all: it must not be read for ever.
            return rest.get(1..).unwrap_or_default();
        }
        let (name, after) = rest.split_at(end);
        if name != "self" || path.is_empty() {
            path.push(name.to_owned());
        }
        match after.strip_prefix("::") {
            Some(after) if !after.starts_with('<') => rest = after,
            _ => {
                let (called, after) = take_name(after, &path);
                found.push((path, called));
                return after;
            }
        }
    }
}

/// What stands after ` as `, or the last segment.
fn take_name<'t>(rest: &'t str, path: &[String]) -> (String, &'t str) {
    if let Some(name) = rest.trim_start().strip_prefix("as ") {
        let end = name.find(|c| !is_in_name(c)).unwrap_or(name.len());
        return (name[..end].to_owned(), &name[end..]);
    }
    (path.last().cloned().unwrap_or_default(), rest)
}

/// The shortest circle through each module that is in one, each circle once.
fn circles_of(edges: &Edges) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    for start in edges.keys() {
        let is_told = found.iter().any(|circle| circle.contains(start));
        if !is_told && let Some(circle) = circle_through(edges, start) {
            found.push(circle);
        }
    }
    found
}

fn circle_through(edges: &Edges, start: &str) -> Option<Vec<String>> {
    let mut ways = vec![vec![start.to_owned()]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in &ways {
            for next in edges.get(way.last()?).into_iter().flat_map(BTreeMap::keys) {
                let further = [&way[..], std::slice::from_ref(next)].concat();
                if next == start {
                    return Some(further);
                }
                if seen.insert(next.clone()) {
                    longer.push(further);
                }
            }
        }
        ways = longer;
    }
    None
}

fn told(parent: &Module, circle: &[String], edges: &Edges) -> String {
    let full = |child: &String| {
        [&parent[..], std::slice::from_ref(child)]
            .concat()
            .join("::")
    };
    let way: Vec<String> = circle.iter().map(full).collect();
    let imports = circle.windows(2).filter_map(|pair| {
        let (file, path) = edges.get(&pair[0])?.get(&pair[1])?;
        Some(format!("{file} uses {path}"))
    });
    let imports: Vec<String> = imports.collect();
    format!("{} ({})", way.join(" -> "), imports.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let mut house = Crate::default();
        for (path, code) in files {
            house.add(Path::new(path), code);
        }
        house.circles()
    }

    #[test]
    fn two_modules_that_use_each_other_are_named_with_the_imports() {
        let found = circles(&[
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
        let found = circles(&[
            ("lib.rs", "mod a;\nfn f() { crate::a::g() }\n"),
            ("a/mod.rs", "mod b;\npub use b::Two;\nuse crate::Root;\n"),
            ("a/b.rs", "use super::One;\nuse crate::a::One;\n"),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn folders_are_in_a_circle_where_different_files_of_theirs_make_it() {
        let found = circles(&[
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
    fn a_name_that_is_passed_on_counts_as_imported_from_where_it_is_defined() {
        for passed_on in [
            "pub use b::Two;",
            "pub use b::*;",
            "pub use b::Second as Two;",
        ] {
            let found = circles(&[
                ("lib.rs", passed_on),
                ("a.rs", "use crate::Two;\n"),
                (
                    "b.rs",
                    "use crate::a::One;\npub struct Two;\npub struct Second;\n",
                ),
            ]);
            assert_eq!(found.len(), 1, "{passed_on}: {found:?}");
        }
    }

    #[test]
    fn a_name_of_a_module_itself_is_not_taken_for_one_that_it_passes_on() {
        let found = circles(&[
            ("lib.rs", "pub use b::*;\npub struct Three;\n"),
            ("a.rs", "use crate::Three;\n"),
            ("b.rs", "use crate::a::One;\n"),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }
}
