//! The tests of the program `selftest`, on the test machine.

use crate::alloc::AllocConfig;
use crate::programs::{self, Team};
use crate::testing::Mock;
use lacuna_abi::workload::{Program, Selftest};

#[test]
fn every_selftest_passes() {
    for (number, test) in (0..).zip(Selftest::ALL) {
        let mock = Mock::new(16, test.cpus());
        mock.stop_recording();
        let allocator = mock.allocator_as(AllocConfig::PLAIN);
        let team = Team::new();
        std::thread::scope(|scope| {
            for cpu in 0..test.cpus() {
                let (mock, allocator, team) = (&mock, &allocator, &team);
                scope.spawn(move || {
                    mock.on_cpu(cpu);
                    let args = [number, 0, 0];
                    programs::run(Program::Selftest, args, allocator, mock, mock, team).unwrap();
                });
            }
        });
    }
}
