"""What the checks found: a number, a level, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from robustood import tables
from robustood.checkpoints import Json
from robustood.inputs import check_choice, check_mapping, check_number, check_text

Level = Literal["error", "warning", "ok"]
_LEVELS: tuple[Level, ...] = ("error", "warning", "ok")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ``"error"`` if an attack cannot be trusted, ``"warning"`` if its result needs care, or ``"ok"``.
        check: the name of the check.
        value: its number.
        text: what was found, and what to do about it.
    """

    level: Level
    check: str
    value: float
    text: str

    def __post_init__(self) -> None:
        check_choice(self.level, "level", _LEVELS)
        check_text(self.check, "check")
        check_number(self.value, "value")
        check_text(self.text, "text")


@dataclass(frozen=True)
class Findings:
    """The results of all checks that apply, by name: ``findings["gradient"]``.

    Attributes:
        found: one :class:`Finding` for each check, in the order of the checks.
    """

    found: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that forbid to trust an attack."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that call for care."""
        return self._of("warning")

    def _of(self, level: Level) -> tuple[Finding, ...]:
        return tuple(each for each in self.found if each.level == level)

    def __getitem__(self, check: str) -> Finding:
        for each in self.found:
            if each.check == check:
                return each
        known = ", ".join(each.check for each in self.found)
        raise KeyError(f"no finding named {check!r}; these checks were made: {known}")

    def __contains__(self, check: object) -> bool:
        return any(each.check == check for each in self.found)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def to_dict(self) -> dict[str, Json]:
        """Level, value and text by name of the check, as JSON has them."""
        return {
            each.check: {k: v for k, v in asdict(each).items() if k != "check"} for each in self
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Json]) -> Findings:
        """The findings that :meth:`to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        form = '{"gradient": {"level": "ok", "value": 0.0, "text": ".."}}, as to_dict() returns'
        check_mapping(kept, "kept", form)
        found = []
        for name, entries in kept.items():
            check_mapping(entries, f"kept[{name!r}]", form)
            if set(entries) != {"level", "value", "text"}:
                raise ValueError(
                    f"kept[{name!r}] must have the keys level, value and text, got {list(entries)!r:.80}; pass "
                    "what Findings.to_dict() returned"
                )
            found.append(Finding(check=name, **entries))
        return cls(tuple(found))

    def cells(self) -> list[list[str]]:
        """Header and rows of the table, as text; errors first."""
        rows = [each for level in _LEVELS for each in self._of(level)]
        body = [[each.level, each.check, f"{each.value:.3g}", each.text] for each in rows]
        return [["level", "check", "value", "what was found"], *body]

    def __str__(self) -> str:
        return tables.text(self.cells())

    def _repr_html_(self) -> str:
        return tables.html(self.cells())
