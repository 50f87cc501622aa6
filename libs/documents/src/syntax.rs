//! Parses text into trees: YAML or JSON, several documents per file, every value with its location.
//!
//! Invariant: parsing terminates within the limits below for any text. Duplicate keys, cycles and
//! expansions past [`NODES_MAX`] are rejected.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use contract::problem::escape;
use saphyr::Scalar;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, StrInput, Tag};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Maximum size of a text: far above any real file of documents, small enough to hold in memory.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Maximum nesting depth. Resources reach ten levels; the limit keeps recursion over trees safe.
pub const DEPTH_MAX: usize = 32;
/// Maximum number of values in a text, counted after expanding aliases, so that a few lines of YAML
/// cannot grow without bound.
pub const NODES_MAX: usize = 100_000;
/// Maximum number of documents in a text.
pub const DOCUMENTS_MAX: usize = 1000;

/// A location in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
}

impl Location {
    /// The first character.
    pub const START: Self = Self { line: 1, column: 1 };
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One document as a tree, with the location of each value.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree {
    /// The document as JSON.
    pub value: Value,
    /// The start of each value, by JSON Pointer.
    pub locations: BTreeMap<String, Location>,
}

impl Tree {
    /// Returns the location of a value, or of its nearest ancestor that has one.
    pub fn location(&self, pointer: &str) -> Location {
        let mut pointer = pointer;
        loop {
            if let Some(location) = self.locations.get(pointer) {
                return *location;
            }
            match pointer.rfind('/') {
                Some(end) => pointer = &pointer[..end],
                None => return Location::START,
            }
        }
    }
}

/// The text is not YAML or JSON, or exceeds a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", .location)]
pub struct SyntaxError {
    /// The location of the fault.
    pub location: Location,
    /// JSON Pointer of the enclosing value; empty if unknown.
    pub pointer: String,
    /// A sentence: what is wrong and what to do.
    pub detail: String,
}

impl SyntaxError {
    fn new(location: Location, pointer: &str, detail: impl Into<String>) -> Self {
        Self {
            location,
            pointer: pointer.to_owned(),
            detail: detail.into(),
        }
    }
}

/// Maximum number of reported faults per text.
const FAULTS_MAX: usize = 100;

/// Parses as much of a text as possible and reports everything that is wrong: a document that is not
/// YAML does not hide those before and after it. Empty documents are skipped.
pub fn read(text: &str) -> (Vec<Tree>, Vec<SyntaxError>) {
    if text.len() > TEXT_BYTES_MAX {
        let detail = format!(
            "the text has {} bytes, and at most {TEXT_BYTES_MAX} are allowed; split it into several files",
            text.len()
        );
        return (
            Vec::new(),
            vec![SyntaxError::new(Location::START, "", detail)],
        );
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match json_tree(text) {
        Ok(Some(tree)) => (vec![tree], Vec::new()),
        Ok(None) => {
            let output = YamlReader::read_all(text);
            (output.trees, output.faults)
        }
        Err(error) => {
            // The YAML parser reports more precise locations, if it sees the same faults.
            let output = YamlReader::read_all(text);
            match output.is_incomplete || output.faults.is_empty() {
                true => (Vec::new(), vec![error]),
                false => (output.trees, output.faults),
            }
        }
    }
}

/// Parses a text that is one JSON object as JSON, since YAML differs in strings (surrogate pairs, tabs).
/// Returns `None` for anything else: the YAML parser accepts JSON syntax too.
fn json_tree(text: &str) -> Result<Option<Tree>, SyntaxError> {
    if !text.trim_start().starts_with('{') {
        return Ok(None);
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let rejection = Cell::new(None);
    let seed = JsonSeed {
        depth: 0,
        rejection: &rejection,
    };
    let read = seed.deserialize(&mut deserializer);
    match read.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => {
            let locations = YamlReader::read_all(text).trees.into_iter().next();
            let locations = locations.map(|tree| tree.locations).unwrap_or_default();
            Ok(Some(Tree { value, locations }))
        }
        Err(error) => match rejection.take() {
            Some(detail) => {
                let location = Location {
                    line: error.line().max(1),
                    column: error.column().max(1),
                };
                Err(SyntaxError::new(location, "", detail))
            }
            // It may be flow-style YAML, such as `{a: 1}`.
            None => Ok(None),
        },
    }
}

#[derive(Clone, Copy)]
struct JsonSeed<'a> {
    depth: usize,
    /// Why valid JSON was rejected.
    rejection: &'a Cell<Option<String>>,
}

impl JsonSeed<'_> {
    fn reject<E: serde::de::Error>(&self, detail: String) -> E {
        let error = E::custom(&detail);
        self.rejection.set(Some(detail));
        error
    }

    /// The seed for the values inside this one.
    fn nested(&self) -> Self {
        Self {
            depth: self.depth + 1,
            ..*self
        }
    }
}

impl<'de> DeserializeSeed<'de> for JsonSeed<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.depth > DEPTH_MAX {
            return Err(self.reject(too_deep()));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self.nested())? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self.nested())?;
            if fields.contains_key(&key) {
                return Err(self.reject(duplicate(&key)));
            }
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

fn duplicate(key: &str) -> String {
    format!("`{key}` is given twice; keep one of the two")
}

fn too_deep() -> String {
    format!(
        "values are nested more than {DEPTH_MAX} levels deep, and no resource needs that; flatten the document"
    )
}

/// A list or mapping that is not closed yet.
enum Container {
    List {
        items: Vec<Value>,
    },
    Map {
        fields: Map<String, Value>,
        /// The key whose value comes next.
        key: Option<String>,
    },
}

struct OpenContainer {
    container: Container,
    anchor: usize,
}

struct YamlReader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    /// Number of lines before the part of the text that the parser was given.
    lines_before: usize,
    /// The line on which the current document begins.
    document_line: usize,
    /// Whether a limit on the whole text has been reached.
    limit_reached: bool,
    output: YamlOutput,
    stack: Vec<OpenContainer>,
    pointer: String,
    locations: BTreeMap<String, Location>,
    root: Option<Value>,
    anchors: BTreeMap<usize, Value>,
}

#[derive(Default)]
struct YamlOutput {
    trees: Vec<Tree>,
    faults: Vec<SyntaxError>,
    /// Whether some document could not be read to its end.
    is_incomplete: bool,
    nodes: usize,
}

impl<'a> YamlReader<'a> {
    /// Reads document by document. After one that cannot be read to its end, reading resumes at the next
    /// line that begins a document: no other line may begin with `---`, not even inside a scalar.
    fn read_all(text: &'a str) -> YamlOutput {
        let mut output = YamlOutput::default();
        let mut rest = Some((text, 0));
        while let Some((text, lines_before)) = rest.take() {
            let mut reader = Self::new(text, lines_before, std::mem::take(&mut output));
            let result = reader.read_documents();
            let (document_line, limit_reached) = (reader.document_line, reader.limit_reached);
            output = reader.output;
            let Err(fault) = result else { break };
            output.faults.push(fault);
            output.is_incomplete = true;
            if !limit_reached && output.faults.len() < FAULTS_MAX {
                rest = next_document(text, lines_before, document_line);
            }
        }
        output.faults.truncate(FAULTS_MAX);
        output
    }

    fn new(text: &'a str, lines_before: usize, output: YamlOutput) -> Self {
        Self {
            parser: Parser::new_from_str(text),
            lines_before,
            document_line: lines_before + 1,
            limit_reached: false,
            output,
            stack: Vec::new(),
            pointer: String::new(),
            locations: BTreeMap::new(),
            root: None,
            anchors: BTreeMap::new(),
        }
    }

    fn read_documents(&mut self) -> Result<(), SyntaxError> {
        while let Some(event) = self.parser.next_event() {
            let (event, span) = event.map_err(|error| {
                let detail = format!(
                    "this is not valid YAML: {}; check the indentation and the quotes here",
                    error.info()
                );
                SyntaxError::new(self.location(*error.marker()), &self.pointer, detail)
            })?;
            let location = self.location(span.start);
            self.handle_event(event, location)?;
        }
        Ok(())
    }

    fn location(&self, marker: Marker) -> Location {
        Location {
            line: marker.line().max(1) + self.lines_before,
            column: marker.col() + 1,
        }
    }

    /// Reports a fault after which the document can still be read.
    fn report(&mut self, fault: SyntaxError) {
        self.output.faults.push(fault);
    }

    fn handle_event(&mut self, event: Event<'a>, location: Location) -> Result<(), SyntaxError> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd => Ok(()),
            Event::DocumentStart(_) => {
                self.document_line = location.line;
                self.anchors.clear();
                self.locations.insert(String::new(), location);
                Ok(())
            }
            Event::DocumentEnd => self.close_document(location),
            Event::Scalar(text, style, anchor, tag) => {
                self.scalar(text, style, anchor, tag, location)
            }
            Event::Alias(anchor) => self.alias(anchor, location),
            Event::SequenceStart(anchor, tag) => {
                let list = Container::List { items: Vec::new() };
                self.open_container(list, anchor, tag.as_deref(), location)
            }
            Event::MappingStart(anchor, tag) => {
                let fields = Map::new();
                self.open_container(
                    Container::Map { fields, key: None },
                    anchor,
                    tag.as_deref(),
                    location,
                )
            }
            Event::SequenceEnd | Event::MappingEnd => self.close_container(location),
        }
    }

    fn error_at(&self, location: Location, detail: impl Into<String>) -> SyntaxError {
        SyntaxError::new(location, &self.pointer, detail)
    }

    fn close_document(&mut self, location: Location) -> Result<(), SyntaxError> {
        let locations = std::mem::take(&mut self.locations);
        self.pointer.clear();
        let value = self.root.take().unwrap_or(Value::Null);
        if value.is_null() {
            return Ok(());
        }
        if self.output.trees.len() == DOCUMENTS_MAX {
            self.limit_reached = true;
            let detail = format!("the text holds more than {DOCUMENTS_MAX} documents; split it");
            return Err(self.error_at(location, detail));
        }
        self.output.trees.push(Tree { value, locations });
        Ok(())
    }

    fn check_tag(&mut self, tag: Option<&Tag>, location: Location) {
        if let Some(tag) = tag.filter(|tag| !tag.is_yaml_core_schema()) {
            self.report(self.error_at(location, unknown_tag(tag)));
        }
    }

    fn scalar(
        &mut self,
        text: Cow<'a, str>,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<Cow<'a, Tag>>,
        location: Location,
    ) -> Result<(), SyntaxError> {
        if self.expects_key() {
            return self.key(text.into_owned(), location);
        }
        self.enter_value(location)?;
        self.check_tag(tag.as_deref(), location);
        let value = match Scalar::parse_from_cow_and_metadata(text.clone(), style, tag.as_ref()) {
            Some(Scalar::Null) => Value::Null,
            Some(Scalar::Boolean(value)) => Value::Bool(value),
            Some(Scalar::Integer(value)) => Value::Number(value.into()),
            Some(Scalar::FloatingPoint(value)) => match text.parse::<u64>() {
                Ok(whole) => Value::Number(whole.into()),
                Err(_) => match Number::from_f64(value.into_inner()) {
                    Some(number) => Value::Number(number),
                    None => {
                        self.report_unusable(location, format!("`{text}` is not a usable number"))
                    }
                },
            },
            Some(Scalar::String(value)) => Value::String(value.into_owned()),
            None => {
                let detail = format!("`{text}` does not fit its tag; remove the tag");
                self.report_unusable(location, detail)
            }
        };
        self.finish_value(value, anchor);
        Ok(())
    }

    fn report_unusable(&mut self, location: Location, detail: String) -> Value {
        self.report(self.error_at(location, detail));
        Value::Null
    }

    fn expects_key(&self) -> bool {
        matches!(
            self.stack.last().map(|frame| &frame.container),
            Some(Container::Map { key: None, .. })
        )
    }

    fn key(&mut self, name: String, location: Location) -> Result<(), SyntaxError> {
        let pointer = format!("{}/{}", self.pointer, escape(&name));
        let Some(OpenContainer {
            container: Container::Map { fields, key },
            ..
        }) = self.stack.last_mut()
        else {
            return Ok(());
        };
        let fault = fields
            .contains_key(&name)
            .then(|| SyntaxError::new(location, &pointer, duplicate(&name)));
        *key = Some(name);
        self.locations.insert(pointer, location);
        if let Some(fault) = fault {
            self.report(fault);
        }
        Ok(())
    }

    /// Counts a value and extends the pointer to it.
    fn enter_value(&mut self, location: Location) -> Result<(), SyntaxError> {
        self.count_values(1, location)?;
        let step = match self.stack.last().map(|frame| &frame.container) {
            None => return Ok(()),
            Some(Container::List { items }) => items.len().to_string(),
            Some(Container::Map { key: Some(key), .. }) => escape(key),
            Some(Container::Map { key: None, .. }) => {
                return Err(self.error_at(location, "a key must be plain text here"));
            }
        };
        self.pointer.push('/');
        self.pointer.push_str(&step);
        self.locations
            .entry(self.pointer.clone())
            .or_insert(location);
        Ok(())
    }

    fn count_values(&mut self, nodes: usize, location: Location) -> Result<(), SyntaxError> {
        self.output.nodes += nodes;
        if self.output.nodes > NODES_MAX {
            self.limit_reached = true;
            let detail = format!(
                "the text holds more than {NODES_MAX} values (after expanding aliases); split it, or use fewer aliases"
            );
            return Err(self.error_at(location, detail));
        }
        Ok(())
    }

    /// Adds a complete value to its container, and moves the pointer back.
    fn finish_value(&mut self, value: Value, anchor: usize) {
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        match self.stack.last_mut().map(|frame| &mut frame.container) {
            None => self.root = Some(value),
            Some(Container::List { items }) => {
                items.push(value);
                self.shorten_pointer();
            }
            Some(Container::Map { fields, key }) => {
                if let Some(key) = key.take() {
                    fields.insert(key, value);
                }
                self.shorten_pointer();
            }
        }
    }

    fn shorten_pointer(&mut self) {
        let end = self.pointer.rfind('/').unwrap_or(0);
        self.pointer.truncate(end);
    }

    fn open_container(
        &mut self,
        container: Container,
        anchor: usize,
        tag: Option<&Tag>,
        location: Location,
    ) -> Result<(), SyntaxError> {
        if self.expects_key() {
            return Err(self.error_at(
                location,
                "a list or mapping cannot be a key; use plain text",
            ));
        }
        self.enter_value(location)?;
        self.check_tag(tag, location);
        if self.stack.len() >= DEPTH_MAX {
            return Err(self.error_at(location, too_deep()));
        }
        self.stack.push(OpenContainer { container, anchor });
        Ok(())
    }

    fn close_container(&mut self, location: Location) -> Result<(), SyntaxError> {
        let Some(frame) = self.stack.pop() else {
            return Err(self.error_at(
                location,
                "this closes a list or mapping that was never opened",
            ));
        };
        let value = match frame.container {
            Container::List { items } => Value::Array(items),
            Container::Map { fields, .. } => Value::Object(fields),
        };
        self.finish_value(value, frame.anchor);
        Ok(())
    }

    fn alias(&mut self, anchor: usize, location: Location) -> Result<(), SyntaxError> {
        if self.expects_key() {
            return Err(self.error_at(location, "an alias cannot be a key; write the key out"));
        }
        // An anchor is registered when its value is complete, so an alias inside its own anchor is unknown.
        let Some(value) = self.anchors.get(&anchor).cloned() else {
            let detail = "this alias is inside the value that it refers to; write the value out";
            return Err(self.error_at(location, detail));
        };
        self.enter_value(location)?;
        self.count_values(count_nodes(&value), location)?;
        if self.stack.len() + depth(&value) > DEPTH_MAX {
            return Err(self.error_at(location, too_deep()));
        }
        self.finish_value(value, 0);
        Ok(())
    }
}

/// Returns the rest of the text from the next document after the one that begins on `document_line`.
fn next_document(text: &str, lines_before: usize, document_line: usize) -> Option<(&str, usize)> {
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        let is_marker = rest.is_some_and(|rest| rest.trim_start() != rest || rest.is_empty());
        if is_marker && lines_before + index + 1 > document_line {
            return Some((&text[offset..], lines_before + index));
        }
        offset += line.len();
    }
    None
}

fn unknown_tag(tag: &Tag) -> String {
    format!(
        "the tag `{}{}` has no meaning here; remove it",
        tag.handle, tag.suffix
    )
}

pub(crate) fn count_nodes(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(count_nodes).sum::<usize>(),
        Value::Object(fields) => 1 + fields.values().map(count_nodes).sum::<usize>(),
        _ => 1,
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
