"""The budget: limits for the chosen variant, in the user's notation."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import ByteSize, Field, FiniteFloat, TypeAdapter, ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.records import Record

if TYPE_CHECKING:
    from slmops.tasks.verdict.pareto import Candidate

EXAMPLES = "max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, max-quality-loss=0.02"
TIME = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?(ms|s)", re.ASCII | re.IGNORECASE)

Limit = Annotated[FiniteFloat, Field(gt=0)]


class Budget(Record):
    """Limits of size and peak memory in bytes, TTFT in ms, token generation in tokens/s, and loss of the task score.

    None: no limit.
    """

    max_size: int | None = Field(None, gt=0)
    max_rss: int | None = Field(None, gt=0)
    max_ttft: Limit | None = None
    min_tps: Limit | None = None
    max_quality_loss: FiniteFloat | None = Field(None, ge=0, le=1)

    def excesses(self, candidate: "Candidate") -> dict[str, float]:
        """Return by how much a candidate exceeds each limit, as text and factor (above 1); kept limits are left out.

        An unknown quality loss exceeds its limit.
        """
        found: dict[str, float] = {}

        def compare(text: str, value: float, limit: float | None) -> None:
            if limit is not None and value > limit:
                found[text] = value / limit if limit else float("inf")

        compare(f"size {in_megabytes(candidate.size_bytes)}", candidate.size_bytes, self.max_size)
        compare(f"peak RSS {in_megabytes(candidate.peak_rss_bytes)}", candidate.peak_rss_bytes, self.max_rss)
        found |= self._too_slow(candidate) if candidate.reliable else {}
        if self.max_quality_loss is not None and candidate.quality_loss is None:
            found["quality loss unknown (no expected answers)"] = float("inf")
        elif candidate.quality_loss is not None:
            loss = round(candidate.quality_loss, 9)  # rounded, because 1.0 - 0.98 is a little more than 0.02
            compare(f"quality loss {loss:.3f}", loss, self.max_quality_loss)
        return found

    def undecided(self, candidate: "Candidate") -> tuple[str, ...]:
        """Return the limits of speed that a candidate exceeded on a busy machine, as texts.

        Other load can only slow down a variant, so a limit that is kept on a busy machine is kept.
        """
        return () if candidate.reliable else tuple(self._too_slow(candidate))

    def _too_slow(self, candidate: "Candidate") -> dict[str, float]:
        found, rate = {}, candidate.token_generation_throughput_tps
        if self.max_ttft is not None and candidate.ttft_ms > self.max_ttft:
            found[f"TTFT {candidate.ttft_ms:,.1f} ms"] = candidate.ttft_ms / self.max_ttft
        if self.min_tps is not None and rate < self.min_tps:
            found[f"{rate:,.1f} tok/s"] = self.min_tps / rate
        return found


def in_megabytes(size_bytes: int) -> str:
    """Return a size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def parse_budget(pairs: Sequence[str]) -> Budget | None:
    """Parse a budget from `key=value` texts; None if there are none.

    Raises `BadInput` for an unknown key, one given twice, or an invalid value or unit.
    """
    values: dict[str, float] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in Budget.model_fields:
            raise BadInput(
                f"The budget {pair!r} is unknown.", f"Write KEY=VALUE, such as {EXAMPLES}.", code="budget-key-unknown"
            )
        if name in values:
            raise BadInput(f"The budget names {key.strip()} twice.", "Name it once.", code="budget-key-twice")
        try:
            values[name] = _value(name, text.strip())
        except (ValueError, ValidationError):
            raise BadInput(
                f"The budget {pair!r} has no valid value.",
                f"Write, for example, {EXAMPLES}.",
                code="budget-value-not-valid",
            ) from None
    if not values:
        return None
    try:
        return Budget.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0]).replace("_", "-")
        message = f"The budget {key}: {fault['msg']}, found {fault['input']!r}."
        raise BadInput(message, f"Examples: {EXAMPLES}.", code="budget-out-of-range") from None


def _value(name: str, text: str) -> float:
    if name in ("max_size", "max_rss"):
        return int(TypeAdapter(ByteSize).validate_python(text))
    if name == "max_ttft":
        found = TIME.fullmatch(text)
        if found is None:
            raise ValueError(text)
        return float(found[1]) * (1000 if found[2].lower() == "s" else 1)
    return float(text)
