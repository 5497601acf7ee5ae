//! Findings as a report lists them, with the names of the functions in their stories.

use crate::audit::{Finding, Step};
use crate::names::Names;
use crate::report::{Address, StoryStep, Violation};
use std::collections::{BTreeMap, BTreeSet};

/// The violations, in the order in which they were found.
pub(super) fn violations(findings: Vec<Finding>, names: &Names) -> Vec<Violation> {
    let steps = findings.iter().flat_map(|finding| &finding.story);
    let sites: BTreeSet<u32> = steps.filter_map(|step| step.site).collect();
    let functions = names.functions(&sites);
    findings.into_iter().map(|finding| violation(finding, &functions)).collect()
}

fn violation(finding: Finding, functions: &BTreeMap<u32, String>) -> Violation {
    let step = |step: Step| StoryStep {
        seq: step.seq,
        cpu: step.cpu,
        what: step.what.name().to_owned(),
        function: step.site.and_then(|site| functions.get(&site).cloned()),
        text: step.text,
    };
    Violation {
        rule: finding.rule.name().to_owned(),
        frame: finding.frame.map(|frame| Address(frame.gpa().0)),
        va: finding.va.map(|va| Address(va.0)),
        vcpu: finding.cpu,
        root: finding.root.map(|root| Address(root.0)),
        seq: finding.seq,
        detail: finding.detail,
        story: finding.story.into_iter().map(step).collect(),
        expected: false,
    }
}
