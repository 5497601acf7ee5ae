//! Accesses through windows, seen where the guest is stepped.

use super::*;

/// CPU 0 has a frame of a secret block open and mapped in its window.
fn mapped(cpus: usize) -> (Scene, Gfn) {
    let mut scene = Scene::with_seal(cpus, Denial::NotEnforced);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush_all(Flush::NonGlobal);
    let frame = block.start().wrapping_add(5);
    scene.op(0, OpKind::Open, FrameRange::single(frame)).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    scene.assert_clean(&[]);
    (scene, frame)
}

impl Scene {
    fn uses(&mut self, cpu: u8, va: Gva, write: bool) {
        self.see(cpu, Sighting::Access { va, write });
    }

    #[track_caller]
    fn assert_use_found(&self, rule: Rule, frame: Option<Gfn>, cpu: u8, words: &[&str]) {
        let result = self.audit.result();
        let [finding] = &result.findings[..] else { panic!("{:#?}", result.findings) };
        assert_eq!((finding.rule, finding.frame, finding.cpu), (rule, frame, Some(cpu)));
        assert_eq!(finding.va, Some(window(0)));
        let story: Vec<_> = finding.story.iter().map(|step| step.text.as_str()).collect();
        let told = finding.detail.clone() + &story.join("\n");
        for word in words {
            assert!(told.contains(word), "{word:?} is not in {told}");
        }
    }
}

#[test]
fn a_window_is_used_by_its_own_cpu() {
    let (mut scene, _) = mapped(2);
    for write in [false, true] {
        let before = scene.checked(Rule::ForeignAlias);
        scene.uses(0, window(0), write);
        assert_eq!(scene.checked(Rule::ForeignAlias), before + 1);
    }
    scene.assert_clean(&[Rule::ForeignAlias]);
    assert_eq!(scene.audit.uses(), 2);
}

#[test]
fn a_window_that_another_cpu_uses_is_a_violation() {
    for (write, verb) in [(false, "read"), (true, "wrote")] {
        let (mut scene, frame) = mapped(2);
        scene.uses(1, window(0), write);
        let words = ["CPU 1", verb, "window of CPU 0", "flushes do not reach", "alone"];
        scene.assert_use_found(Rule::ForeignAlias, Some(frame), 1, &words);
    }
}

#[test]
fn what_is_mapped_and_not_secret_may_be_used_by_anybody() {
    let mut scene = Scene::new(2);
    let frame = scene.block(1).start();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    scene.uses(1, window(0), true);
    scene.assert_clean(&[Rule::ForeignAlias]);
}

#[test]
fn an_address_that_is_used_after_its_entry_was_cleared_is_stale() {
    let (mut scene, frame) = mapped(1);
    scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
    scene.uses(0, window(0), false);
    let words = ["translation that is left", "went on by an old translation", "until its entry"];
    scene.assert_use_found(Rule::StaleWindow, Some(frame), 0, &words);
    assert!(scene.audit.result().findings[0].revoked.is_some());
}

#[test]
fn what_another_cpu_caches_of_a_window_is_not_told() {
    let (mut scene, _) = mapped(2);
    scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
    let before = scene.audit.result().tally(Rule::StaleWindow).not_checked;
    scene.uses(1, window(0), false);
    assert!(scene.found().is_empty());
    assert_eq!(scene.audit.result().tally(Rule::StaleWindow).not_checked, before + 1);
}

#[test]
fn the_frame_of_a_page_in_a_run_is_named() {
    let (mut scene, _) = mapped(1);
    let block = scene.block(1);
    scene.op(0, OpKind::Open, block).unwrap();
    let va = window(0).wrapping_add(BLOCK_SIZE);
    scene.write(0, va, Level::Pd, 1, Entry::new(block.start(), BLOCK_ENTRY));
    scene.uses(0, va.wrapping_add(7 * PAGE_SIZE), true);
    scene.assert_clean(&[Rule::ForeignAlias]);
    scene.write(0, va, Level::Pd, 1, Entry::EMPTY);
    scene.uses(0, va.wrapping_add(7 * PAGE_SIZE), true);
    let seventh = block.start().wrapping_add(7);
    assert_eq!(scene.found(), [(Rule::StaleWindow, Some(seventh))]);
}

#[test]
fn what_a_seal_has_removed_of_a_large_page_leads_nowhere() {
    for (page, rule) in [(3, Rule::ObservedAccess), (9, Rule::StaleWindow)] {
        let mut scene = Scene::with_seal(1, Denial::Denied);
        let block = scene.block(1);
        scene.flip(block);
        scene.op(0, OpKind::Open, block).unwrap();
        let va = window(0).wrapping_add(BLOCK_SIZE);
        scene.write(0, va, Level::Pd, 1, Entry::new(block.start(), BLOCK_ENTRY));
        scene.write(0, va, Level::Pd, 1, Entry::EMPTY);
        scene.op(0, OpKind::Seal, FrameRange::new(block.start(), 7).unwrap()).unwrap();
        scene.uses(0, va.wrapping_add(page * PAGE_SIZE), false);
        let frame = (page == 9).then(|| block.start().wrapping_add(page));
        assert_eq!(scene.found(), [(rule, frame)]);
    }
}

#[test]
fn an_access_that_nothing_allows_contradicts_the_model() {
    let (mut scene, _) = mapped(1);
    scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
    scene.flush(0, Flush::NonGlobal);
    scene.uses(0, window(0), true);
    let words = ["no entry leads anywhere", "model is wrong", "nothing that the CPU may cache"];
    scene.assert_use_found(Rule::ObservedAccess, None, 0, &words);
}

#[test]
fn an_access_elsewhere_is_no_window_s() {
    let (mut scene, frame) = mapped(1);
    scene.uses(0, direct_map(frame.gpa()), true);
    assert!(scene.found().is_empty());
    let doubts = scene.audit.result().inconclusive.join("\n");
    assert!(doubts.contains("is in no window"), "{doubts}");
}
