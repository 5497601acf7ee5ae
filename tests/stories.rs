//! Planted faults and the stories that reports must tell of them.

use crate::support::{Check, EVENTS, dirty, ensure, lacuna, replay};
use serde_json::Value;

/// A planted fault and what the story of the violation must tell: kind of step, part of the
/// function's name, part of the text; in this order, with others in between.
pub struct Story {
    pub fault: &'static str,
    pub rule: &'static str,
    pub vcpus: u8,
    pub args: &'static [&'static str],
    pub steps: &'static [(&'static str, &'static str, &'static str)],
}

const CALL: (&str, &str, &str) = ("mattered", "", "asked the host, after event");
const BY_THE_VMM: (&str, &str, &str) = ("made", "", "before the guest started: the VMM mapped");
const UNMAPPED: (&str, &str, &str) =
    ("revoked", "flip::PageAllocator::", "cleared the entry for 0xffff888100000000");

/// Stories on either machine. The functions are those of the file in which the slip is.
pub const STORIES: &[Story] = &[
    Story {
        fault: "skip-flip-flush",
        rule: "stale-direct-map",
        vcpus: 1,
        args: &[],
        steps: &[
            BY_THE_VMM,
            UNMAPPED,
            CALL,
            ("right", "", "on CPU 0, between event 1 and the call"),
        ],
    },
    Story {
        fault: "cr3-flip-flush",
        rule: "stale-direct-map",
        vcpus: 1,
        args: &[],
        steps: &[
            UNMAPPED,
            (
                "flush",
                "flip::PageAllocator::",
                "reloaded CR3: does not count, because it spares global",
            ),
            CALL,
            ("right", "", "a CR3 load spares what is global"),
        ],
    },
    Story {
        fault: "flush-before-unmap",
        rule: "stale-direct-map",
        vcpus: 1,
        args: &[],
        steps: &[
            ("flush", "flip::PageAllocator::", "does not count, because it came before the revoke"),
            UNMAPPED,
            CALL,
        ],
    },
    Story {
        fault: "local-only-flip-flush",
        rule: "stale-direct-map",
        vcpus: 2,
        args: &[],
        steps: &[
            UNMAPPED,
            ("flush", "flip::PageAllocator::", "it removes nothing of what CPU 1 caches"),
            CALL,
            ("right", "", "on CPU 1, between event"),
        ],
    },
    Story {
        fault: "leave-direct-map-alias",
        rule: "direct-map-alias",
        vcpus: 1,
        args: &[],
        steps: &[
            BY_THE_VMM,
            ("mattered", "", "the frame is secret, and the direct map shows it"),
            ("right", "", "to clear the entry and flush it on every CPU, and only then to seal"),
        ],
    },
    Story {
        fault: "skip-window-flush",
        rule: "stale-window",
        vcpus: 1,
        args: &["--seal", "off"],
        steps: &[
            ("made", "mermap::Mermap::", "mapped the frame"),
            ("revoked", "mermap::", "cleared the entry"),
            ("sealed", "", "does not count, because the seal is off"),
            ("mattered", "mermap::Mermap::", "CPU 0 may still reach the old frame there"),
            ("right", "", "an INVLPG of the address, a CR3 load or a change of CR4.PGE"),
        ],
    },
    Story {
        fault: "table-free-stale",
        rule: "stale-table",
        vcpus: 1,
        args: &[],
        steps: &[
            ("made", "", "linked the table at"),
            ("revoked", "convert::PageAllocator::", "changed the entry"),
            ("mattered", "convert::PageAllocator::", "freed the frame"),
            ("right", "", "and only then to free the page"),
        ],
    },
];

/// Runs with the fault planted and reads the story of its first violation, in the JSON report.
pub fn story_is_told(story: &Story, machine: &[&str]) -> Check {
    let Story { fault, rule, vcpus, args, steps } = story;
    let in_place = if *rule == "stale-table" { "in_place = 100\n" } else { "" };
    let workload = replay(EVENTS, "all") + in_place;
    let config = dirty(&workload).replace("[guest]\n", &format!("[guest]\nvcpus = {vcpus}\n"));
    let run = lacuna(&config, &[machine, args, &["--inject", fault]].concat())?;
    run.expect(1, "violation")?;
    let violations = run.report["violations"].as_array().ok_or("no violations")?;
    let first = violations.iter().find(|violation| violation["rule"] == *rule);
    let told = first.and_then(|violation| violation["story"].as_array()).ok_or("no story")?;
    let mut left = told.iter();
    for (what, function, text) in *steps {
        let says = |step: &Value, field: &str, part: &str| {
            part.is_empty() || step[field].as_str().is_some_and(|said| said.contains(part))
        };
        let found = left.any(|step| {
            step["what"] == *what && says(step, "function", function) && says(step, "text", text)
        });
        ensure(found, &format!("no step `{what}` in {function:?} with {text:?} in {told:#?}"))?;
    }
    // Whatever counts as a flush of the blamed CPU after the revoke would have been enough.
    let counted = |step: &&Value| {
        let text = step["text"].as_str().unwrap_or_default();
        step["what"] == "flush" && !text.contains("does not count") && !text.contains("removes")
    };
    let counts = told.iter().find(counted);
    ensure(counts.is_none(), &format!("a flush without a reason: {counts:#?}"))
}
