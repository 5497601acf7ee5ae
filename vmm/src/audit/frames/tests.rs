//! Of each flag, and of the counts.

use super::*;
use lacuna_abi::layout::Needs;

fn frames() -> (Frames, FrameRange) {
    let needs = Needs { image: 1, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
    let layout = Layout::new(&needs).unwrap();
    (Frames::new(&layout), layout.zone_frames())
}

fn one(frame: Gfn) -> FrameRange {
    FrameRange::single(frame)
}

#[test]
fn a_frame_may_be_closed_once_every_cpu_has_sealed_it_as_often_as_it_opened_it() {
    let (mut frames, zone) = frames();
    let frame = zone.start();
    frames.seal(one(frame), 0);
    assert!(frames.may_close(frame));
    frames.open(one(frame), 0);
    frames.open(one(frame), 1);
    frames.open(one(frame), 1);
    frames.seal(one(frame), 1);
    frames.seal(one(frame), 0);
    assert!(!frames.may_close(frame));
    frames.seal(one(frame), 1);
    assert!(frames.may_close(frame));
    frames.release(one(frame));
    assert!(!frames.may_close(frame) && !frames.is_secret(frame));
}

#[test]
fn block_counts_agree_with_the_frames() {
    let (mut frames, zone) = frames();
    let block = FrameRange::new(zone.start(), BLOCK_FRAMES).unwrap();
    frames.seal(block, 0);
    assert_eq!(frames.secret_in(zone), BLOCK_FRAMES);
    assert!(frames.all_may_close(block));
    let last = Gfn(block.end().0 - 1);
    frames.open(one(last), 1);
    assert!(!frames.all_may_close(block));
    frames.seal(one(last), 1);
    frames.release(one(last));
    assert!(!frames.all_may_close(block));
    assert_eq!(frames.secret_in(block), BLOCK_FRAMES - 1);
    assert_eq!(frames.sealed().count(), 511);
}

#[test]
fn held_frames_are_those_whose_seal_did_not_complete() {
    let (mut frames, zone) = frames();
    let frame = zone.start();
    frames.seal(one(frame), 0);
    frames.seal(one(frame.wrapping_add(1)), 0);
    frames.complete(one(frame));
    let beside = |frames: &Frames, at: Gfn| -> Vec<_> { frames.held_beside(one(at)).collect() };
    assert_eq!(beside(&frames, frame), [frame.wrapping_add(1)]);
    // Its own frame is not beside it.
    assert_eq!(beside(&frames, frame.wrapping_add(1)), []);
    frames.release(one(frame));
    frames.seal(one(frame), 0);
    assert_eq!(beside(&frames, frame.wrapping_add(1)), [frame]);
    assert_eq!(beside(&frames, frame.wrapping_add(2)).len(), 2);
}

#[test]
fn runs_join_consecutive_frames_of_one_block() {
    let frames = [5, 6, 8, 510, 511, 512].map(Gfn);
    let joined: Vec<_> = runs(frames.into_iter()).map(|r| (r.start().0, r.count())).collect();
    assert_eq!(joined, [(5, 2), (8, 1), (510, 2), (512, 1)]);
}

#[test]
fn ranges_touch_their_own_frames_only() {
    let (mut frames, zone) = frames();
    for (first, count) in [(0, 1), (63, 2), (64, 64), (500, 600), (1, 1023), (512, 512)] {
        let range = FrameRange::new(Gfn(zone.start().0 + first), count).unwrap();
        frames.seal(range, 0);
        assert_eq!(frames.secret_in(zone), count);
        assert!(frames.sealed().eq(range.iter()));
        assert!(frames.all_may_close(range));
        frames.open(range, 1);
        let theirs = |frames: &Frames, cpu| frames.all_secret_and_open(range, cpu);
        assert!(theirs(&frames, 1) && !theirs(&frames, 0));
        let middle = one(range.start().wrapping_add(count / 2));
        frames.seal(middle, 1);
        assert!(!theirs(&frames, 1));
        assert_eq!(frames.all_may_close(range), count == 1);
        assert!(frames.all_may_close(middle));
        frames.seal(range, 1);
        assert!(frames.all_may_close(range));
        frames.release(range);
        assert_eq!(frames.secret_blocks().count(), 0);
    }
}

#[test]
fn steps_of_life_replace_each_other() {
    let (mut frames, zone) = frames();
    let range = FrameRange::new(zone.start().wrapping_add(7), 3).unwrap();
    frames.note_life(range, Life::PooledZero);
    assert!(frames.known_zero().eq(range.iter()));
    assert!(frames.pooled_but_ordinary().eq(range.iter()));
    frames.note_life(range, Life::Pooled);
    assert_eq!(frames.known_zero().count(), 0);
    assert!(frames.pooled_but_ordinary().eq(range.iter()));
    frames.note_life(range, Life::HandedOutZero);
    assert_eq!(frames.pooled_but_ordinary().count(), 0);
    assert!(frames.due_for_first_open(zone).eq(range.iter()));
    frames.seal(range, 0);
    frames.open(one(range.start()), 0);
    assert_eq!(frames.due_for_first_open(zone).count(), 2);
    frames.note_life(range, Life::HandedOut);
    assert_eq!(frames.due_for_first_open(zone).count(), 0);
}

#[test]
fn frames_outside_the_zone_are_never_anything() {
    let (mut frames, zone) = frames();
    for frame in [Gfn(0), zone.end(), Gfn(u64::MAX)] {
        frames.seal(one(frame), 0);
        frames.open(one(frame), 0);
        assert!(!frames.is_secret(frame) && !frames.is_open(frame));
    }
    frames.open(one(zone.start()), 200);
    assert!(!frames.is_open(zone.start()));
}
