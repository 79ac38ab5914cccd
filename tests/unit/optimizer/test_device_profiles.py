"""The shipped profiles, and those of users."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_contract.errors import InputRejected, Reason
from edge_contract.profile import KERNEL_GROUPS, Facts, check_fit
from optimizer import profile as profiles
from tests.unit.edge_contract.samples import FACTS, MANIFEST

ROOT = Path(__file__).parents[3]
EXPECTED = {
    "generic-arm64",
    "generic-x86-64",
    "raspberry-pi-3-32bit",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "x86-64-vnni",
}
# `Features` and `flags` of /proc/cpuinfo on such machines, in the kernel's spelling, plus neon.
PI_5 = ["neon", "fp", "asimd", "aes", "crc32", "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp"]
PI_4 = ["neon", "fp", "asimd", "evtstrm", "crc32", "cpuid"]
SAPPHIRE_RAPIDS = ["avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8"]


def machine(architecture: str, isa: list[str]) -> Facts:
    return replace(FACTS, architecture=architecture, isa=isa, memory_bytes=1 << 34)


def test_the_promised_ones_are_there() -> None:
    assert set(profiles.names()) >= EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_is_valid_and_called_as_its_file(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name
    known = frozenset().union(*KERNEL_GROUPS)
    assert set(profile.isa) <= known, "list what kernels need, in the kernel's spelling"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_figures_have_sources_and_the_readme_knows_every_key(name: str) -> None:
    text = (ROOT / "device_profiles" / f"{name}.toml").read_text()
    assert "https://" in text
    readme = (ROOT / "device_profiles" / "README.md").read_text()
    for key, value in tomllib.loads(text).items():
        keys = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        assert all(f"`{k}`" in readme for k in keys)


def test_a_bundle_fits_every_device_that_has_more() -> None:
    def fits(profile: str, facts: Facts) -> None:
        check_fit(replace(MANIFEST, needs=profiles.load(profile).needs(1)), facts)

    pi_4, pi_5 = machine("aarch64", PI_4), machine("aarch64", PI_5)
    for profile in ("generic-arm64", "raspberry-pi-4"):
        fits(profile, pi_4)
        fits(profile, pi_5)
    fits("raspberry-pi-5", pi_5)
    fits("x86-64-vnni", machine("x86_64", SAPPHIRE_RAPIDS))
    with pytest.raises(Exception, match="asimddp"):
        fits("raspberry-pi-5", pi_4)


def test_an_unknown_name_gets_the_closest_known_one() -> None:
    with pytest.raises(InputRejected) as caught:
        profiles.load("raspbery-pi-4")
    assert caught.value.reason is Reason.UNKNOWN_PROFILE
    assert "'raspbery-pi-4'" in caught.value.what
    assert caught.value.next_step.startswith("did you mean raspberry-pi-4?")
    assert all(name in caught.value.next_step for name in EXPECTED)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"budget": "latency_p50_ms = 3.0"}, "unknown field `latency_p50_ms` at $.budget"),
        ({"top": "colour = 'red'"}, "unknown field `colour` at $"),
        ({"budget": "size_bytes = 'big'"}, "Expected `int | null`, got `str` at $.budget.size_bytes"),
        ({"budget": "latency_p95_ms = -1.0"}, "at $.budget.latency_p95_ms"),
        ({"quantization": "weights = 'int4'"}, "'int4' at $.quantization.weights"),
        ({"quantization": "prefer = ['fp32']"}, "not TOML"),
        ({"budget": "size_bytes = "}, "not TOML"),
    ],
)
def test_a_bad_profile_is_refused_with_the_path(
    fields: dict[str, str], problem: str, profile: Callable[..., str]
) -> None:
    path = profile(**fields)
    with pytest.raises(InputRejected) as caught:
        profiles.load(path)
    assert caught.value.reason is Reason.BAD_CONFIG
    assert path in caught.value.what
    assert problem in caught.value.what


@pytest.mark.parametrize(
    ("prefer", "problem"),
    [('"fp32", "fp32"', "named twice"), ('"fp16"', "fp16 is preferred although fp16 = false")],
)
def test_contradictions_are_refused(prefer: str, problem: str, profile: Callable[..., str]) -> None:
    text = Path(profile()).read_text().replace('"static_int8", "fp32"', prefer)
    with pytest.raises(InputRejected, match=problem):
        profiles.decode(text.encode(), "mine")


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(InputRejected, match="not TOML"):
        profiles.decode(b"\xff\xfe", "mine")


def test_the_digest_is_of_what_it_says_not_how(profile: Callable[..., str]) -> None:
    text = Path(profile()).read_text()
    commented = f"# a comment\n{text}".encode()
    other = text.replace("1_000_000_000", "2_000_000_000").encode()
    digest = profiles.digest(profiles.decode(text.encode(), "a"))
    assert digest == profiles.digest(profiles.decode(commented, "b"))
    assert digest != profiles.digest(profiles.decode(other, "c"))


def test_they_are_found_inside_an_archive_too(tmp_path: Path) -> None:
    """Installed from a wheel they are package data; found by the import system, not by a path."""
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for package in ("optimizer", "edge_contract", "device_profiles"):
            for file in (ROOT / package).rglob("*"):
                if file.suffix in (".py", ".toml"):
                    target.write(file, file.relative_to(ROOT))
    code = "from optimizer import profile; print(profile.load('raspberry-pi-4').name, profile.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("raspberry-pi-4 ")
    assert str(archive) in done.stdout
