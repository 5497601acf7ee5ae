//! Accesses through windows.

use super::*;
use lacuna_abi::layout::window;

fn access(page: u64, write: bool) -> Sighting {
    Sighting::Access { va: window(0).wrapping_add(page * 0x1000), write }
}

/// RAX, RSI and RDI lead into the window of CPU 0.
fn in_window(code: &[u8], offset: u64) -> Bench {
    let mut bench = Bench::new(code);
    for register in [RAX, Registers::RSI, Registers::RDI] {
        bench.registers.general[register] = window(0).0 + offset;
    }
    bench
}

#[test]
fn loads_and_stores_through_a_window_are_seen() {
    for (code, seen) in [
        (&[0x48, 0x8b, 0x18][..], vec![access(0, false)]), // mov rbx, [rax]
        (&STORE, vec![access(0, true)]),
        (&[0x48, 0x01, 0x18], vec![access(0, true)]), // add [rax], rbx
        (&[0xf0, 0x48, 0x0f, 0xb1, 0x18], vec![access(0, true)]), // lock cmpxchg [rax], rbx
        (&[0xff, 0x30], vec![access(0, false)]),      // push [rax]
        (&[0x48, 0xa5], vec![access(0, true), access(0, false)]), // movsq
        (&[0x48, 0x8d, 0x18], vec![]),                // lea rbx, [rax]
        (&[0x48, 0x89, 0xd8], vec![]),                // mov rax, rbx
    ] {
        let next = CODE + code.len() as u64;
        let run = in_window(code, 0x40).run(&[&to(next)]);
        run.assert_followed();
        assert_eq!(run.seen, seen, "{code:x?}");
    }
}

#[test]
fn an_operand_over_two_pages_is_an_access_of_both() {
    let run = in_window(&STORE, 0xffc).run(&[&to(CODE + 3)]);
    run.assert_followed();
    assert_eq!(run.seen, [access(0, true), access(1, true)]);
}

#[test]
fn a_page_is_told_once_until_something_else_is_seen() {
    // mov rbx, [rax] twice, invlpg [rax], mov rbx, [rax]
    let code = [0x48, 0x8b, 0x18, 0x48, 0x8b, 0x18, 0x0f, 0x01, 0x38, 0x48, 0x8b, 0x18];
    let stops = [3, 6, 9, 12].map(|offset| to(CODE + offset));
    let acts: Vec<Act<'_>> = stops.iter().map(|stop| stop as Act<'_>).collect();
    let run = in_window(&code, 0).run(&acts);
    run.assert_followed();
    let page = Flush::Pages { va: window(0), count: 1, level: Level::Pt };
    assert_eq!(run.seen, [access(0, false), Sighting::Flush(page), access(0, false)]);
}

#[test]
fn of_a_string_only_the_pages_that_were_reached_count() {
    // rep stosq, rep lodsq
    for (code, write) in [([0xf3, 0x48, 0xab], true), ([0xf3, 0x48, 0xad], false)] {
        let mut bench = in_window(&code, 0);
        bench.registers.general[Registers::RCX] = 3 * 512;
        let part = |count: u64, rip: u64| {
            move |registers: &mut Registers, memory: &Memory| {
                registers.general[Registers::RCX] -= count;
                registers.general[Registers::RDI] += 8 * count;
                registers.general[Registers::RSI] += 8 * count;
                to(rip)(registers, memory)
            }
        };
        let run = bench.run(&[&part(513, CODE), &part(3 * 512 - 513, CODE + 3)]);
        run.assert_followed();
        assert_eq!(run.seen, [0, 1, 2].map(|page| access(page, write)), "{code:x?}");
    }
}

#[test]
fn of_a_string_that_ends_in_an_exception_what_was_reached_counts() {
    // rep lodsq
    let mut bench = in_window(&[0xf3, 0x48, 0xad], 0);
    bench.gate(1);
    bench.write(HANDLER, &[0x6a, 0x0e]); // push 14
    bench.registers.general[Registers::RCX] = 3 * 512;
    let run = bench.run(&[&|registers, memory| {
        registers.general[Registers::RCX] -= 512;
        registers.general[Registers::RSI] += 4096;
        deliver(&bench, registers, memory)
    }]);
    run.assert_followed();
    assert_eq!(run.seen, [access(0, false)]);
}

#[test]
fn a_table_look_up_is_followed() {
    let mut bench = Bench::new(&[0xd7]); // xlatb
    bench.registers.general[RBX] = window(0).0 + 0xf80;
    bench.registers.general[RAX] = 0x1280;
    let run = bench.run(&[&to(CODE + 1)]);
    run.assert_followed();
    assert_eq!(run.seen, [access(1, false)]);
}

#[test]
fn a_scan_and_a_comparison_only_read() {
    // repe cmpsb, repne scasb
    for code in [[0xf3, 0xa6], [0xf2, 0xae]] {
        let mut bench = in_window(&code, 0);
        bench.registers.general[Registers::RCX] = 8;
        let run = bench.run(&[&|registers, memory| {
            registers.general[Registers::RCX] -= 5;
            to(CODE + 2)(registers, memory)
        }]);
        run.assert_followed();
        assert_eq!(run.seen, [access(0, false)], "{code:x?}");
    }
}

#[test]
fn an_access_that_faults_is_none() {
    let bench = in_window(&STORE, 0);
    bench.gate(1);
    bench.write(HANDLER, &[0x6a, 0x0e]); // push 14
    let run = bench.run(&[&|registers, memory| deliver(&bench, registers, memory)]);
    run.assert_followed();
    assert!(run.seen.is_empty(), "{:?}", run.seen);
}

/// An exception of the instruction at [`CODE`].
fn deliver(bench: &Bench, registers: &mut Registers, memory: &Memory) -> Exit {
    let rsp = INTERRUPT_STACK.top(0).0 - 48;
    let (flags, old) = (registers.rflags, registers.general[Registers::RSP]);
    let words = [0, CODE, CODE_SELECTOR.into(), flags, old, STACK_SELECTOR.into()];
    for (index, word) in (0..).zip(words) {
        memory.store(bench.place(rsp + 8 * index), word).unwrap();
    }
    registers.general[Registers::RSP] = rsp;
    to(HANDLER)(registers, memory)
}
