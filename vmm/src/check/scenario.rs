//! From a scenario's file to its cases.

use super::builder::Builder;
use super::case::{Base, Case, Expected, Violation};
use super::pattern::Pattern;
use super::raw::{self, File, List, SCHEMA, SECTION};
use crate::audit::Rule;
use crate::config::{
    CONFIG, Config, ConfigError, MachineKind, Mediation, Overrides, Place, Seal, Setting, Source,
    Template, read,
};
use lacuna_abi::fault::Fault;
use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use toml::Spanned;

const VCPUS: RangeInclusive<i64> = 1..=lacuna_abi::MAX_CPUS as i64;
const TIMEOUT_S: RangeInclusive<i64> = 1..=86_400;
/// Seconds that a case may take where its scenario does not say.
const DEFAULT_TIMEOUT_S: u64 = 300;

/// What varies between the cases of a scenario, or between those of a fault.
#[derive(Clone, Default)]
pub(super) struct Axes {
    pub(super) machine: Option<Vec<MachineKind>>,
    pub(super) mediate: Option<Vec<Mediation>>,
    pub(super) seal: Option<Vec<Seal>>,
    pub(super) vcpus: Option<Vec<u8>>,
}

/// A fault to be planted, and where.
pub(super) struct Planted {
    pub(super) fault: Fault,
    pub(super) axes: Axes,
    pub(super) violation: Violation,
}

/// The cases of the scenario in `file`.
///
/// # Errors
/// [`ConfigError`] for the first mistake found, in it or in a configuration that it names.
pub(super) fn load(file: &Path) -> Result<Vec<Case>, ConfigError> {
    from_text(file, &read(file)?)
}

/// The cases of the scenario in `text`, as if it were the contents of `file`.
pub(super) fn from_text(file: &Path, text: &str) -> Result<Vec<Case>, ConfigError> {
    let (source, raw) = Source::parse::<File>(file, text, &SCHEMA, |_| ())?;
    let Some(raw) = raw.scenario else {
        let place = Place::File { file: file.to_owned(), line: None };
        let remedy = "add the section [scenario]; docs/check.md says what it holds";
        return Err(ConfigError::new(place, "this is no scenario", remedy));
    };
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let reader = Reader { source: &source };
    let base = Arc::new(reader.base(&raw, text)?);
    let plain = Template { file: &base.file, text: &base.text, beside: base.beside };
    let plain = plain.config(&[], &Overrides::default())?;
    let planted = reader.planted(&raw)?;
    let builder = Builder {
        reader: &reader,
        name,
        axes: reader.axes(&raw.machine, &raw.mediate, &raw.seal, &raw.vcpus)?,
        vary: reader.vary(&raw, base.beside.is_some())?,
        require: reader.require(&raw, &plain)?,
        expected: reader.expected(&raw)?,
        optional: raw.optional.unwrap_or(false),
        timeout: Duration::from_secs(
            reader
                .number("timeout_s", &raw.timeout_s, TIMEOUT_S)?
                .map_or(DEFAULT_TIMEOUT_S, i64::unsigned_abs),
        ),
        base,
        plain,
    };
    let mut cases = builder.cases(&planted)?;
    let mut names = BTreeSet::new();
    if let Some(twice) = cases.iter().find(|case| !names.insert(&case.name)) {
        let what = format!("that makes the case {} twice", twice.name);
        let field = if twice.fault.is_some() { "fault" } else { "vary" };
        return Err(source.error(SECTION, field, None, what, "leave one of them out"));
    }
    if let Some(left_out) = reader.matching("leave_out", &raw.leave_out, &cases)? {
        let mut left_out = left_out.into_iter();
        cases.retain(|_| left_out.next() == Some(false));
    }
    if let Some(quick) = reader.matching("quick", &raw.quick, &cases)? {
        cases.iter_mut().zip(quick).for_each(|(case, quick)| case.quick = quick);
    }
    Ok(cases)
}

/// Turns what stands in the section into settings.
pub(super) struct Reader<'a> {
    pub(super) source: &'a Source<'a>,
}

impl Reader<'_> {
    pub(super) fn refuse(
        &self,
        field: &str,
        at: Option<Range<usize>>,
        what: String,
    ) -> ConfigError {
        let takes = SCHEMA.find(SECTION, field).map_or("another value", |field| field.takes);
        self.source.error(SECTION, field, at, what, format!("give {takes}"))
    }

    /// The configuration: the rest of the file, or another one.
    fn base(&self, raw: &raw::Scenario, text: &str) -> Result<Base, ConfigError> {
        let file = self.source.file();
        let Some(name) = &raw.config else {
            return Ok(Base { file: file.into(), text: text.into(), beside: Some(SECTION) });
        };
        if let Some(section) = self.source.other_than(SECTION) {
            let what = format!("the file has a section [{section}] too");
            return Err(self.refuse("config", Some(name.span()), what));
        }
        let path = file.parent().unwrap_or(Path::new("")).join(name.get_ref());
        let text = read(&path).map_err(|error| {
            let what = format!("{}: {}", path.display(), error.what);
            self.source.error(SECTION, "config", Some(name.span()), what, error.remedy)
        })?;
        Ok(Base { file: path, text, beside: None })
    }

    fn axes(
        &self,
        machine: &List<String>,
        mediate: &List<String>,
        seal: &List<String>,
        vcpus: &List<i64>,
    ) -> Result<Axes, ConfigError> {
        let vcpu = |number: &Spanned<i64>| {
            let known = Some(*number.get_ref()).filter(|number| VCPUS.contains(number));
            known.and_then(|number| u8::try_from(number).ok()).ok_or_else(|| {
                let what = format!("{} is out of range", number.get_ref());
                self.refuse("vcpus", Some(number.span()), what)
            })
        };
        Ok(Axes {
            machine: self.list(
                "machine",
                machine,
                self.named("machine", MachineKind::from_name),
            )?,
            mediate: self.list("mediate", mediate, self.named("mediate", Mediation::from_name))?,
            seal: self.list("seal", seal, self.named("seal", Seal::from_name))?,
            vcpus: self.list("vcpus", vcpus, vcpu)?,
        })
    }

    fn named<T>(
        &self,
        field: &'static str,
        from_name: impl Fn(&str) -> Option<T>,
    ) -> impl Fn(&Spanned<String>) -> Result<T, ConfigError> {
        move |name| {
            from_name(name.get_ref()).ok_or_else(|| {
                let what = format!("{:?} is not known", name.get_ref());
                self.refuse(field, Some(name.span()), what)
            })
        }
    }

    /// A list without repetition that is not empty.
    fn list<T, U: PartialEq>(
        &self,
        field: &str,
        raw: &List<T>,
        read: impl Fn(&Spanned<T>) -> Result<U, ConfigError>,
    ) -> Result<Option<Vec<U>>, ConfigError> {
        let Some(raw) = raw else { return Ok(None) };
        let mut list = Vec::new();
        for value in raw.get_ref() {
            let read = read(value)?;
            if list.contains(&read) {
                return Err(self.refuse(field, Some(value.span()), "it is there twice".into()));
            }
            list.push(read);
        }
        if list.is_empty() {
            let what = "without a value there is no case".to_owned();
            return Err(self.refuse(field, Some(raw.span()), what));
        }
        Ok(Some(list))
    }

    fn number(
        &self,
        field: &str,
        raw: &raw::Number,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ConfigError> {
        let Some(raw) = raw else { return Ok(None) };
        if range.contains(raw.get_ref()) {
            return Ok(Some(*raw.get_ref()));
        }
        Err(self.refuse(field, Some(raw.span()), format!("{} is out of range", raw.get_ref())))
    }

    fn rule(&self, field: &str, name: &Spanned<String>) -> Result<Rule, ConfigError> {
        Rule::from_name(name.get_ref()).ok_or_else(|| {
            let known: Vec<_> = Rule::ALL.iter().map(|rule| rule.name()).collect();
            let what = format!("there is no rule {:?}", name.get_ref());
            let remedy = format!("known: {}", known.join(", "));
            self.source.error(SECTION, field, Some(name.span()), what, remedy)
        })
    }

    /// The settings of each field that varies. They stand in this file, whatever they are set in.
    fn vary(&self, raw: &raw::Scenario, here: bool) -> Result<Vec<Vec<Setting>>, ConfigError> {
        let mut all = Vec::new();
        for (name, values) in &raw.vary {
            let known = name.split_once('.').filter(|(s, f)| CONFIG.find(s, f).is_some());
            let Some((section, field)) = known else {
                let what = format!("no configuration has a field {name:?}");
                return Err(self.refuse("vary", Some(values.span()), what));
            };
            if let Some(axis) = [("guest", "vcpus"), ("second_stage", "seal")]
                .iter()
                .find(|a| **a == (section, field))
            {
                let what = format!("{name:?} has a list of its own");
                let remedy = format!("use {} = […]", axis.1);
                let at = Some(values.span());
                return Err(self.source.error(SECTION, "vary", at, what, remedy));
            }
            if values.get_ref().is_empty() {
                let what = format!("{name:?} has no values, so that there is no case");
                return Err(self.refuse("vary", Some(values.span()), what));
            }
            let setting = |value: &Spanned<toml::Value>| Setting {
                section: section.to_owned(),
                field: field.to_owned(),
                value: value.get_ref().to_string(),
                at: here.then(|| value.span()),
            };
            all.push(values.get_ref().iter().map(setting).collect());
        }
        Ok(all)
    }

    /// The rules that clean runs must exercise: those named here, and those of the configuration.
    fn require(&self, raw: &raw::Scenario, plain: &Config) -> Result<Vec<Rule>, ConfigError> {
        let mut rules = plain.audit.require.clone();
        for name in raw.require.iter().flat_map(Spanned::get_ref) {
            let rule = self.rule("require", name)?;
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
        let passes = raw.expect.as_ref().is_none_or(|expect| expect.get_ref() == "pass");
        if passes && rules.is_empty() && raw.require.is_none() {
            let what = "it is missing: a run that exercises no rule shows nothing".to_owned();
            return Err(self.refuse("require", None, what));
        }
        Ok(rules)
    }

    fn expected(&self, raw: &raw::Scenario) -> Result<Expected, ConfigError> {
        let message = raw.message.as_ref().map(|message| message.get_ref().clone());
        let word = raw.expect.as_ref().map_or("pass", |expect| expect.get_ref().as_str());
        let expected = match (word, &raw.expect) {
            ("guest-error", _) => return Ok(Expected::GuestError(message)),
            ("inconclusive", _) => return Ok(Expected::Inconclusive(message)),
            ("pass", _) | (_, None) => Expected::Pass,
            (_, Some(name)) => Expected::Violation(Violation::of(self.rule("expect", name)?)),
        };
        if let Some(message) = &raw.message {
            let what = format!("nothing is said where \"{word}\" is expected");
            return Err(self.refuse("message", Some(message.span()), what));
        }
        if let (Expected::Violation(_), Some(fault)) = (&expected, raw.fault.first()) {
            let at = fault.inject.as_ref().map(Spanned::span);
            let what = "without its faults the scenario is not clean".to_owned();
            return Err(self.refuse("fault", at, what));
        }
        Ok(expected)
    }

    fn planted(&self, raw: &raw::Scenario) -> Result<Vec<Planted>, ConfigError> {
        let mut all = Vec::new();
        for raw in &raw.fault {
            let fault = |name: &Spanned<String>| {
                Fault::from_name(name.get_ref()).ok_or_else(|| {
                    let known: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
                    let what = format!("there is no fault {:?}", name.get_ref());
                    let remedy = format!("the faults are {}", known.join(", "));
                    self.source.error(SECTION, "fault", Some(name.span()), what, remedy)
                })
            };
            let Some(faults) = self.list("fault", &raw.inject, fault)? else {
                return Err(self.refuse("fault", None, "inject is missing".into()));
            };
            let axes = self.axes(&raw.machine, &raw.mediate, &raw.seal, &raw.vcpus)?;
            let frame = raw.frame.as_ref().map(|frame| {
                let digits = frame.get_ref().strip_prefix("0x");
                let address = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                address.ok_or_else(|| {
                    let what = format!("frame: {:?} is no address as 0x100200000", frame.get_ref());
                    self.refuse("fault", Some(frame.span()), what)
                })
            });
            let frame = frame.transpose()?;
            let vcpu = self.number("fault", &raw.vcpu, 0..=VCPUS.end() - 1)?;
            for fault in faults {
                // Each fault's rule is one that the audit has.
                let own = Rule::from_name(fault.rule());
                let rule = match (&raw.rule, own) {
                    (Some(name), _) => self.rule("fault", name)?,
                    (None, Some(rule)) => rule,
                    (None, None) => {
                        let what = format!("no rule finds {}", fault.name());
                        return Err(self.refuse("fault", None, what));
                    }
                };
                let violation = Violation {
                    rule,
                    vcpu: vcpu.and_then(|vcpu| u8::try_from(vcpu).ok()),
                    frame,
                    function: raw.function.as_ref().map(|name| name.get_ref().clone()),
                };
                all.push(Planted { fault, axes: axes.clone(), violation });
            }
        }
        Ok(all)
    }

    /// Which of the cases the patterns of a field match; `None` if the file has no such field.
    fn matching(
        &self,
        field: &str,
        raw: &List<String>,
        cases: &[Case],
    ) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(raw) = raw else { return Ok(None) };
        let mut all = vec![false; cases.len()];
        for text in raw.get_ref() {
            let refuse = |what| self.refuse(field, Some(text.span()), what);
            let text = text.get_ref();
            let pattern = Pattern::new(text)
                .map_err(|why| refuse(format!("{text:?} is no pattern: {why}")))?;
            let matches = |case: &Case| pattern.matches(&case.name);
            if !cases.iter().any(matches) {
                return Err(refuse(format!("no case matches {text:?}")));
            }
            all.iter_mut().zip(cases).for_each(|(known, case)| *known |= matches(case));
        }
        Ok(Some(all))
    }
}
