"""Which candidates are built."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_contract.profile import Quantization
from optimizer import recipes
from optimizer.recipes import DynamicInt8, ModelFacts, StaticInt8
from tests.unit.edge_contract.samples import PROFILE


def facts(ops: str = "Conv Relu Gemm", *, quantized: bool = False, half: bool = False) -> ModelFacts:
    return ModelFacts(17, dict.fromkeys(ops.split(), 1), 1000, quantized, half)


def plan(q: Quantization, found: ModelFacts) -> recipes.Plan:
    return recipes.plan(replace(PROFILE, quantization=q), found)


ARM = Quantization("int8", ["static_int8"])
VNNI = Quantization("uint8", ["static_int8"])
AVX2 = Quantization("uint8", ["static_int8"], reduce_range=True, per_channel=False)


def test_fp32_comes_first_and_every_family_is_tried() -> None:
    made = plan(ARM, facts())
    assert made.recipes[0].name == "fp32"
    assert {r.family for r in made.recipes} == {"fp32", "fp16", "dynamic_int8", "static_int8"}
    assert len({r.name for r in made.recipes}) == len(made.recipes)
    assert made.omitted == []


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (ARM, ("int8", "int8", True, False)),
        (VNNI, ("uint8", "int8", True, False)),
        (AVX2, ("uint8", "int8", False, True)),
    ],
)
def test_static_types_are_the_profiles(quantization: Quantization, expected: tuple[object, ...]) -> None:
    settings = [r.settings for r in plan(quantization, facts()).recipes if isinstance(r.settings, StaticInt8)]
    assert {s.ranges for s in settings} == {"minmax", "percentile"}
    assert {(s.activations, s.weights, s.per_channel, s.reduce_range) for s in settings} == {expected}


@pytest.mark.parametrize(("ops", "weights"), [("Conv Gemm", "uint8"), ("MatMul Add", "int8")])
def test_dynamic_weights_are_unsigned_where_there_are_convolutions(ops: str, weights: str) -> None:
    (settings,) = (r.settings for r in plan(ARM, facts(ops)).recipes if isinstance(r.settings, DynamicInt8))
    assert settings.weights == weights


@pytest.mark.parametrize(
    ("found", "left", "why"),
    [
        (facts(quantized=True), {"fp32"}, "quantized already"),
        (facts(half=True), {"fp32"}, "half precision already"),
        (facts("Relu Add"), {"fp32", "fp16"}, "no convolution or matrix product"),
    ],
)
def test_what_would_gain_nothing_is_not_built_and_said(found: ModelFacts, left: set[str], why: str) -> None:
    made = plan(ARM, found)
    assert {r.name for r in made.recipes} == left
    assert made.omitted
    assert all(why in o.why for o in made.omitted)


def test_settings_are_told_in_words() -> None:
    words = {r.name: r.settings.settings for r in plan(AVX2, facts()).recipes}
    assert (
        words["static_int8_minmax"] == "activations uint8, weights int8, per tensor, 7 bits, min-max ranges"
    )
    assert words["dynamic_int8"] == "weights uint8, per tensor, 7 bits"
    assert "99.99 percentile" in words["static_int8_percentile"]
