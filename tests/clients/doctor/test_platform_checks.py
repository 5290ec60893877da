from dataclasses import replace

import pytest

from clients.doctor.platform_checks import (
    Machine,
    cgroup_finding,
    machine_finding,
    python_finding,
    this_machine,
)

PI = Machine(
    "Linux", "aarch64", 64, ("glibc", "2.36"), "Raspberry Pi 4 Model B, Debian GNU/Linux 12"
)


def test_a_64_bit_pi_is_well():
    found = machine_finding(PI)
    assert (found.state, found.remedy) == ("ok", "")
    assert found.fact == (
        "aarch64 kernel, 64-bit Python, Raspberry Pi 4 Model B, Debian GNU/Linux 12"
    )


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"kernel": "armv7l", "bits": 32}, "flash the 64-bit image of Raspberry Pi OS"),
        ({"bits": 32}, "a 64-bit kernel alone does not do; flash the 64-bit image"),
        ({"kernel": "riscv64"}, "PyTorch has no wheels for it; use one of aarch64, arm64, x86_64"),
        ({"libc": ("glibc", "2.24")}, "PyTorch's wheels need glibc 2.28 or later"),
        ({"libc": ("", "")}, "PyTorch's wheels need glibc 2.28 or later"),
    ],
)
def test_a_machine_without_packages_is_a_problem(changes, remedy):
    found = machine_finding(replace(PI, **changes))
    assert found.state == "problem"
    assert found.remedy.startswith(remedy)


def test_a_mac_has_no_glibc_and_is_well():
    mac = Machine("Darwin", "arm64", 64, ("", ""), "Darwin")
    assert machine_finding(mac).state == "ok"


def test_the_machine_has_the_name_that_its_device_tree_and_system_give(tmp_path):
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    write(tmp_path, "etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')
    name = this_machine(tmp_path).name
    assert name == "Raspberry Pi 5 Model B Rev 1.0, Debian GNU/Linux 13 (trixie)"


@pytest.mark.parametrize(
    ("version", "in_venv", "has_ensurepip", "state", "remedy"),
    [
        ((3, 11, 2), False, True, "ok", ""),
        ((3, 13, 5), True, False, "ok", ""),
        ((3, 9, 2), False, True, "problem", "needs 3.11 or later; Raspberry Pi OS bookworm has it"),
        ((3, 15, 0), True, True, "problem", "constraints-pi.txt's PyTorch has no wheel for it"),
        ((3, 14, 0), True, True, "warning", "prefer 3.13"),
        ((3, 11, 2), False, False, "warning", "sudo apt install python3-venv"),
    ],
)
def test_python_has_to_have_packages(version, in_venv, has_ensurepip, state, remedy):
    found = python_finding(version, prefix="/usr", in_venv=in_venv, has_ensurepip=has_ensurepip)
    assert found.state == state
    assert found.remedy.startswith(remedy)
    assert found.fact.startswith(f"{'.'.join(map(str, version))} in /usr")


V1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t5\t1\nmemory\t0\t90\t{}\n"


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n", "ok"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n", "warning"),
        ("proc/cgroups", V1.format(1), "ok"),
        ("proc/cgroups", V1.format(0), "warning"),
        ("proc/version", "Darwin", "unknown"),
    ],
)
def test_the_memory_cgroup_is_seen_in_both_versions(tmp_path, file, content, state):
    write(tmp_path, file, content)
    assert cgroup_finding(tmp_path).state == state


def test_version_2_decides_where_both_are_told_of(tmp_path):
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpu memory")
    write(tmp_path, "proc/cgroups", V1.format(0))
    assert cgroup_finding(tmp_path).state == "ok"


@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("boot/firmware/cmdline.txt", "to the one line of /boot/firmware/cmdline.txt"),
        ("boot/cmdline.txt", "to the one line of /boot/cmdline.txt"),
        ("boot/grub.cfg", "to the kernel's command line"),
    ],
)
def test_the_line_that_turns_it_on_is_named_with_its_file(tmp_path, file, where):
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpu")
    write(tmp_path, file, "console=tty1 root=PARTUUID=1")
    found = cgroup_finding(tmp_path)
    assert found.remedy == f"add cgroup_enable=memory cgroup_memory=1 {where} and reboot"
    assert found.fact == "cgroup v2 with cpu: MemoryMax= of a service has no effect"


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
