//! The `input-leak` rule: after the guest has taken over a secret input, its bytes lie in secret
//! frames and nowhere else.

use super::{Gate, GateFailure};
use crate::recording::{self, ReadError};
use lacuna_abi::addr::{Gfn, Gpa, PAGE_SIZE};
use lacuna_abi::gate::Status;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Most frames with bytes of the secret input that one search names.
const MAX_FOUND: usize = 64;

/// A number for a place that is no frame, so that leaks in different places are different findings.
fn topic(what: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

impl Gate {
    /// Wipes the input region; from now on every quiesce searches for its bytes.
    pub(super) fn input_done(&mut self) -> Result<Status, GateFailure> {
        if self.scanner.is_none() || self.input_done {
            return Ok(Status::BadState);
        }
        let input = self.memory.layout().input;
        self.memory.wipe(&input)?;
        self.input_done = true;
        Ok(Status::Ok)
    }

    /// Searches all memory that is not secret, and the general registers; at the end of a program
    /// (`everywhere`) secret frames too.
    pub(super) fn search(&mut self, seq: u64, everywhere: bool) -> Result<(), GateFailure> {
        let Some(scanner) = self.scanner.as_ref().filter(|_| self.input_done) else {
            return Ok(());
        };
        if scanner.runs() == 0 {
            self.audit.inconclusive(
                "the secret input has no run of 16 bytes that could be recognised in memory: give a \
                 longer or less uniform one"
                    .into(),
            );
            // Too short or too plain to be recognised anywhere.
            self.audit.count_leak_search(0, 1);
            return Ok(());
        }
        let frames = self.audit.frames();
        let mut search = scanner.search();
        let mut expected = Gfn(u64::MAX);
        let mut searched = 0;
        let mut found = Vec::new();
        let each = |at: Gpa, bytes: &[u8]| {
            let frame = at.frame();
            if frame != expected {
                search.restart();
            }
            if !everywhere && frames.is_secret(frame) {
                expected = Gfn(u64::MAX);
                return;
            }
            expected = frame.wrapping_add(bytes.len() as u64 / PAGE_SIZE);
            searched += 1;
            if let Some(end) = search.feed(bytes) {
                // One a frame, and not more frames than anybody would read about.
                if found.len() < MAX_FOUND {
                    found.push((frame, end));
                }
                search.restart();
            }
        };
        self.memory.for_each_page_with_data(each).map_err(GateFailure::Search)?;
        for (frame, end) in found {
            let mut regions = self.memory.layout().regions().into_iter();
            let region = regions.find(|(_, region)| region.contains(frame.gpa()));
            let region = region.map_or("memory", |(name, _)| name);
            let detail = format!(
                "16 bytes of the secret input end at offset {end:#x} of this frame, in the \
                 {region}; copies outside secret frames must be scrubbed before input-done, secret \
                 frames before their release or the end"
            );
            self.audit.report_leak(0, Some(frame), detail, seq);
        }
        for (cpu, registers) in self.cpus.iter().enumerate() {
            let Some(registers) = registers else { continue };
            searched += 1;
            let bytes: Vec<u8> = registers.general.iter().flat_map(|r| r.to_le_bytes()).collect();
            if scanner.find(&bytes).is_some() {
                let detail = format!("16 bytes of the secret input lie in CPU {cpu}'s registers");
                self.audit.report_leak(topic("registers"), None, detail, seq);
            }
        }
        self.audit.count_leak_search(searched, 0);
        Ok(())
    }

    /// Searches text that the VMM is about to write. A hit is reported, and the text must not be
    /// written.
    #[must_use]
    pub fn leaks_into(&mut self, what: &str, text: &[u8]) -> bool {
        let Some(scanner) = &self.scanner else { return false };
        let hit = scanner.find(text).is_some();
        self.note_search(what, hit);
        hit
    }

    /// Searches what the recording holds so far. A hit is reported, and the recording must be taken
    /// away.
    ///
    /// # Errors
    /// [`ReadError`] if the recording cannot be read.
    pub fn leaks_into_recording(&mut self) -> Result<bool, ReadError> {
        let (Some(scanner), Some(recorder)) = (&self.scanner, self.audit.recorder()) else {
            return Ok(false);
        };
        recorder.sync();
        let hit = recording::holds(recorder.path(), scanner)?;
        self.note_search(recording::FILE, hit);
        Ok(hit)
    }

    /// Whether text that is not from the guest's own output holds bytes of the secret input: nothing
    /// is reported.
    #[must_use]
    pub fn holds_secret(&self, text: &[u8]) -> bool {
        self.scanner.as_ref().is_some_and(|scanner| scanner.find(text).is_some())
    }

    /// Counts a search of what the VMM is about to write, and reports what it found.
    fn note_search(&mut self, what: &str, hit: bool) {
        self.audit.count_leak_search(1, 0);
        if hit {
            let detail = format!("16 bytes of the secret input are in {what}, which was withheld");
            let seq = self.last_event();
            self.audit.report_leak(topic(what), None, detail, seq);
        }
    }

    /// The text, or a note in its place if it holds bytes of the secret input.
    pub(super) fn withhold(&mut self, what: &str, text: String) -> String {
        if self.leaks_into(what, text.as_bytes()) {
            return "(withheld: this text holds bytes of the secret input)".into();
        }
        text
    }

    /// Whether the input was taken over, if the program has one.
    #[must_use]
    pub fn input_is_outstanding(&self) -> bool {
        self.scanner.is_some() && !self.input_done
    }
}
