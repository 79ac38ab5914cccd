"""The shipped profiles as a table for people."""

from __future__ import annotations

from rich.table import Table

from edge_contract.profile import Profile
from optimizer import terminal, text


def print_profiles(profiles: list[Profile]) -> None:
    """The shipped profiles."""
    table = Table("profile", "what it is", "runtime", "needs", "threads", "budgets", "prefers")
    for profile in profiles:
        budget = profile.budget
        limits = [
            f"p95 {text.milliseconds(budget.latency_p95_ms)}" if budget.latency_p95_ms else "",
            f"memory {text.size(budget.memory_bytes)}" if budget.memory_bytes else "",
            f"size {text.size(budget.size_bytes)}" if budget.size_bytes else "",
        ]
        table.add_row(
            profile.name,
            profile.title,
            profile.runtime,
            f"{profile.architecture} {' '.join(profile.isa)}",
            str(profile.session.threads),
            ", ".join(filter(None, limits)),
            " > ".join(profile.quantization.prefer),
        )
    terminal.console().print(table)
