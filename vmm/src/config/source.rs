//! The file of a configuration: reading it, parsing it, and finding the line and field that a
//! place in its text belongs to.

use super::error::{ConfigError, Place};
use super::fields::Schema;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Largest file that is taken, in bytes.
const MAX_BYTES: u64 = 1 << 20;
const EXAMPLES: &str = "take one of configs/ as an example";

/// The text of a configuration, parsed as TOML.
pub(crate) struct Source<'t> {
    file: PathBuf,
    text: &'t str,
    table: DeTable<'t>,
    schema: &'static Schema,
}

/// The file's text.
pub(crate) fn read(file: &Path) -> Result<String, ConfigError> {
    let refuse = |what: String, remedy: &str| {
        let place = Place::File { file: file.to_owned(), line: None };
        ConfigError::new(place, what, remedy)
    };
    let refuse_io = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            refuse("the file does not exist".into(), "check the path, or take one of configs/")
        }
        io::ErrorKind::IsADirectory => {
            refuse("this is a directory".into(), "name a configuration file in it")
        }
        io::ErrorKind::PermissionDenied => {
            refuse("the file may not be read".into(), "change its permissions, or copy it")
        }
        _ => refuse(format!("the file cannot be read: {error}"), "name a readable file"),
    };
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(refuse_io)?;
    opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(refuse_io)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refuse(
            format!("the file is larger than {} MiB", MAX_BYTES >> 20),
            "this is no configuration; name a TOML file",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + newlines(&error.as_bytes()[..error.utf8_error().valid_up_to()]);
        let place = Place::File { file: file.to_owned(), line: Some(line) };
        ConfigError::new(place, "the file is not UTF-8 text", "save it as UTF-8")
    })
}

impl<'t> Source<'t> {
    /// Parses a file up to its types. `edit` may change what stands in it before that.
    pub(crate) fn parse<T: DeserializeOwned>(
        file: &Path,
        text: &'t str,
        schema: &'static Schema,
        edit: impl FnOnce(&mut DeTable<'t>),
    ) -> Result<(Self, T), ConfigError> {
        let mut document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map(|span| line_of(text, span.start));
            let place = Place::File { file: file.to_owned(), line };
            ConfigError::new(place, format!("this is not TOML: {}", error.message()), EXAMPLES)
        })?;
        edit(document.get_mut());
        let table = document.get_ref().clone();
        let source = Self { file: file.to_owned(), text, table, schema };
        let raw = T::deserialize(toml::Deserializer::from(document));
        let raw = raw.map_err(|error| source.wrong_type(error.span(), error.message()))?;
        Ok((source, raw))
    }

    /// The file.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// A section beside this one, if there is any.
    pub(crate) fn other_than(&self, section: &str) -> Option<&str> {
        self.table.keys().map(|name| name.get_ref().as_ref()).find(|name| *name != section)
    }

    /// A mistake in a field. Without a place in the text, the field or its section is looked up.
    pub(crate) fn error(
        &self,
        section: &str,
        field: &str,
        span: Option<Range<usize>>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ConfigError {
        let span = span.or_else(|| self.span_of(section, field));
        let place = Place::Field {
            file: self.file.clone(),
            line: span.map(|span| line_of(self.text, span.start)),
            section: section.to_owned(),
            field: Some(field.to_owned()),
        };
        ConfigError::new(place, what, remedy)
    }

    /// What serde refused: an unknown section or field, or a wrong type.
    fn wrong_type(&self, span: Option<Range<usize>>, message: &str) -> ConfigError {
        let line = span.as_ref().map(|span| line_of(self.text, span.start));
        let file = self.file.clone();
        let Some((section, field)) = span.and_then(|span| self.locate(&span)) else {
            return ConfigError::new(Place::File { file, line }, message, EXAMPLES);
        };
        let known = self.schema.names(&section);
        let (what, remedy) = match &field {
            _ if known.is_empty() => (
                "there is no such section".to_owned(),
                format!("the sections are {}", self.schema.sections),
            ),
            None => ("this must be a section".to_owned(), format!("write it as [{section}]")),
            Some(name) => match self.schema.find(&section, name) {
                None => ("there is no such field".into(), format!("known: {}", known.join(", "))),
                Some(field) => (message.to_owned(), format!("give {}", field.takes)),
            },
        };
        ConfigError::new(Place::Field { file, line, section, field }, what, remedy)
    }

    /// Section and field that hold a part of the text.
    fn locate(&self, span: &Range<usize>) -> Option<(String, Option<String>)> {
        let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
        for (section, value) in &self.table {
            if let DeValue::Table(fields) = value.get_ref() {
                for (field, value) in fields {
                    if holds(field.span()) || within(value, span) {
                        return Some((section.to_string(), Some(field.to_string())));
                    }
                }
            }
            if holds(section.span()) || holds(value.span()) {
                return Some((section.to_string(), None));
            }
        }
        None
    }

    /// Where a field stands, or else the header of its section.
    fn span_of(&self, section: &str, field: &str) -> Option<Range<usize>> {
        let (header, value) = self.table.get_key_value(section)?;
        let found = value.get_ref().as_table().and_then(|t| t.get_key_value(field));
        Some(found.map_or_else(|| header.span(), |(key, _)| key.span()))
    }
}

/// Whether the span lies in a part of this value. The value of a section that is there several times has
/// no span that holds all of them.
fn within(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    holds(value.span())
        || match value.get_ref() {
            DeValue::Array(values) => values.iter().any(|value| within(value, span)),
            DeValue::Table(fields) => {
                fields.iter().any(|(name, value)| holds(name.span()) || within(value, span))
            }
            _ => false,
        }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + newlines(&text.as_bytes()[..at.min(text.len())])
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}
