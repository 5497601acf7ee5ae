//! Where a guest was: its frames by frame pointers, symbolised.

use crate::image::Image;
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::{CPU_PARTS, CPU_STRIDE, CpuPart, Layout, cpu_area};
use lacuna_abi::walk::{Tables, translate};

/// Most frames that are followed.
const MAX_FRAMES: usize = 32;

/// Return addresses from `rip` upwards, each with its function where it has one. The guest may
/// have broken its stack: the walk ends at the first frame that makes no sense.
#[must_use]
pub fn backtrace(
    image: &Image,
    tables: &impl Tables,
    inspect: &dyn Fn(Gpa, &mut [u8]) -> bool,
    root: Gpa,
    rip: u64,
    frame_pointer: u64,
) -> Vec<(u64, Option<String>)> {
    let word = |va: u64| {
        let mut bytes = [0; 8];
        let leaf = translate(tables, root, Gva(va)).ok()?;
        let fits = va % PAGE_SIZE <= PAGE_SIZE - 8;
        (fits && inspect(leaf.gpa_of(Gva(va)), &mut bytes)).then(|| u64::from_le_bytes(bytes))
    };
    let mut lines = vec![describe(image, rip, rip)];
    let mut frame = frame_pointer;
    while lines.len() < MAX_FRAMES && frame.is_multiple_of(8) {
        let (Some(next), Some(back)) = (word(frame), word(frame.wrapping_add(8))) else { break };
        // A call that never returns may be the last instruction of its function: the address before
        // the return address is the one that names it.
        let call = back.wrapping_sub(1);
        if image.function(call).is_none() {
            break;
        }
        lines.push(describe(image, back, call));
        if next <= frame {
            break;
        }
        frame = next;
    }
    lines
}

/// The address, with the function that holds `inside` and how far in the address is.
fn describe(image: &Image, address: u64, inside: u64) -> (u64, Option<String>) {
    let function = image.function(inside);
    let symbol = function.map(|(start, name)| format!("{name}+{:#x}", address.wrapping_sub(start)));
    (address, symbol)
}

/// What is special about an address that a guest faulted on: the guard below one of its stacks.
#[must_use]
pub fn place(layout: &Layout, va: Gva) -> Option<String> {
    let cpu = (0..layout.cpus)
        .find(|cpu| va.offset_from(cpu_area(*cpu)).is_some_and(|offset| offset < CPU_STRIDE))?;
    let above = CPU_PARTS.iter().find(|part| va < part.start(cpu));
    let inside = CPU_PARTS.iter().any(|part: &CpuPart| va >= part.start(cpu) && va < part.top(cpu));
    match above {
        Some(part) if !inside => {
            Some(format!("the guard page below CPU {cpu}'s {}: it overflowed", part.name))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::layout::{MAIN_STACK, Needs};
    use lacuna_abi::paging::Entry;

    #[test]
    fn a_stack_without_sense_ends_the_trace() {
        let image = Image::parse(crate::image::ORDINARY).unwrap();
        let nothing = |_: Gpa| -> Option<Entry> { None };
        let lines = backtrace(&image, &nothing, &|_, _| true, Gpa(0), image.entry.0, 0xdead_beef);
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].1.as_deref(), Some("lacuna_start+0x0"));
    }

    #[test]
    fn guards_are_told_from_stacks() {
        let needs = Needs { image: 1, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).unwrap();
        let guard = Gva(MAIN_STACK.start(1).0 - 8);
        assert!(place(&layout, guard).unwrap().contains("CPU 1's main stack"));
        assert_eq!(place(&layout, MAIN_STACK.start(1)), None);
        assert_eq!(place(&layout, Gva(0)), None);
    }
}
