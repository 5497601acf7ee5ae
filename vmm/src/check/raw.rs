//! A scenario as it stands in its file: types are right, values are not yet looked at.

use crate::config::{Field, Schema, field};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

/// The section of a scenario's file that is no part of its configuration.
pub(super) const SECTION: &str = "scenario";

pub(super) type Text = Option<Spanned<String>>;
pub(super) type Number = Option<Spanned<i64>>;
/// A list, each of its members still with its place in the file.
pub(super) type List<T> = Option<Spanned<Vec<Spanned<T>>>>;

/// The fields of the section `[scenario]`.
const FIELDS: &[Field] = &[
    field(SECTION, "about", "a sentence on what the scenario shows"),
    field(SECTION, "config", "the path of a configuration, or its sections beside [scenario]"),
    field(SECTION, "machine", "a list of \"kvm\" and \"sim\""),
    field(SECTION, "mediate", "a list of \"trace\", \"tables\" and \"step\""),
    field(SECTION, "seal", "a list of \"guard\", \"memslot\", \"off\" and \"auto\""),
    field(SECTION, "vcpus", "a list of numbers from 1 to 8"),
    field(
        SECTION,
        "vary",
        "fields of the configuration and lists of their values, such as \
         \"workload.in_place\" = [0, 100]",
    ),
    field(SECTION, "require", "a list of rules, those that each clean run must exercise"),
    field(
        SECTION,
        "expect",
        "\"pass\", \"guest-error\", \"inconclusive\", or the rule that must be violated",
    ),
    field(SECTION, "message", "a text that the guest's error, or a reason of doubt, must contain"),
    field(SECTION, "optional", "true or false"),
    field(SECTION, "timeout_s", "a number of seconds from 1 to 86400"),
    field(
        SECTION,
        "leave_out",
        "a list of patterns of names of cases that are not to be made, such as [\"*/kvm/step/*\"]",
    ),
    field(SECTION, "quick", "a list of patterns of names of cases, such as [\"*/sim/*\"]"),
    field(
        SECTION,
        "fault",
        "sections [[scenario.fault]] with the field inject, and at will machine, mediate, seal, \
         vcpus, rule, vcpu, frame, function",
    ),
];

/// What a scenario's file can hold beside a configuration.
pub(super) static SCHEMA: Schema = Schema { fields: FIELDS, sections: "[scenario]" };

/// Other sections belong to the configuration, which is read by itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default, expecting = "sections")]
pub(super) struct File {
    pub scenario: Option<Scenario>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Scenario {
    pub about: Text,
    pub config: Text,
    pub machine: List<String>,
    pub mediate: List<String>,
    pub seal: List<String>,
    pub vcpus: List<i64>,
    pub vary: BTreeMap<String, Spanned<Vec<Spanned<toml::Value>>>>,
    pub require: List<String>,
    pub expect: Text,
    pub message: Text,
    pub optional: Option<bool>,
    pub timeout_s: Number,
    pub leave_out: List<String>,
    pub quick: List<String>,
    pub fault: Vec<Fault>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section")]
pub(super) struct Fault {
    pub inject: List<String>,
    pub machine: List<String>,
    pub mediate: List<String>,
    pub seal: List<String>,
    pub vcpus: List<i64>,
    pub rule: Text,
    pub vcpu: Number,
    pub frame: Text,
    pub function: Text,
}
