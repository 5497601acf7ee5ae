//! Guests made of bytes: those that the fuzzer kept, and as many of chance as are asked for; and the
//! oracle, with what it must see.

use super::rig::Rig;
use super::*;
use crate::image::Image;
use crate::sim::Random;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::gate::{Call, OpKind};
use lacuna_abi::layout::{POOL, window};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::locate;
use std::fs;
use std::path::Path;

/// Guests of chance in a plain test run; `LACUNA_HOSTILE` asks for another number.
const GUESTS: u64 = 1500;
/// Longest scripts, in bytes. Short ones do one thing, which nothing else covers up.
const MAX_BYTES: [u64; 4] = [30, 60, 200, 700];

#[test]
fn what_the_fuzzer_kept_harms_nobody() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/hostile");
    let mut guests = 0;
    for entry in fs::read_dir(&corpus).unwrap() {
        let path = entry.unwrap().path();
        let ended = torment(&fs::read(&path).unwrap());
        ended.unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        guests += 1;
    }
    assert!(guests >= 20, "only {guests} guests in {}", corpus.display());
}

/// The bytes of a seed's guest.
fn bytes(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed, 1);
    let most = MAX_BYTES[(seed % 4) as usize];
    (0..random.below(most)).map(|_| random.below(256).to_le_bytes()[0]).collect()
}

/// `LACUNA_HOSTILE=100000 cargo test --profile lab -p lacuna --lib guests_of_chance -- --nocapture`
#[test]
fn guests_of_chance_harm_nobody_and_are_never_called_clean_in_spite_of_what_they_did() {
    let guests = std::env::var("LACUNA_HOSTILE").map_or(GUESTS, |number| number.parse().unwrap());
    let (mut steps, mut calls, mut clean, mut forbidden) = (0, 0, 0, 0);
    for seed in 0..guests {
        let ended = torment(&bytes(seed)).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        steps += ended.steps as u64;
        calls += ended.calls;
        clean += u64::from(ended.clean);
        forbidden += u64::from(ended.forbidden.is_some());
    }
    println!(
        "{guests} guests, {steps} steps, {calls} gate calls; {clean} clean, {forbidden} left something \
         forbidden"
    );
    // Otherwise nothing was tried.
    assert!(
        guests == 0 || (calls > guests && forbidden > guests / 10 && clean > 0),
        "{calls} {forbidden} {clean}"
    );
}

#[test]
fn a_guest_without_bytes_is_clean() {
    let ended = torment(&[]).unwrap();
    assert!(ended.clean && ended.forbidden.is_none(), "{ended:?}");
}

fn rig() -> Rig {
    Rig::new(1, true, Mediation::Trace).unwrap()
}

fn map(rig: &Rig, va: lacuna_abi::addr::Gva, entry: Entry) {
    let at = locate(&*rig.memory, rig.root, va, Level::Pt).unwrap();
    rig.store(at, entry.0);
}

/// Each thing that the oracle knows, in a world that has it and no other.
#[test]
fn the_oracle_sees_what_is_forbidden_and_nothing_in_a_fresh_guest() {
    assert_eq!(rig().forbidden(), None);
    type Break = fn(&mut Rig);
    let breaks: [(&str, Break); 8] = [
        ("is mapped globally at 0xffff888100000000", |rig| seal(rig)),
        ("is mapped at 0xffff910000000000", |rig| {
            let at = locate(&*rig.memory, rig.root, rig.layout().zone.va, Level::Pd).unwrap();
            rig.store(at, 0);
            seal(rig);
            let first = rig.layout().zone_frames().start();
            map(rig, window(0), Entry::new(first, Entry::DATA));
        }),
        ("is mapped writable at", |rig| {
            map(rig, window(0), Entry::new(rig.root.frame(), Entry::DATA))
        }),
        ("is writable and executable", |rig| {
            let image = rig.layout().image.gpa.frame();
            map(rig, window(0), Entry::new(image, Entry::DATA));
        }),
        ("outside the table pool", |rig| {
            let at = locate(&*rig.memory, rig.root, window(0), Level::Pd).unwrap();
            rig.store(at, Entry::new(rig.layout().zone_frames().start(), Entry::TABLE).0);
        }),
        ("CPU 0 has CR0", |rig| rig.cpus.registers[0].cr0 &= !(1 << 16)),
        ("is on the root", |rig| rig.cpus.registers[0].cr3 += 4096),
        ("for ring 3", |rig| {
            for level in [Level::Pml4, Level::Pdpt, Level::Pd] {
                let at = locate(&*rig.memory, rig.root, POOL, level).unwrap();
                rig.store(at, rig.load(at) | Entry::USER);
            }
        }),
    ];
    for (needle, break_it) in breaks {
        let mut rig = rig();
        break_it(&mut rig);
        let seen = rig.forbidden().unwrap_or_default();
        assert!(seen.contains(needle), "{needle:?} is not what is seen: {seen:?}");
        rig.finish().unwrap();
        assert!(!rig.is_clean(), "{needle:?} is clean to the audit");
    }
}

fn seal(rig: &mut Rig) {
    let frames = FrameRange::single(rig.layout().zone_frames().start());
    let mut words = Vec::new();
    lacuna_abi::gate::OpWriter::new(|word, value| words.push((word, value)))
        .push(OpKind::Seal, frames)
        .unwrap();
    for (word, value) in words {
        rig.store(rig.call_word(0, word), value);
    }
    assert!(rig.call(0, Call::Ops).unwrap());
    rig.second_stage_is_right().unwrap();
}

#[test]
fn images_made_by_hand_can_be_started() {
    let image = Image::parse(&elf(b"\xf4")).unwrap();
    assert_eq!(image.segments.len(), 1);
    for seed in 0..200 {
        Image::parse(&Program::new(seed).image).unwrap();
        assert_eq!(Program::new(seed), Program::new(seed));
    }
    for sin in Sin::ALL {
        Image::parse(&sin.image().unwrap()).unwrap();
    }
}
