//! From what stands in the file, and on the command line, to a complete configuration.

use super::error::ConfigError;
use super::fields::{
    self, EVENTS_MIB, GUEST_LOG_KIB, MAX_FILL_MIB, MEMORY_MIB, PROBES, SHOOTDOWN_S, TIMEOUT_S,
    VCPUS,
};
use super::raw::{self, Number, Raw};
use super::source::Source;
use super::{
    Allocator, Audit, Config, Expect, GuardChoice, Guest, Limits, MachineKind, Mediation, OnFree,
    Output, Overrides, ProfileChoice, ReportFormat, Seal, SecondStage, Shootdown, Steps, Workload,
    flags, input,
};
use crate::audit::Rule;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Marks of the pool where the file gives none.
const POOL_LOW_KIB: u64 = 512;
const POOL_HIGH_KIB: u64 = 2048;

/// What [`Expect`] calls an access to a sealed frame.
const SEALED_ACCESS: &str = "sealed-access";

pub(super) fn resolve(
    source: &Source<'_>,
    raw: &Raw,
    overrides: &Overrides,
) -> Result<Config, ConfigError> {
    let resolver = Resolver { source };
    flags::refuse_what_is_missing(overrides)?;
    let machine = overrides.machine.unwrap_or(MachineKind::Kvm);
    let mut guest = resolver.guest(&raw.guest)?;
    guest.seed = overrides.seed.unwrap_or(guest.seed);
    let allocator = resolver.allocator(&raw.allocator, guest.memory_mib)?;
    let inject = flags::faults(&overrides.inject, guest.vcpus)?;
    let mut second_stage = resolver.second_stage(&raw.second_stage)?;
    second_stage.seal = overrides.seal.unwrap_or(second_stage.seal);
    let workload = resolver.workload(&raw.workload, overrides.input.as_deref())?;
    resolver.check_vcpus(&workload, raw.guest.vcpus.as_ref(), guest.vcpus)?;
    let mediation = overrides.mediate.unwrap_or(Mediation::Trace);
    if mediation == Mediation::Step {
        // A step would lose what the controller delivers; the VMM delivers by itself.
        guest.shootdown = Shootdown::Gate;
    }
    if machine == MachineKind::Sim {
        flags::refuse_what_a_simulation_lacks(&guest, &workload, overrides)?;
    }
    Ok(Config {
        file: source.file().to_owned(),
        machine,
        mediation,
        steps: Steps {
            from: overrides.step_from.unwrap_or(0),
            to: overrides.step_to.unwrap_or(u64::MAX),
        },
        guest,
        allocator,
        workload,
        second_stage,
        audit: resolver.audit(&raw.audit)?,
        limits: resolver.limits(&raw.limits)?,
        inject,
        output: Output {
            report: overrides.report.unwrap_or(ReportFormat::Text),
            out: overrides.out.as_deref().map(flags::folder).transpose()?,
            record: overrides.record,
        },
    })
}

/// Turns what stands in the file into settings, section by section.
pub(super) struct Resolver<'a> {
    pub(super) source: &'a Source<'a>,
}

impl Resolver<'_> {
    fn guest(&self, raw: &raw::Guest) -> Result<Guest, ConfigError> {
        let memory_mib = self.number(("guest", "memory_mib"), &raw.memory_mib, MEMORY_MIB)?;
        let memory_mib = memory_mib.unwrap_or(64);
        if memory_mib % 2 != 0 {
            let what = format!("{memory_mib} is odd");
            return Err(self.refuse(("guest", "memory_mib"), None, what));
        }
        let fill = self.number(("guest", "fill"), &raw.fill, 0..=u8::MAX.into())?;
        if fill.is_some() && memory_mib > MAX_FILL_MIB {
            let what = format!("{memory_mib} MiB are too many to be filled");
            return Err(self.refuse(("guest", "fill"), None, what));
        }
        Ok(Guest {
            memory_mib,
            vcpus: self.vcpus(&raw.vcpus)?,
            shootdown: match &raw.shootdown {
                Some(how) => self.named(("guest", "shootdown"), how, Shootdown::from_name)?,
                None => Shootdown::X2apic,
            },
            image: match &raw.image {
                Some(image) => Some(self.file(("guest", "image"), image)?),
                None => None,
            },
            fill: fill.and_then(|fill| u8::try_from(fill).ok()),
            prezero: raw.prezero.unwrap_or(true),
            seed: self.number(("guest", "seed"), &raw.seed, 0..=u64::MAX)?.unwrap_or(0),
        })
    }

    fn allocator(&self, raw: &raw::Allocator, memory_mib: u64) -> Result<Allocator, ConfigError> {
        let half = memory_mib * 1024 / 2;
        let kib = |name, number| self.number(("allocator", name), number, 0..=half);
        let pool_high_kib = kib("pool_high_kib", &raw.pool_high_kib)?.unwrap_or(POOL_HIGH_KIB);
        let pool_low_kib = kib("pool_low_kib", &raw.pool_low_kib)?;
        if let Some((low, place)) = pool_low_kib.zip(raw.pool_low_kib.as_ref())
            && low > pool_high_kib
        {
            let what = format!("{low} is above pool_high_kib, {pool_high_kib}");
            return Err(self.refuse(("allocator", "pool_low_kib"), Some(place.span()), what));
        }
        Ok(Allocator {
            min_free_kib: kib("min_free_kib", &raw.min_free_kib)?,
            pool_low_kib: pool_low_kib.unwrap_or(POOL_LOW_KIB.min(pool_high_kib)),
            pool_high_kib,
            on_free: match &raw.on_free {
                Some(what) => self.named(("allocator", "on_free"), what, OnFree::from_name)?,
                None => OnFree::Leave,
            },
            scrub: raw.scrub.unwrap_or(true),
            check_zero: raw.check_zero.unwrap_or(false),
        })
    }

    fn vcpus(&self, raw: &Number) -> Result<u8, ConfigError> {
        let vcpus = self.number(("guest", "vcpus"), raw, VCPUS)?;
        Ok(vcpus.and_then(|vcpus| u8::try_from(vcpus).ok()).unwrap_or(1))
    }

    /// Whether the guest has the vCPUs that its program needs.
    fn check_vcpus(
        &self,
        workload: &Workload,
        raw: Option<&Spanned<i64>>,
        vcpus: u8,
    ) -> Result<(), ConfigError> {
        let (what, needed) = match workload {
            Workload::Crash { crash } => {
                (format!("crash = \"{}\"", crash.name()), crash.vcpus().into())
            }
            Workload::Probe { scenario, .. } => {
                (format!("scenario = \"{}\"", scenario.name()), scenario.cpus())
            }
            Workload::Selftest { test, .. } => (format!("test = \"{}\"", test.name()), test.cpus()),
            _ => return Ok(()),
        };
        if usize::from(vcpus) >= needed {
            return Ok(());
        }
        let what = format!("{what} needs at least {needed}");
        let remedy = format!("give a number from {needed} to 8");
        Err(self.source.error("guest", "vcpus", raw.map(Spanned::span), what, remedy))
    }

    fn second_stage(&self, raw: &raw::SecondStage) -> Result<SecondStage, ConfigError> {
        let budget = ("second_stage", "vma_budget");
        let budget = self.number(budget, &raw.vma_budget, 1..=u32::MAX.into())?;
        Ok(SecondStage {
            seal: match &raw.seal {
                Some(seal) => self.named(("second_stage", "seal"), seal, Seal::from_name)?,
                None => Seal::Auto,
            },
            guard: match &raw.guard {
                Some(how) => self.named(("second_stage", "guard"), how, GuardChoice::from_name)?,
                None => GuardChoice::Auto,
            },
            vma_budget: budget.and_then(|budget| u32::try_from(budget).ok()),
        })
    }

    fn audit(&self, raw: &raw::Audit) -> Result<Audit, ConfigError> {
        let every = ("audit", "quiesce_every");
        let every = self.number(every, &raw.quiesce_every, 1..=u64::MAX)?;
        let mut expect = Expect::default();
        for name in &raw.expect {
            if name.get_ref() == SEALED_ACCESS {
                expect.sealed_access = true;
            } else {
                self.add_rule("expect", name, &mut expect.rules)?;
            }
        }
        let mut require = Vec::new();
        for name in &raw.require {
            self.add_rule("require", name, &mut require)?;
        }
        let probes = self.number(("audit", "probes"), &raw.probes, PROBES)?.unwrap_or(16);
        let profile = match &raw.profile {
            Some(profile) => self.named(("audit", "profile"), profile, ProfileChoice::from_name)?,
            None => ProfileChoice::Auto,
        };
        let quiesce_every = every.unwrap_or(1000);
        Ok(Audit { profile, quiesce_every, probes, require, expect })
    }

    fn add_rule(
        &self,
        field: &str,
        name: &Spanned<String>,
        rules: &mut Vec<Rule>,
    ) -> Result<(), ConfigError> {
        let Some(rule) = Rule::from_name(name.get_ref()) else {
            let mut known: Vec<_> = Rule::ALL.iter().map(|rule| rule.name()).collect();
            if field == "expect" {
                known.push(SEALED_ACCESS);
            }
            let what = format!("there is no rule {:?}", name.get_ref());
            let remedy = format!("known: {}", known.join(", "));
            return Err(self.source.error("audit", field, Some(name.span()), what, remedy));
        };
        if !rules.contains(&rule) {
            rules.push(rule);
        }
        Ok(())
    }

    fn limits(&self, raw: &raw::Limits) -> Result<Limits, ConfigError> {
        let number = |name, raw, range| self.number(("limits", name), raw, range);
        Ok(Limits {
            timeout_s: number("timeout_s", &raw.timeout_s, TIMEOUT_S)?.unwrap_or(60),
            shootdown_s: number("shootdown_s", &raw.shootdown_s, SHOOTDOWN_S)?.unwrap_or(10),
            guest_log_kib: number("guest_log_kib", &raw.guest_log_kib, GUEST_LOG_KIB)?
                .unwrap_or(1024),
            events_mib: number("events_mib", &raw.events_mib, EVENTS_MIB)?.unwrap_or(64),
        })
    }

    pub(super) fn number(
        &self,
        field: (&str, &str),
        raw: &Number,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ConfigError> {
        let Some(raw) = raw else { return Ok(None) };
        match u64::try_from(*raw.get_ref()) {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let what = format!("{} is out of range", raw.get_ref());
                Err(self.refuse(field, Some(raw.span()), what))
            }
        }
    }

    pub(super) fn named<T>(
        &self,
        field: (&str, &str),
        raw: &Spanned<String>,
        from_name: impl Fn(&str) -> Option<T>,
    ) -> Result<T, ConfigError> {
        from_name(raw.get_ref()).ok_or_else(|| {
            self.refuse(field, Some(raw.span()), format!("{:?} is not known", raw.get_ref()))
        })
    }

    pub(super) fn file(
        &self,
        field: (&str, &str),
        raw: &Spanned<String>,
    ) -> Result<PathBuf, ConfigError> {
        let path = self.relative(raw.get_ref());
        input::check(&path, u64::MAX).map_err(|(what, remedy)| {
            self.source.error(field.0, field.1, Some(raw.span()), what, remedy)
        })?;
        Ok(path)
    }

    /// A path of the file, which is relative to the file's folder.
    pub(super) fn relative(&self, path: &str) -> PathBuf {
        self.source.file().parent().unwrap_or(Path::new("")).join(path)
    }

    /// A mistake whose remedy is to give what the field takes.
    pub(super) fn refuse(
        &self,
        (section, field): (&str, &str),
        span: Option<Range<usize>>,
        what: impl Into<String>,
    ) -> ConfigError {
        let takes = fields::find(section, field).map_or("another value", |field| field.takes);
        self.source.error(section, field, span, what, format!("give {takes}"))
    }
}
