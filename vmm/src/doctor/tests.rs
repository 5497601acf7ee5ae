use super::*;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// A host made of files, and of what KVM answers.
struct Made {
    files: BTreeMap<&'static str, &'static str>,
    kvm: fn() -> Result<KvmFacts, HostError>,
}

impl Host for Made {
    fn read(&self, path: &str) -> Option<String> {
        self.files.get(path).map(|text| (*text).to_owned())
    }

    fn exists(&self, path: &str) -> bool {
        self.files.keys().any(|file| file.starts_with(path))
    }

    fn kvm(&self) -> Result<KvmFacts, HostError> {
        (self.kvm)()
    }
}

fn all_there() -> KvmFacts {
    KvmFacts { api_version: 12, values: CAPABILITIES.iter().map(|c| c.minimum).collect() }
}

fn facts_without(name: &str) -> KvmFacts {
    let mut facts = all_there();
    let index = CAPABILITIES.iter().position(|capability| capability.name == name).unwrap();
    facts.values[index] = CAPABILITIES[index].minimum - 1;
    facts
}

fn good() -> Made {
    let files = BTreeMap::from([
        ("/sys/module/kvm_intel/parameters/ept", "Y\n"),
        ("/proc/sys/kernel/osrelease", "6.18.44-generic\n"),
        (
            "/proc/cpuinfo",
            "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 151\nmodel name\t: Xeon\nflags\t\t: fpu vmx ept\n",
        ),
        ("/proc/sys/vm/max_map_count", "65530\n"),
        ("/proc/meminfo", "MemTotal:       24684092 kB\nMemAvailable:   24453080 kB\n"),
    ]);
    Made { files, kvm: || Ok(all_there()) }
}

fn opening(number: i32) -> HostError {
    HostError::opening(Path::new(DEVICE), io::Error::from_raw_os_error(number))
}

#[test]
fn a_good_host_can_run_guests() {
    let doctor = Doctor::inspect(&good());
    assert!(doctor.can_run);
    assert_eq!((&*doctor.problems, &*doctor.notes), (&[][..], &[][..]));
    assert!(doctor.capabilities.iter().all(|capability| capability.present));
    let host = HostFacts {
        kernel: Some("6.18.44-generic".into()),
        guards_by_version: Some(true),
        cpu_vendor: Some("GenuineIntel".into()),
        cpu_model: Some("Xeon".into()),
        profile: Profile::IntelInvlpgErratum,
        cpu_flags: vec!["vmx".into(), "ept".into()],
        max_map_count: Some(65_530),
        memory_mib: Some(24_105),
        available_mib: Some(23_879),
    };
    assert_eq!(doctor.host, host);
    let text = doctor.to_text();
    assert!(text.starts_with("OK: lacuna run can work here\n"), "{text}");
    let kernel =
        "6.18.44-generic, guards for shared mappings by its version (checked for real when";
    assert!(text.contains(kernel), "{text}");
    assert!(text.contains("invalidation profile intel-invlpg-erratum"), "{text}");
    assert!(doctor.to_json().unwrap().contains("\"profile\": \"intel-invlpg-erratum\""));
}

#[test]
fn a_host_without_kvm_is_told_the_remedy() {
    let host = Made { kvm: || Err(opening(libc::EACCES)), ..good() };
    let doctor = Doctor::inspect(&host);
    assert!(!doctor.can_run);
    assert_eq!(doctor.api_version, None);
    assert_eq!(doctor.problems[0].what, "/dev/kvm may not be opened by this user");
    assert!(doctor.problems[0].remedy.contains("sudo usermod -aG kvm $USER"));
    let text = doctor.to_text();
    assert!(text.starts_with("NOT OK: "), "{text}");
    assert!(text.contains("remedy: run sudo usermod -aG kvm $USER"), "{text}");
}

#[test]
fn each_error_of_opening_has_its_own_remedy() {
    for (number, parts) in [
        (libc::ENOENT, &["does not exist", "modprobe kvm_intel", "nested virtualisation"][..]),
        (libc::ENOTDIR, &["does not exist"]),
        (libc::EACCES, &["may not be opened", "usermod -aG kvm $USER"]),
        (libc::EPERM, &["may not be opened", "usermod -aG kvm $USER"]),
        (libc::ENODEV, &["no KVM behind it", "VT-x or SVM in the firmware"]),
        (libc::ENXIO, &["no KVM behind it", "modprobe kvm_intel"]),
        (libc::EBUSY, &["is busy", "stop the other hypervisor"]),
        (libc::EMFILE, &["cannot be opened", "10:232"]),
    ] {
        let message = opening(number).to_string();
        for part in parts {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
}

#[test]
fn every_required_capability_that_is_missing_is_a_problem_and_others_are_notes() {
    for capability in CAPABILITIES {
        let mut doctor = Doctor::inspect(&good());
        assert!(doctor.can_run);
        doctor.capabilities.clear();
        doctor.add_kvm(&facts_without(capability.name));
        let missing: Vec<_> =
            doctor.capabilities.iter().filter(|c| !c.present).map(|c| c.name).collect();
        assert_eq!(missing, [capability.name]);
        let problem = doctor.problems.iter().any(|p| p.what.contains(capability.name));
        assert_eq!(problem, capability.required, "{}", capability.name);
        let note = doctor.notes.iter().any(|note| note.contains(capability.name));
        assert_eq!(note, !capability.required, "{}", capability.name);
    }
    let host = Made { kvm: || Ok(facts_without("KVM_CAP_IMMEDIATE_EXIT")), ..good() };
    let doctor = Doctor::inspect(&host);
    assert!(!doctor.can_run);
    assert!(doctor.to_text().contains("MISSING  KVM_CAP_IMMEDIATE_EXIT"), "{}", doctor.to_text());
}

#[test]
fn the_flavour_follows_from_modules_and_their_parameters() {
    let detect = |files: &[(&'static str, &'static str)]| {
        Flavour::detect(&Made { files: files.iter().copied().collect(), ..good() })
    };
    for (path, value, module, translation) in [
        ("/sys/module/kvm_intel/parameters/ept", "Y\n", Some("kvm_intel"), Translation::Ept),
        ("/sys/module/kvm_intel/parameters/ept", "N\n", Some("kvm_intel"), Translation::Shadow),
        ("/sys/module/kvm_amd/parameters/npt", "1\n", Some("kvm_amd"), Translation::Npt),
        ("/sys/module/kvm_amd/parameters/npt", "0\n", Some("kvm_amd"), Translation::Shadow),
        ("/sys/module/kvm_amd/parameters/sev", "0\n", Some("kvm_amd"), Translation::Unknown),
        ("/sys/module/kvm_pvm/parameters/force", "N\n", Some("kvm_pvm"), Translation::Shadow),
        ("/sys/module/kvm/parameters/tdp_mmu", "N\n", None, Translation::Unknown),
    ] {
        let flavour = detect(&[(path, value)]);
        assert_eq!(flavour.module.as_deref(), module, "{path} {value}");
        assert_eq!(flavour.translation, translation, "{path} {value}");
        assert!(flavour.evidence.starts_with("/sys/module"), "{}", flavour.evidence);
    }
}

#[test]
fn limits_that_matter_are_notes_and_no_problems() {
    let mut host = good();
    host.files.insert("/proc/sys/kernel/osrelease", "6.14.0-rc1");
    host.files.insert("/proc/sys/vm/max_map_count", "1000");
    host.files.insert("/proc/meminfo", "MemAvailable: 65536 kB");
    let doctor = Doctor::inspect(&host);
    assert!(doctor.can_run);
    for part in ["no guards for shared mappings", "vm.max_map_count is 1000", "only 64 MiB"] {
        assert!(doctor.notes.iter().any(|note| note.contains(part)), "{part}");
    }
}

#[test]
fn a_host_that_tells_nothing_is_no_error() {
    let host = Made { files: BTreeMap::new(), ..good() };
    let doctor = Doctor::inspect(&host);
    assert!(doctor.can_run);
    assert_eq!(doctor.host, HostFacts::default());
    assert!(doctor.to_text().contains("unknown"));
}

#[test]
fn releases_are_compared_by_number() {
    assert_eq!(release("6.15"), Some((6, 15)));
    assert!(release("6.9.1") < Some(GUARD_RELEASE) && release("10.0") > Some(GUARD_RELEASE));
    assert_eq!(release("next"), None);
}

#[test]
fn a_file_that_is_not_kvm_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kvm");
    assert!(matches!(kvm::open_at(&file), Err(HostError::NoDevice(_))));
    std::fs::write(&file, "").unwrap();
    assert!(matches!(kvm::open_at(&file), Err(HostError::ApiVersion { found: -1, .. })));
}

#[test]
fn the_json_form_has_its_fields() {
    let json = serde_json::to_value(Doctor::inspect(&good())).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["can_run"], true);
    assert_eq!(json["flavour"]["translation"], "EPT");
    assert_eq!(json["api_version"], 12);
    assert_eq!(json["capabilities"][0]["name"], "KVM_CAP_USER_MEMORY");
    assert_eq!(json["capabilities"][0]["present"], true);
    assert_eq!(json["host"]["max_map_count"], 65_530);
}

#[test]
fn text_fits_its_width() {
    let host = Made { kvm: || Err(opening(libc::ENOENT)), ..good() };
    for doctor in [Doctor::inspect(&host), Doctor::inspect(&good()), Doctor::inspect(&ThisHost)] {
        for line in doctor.to_text().lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }
}
