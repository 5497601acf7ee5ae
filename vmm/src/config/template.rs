//! A configuration of which some fields are set from outside: one text, many configurations.

use super::error::ConfigError;
use super::fields::CONFIG;
use super::raw::Raw;
use super::source::Source;
use super::{Config, Overrides, resolve};
use std::ops::Range;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The text of a configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Template<'t> {
    /// The file, which relative paths start from.
    pub(crate) file: &'t Path,
    /// Its text.
    pub(crate) text: &'t str,
    /// A section of the file that is no part of the configuration.
    pub(crate) beside: Option<&'static str>,
}

/// A field and its value, in place of what the text says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Setting {
    pub(crate) section: String,
    pub(crate) field: String,
    /// The value, as TOML.
    pub(crate) value: String,
    /// Where it stands in the text; where it does not, mistakes are shown at the field or its section.
    pub(crate) at: Option<Range<usize>>,
}

impl Template<'_> {
    /// Checks and resolves the configuration with these settings.
    ///
    /// # Errors
    /// [`ConfigError`] for the first mistake found.
    pub(crate) fn config(
        &self,
        settings: &[Setting],
        overrides: &Overrides,
    ) -> Result<Config, ConfigError> {
        let (source, raw) = Source::parse::<Raw>(self.file, self.text, &CONFIG, |table| {
            if let Some(section) = self.beside {
                table.remove(section);
            }
            for setting in settings {
                set(table, setting);
            }
        })?;
        resolve::resolve(&source, &raw, overrides)
    }
}

/// A value that is no TOML is left out: the caller has it from a parsed file.
fn set<'t>(table: &mut DeTable<'t>, setting: &'t Setting) {
    let Ok(value) = DeValue::parse(&setting.value) else { return };
    let header = table.get_key_value(setting.section.as_str()).map(|(header, _)| header.span());
    let at = setting.at.clone().or(header).unwrap_or(0..0);
    if !table.contains_key(setting.section.as_str()) {
        let section = Spanned::new(at.clone(), setting.section.as_str().into());
        table.insert(section, Spanned::new(at.clone(), DeValue::Table(DeTable::new())));
    }
    // Something else than a section is refused when the text's types are looked at.
    let section = table.get_mut(setting.section.as_str()).map(Spanned::get_mut);
    let Some(DeValue::Table(fields)) = section else { return };
    let old = fields.remove_entry(setting.field.as_str()).map(|(name, _)| name.span());
    let at = setting.at.clone().or(old).unwrap_or(at);
    let name = Spanned::new(at.clone(), setting.field.as_str().into());
    fields.insert(name, Spanned::new(at, value.into_inner()));
}
