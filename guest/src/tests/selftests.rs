//! The tests of the program `selftest`, on the test machine.

use crate::alloc::AllocConfig;
use crate::programs::{self, Team};
use crate::testing::Mock;
use lacuna_abi::workload::{Program, Selftest};

/// A CPU whose test panics is not waited for.
pub(super) struct Leave<'t>(pub(super) &'t Team);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.give_up();
        }
    }
}

fn run(test: Selftest) {
    let mock = Mock::new(16, test.cpus());
    mock.stop_recording();
    let allocator = mock.allocator_as(AllocConfig::PLAIN);
    let team = Team::new();
    std::thread::scope(|scope| {
        for cpu in 0..test.cpus() {
            let (mock, allocator, team) = (&mock, &allocator, &team);
            scope.spawn(move || {
                mock.on_cpu(cpu);
                let _leave = Leave(team);
                let args = [test as u64, 0, 0];
                programs::run(Program::Selftest, args, allocator, mock, mock, team).unwrap();
            });
        }
    });
}

/// One test for each of them, with the name that it has in the guest.
macro_rules! selftests {
    ($($module:ident { $($name:ident)* })*) => {
        $(mod $module {
            $(#[test]
            fn $name() {
                let name = concat!(stringify!($module), "::", stringify!($name));
                super::run(lacuna_abi::workload::Selftest::from_name(name).unwrap());
            })*
        })*

        #[test]
        fn none_is_left_out() {
            let here = [$($(concat!(stringify!($module), "::", stringify!($name))),*),*];
            assert!(Selftest::ALL.iter().map(|test| test.name()).eq(here));
        }
    };
}

selftests! {
    mermap { basic_alloc size multiple_allocs tlb_flushed }
    page_alloc { alloc_map_unmap pindex_helpers freetype_idx stress_interleaved }
    regression {
        series_01 series_02 series_03 series_04 series_05 series_06
        series_07 series_08 series_09 series_10 series_11 series_12
    }
}
