//! From text to trees: YAML or JSON, several documents in a file, every value with its place.
//!
//! Invariant: whatever the text is, reading it ends, within the limits below: no duplicate key, no
//! cycle and no expansion past [`NODES_MAX`] gets through.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use contract::problem::escape;
use saphyr::Scalar;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, StrInput, Tag};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Largest text that is read: far past any real file of documents, small enough to hold whole.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Deepest nesting. Our documents reach ten levels; the limit keeps recursion over trees safe.
pub const DEPTH_MAX: usize = 32;
/// Most values in a text, aliases counted as what they stand for, so that a few lines of YAML cannot
/// grow without bound.
pub const NODES_MAX: usize = 100_000;
/// Most documents in a text.
pub const DOCUMENTS_MAX: usize = 1000;

/// A place in a text; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Of the text, from 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
}

impl Place {
    /// The first character.
    pub const START: Self = Self { line: 1, column: 1 };
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One document as a tree, with the place of each value by its JSON Pointer.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree {
    /// What the document says, as JSON.
    pub value: Value,
    /// Where each value begins, by its JSON Pointer.
    pub places: BTreeMap<String, Place>,
}

impl Tree {
    /// The place of a value, or of the nearest thing around it.
    pub fn place(&self, pointer: &str) -> Place {
        let mut pointer = pointer;
        loop {
            if let Some(place) = self.places.get(pointer) {
                return *place;
            }
            match pointer.rfind('/') {
                Some(end) => pointer = &pointer[..end],
                None => return Place::START,
            }
        }
    }
}

/// The text is not YAML or JSON, or goes past a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {detail}")]
pub struct SyntaxError {
    /// Where reading stopped.
    pub place: Place,
    /// JSON Pointer of the value around it; empty where that is not known.
    pub pointer: String,
    /// A sentence: what is wrong and what to do.
    pub detail: String,
}

impl SyntaxError {
    fn new(place: Place, pointer: &str, detail: impl Into<String>) -> Self {
        Self {
            place,
            pointer: pointer.to_owned(),
            detail: detail.into(),
        }
    }
}

/// Most faults of a text that are reported.
const FAULTS_MAX: usize = 100;

/// Reads what can be read of a text, and says everything that is wrong: a document that is no YAML
/// does not hide those before and after it. Empty documents are left out.
pub fn read(text: &str) -> (Vec<Tree>, Vec<SyntaxError>) {
    if text.len() > TEXT_BYTES_MAX {
        let detail = format!(
            "the text has {} bytes, and at most {TEXT_BYTES_MAX} are read; split it into several files",
            text.len()
        );
        return (Vec::new(), vec![SyntaxError::new(Place::START, "", detail)]);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match json_tree(text) {
        Ok(Some(tree)) => (vec![tree], Vec::new()),
        Ok(None) => {
            let read = YamlReader::read_all(text);
            (read.trees, read.faults)
        }
        Err(error) => {
            // The YAML reader knows places better, where it reads the same.
            let read = YamlReader::read_all(text);
            match read.broke_off || read.faults.is_empty() {
                true => (Vec::new(), vec![error]),
                false => (read.trees, read.faults),
            }
        }
    }
}

/// A text that is one JSON object is read as JSON, whose strings YAML does not read alike (surrogate
/// pairs, tabs). Anything else is left to the YAML reader, which knows JSON's syntax as well.
fn json_tree(text: &str) -> Result<Option<Tree>, SyntaxError> {
    if !text.trim_start().starts_with('{') {
        return Ok(None);
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let refusal = Cell::new(None);
    let seed = JsonValue {
        depth: 0,
        refusal: &refusal,
    };
    let read = seed.deserialize(&mut deserializer);
    match read.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => {
            let places = YamlReader::read_all(text).trees.into_iter().next();
            let places = places.map(|tree| tree.places).unwrap_or_default();
            Ok(Some(Tree { value, places }))
        }
        Err(error) => match refusal.take() {
            Some(detail) => {
                let place = Place {
                    line: error.line().max(1),
                    column: error.column().max(1),
                };
                Err(SyntaxError::new(place, "", detail))
            }
            // It may be YAML in flow style, such as `{a: 1}`.
            None => Ok(None),
        },
    }
}

#[derive(Clone, Copy)]
struct JsonValue<'a> {
    depth: usize,
    /// Why we refuse what is JSON.
    refusal: &'a Cell<Option<String>>,
}

impl JsonValue<'_> {
    fn refuse<E: serde::de::Error>(&self, detail: String) -> E {
        let error = E::custom(&detail);
        self.refusal.set(Some(detail));
        error
    }

    /// What reads the values inside this one.
    fn inner(&self) -> Self {
        Self {
            depth: self.depth + 1,
            ..*self
        }
    }
}

impl<'de> DeserializeSeed<'de> for JsonValue<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.depth > DEPTH_MAX {
            return Err(self.refuse(too_deep()));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonValue<'_> {
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
        while let Some(item) = seq.next_element_seed(self.inner())? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self.inner())?;
            if fields.contains_key(&key) {
                return Err(self.refuse(duplicate(&key)));
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
        "values are nested more than {DEPTH_MAX} levels deep, which no resource is; flatten the document"
    )
}

/// A value that is still being read.
enum Open {
    List {
        items: Vec<Value>,
    },
    Map {
        fields: Map<String, Value>,
        /// Read, and waiting for its value.
        key: Option<String>,
    },
}

struct Frame {
    open: Open,
    anchor: usize,
}

struct YamlReader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    /// Lines of the text before what the parser was given.
    lines_before: usize,
    /// Line of the text in which the present document begins.
    begun: usize,
    /// A limit of the whole text is reached.
    over: bool,
    read: YamlRead,
    stack: Vec<Frame>,
    pointer: String,
    places: BTreeMap<String, Place>,
    root: Option<Value>,
    anchors: BTreeMap<usize, Value>,
}

#[derive(Default)]
struct YamlRead {
    trees: Vec<Tree>,
    faults: Vec<SyntaxError>,
    /// A document could not be read to its end.
    broke_off: bool,
    nodes: usize,
}

impl<'a> YamlReader<'a> {
    /// Reads document by document. After one that cannot be read to its end, reading goes on at the
    /// next line that begins one: no other line may begin with `---`, not even inside a text.
    fn read_all(text: &'a str) -> YamlRead {
        let mut read = YamlRead::default();
        let mut rest = Some((text, 0));
        while let Some((text, lines_before)) = rest.take() {
            let mut reader = Self::new(text, lines_before, std::mem::take(&mut read));
            let broken = reader.documents();
            let (begun, over) = (reader.begun, reader.over);
            read = reader.read;
            let Err(fault) = broken else { break };
            read.faults.push(fault);
            read.broke_off = true;
            if !over && read.faults.len() < FAULTS_MAX {
                rest = next_document(text, lines_before, begun);
            }
        }
        read.faults.truncate(FAULTS_MAX);
        read
    }

    fn new(text: &'a str, lines_before: usize, read: YamlRead) -> Self {
        Self {
            parser: Parser::new_from_str(text),
            lines_before,
            begun: lines_before + 1,
            over: false,
            read,
            stack: Vec::new(),
            pointer: String::new(),
            places: BTreeMap::new(),
            root: None,
            anchors: BTreeMap::new(),
        }
    }

    fn documents(&mut self) -> Result<(), SyntaxError> {
        while let Some(event) = self.parser.next_event() {
            let (event, span) = event.map_err(|error| {
                let detail = format!(
                    "this is not valid YAML: {}; check the indentation and the quotes here",
                    error.info()
                );
                SyntaxError::new(self.place(*error.marker()), &self.pointer, detail)
            })?;
            let place = self.place(span.start);
            self.take(event, place)?;
        }
        Ok(())
    }

    fn place(&self, marker: Marker) -> Place {
        Place {
            line: marker.line().max(1) + self.lines_before,
            column: marker.col() + 1,
        }
    }

    /// Notes a fault after which the document can still be read.
    fn note(&mut self, fault: SyntaxError) {
        self.read.faults.push(fault);
    }

    fn take(&mut self, event: Event<'a>, place: Place) -> Result<(), SyntaxError> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd => Ok(()),
            Event::DocumentStart(_) => {
                self.begun = place.line;
                self.anchors.clear();
                self.places.insert(String::new(), place);
                Ok(())
            }
            Event::DocumentEnd => self.close_document(place),
            Event::Scalar(text, style, anchor, tag) => self.scalar(text, style, anchor, tag, place),
            Event::Alias(anchor) => self.alias(anchor, place),
            Event::SequenceStart(anchor, tag) => {
                let list = Open::List { items: Vec::new() };
                self.open(list, anchor, tag.as_deref(), place)
            }
            Event::MappingStart(anchor, tag) => {
                let fields = Map::new();
                self.open(
                    Open::Map { fields, key: None },
                    anchor,
                    tag.as_deref(),
                    place,
                )
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(place),
        }
    }

    fn fail(&self, place: Place, detail: impl Into<String>) -> SyntaxError {
        SyntaxError::new(place, &self.pointer, detail)
    }

    fn close_document(&mut self, place: Place) -> Result<(), SyntaxError> {
        let places = std::mem::take(&mut self.places);
        self.pointer.clear();
        let value = self.root.take().unwrap_or(Value::Null);
        if value.is_null() {
            return Ok(());
        }
        if self.read.trees.len() == DOCUMENTS_MAX {
            self.over = true;
            let detail = format!("more than {DOCUMENTS_MAX} documents; split the text");
            return Err(self.fail(place, detail));
        }
        self.read.trees.push(Tree { value, places });
        Ok(())
    }

    fn check_tag(&mut self, tag: Option<&Tag>, place: Place) {
        if let Some(tag) = tag.filter(|tag| !tag.is_yaml_core_schema()) {
            self.note(self.fail(place, unknown_tag(tag)));
        }
    }

    fn scalar(
        &mut self,
        text: Cow<'a, str>,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<Cow<'a, Tag>>,
        place: Place,
    ) -> Result<(), SyntaxError> {
        if self.takes_key() {
            return self.key(text.into_owned(), place);
        }
        self.begin(place)?;
        self.check_tag(tag.as_deref(), place);
        let value = match Scalar::parse_from_cow_and_metadata(text.clone(), style, tag.as_ref()) {
            Some(Scalar::Null) => Value::Null,
            Some(Scalar::Boolean(value)) => Value::Bool(value),
            Some(Scalar::Integer(value)) => Value::Number(value.into()),
            Some(Scalar::FloatingPoint(value)) => match text.parse::<u64>() {
                Ok(whole) => Value::Number(whole.into()),
                Err(_) => match Number::from_f64(value.into_inner()) {
                    Some(number) => Value::Number(number),
                    None => {
                        self.unusable(place, format!("`{text}` is not a number that can be used"))
                    }
                },
            },
            Some(Scalar::String(value)) => Value::String(value.into_owned()),
            None => {
                let detail = format!("`{text}` does not fit its tag; remove the tag");
                self.unusable(place, detail)
            }
        };
        self.finish(value, anchor);
        Ok(())
    }

    fn unusable(&mut self, place: Place, detail: String) -> Value {
        self.note(self.fail(place, detail));
        Value::Null
    }

    fn takes_key(&self) -> bool {
        matches!(
            self.stack.last().map(|frame| &frame.open),
            Some(Open::Map { key: None, .. })
        )
    }

    fn key(&mut self, name: String, place: Place) -> Result<(), SyntaxError> {
        let pointer = format!("{}/{}", self.pointer, escape(&name));
        let Some(Frame {
            open: Open::Map { fields, key },
            ..
        }) = self.stack.last_mut()
        else {
            return Ok(());
        };
        let fault = fields
            .contains_key(&name)
            .then(|| SyntaxError::new(place, &pointer, duplicate(&name)));
        *key = Some(name);
        self.places.insert(pointer, place);
        if let Some(fault) = fault {
            self.note(fault);
        }
        Ok(())
    }

    /// Counts a value and moves the pointer to it.
    fn begin(&mut self, place: Place) -> Result<(), SyntaxError> {
        self.count(1, place)?;
        let step = match self.stack.last().map(|frame| &frame.open) {
            None => return Ok(()),
            Some(Open::List { items }) => items.len().to_string(),
            Some(Open::Map { key: Some(key), .. }) => escape(key),
            Some(Open::Map { key: None, .. }) => {
                return Err(self.fail(place, "a key must be plain text here"));
            }
        };
        self.pointer.push('/');
        self.pointer.push_str(&step);
        self.places.entry(self.pointer.clone()).or_insert(place);
        Ok(())
    }

    fn count(&mut self, nodes: usize, place: Place) -> Result<(), SyntaxError> {
        self.read.nodes += nodes;
        if self.read.nodes > NODES_MAX {
            self.over = true;
            let detail = format!(
                "the text holds more than {NODES_MAX} values (aliases counted as what they stand for); split it, or write less by alias"
            );
            return Err(self.fail(place, detail));
        }
        Ok(())
    }

    /// Hands a whole value to what holds it, and moves the pointer back.
    fn finish(&mut self, value: Value, anchor: usize) {
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        match self.stack.last_mut().map(|frame| &mut frame.open) {
            None => self.root = Some(value),
            Some(Open::List { items }) => {
                items.push(value);
                self.shorten_pointer();
            }
            Some(Open::Map { fields, key }) => {
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

    fn open(
        &mut self,
        open: Open,
        anchor: usize,
        tag: Option<&Tag>,
        place: Place,
    ) -> Result<(), SyntaxError> {
        if self.takes_key() {
            return Err(self.fail(place, "a list or mapping cannot be a key; use plain text"));
        }
        self.begin(place)?;
        self.check_tag(tag, place);
        if self.stack.len() >= DEPTH_MAX {
            return Err(self.fail(place, too_deep()));
        }
        self.stack.push(Frame { open, anchor });
        Ok(())
    }

    fn close(&mut self, place: Place) -> Result<(), SyntaxError> {
        let Some(frame) = self.stack.pop() else {
            return Err(self.fail(place, "something is closed here that was never opened"));
        };
        let value = match frame.open {
            Open::List { items } => Value::Array(items),
            Open::Map { fields, .. } => Value::Object(fields),
        };
        self.finish(value, frame.anchor);
        Ok(())
    }

    fn alias(&mut self, anchor: usize, place: Place) -> Result<(), SyntaxError> {
        if self.takes_key() {
            return Err(self.fail(place, "an alias cannot be a key; write the key out"));
        }
        // An anchor is known once its value is whole, so an alias inside its own anchor is not.
        let Some(value) = self.anchors.get(&anchor).cloned() else {
            let detail = "this alias stands inside what it refers to; write the value out";
            return Err(self.fail(place, detail));
        };
        self.begin(place)?;
        self.count(nodes_of(&value), place)?;
        if self.stack.len() + depth_of(&value) > DEPTH_MAX {
            return Err(self.fail(place, too_deep()));
        }
        self.finish(value, 0);
        Ok(())
    }
}

/// The text from the line on that begins the document after the one begun in a line.
fn next_document(text: &str, lines_before: usize, begun: usize) -> Option<(&str, usize)> {
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        let marks = rest.is_some_and(|rest| rest.trim_start() != rest || rest.is_empty());
        if marks && lines_before + index + 1 > begun {
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

pub(crate) fn nodes_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(nodes_of).sum::<usize>(),
        Value::Object(fields) => 1 + fields.values().map(nodes_of).sum::<usize>(),
        _ => 1,
    }
}

fn depth_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth_of).max().unwrap_or(0),
        _ => 0,
    }
}
