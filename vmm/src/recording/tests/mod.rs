//! Runs of simulated machines, recorded and judged again.

mod damage;
mod same;
mod twins;

use super::recorder::Kept;
use super::{Origin, Recorder};
use crate::config::{Config, MachineKind, Overrides, Seal};
use crate::report::{self, Report};
use crate::run::{Host, Machine, Plan, Surroundings, beginning, complete, outline, profile};
use crate::sim::Schedule;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// A small replay whose memory is dirty: every rule is exercised, a window wraps.
fn replay() -> String {
    let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/data/compile.csv.gz");
    format!(
        "[guest]\nmemory_mib = 32\nfill = 0xA5\n[workload]\nprogram = \"replay\"\ninput = {input:?}\n\
         events = 260\nsecret = \"all\"\n[audit]\nquiesce_every = 400\n"
    )
}

/// A run that was recorded.
struct Recorded {
    folder: TempDir,
    report: Report,
}

impl Recorded {
    fn new(text: &str, inject: &[&str], seal: Seal) -> Self {
        Self::limited(text, inject, seal, 64 << 20)
    }

    fn limited(text: &str, inject: &[&str], seal: Seal, limit: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let overrides = Overrides {
            machine: Some(MachineKind::Sim),
            seal: Some(seal),
            inject: inject.iter().map(|fault| (*fault).to_owned()).collect(),
            ..Overrides::default()
        };
        let config = Config::from_text(Path::new("test.toml"), text, &overrides).unwrap();
        let (plan, warnings) = Plan::new(&config).unwrap();
        let machine = report::Machine {
            kind: "sim".into(),
            profile: profile(&config).name().into(),
            ..report::Machine::default()
        };
        let origin = Origin::new(&config, text.to_owned(), beginning(&config, machine.clone()));
        let recorder = Recorder::create(folder.path(), limit, origin).unwrap();
        let host = Host::Sim(Schedule::Seeded);
        let opened = Machine::open_recorded(host, plan, Vec::new(), Some(recorder)).unwrap();
        let outcome = opened.start().unwrap().wait(|_| ControlFlow::Continue(()));
        let surroundings = Surroundings {
            machine,
            warnings,
            inconclusive: Vec::new(),
            last_line: None,
            total: Duration::ZERO,
        };
        assert!(!outcome.with_gate(|gate| gate.leaks_into_recording()).unwrap());
        let recorder = outcome.with_gate(|gate| gate.take_recorder()).unwrap();
        let mut report = outline(&config, &outcome, surroundings);
        let Kept { warning, failure } = recorder.finish(&report, outcome.names());
        assert_eq!(failure, None);
        report.warnings.extend(warning);
        Self { folder, report: complete(&config, &outcome, report) }
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join(super::FILE)).unwrap()
    }
}
