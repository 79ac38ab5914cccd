"""The choice: figures in, a candidate or a refusal out, each with its reason."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from edge_contract.bench import Measured
from edge_contract.errors import Reason
from edge_contract.profile import Budget, Facts, Profile, Quantization, RecipeName
from optimizer import choose
from optimizer.choose import Accuracy, Broken, Candidate, Choice, Refusal, Rules, Scored
from tests.unit.edge_contract.samples import FACTS, PROFILE

X86 = replace(FACTS, architecture="x86_64", isa=["avx2"], cores=4)
DEVICE = replace(
    PROFILE,
    name="device",
    architecture="x86_64",
    isa=["avx2"],
    budget=Budget(),
    quantization=Quantization("uint8", ["static_int8", "dynamic_int8", "fp32"]),
)
ARM = replace(DEVICE, name="board", architecture="aarch64", isa=["neon"])


def rules(
    profile: Profile = DEVICE, machine: Facts = X86, max_drop: float = 0.01, points: bool = True
) -> Rules:
    return Rules(replace(profile, session=replace(profile.session, threads=1)), machine, max_drop, points)


def candidate(
    name: str,
    ratio: float = 1.0,
    drop: float = 0.0,
    size: int = 1000,
    *,
    p95_ms: float | None = None,
    memory: int = 50_000_000,
) -> Scored:
    family: RecipeName = "static_int8" if name.startswith("static") else name  # type: ignore[assignment]
    p95_ms = ratio * 12 if p95_ms is None else p95_ms
    measured = Measured(name, "0" * 64, size, 5.0, memory, ratio * 10, p95_ms, ratio * 10, ratio, 100)
    return Scored(name, family, "", Accuracy(0.9 - drop, 0.9, drop, 1000), measured)


FP32 = candidate("fp32", size=4000)


def verdicts(outcome: Choice | Refusal) -> dict[str, str]:
    return {v.name: f"{v.outcome}: {v.why}" for v in outcome.verdicts}


def chosen(*candidates: Candidate, **fields: Any) -> str:
    outcome = choose.choose([FP32, *candidates], rules(**fields))
    assert isinstance(outcome, Choice)
    won = [v.name for v in outcome.verdicts if v.outcome == "won"]
    assert won == [outcome.name]
    assert len(outcome.verdicts) == 1 + len(candidates)
    assert all(v.why for v in outcome.verdicts)
    return outcome.name


@pytest.mark.parametrize(
    ("candidates", "winner"),
    [
        ([], "fp32"),
        ([candidate("static_int8", 0.6)], "static_int8"),
        # never one slower than FP32, however small
        ([candidate("static_int8", 1.001, size=10)], "fp32"),
        # the fastest of several
        ([candidate("static_int8", 0.6), candidate("dynamic_int8", 0.5)], "dynamic_int8"),
        # a tie goes to the smaller
        ([candidate("static_a", 0.60, size=900), candidate("static_b", 0.61, size=800)], "static_b"),
        # just beyond a tie
        ([candidate("static_a", 0.60, size=900), candidate("static_b", 0.62, size=800)], "static_a"),
        # equally fast, equally small: the more accurate, then the faster, then the first by name
        ([candidate("static_a", 0.60, 0.002), candidate("static_b", 0.61, 0.001)], "static_b"),
        ([candidate("static_a", 0.61), candidate("static_b", 0.60)], "static_b"),
        ([candidate("static_b", 0.6), candidate("static_a", 0.6)], "static_a"),
        # FP32 takes part in ties, too
        ([candidate("static_int8", 0.98, size=5000)], "fp32"),
        ([candidate("static_int8", 0.98, size=3000)], "static_int8"),
        # accuracy, at the limit and beyond
        ([candidate("static_int8", 0.6, 0.01)], "static_int8"),
        ([candidate("static_int8", 0.6, 0.0101)], "fp32"),
        ([candidate("static_a", 0.3, 0.05), candidate("static_b", 0.6, 0.0)], "static_b"),
        # a gain in accuracy is no miss
        ([candidate("static_int8", 0.6, -0.02)], "static_int8"),
        # FP16 only where there are kernels for it
        ([candidate("fp16", 0.5), candidate("static_int8", 0.6)], "static_int8"),
        # broken ones lose
        ([Broken("static_int8", "static_int8", "", "build", Reason.LOAD_FAILED, "no kernel")], "fp32"),
    ],
)
def test_where_the_machine_speaks_for_the_device_the_fastest_wins(
    candidates: list[Candidate], winner: str
) -> None:
    assert chosen(*candidates) == winner


@pytest.mark.parametrize(
    ("budget", "winner"),
    [
        (Budget(size_bytes=899), "static_b"),
        (Budget(size_bytes=900), "static_a"),
        (Budget(memory_bytes=50_000_000), "static_a"),
        (Budget(memory_bytes=49_999_999), "static_b"),
        (Budget(latency_p95_ms=6.0), "static_a"),
        (Budget(latency_p95_ms=5.9), "static_b"),
    ],
)
def test_budgets_reject(budget: Budget, winner: str) -> None:
    a = candidate("static_a", 0.5, size=900, p95_ms=6.0)
    b = candidate("static_b", 0.7, size=800, p95_ms=5.0, memory=40_000_000)
    fp32 = candidate("fp32", size=700, p95_ms=5.0, memory=40_000_000)
    outcome = choose.choose([fp32, a, b], rules(replace(DEVICE, budget=budget)))
    assert isinstance(outcome, Choice)
    assert outcome.name == winner
    assert outcome.decided_by == "latency"


@pytest.mark.parametrize(
    ("candidates", "winner"),
    [
        # the profile's order, whatever the latencies here
        ([candidate("static_int8", 3.0), candidate("dynamic_int8", 0.5)], "static_int8"),
        ([candidate("static_int8", 0.5, 0.02), candidate("dynamic_int8", 9.0)], "dynamic_int8"),
        ([candidate("static_int8", 0.5, 0.02), candidate("dynamic_int8", 0.5, 0.02)], "fp32"),
        # within a family: accuracy, then size
        ([candidate("static_a", 0.5, 0.002), candidate("static_b", 0.9, 0.001)], "static_b"),
        ([candidate("static_a", 0.5, size=900), candidate("static_b", 0.9, size=800)], "static_b"),
        # what the profile does not name is never chosen
        ([candidate("fp16", 0.1, size=1)], "fp32"),
        # an absolute latency measured on another machine rejects nothing
        ([candidate("static_int8", 1.0, p95_ms=1e6)], "static_int8"),
    ],
)
def test_where_it_does_not_the_profiles_order_decides(candidates: list[Candidate], winner: str) -> None:
    profile = replace(ARM, budget=Budget(latency_p95_ms=20.0))
    assert chosen(*candidates, profile=profile) == winner
    outcome = choose.choose([FP32, *candidates], rules(profile))
    assert outcome.decided_by == "preference"
    assert "latency" not in outcome.why


def test_size_and_memory_reject_everywhere() -> None:
    budget = Budget(size_bytes=1000, memory_bytes=60_000_000)
    profile = replace(ARM, budget=budget)
    big, hungry = candidate("static_a", size=1001), candidate("static_b", memory=60_000_001)
    small = candidate("dynamic_int8", size=1000)
    assert chosen(big, hungry, small, profile=profile) == "dynamic_int8"


def test_fp16_takes_part_where_there_are_kernels() -> None:
    half = replace(DEVICE, quantization=Quantization("uint8", ["static_int8"], fp16=True))
    assert chosen(candidate("fp16", 0.5), candidate("static_int8", 0.6), profile=half) == "fp16"
    board = replace(half, architecture="aarch64", isa=["asimdhp"])
    assert chosen(candidate("fp16", 0.5), profile=board) == "fp32", "not named among the preferred"
    outcome = choose.choose([FP32, candidate("fp16", 0.5)], rules(board))
    assert verdicts(outcome)["fp16"] == "lost: the profile does not name fp16 among what its device prefers"
    named = replace(board, quantization=Quantization("int8", ["fp16", "fp32"], fp16=True))
    assert chosen(candidate("fp16", 0.5), profile=named) == "fp16"


def test_fp32_comes_last_where_a_profile_does_not_name_it() -> None:
    profile = replace(ARM, quantization=Quantization("int8", ["static_int8"]))
    assert chosen(candidate("static_int8", drop=0.5), profile=profile) == "fp32"
    assert chosen(candidate("static_int8"), profile=profile) == "static_int8"


@pytest.mark.parametrize(
    ("profile", "machine", "words"),
    [
        (ARM, X86, "it is x86_64, not aarch64"),
        (DEVICE, replace(X86, isa=["avx2", "avx512f", "fma"]), "has avx2, avx512f, not avx2"),
        (DEVICE, replace(X86, isa=["fma"]), "has none, not avx2"),
        (DEVICE, replace(X86, isa=["avx2", "fma"]), None),
    ],
)
def test_why_a_machine_does_not_speak_for_a_device(
    profile: Profile, machine: Facts, words: str | None
) -> None:
    gap = choose.machine_gap(rules(profile, machine))
    assert (gap is None) if words is None else (gap is not None and words in gap)


def test_a_machine_with_fewer_cores_than_threads_does_not_speak_for_the_device() -> None:
    profile = replace(DEVICE, session=replace(DEVICE.session, threads=4))
    gap = choose.machine_gap(Rules(profile, replace(X86, cores=2), 0.01, True))
    assert gap == "it has 2 cores for 4 threads"


def test_each_candidate_is_told_why() -> None:
    outcome = choose.choose(
        [
            FP32,
            candidate("static_a", 0.6, size=900),
            candidate("static_b", 0.61, size=1800),
            candidate("static_c", 0.6, 0.021, size=900),
            candidate("static_d", 0.6, 0.001, size=900),
            candidate("static_e", 0.9, size=900),
            candidate("dynamic_int8", 12.0, 0.03),
            Broken("fp16", "fp16", "", "build", Reason.LOAD_FAILED, "KeyError: 7"),
            Broken("x", "fp16", "", "evaluate", Reason.CANDIDATE_CRASHED, "killed by SIGSEGV"),
            Broken("y", "fp16", "", "measure", Reason.LOAD_FAILED, "no kernel"),
        ],
        rules(replace(DEVICE, budget=Budget(size_bytes=3000))),
    )
    assert verdicts(outcome) == {
        "fp32": "lost: file 4.0 KB, over the budget of 3.0 KB by 1.0 KB",
        "static_a": "won: 0.60× the latency of FP32 (p50 6 ms), the fastest within the budgets,"
        " accuracy drop 0.00 pt of 1.00 pt allowed, 900 B",
        "static_b": "lost: as fast as static_a within 3%, but 2.00× its size",
        "static_c": "lost: accuracy drop 2.10 pt, over the 1.00 pt allowed",
        "static_d": "lost: as fast as static_a within 3% and of the same size, but not more accurate",
        "static_e": "lost: slower than static_a: 1.50× its latency",
        "dynamic_int8": "lost: accuracy drop 3.00 pt, over the 1.00 pt allowed"
        " and slower than FP32: 12× its latency",
        "fp16": "failed: could not be built: KeyError: 7",
        "x": "failed: failed when run: killed by SIGSEGV",
        "y": "failed: could not be measured: no kernel",
    }


def test_each_candidate_is_told_why_without_latencies() -> None:
    outcome = choose.choose(
        [
            FP32,
            candidate("static_a", 0.6, 0.001, size=900),
            candidate("static_b", 0.6, 0.002, size=900),
            candidate("static_c", 0.6, 0.001, size=901),
            candidate("fp16", 0.5),
        ],
        rules(ARM),
    )
    order = "static_int8 > dynamic_int8 > fp32"
    assert verdicts(outcome) == {
        "fp32": "lost: within the budgets, but the profile prefers static_int8 to fp32",
        "static_a": f"won: first in the profile's order of preference ({order}) within accuracy, memory and"
        " size, of its kind the most accurate; accuracy drop 0.10 pt of 1.00 pt allowed, 900 B",
        "static_b": "lost: within the budgets, but less accurate than static_a",
        "static_c": "lost: within the budgets, as accurate as static_a and no smaller",
        "fp16": "lost: the profile says that its device has no FP16 kernels",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "nothing within the budgets is faster than clean FP32 (p50 10 ms), accuracy 90.00 %"),
        ({"points": False}, "accuracy 0.9, 4.0 KB"),
    ],
)
def test_why_fp32_wins(fields: dict[str, Any], words: str) -> None:
    outcome = choose.choose([FP32, candidate("static_int8", 1.2)], rules(**fields))
    assert words in outcome.why


def test_winners_of_a_tie_say_so() -> None:
    smaller = choose.choose(
        [FP32, candidate("static_a", 0.60, size=900), candidate("static_b", 0.61, size=800)], rules()
    )
    assert "within 3% of the fastest and smaller" in smaller.why
    fp32 = choose.choose([FP32, candidate("static_int8", 0.98, size=5000)], rules())
    assert "nothing smaller is faster than clean FP32" in fp32.why


def test_a_gain_is_told_as_one() -> None:
    outcome = choose.choose([FP32, candidate("static_int8", 0.6, -0.004)], rules())
    assert "accuracy 0.40 pt above FP32" in outcome.why


@pytest.mark.parametrize(
    ("candidates", "budget", "nearest", "words"),
    [
        (
            [candidate("static_int8", 0.5, size=1200)],
            Budget(size_bytes=1000),
            "static_int8",
            ["file 1.2 KB, over the budget of 1.0 KB by 200 B"],
        ),
        (
            [candidate("static_int8", 0.5, 0.03, size=900)],
            Budget(size_bytes=1000),
            "static_int8",
            ["accuracy drop 3.00 pt, over the 1.00 pt allowed"],
        ),
        (
            [candidate("static_int8", 0.5, p95_ms=8.0), candidate("dynamic_int8", 0.9, p95_ms=7.5)],
            Budget(latency_p95_ms=6.0),
            "dynamic_int8",
            ["p95 latency 7.5 ms, over the budget of 6 ms by 1.5 ms"],
        ),
        (
            [candidate("static_int8", 1.1, size=900)],
            Budget(size_bytes=1000, memory_bytes=45_000_000),
            "static_int8",
            [
                "peak memory 50.0 MB, over the budget of 45.0 MB by 5.0 MB",
                "slower than FP32: 1.10× its latency",
            ],
        ),
    ],
)
def test_a_refusal_names_the_nearest_and_by_how_much_it_misses(
    candidates: list[Candidate], budget: Budget, nearest: str, words: list[str]
) -> None:
    outcome = choose.choose([FP32, *candidates], rules(replace(DEVICE, budget=budget)))
    assert isinstance(outcome, Refusal)
    assert outcome.nearest == nearest
    assert outcome.why.startswith(f"no candidate meets the budgets of device; the nearest is {nearest}: ")
    assert all(word in outcome.why for word in words)
    assert {v.outcome for v in outcome.verdicts} == {"lost"}


def test_a_refusal_counts_broken_candidates_as_failed_never_as_nearest() -> None:
    broken = Broken("static_int8", "static_int8", "", "build", Reason.LOAD_FAILED, "no")
    outcome = choose.choose([FP32, broken], rules(replace(ARM, budget=Budget(size_bytes=1))))
    assert isinstance(outcome, Refusal)
    assert outcome.nearest == "fp32"
    assert outcome.decided_by == "preference"
    assert [v.outcome for v in outcome.verdicts] == ["lost", "failed"]


def test_the_order_of_candidates_does_not_matter() -> None:
    group = [
        FP32,
        candidate("static_a", 0.6, size=900),
        candidate("static_b", 0.61, size=900),
        candidate("fp16", 0.6),
    ]
    names = {getattr(choose.choose(list(p), rules()), "name", None) for p in itertools.permutations(group)}
    assert names == {"static_a"}


def test_a_limit_of_zero_drop() -> None:
    assert chosen(candidate("static_int8", 0.6, 0.0), max_drop=0.0) == "static_int8"
    assert chosen(candidate("static_int8", 0.6, 0.001), max_drop=0.0) == "fp32"
