//! Instructions that do more than their operands say, and what an exception leaves.

use super::*;

/// bts [rax], rcx
const SET_BIT: [u8; 4] = [0x48, 0x0f, 0xab, 0x08];

#[test]
fn a_bit_offset_in_a_register_leads_away_from_the_address() {
    for (offset, words) in [(3_i64, 0_i64), (64 * 5 + 3, 5), (3 - 64 * 2, -2)] {
        let mut bench = Bench::new(&SET_BIT);
        let va = bench.free() + 0x100;
        bench.registers.general[RAX] = va;
        bench.registers.general[Registers::RCX] = offset.cast_unsigned();
        let at = bench.place(va.wrapping_add_signed(8 * words));
        let run = bench.run(&[&|registers, memory| {
            memory.store(at, 8).unwrap();
            to(CODE + 4)(registers, memory)
        }]);
        run.assert_followed();
        assert_eq!(run.seen, [stores(at, 0, 8)], "bit {offset}");
    }
}

#[test]
fn what_is_not_followed_is_lost() {
    for code in [
        &[0x0f, 0x01, 0xfc][..],   // clzero
        &[0x0f, 0x05],             // syscall
        &[0xcc],                   // int3
        &[0xcd, 0x80],             // int 0x80
        &[0x67, 0xf3, 0x48, 0xab], // rep stosq with 32-bit addresses
    ] {
        let next = CODE + code.len() as u64;
        Bench::new(code).run(&[&to(next)]).assert_lost("not followed");
    }
}

#[test]
fn a_word_counts_once_any_byte_of_it_is_stored() {
    // rep stosb, downwards, broken off in the middle of a word.
    let mut bench = Bench::new(&[0xf3, 0xaa]);
    let va = bench.free() + 0x40;
    bench.registers.rflags |= RFLAGS_DF;
    bench.registers.general[Registers::RDI] = va + 7;
    bench.registers.general[Registers::RCX] = 16;
    let at = bench.place(va);
    let run = bench.run(&[&|registers, memory| {
        memory.store(at, 0x1111_1100_0000_0000).unwrap();
        registers.general[Registers::RCX] -= 3;
        registers.general[Registers::RDI] -= 3;
        to(CODE)(registers, memory)
    }]);
    run.assert_followed();
    assert_eq!(run.seen, [stores(at, 0, 0x1111_1100_0000_0000)]);
}

/// The delivery of an exception with this stack, from the instruction at [`CODE`].
fn delivered(bench: &Bench, stack: u64) -> impl Fn(&mut Registers, &Memory) -> Exit {
    let places: Vec<_> = (0..5).map(|word| bench.place(stack - 40 + 8 * word)).collect();
    move |registers, memory| {
        let rsp = registers.general[Registers::RSP];
        let words = [CODE, CODE_SELECTOR.into(), registers.rflags, rsp, STACK_SELECTOR.into()];
        for (at, word) in places.iter().zip(words) {
            memory.store(*at, word).unwrap();
        }
        registers.general[Registers::RSP] = stack - 40;
        to(HANDLER)(registers, memory)
    }
}

#[test]
fn what_was_stored_before_an_exception_is_seen() {
    // rep stosq
    let mut bench = Bench::new(&[0xf3, 0x48, 0xab]);
    bench.gate(1);
    let va = bench.free();
    bench.registers.general[Registers::RDI] = va;
    bench.registers.general[Registers::RCX] = 100;
    let at = bench.place(va);
    let deliver = delivered(&bench, INTERRUPT_STACK.top(0).0);
    let run = bench.run(&[&|registers, memory| {
        memory.store(at, 7).unwrap();
        registers.general[Registers::RCX] -= 1;
        registers.general[Registers::RDI] += 8;
        deliver(registers, memory)
    }]);
    run.assert_followed();
    assert_eq!(run.seen, [stores(at, 0, 7)]);
}

#[test]
fn a_frame_of_an_exception_in_a_page_table_is_lost() {
    // mov rax, [rax]
    let bench = Bench::new(&[0x48, 0x8b, 0x00]);
    bench.gate(1);
    let stack = bench.free() + 0x100;
    bench.run(&[&delivered(&bench, stack)]).assert_lost("lies in a page table");
    bench.run(&[&delivered(&bench, INTERRUPT_STACK.top(0).0)]).assert_followed();
}

#[test]
fn what_uses_gs_behind_a_swapgs_is_lost() {
    // swapgs; mov gs:[0], rax
    let bench = Bench::new(&[0x0f, 0x01, 0xf8, 0x65, 0x48, 0x89, 0x04, 0x25, 0, 0, 0, 0]);
    bench.run(&[&to(CODE + 12)]).assert_lost("uses the GS");
    // swapgs; nop
    Bench::new(&[0x0f, 0x01, 0xf8, 0x90]).run(&[&to(CODE + 4)]).assert_followed();
}

/// Where the processor runs a handler without a stop, the next thing that is seen of it is its call.
#[test]
fn a_vcpu_that_is_lost_at_a_call_says_which() {
    let call = Exit::PortOut { port: lacuna_abi::gate::GATE_PORT, value: 9, len: 4 };
    // mov rax, [rax]
    let run = Bench::new(&[0x48, 0x8b, 0x00]).run(&[&move |registers, memory| {
        to(HANDLER + 0x20)(registers, memory);
        call
    }]);
    run.assert_lost("where it cannot lead");
    assert_eq!(run.stepper.lost().and_then(|lost| lost.call), Some(call));
    let run = Bench::new(&[0x90]).run(&[&to(CODE + 9)]);
    run.assert_lost("where it cannot lead");
    assert_eq!(run.stepper.lost().and_then(|lost| lost.call), None);
}
