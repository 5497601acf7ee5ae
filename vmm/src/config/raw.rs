//! A configuration as it stands in the file: types are right, values are not yet looked at.

use serde::Deserialize;
use toml::Spanned;

/// A whole number of any size that TOML can write, still with its place in the file.
pub(super) type Number = Option<Spanned<i64>>;
pub(super) type Text = Option<Spanned<String>>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "sections")]
pub(super) struct Raw {
    pub guest: Guest,
    pub allocator: Allocator,
    pub workload: Workload,
    pub second_stage: SecondStage,
    pub audit: Audit,
    pub limits: Limits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Guest {
    pub memory_mib: Number,
    pub vcpus: Number,
    pub shootdown: Text,
    pub image: Text,
    pub fill: Number,
    pub prezero: Option<bool>,
    pub seed: Number,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Allocator {
    pub min_free_kib: Number,
    pub pool_low_kib: Number,
    pub pool_high_kib: Number,
    pub on_free: Text,
    pub scrub: Option<bool>,
    pub check_zero: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Workload {
    pub program: Text,
    pub input: Text,
    pub events: Number,
    pub secret: Option<Spanned<Secret>>,
    pub in_place: Number,
    pub operations: Number,
    pub max_order: Number,
    pub test: Text,
    pub bench: Text,
    pub order: Number,
    pub rounds: Number,
    pub touch: Text,
    pub crash: Text,
    pub scenario: Text,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "neither a text nor a list of texts")]
pub(super) enum Secret {
    Word(String),
    Names(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct SecondStage {
    pub seal: Text,
    pub guard: Text,
    pub vma_budget: Number,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Audit {
    pub quiesce_every: Number,
    pub probes: Number,
    pub profile: Text,
    pub require: Vec<Spanned<String>>,
    pub expect: Vec<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Limits {
    pub timeout_s: Number,
    pub shootdown_s: Number,
    pub guest_log_kib: Number,
    pub events_mib: Number,
}
