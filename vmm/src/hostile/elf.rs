//! Guest images made by hand: one segment of code.

use lacuna_abi::ABI_VERSION;
use lacuna_abi::layout::IMAGE;

const PAGE: usize = 4096;
/// Names of the sections.
const NAMES: &[u8] = b"\0.lacuna.abi\0.shstrtab\0";
const HEADER: usize = 64;
const SECTION: usize = 64;

/// A static ELF file with this code at the start of the image region, where it begins
/// (ELF-64 Object File Format, version 1.5).
#[must_use]
pub fn elf(code: &[u8]) -> Vec<u8> {
    let abi = PAGE + code.len().next_multiple_of(8);
    let names = abi + 8;
    let sections = (names + NAMES.len()).next_multiple_of(8);
    let mut file = vec![0; sections + 3 * SECTION];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    half(&mut file, 16, 2); // ET_EXEC
    half(&mut file, 18, 62); // EM_X86_64
    half(&mut file, 20, 1);
    word(&mut file, 24, IMAGE.0);
    word(&mut file, 32, HEADER as u64);
    word(&mut file, 40, sections as u64);
    for (at, value) in [(52, 64), (54, 56), (56, 1), (58, 64), (60, 3), (62, 2)] {
        half(&mut file, at, value);
    }
    // One segment: PT_LOAD, read and execute.
    half(&mut file, HEADER, 1);
    half(&mut file, HEADER + 4, 5);
    let len = code.len().max(1) as u64;
    for (at, value) in
        [(8, PAGE as u64), (16, IMAGE.0), (24, IMAGE.0), (32, len), (40, len), (48, 4096)]
    {
        word(&mut file, HEADER + at, value);
    }
    put(&mut file, PAGE, code);
    word(&mut file, abi, ABI_VERSION);
    put(&mut file, names, NAMES);
    // Name, type, place and bytes of the two sections behind the empty one.
    for (index, name, kind, place, bytes) in [(1, 1, 1, abi, 8), (2, 13, 3, names, NAMES.len())] {
        let at = sections + index * SECTION;
        half(&mut file, at, name);
        half(&mut file, at + 4, kind);
        word(&mut file, at + 24, place as u64);
        word(&mut file, at + 32, bytes as u64);
        word(&mut file, at + 48, 1);
    }
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn half(file: &mut [u8], at: usize, value: u16) {
    put(file, at, &value.to_le_bytes());
}

fn word(file: &mut [u8], at: usize, value: u64) {
    put(file, at, &value.to_le_bytes());
}
