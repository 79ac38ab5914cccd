"""Pure: which candidates are worth building for a model and a profile, in which order, with which settings.

Building them is pipeline.py's work, choosing among them choose.py's.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_contract.profile import IntType, Profile, RecipeName

RangeMethod = Literal["minmax", "percentile"]

# Share of activations kept inside the range; the rest is clipped. The field's usual value.
PERCENTILE = 99.99
# What static and dynamic quantization can make faster; a model without any of these gains nothing.
_HEAVY_OPS = frozenset({"Conv", "MatMul", "Gemm", "ConvTranspose", "LSTM", "GRU", "Attention", "Gather"})


class ModelFacts(Struct, frozen=True):
    """What recipes depend on. `ops` counts every node by its type, those of subgraphs too."""

    opset: int
    ops: dict[str, int]
    parameters: int
    quantized: bool
    half: bool


class Fp32(Struct, frozen=True, tag="fp32"):
    """The cleaned model as it is: the reference, and always a candidate."""

    @property
    def settings(self) -> str:
        """What distinguishes it, for people."""
        return "cleaned graph, float32"


class Fp16(Struct, frozen=True, tag="fp16"):
    """Weights and arithmetic in half precision, inputs and outputs in float32."""

    @property
    def settings(self) -> str:
        """What distinguishes it, for people."""
        return "float16 inside, float32 inputs and outputs"


class DynamicInt8(Struct, frozen=True, tag="dynamic_int8"):
    """8-bit weights; the ranges of activations are found anew in every inference."""

    weights: IntType
    per_channel: bool
    reduce_range: bool

    @property
    def settings(self) -> str:
        """What distinguishes it, for people."""
        return f"weights {self.weights}, {_weight_words(self.per_channel, self.reduce_range)}"


class StaticInt8(Struct, frozen=True, tag="static_int8"):
    """8-bit weights and activations; ranges come from calibration data. QDQ format."""

    activations: IntType
    weights: IntType
    per_channel: bool
    reduce_range: bool
    ranges: RangeMethod

    @property
    def settings(self) -> str:
        """What distinguishes it, for people."""
        ranges = "min-max" if self.ranges == "minmax" else f"{PERCENTILE} percentile"
        words = _weight_words(self.per_channel, self.reduce_range)
        return f"activations {self.activations}, weights {self.weights}, {words}, {ranges} ranges"


Settings = Fp32 | Fp16 | DynamicInt8 | StaticInt8


class Recipe(Struct, frozen=True):
    """One candidate to build. `family` is what profiles prefer; `name` is unique in a run."""

    name: str
    family: RecipeName
    settings: Settings


class Omitted(Struct, frozen=True):
    """A candidate that was not built, and why."""

    name: str
    why: str


class Plan(Struct, frozen=True):
    """What to build, FP32 first, and what not."""

    recipes: list[Recipe]
    omitted: list[Omitted]


def plan(profile: Profile, facts: ModelFacts) -> Plan:
    """The candidates for a cleaned model of these facts on a device of this profile."""
    recipes = [Recipe("fp32", "fp32", Fp32())]
    omitted: list[Omitted] = []
    for recipe in (*_integer_recipes(profile, facts), Recipe("fp16", "fp16", Fp16())):
        why = _why_not(recipe, facts)
        if why:
            omitted.append(Omitted(recipe.name, why))
        else:
            recipes.append(recipe)
    return Plan(recipes, omitted)


def _integer_recipes(profile: Profile, facts: ModelFacts) -> list[Recipe]:
    q = profile.quantization
    # onnxruntime's ConvInteger is about three times slower with signed weights than with unsigned ones.
    dynamic_weights: IntType = "uint8" if "Conv" in facts.ops else q.weights
    methods: tuple[RangeMethod, ...] = ("minmax", "percentile")
    static = [
        Recipe(
            f"static_int8_{method}",
            "static_int8",
            StaticInt8(q.activations, q.weights, q.per_channel, q.reduce_range, method),
        )
        for method in methods
    ]
    dynamic = DynamicInt8(dynamic_weights, q.per_channel, q.reduce_range)
    return [*static, Recipe("dynamic_int8", "dynamic_int8", dynamic)]


def _why_not(recipe: Recipe, facts: ModelFacts) -> str | None:
    if facts.quantized:
        return "the model is quantized already"
    if facts.half:
        return "the model is in half precision already"
    if recipe.family != "fp16" and not _HEAVY_OPS & facts.ops.keys():
        return "the model has no convolution or matrix product to quantize"
    return None


def _weight_words(per_channel: bool, reduce_range: bool) -> str:
    return ("per channel" if per_channel else "per tensor") + (", 7 bits" if reduce_range else "")
