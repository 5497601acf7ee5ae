//! The guest image holds only instructions that every KVM can run in ring 0.
//!
//! Where ring 0 is interpreted, KVM's emulator knows few SIMD instructions and leaves out some
//! others; an image that contains one would fail there and nowhere else.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use lacuna::image::{Image, ORDINARY, WITH_FAULTS};
use lacuna_abi::fault::{Fault, Slip};

/// Instructions beyond the feature sets below that KVM's emulator lacks.
const FORBIDDEN: [Mnemonic; 12] = [
    Mnemonic::Int,
    Mnemonic::Int1,
    Mnemonic::Int3,
    Mnemonic::Into,
    Mnemonic::Popcnt,
    Mnemonic::Rdtscp,
    Mnemonic::Rdpid,
    Mnemonic::Cmpxchg16b,
    Mnemonic::Xgetbv,
    Mnemonic::Syscall,
    Mnemonic::Fxsave,
    Mnemonic::Fxrstor,
];

/// Fences that count as SSE2 but use none of its registers; KVM's emulator has both. The image needs
/// them before it sends an interrupt.
const ALLOWED: [Mnemonic; 2] = [Mnemonic::Mfence, Mnemonic::Lfence];

/// The interrupt command register (SDM volume 3, "x2APIC Register Address Space").
const X2APIC_COMMAND: u64 = 0x830;

/// Whether an instruction must not occur: x87, MMX, SSE, AVX and what builds on them, and the list.
fn is_forbidden(instruction: &Instruction) -> bool {
    let simd = |feature: &CpuidFeature| {
        let name = format!("{feature:?}");
        ["FPU", "MMX", "SSE", "AVX", "AES", "SHA", "PCLMUL", "VPCLMUL", "GFNI", "D3NOW", "XSAVE"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    if ALLOWED.contains(&instruction.mnemonic()) {
        return false;
    }
    instruction.is_invalid()
        || FORBIDDEN.contains(&instruction.mnemonic())
        || instruction.cpuid_features().iter().any(simd)
}

/// Whether a function may hold the instruction: INVPCID, which KVM's emulator lacks too, stands in a
/// function of its own, which is called where CPUID offers it.
fn is_out_of_place(instruction: &Instruction, function: &str) -> bool {
    instruction.mnemonic() == Mnemonic::Invpcid && function != "lacuna_guest_image::cpu::invpcid"
}

fn decode(code: &[u8], start: u64) -> Vec<Instruction> {
    Decoder::with_ip(64, code, start, DecoderOptions::NONE).into_iter().collect()
}

fn check(file: &[u8]) {
    let image = Image::parse(file).unwrap();
    let (mut functions, mut instructions) = (0, 0);
    for (start, code, name) in image.functions() {
        functions += 1;
        for instruction in decode(code, start) {
            instructions += 1;
            assert!(
                !is_forbidden(&instruction) && !is_out_of_place(&instruction, name),
                "{name} holds `{instruction}` at {:#x}",
                instruction.ip()
            );
        }
    }
    // An image without symbols would pass unseen.
    assert!(functions > 20 && instructions > 2000, "{functions} functions, {instructions}");
}

#[test]
fn the_ordinary_image_holds_no_forbidden_instruction() {
    check(ORDINARY);
}

#[test]
fn the_image_with_faults_holds_no_forbidden_instruction() {
    check(WITH_FAULTS);
}

/// For each write of the interrupt command in a function, whether both fences stand before it.
fn interrupts_sent(function: &[Instruction]) -> Vec<bool> {
    let mut sent = Vec::new();
    let mut register = None;
    for (place, instruction) in function.iter().enumerate() {
        match instruction.mnemonic() {
            Mnemonic::Mov if instruction.op0_register() == Register::ECX => {
                let immediate = instruction.op1_kind() == OpKind::Immediate32;
                register = immediate.then(|| instruction.immediate32().into());
            }
            Mnemonic::Wrmsr if register == Some(X2APIC_COMMAND) => {
                let before = function[..place].iter().rev().take(2).map(Instruction::mnemonic);
                sent.push(before.eq([Mnemonic::Lfence, Mnemonic::Mfence]));
            }
            _ => {}
        }
    }
    sent
}

#[test]
fn interrupts_are_sent_after_what_was_stored_before_can_be_seen() {
    for file in [ORDINARY, WITH_FAULTS] {
        let image = Image::parse(file).unwrap();
        let all: Vec<_> = image
            .functions()
            .flat_map(|(at, code, _)| interrupts_sent(&decode(code, at)))
            .collect();
        assert!(!all.is_empty() && all.iter().all(|fenced| *fenced), "{all:?}");
    }
}

#[test]
fn twin_an_interrupt_that_is_sent_without_fences_is_seen() {
    // mov ecx, 0x830; [mfence; [lfence;]] wrmsr
    let code = |fences: &[u8]| [&[0xb9, 0x30, 0x08, 0, 0], fences, &[0x0f, 0x30]].concat();
    let (mfence, lfence) = ([0x0f, 0xae, 0xf0], [0x0f, 0xae, 0xe8]);
    assert_eq!(interrupts_sent(&decode(&code(&[]), 0)), [false]);
    assert_eq!(interrupts_sent(&decode(&code(&mfence), 0)), [false]);
    assert_eq!(interrupts_sent(&decode(&code(&[mfence, lfence].concat()), 0)), [true]);
}

#[test]
fn forbidden_instructions_are_recognised() {
    let forbidden: [(&str, &[u8]); 12] = [
        ("pxor xmm0, xmm0", &[0x66, 0x0f, 0xef, 0xc0]),
        ("xorps xmm0, xmm0", &[0x0f, 0x57, 0xc0]),
        ("movups xmm0, [rax]", &[0x0f, 0x10, 0x00]),
        ("fld1", &[0xd9, 0xe8]),
        ("emms", &[0x0f, 0x77]),
        ("pand mm0, mm1", &[0x0f, 0xdb, 0xc1]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77]),
        ("int3", &[0xcc]),
        ("int 0x80", &[0xcd, 0x80]),
        ("popcnt eax, eax", &[0xf3, 0x0f, 0xb8, 0xc0]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("cmpxchg16b [rax]", &[0x48, 0x0f, 0xc7, 0x08]),
    ];
    for (name, code) in forbidden {
        let decoded = decode(code, 0);
        assert!(decoded.iter().any(is_forbidden), "{name} passed as {decoded:?}");
    }
}

#[test]
fn invpcid_is_recognised_outside_its_function() {
    let invpcid = decode(&[0x66, 0x0f, 0x38, 0x82, 0x08], 0)[0];
    assert!(is_out_of_place(&invpcid, "lacuna_guest_image::cpu::flush_everything"));
    assert!(!is_out_of_place(&invpcid, "lacuna_guest_image::cpu::invpcid"));
}

#[test]
fn ordinary_instructions_are_not_forbidden() {
    let ordinary: [&[u8]; 5] = [
        &[0x48, 0x89, 0xc8],             // mov rax, rcx
        &[0xf3, 0x48, 0xab],             // rep stosq
        &[0xf0, 0x48, 0x0f, 0xc1, 0x08], // lock xadd [rax], rcx
        &[0x0f, 0x01, 0x38],             // invlpg [rax]
        &[0x0f, 0x0b],                   // ud2
    ];
    for code in ordinary {
        assert!(!decode(code, 0).iter().any(is_forbidden), "{code:x?}");
    }
}

/// Functions by which the code asks whether a slip is planted, and calls of them. They are never
/// inlined (`guest/src/image/machine.rs`), so that no question goes unseen.
fn questions(file: &[u8]) -> (usize, usize) {
    let image = Image::parse(file).unwrap();
    let asks = |name: &str| name.contains("Platform") && name.contains("planted");
    let slips = |name: &str| name.contains("Platform") && name.contains("slips");
    let functions: Vec<_> = image.functions().collect();
    let starts: Vec<u64> =
        functions.iter().filter(|f| asks(f.2) || slips(f.2)).map(|f| f.0).collect();
    let code = functions.iter().flat_map(|(start, code, _)| decode(code, *start));
    let calls = code.filter(|i| i.is_call_near() && starts.contains(&i.near_branch_target()));
    (starts.len(), calls.count())
}

#[test]
fn the_ordinary_image_never_asks_for_faults() {
    assert_eq!(questions(ORDINARY), (0, 0));
}

#[test]
fn twin_the_image_with_faults_asks_for_each_of_them() {
    let (functions, calls) = questions(WITH_FAULTS);
    assert_eq!(functions, 2, "one asks for faults, one for slips");
    let all = Fault::ALL.len() + Slip::ALL.len();
    assert!(calls >= all, "{calls} questions for {all} faults and slips");
}

#[test]
fn the_ordinary_image_is_smaller_by_the_code_of_the_faults() {
    let size = |file: &[u8]| {
        let image = Image::parse(file).unwrap();
        image.segments.iter().map(|segment| segment.bytes.len()).sum::<usize>()
    };
    assert!(size(ORDINARY) < size(WITH_FAULTS), "the code of the faults takes room");
}
