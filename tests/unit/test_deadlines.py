"""The one list of waits, and the README's copy of it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from trivmm.deadlines import TABLE, Deadlines, markdown_table
from trivmm.errors import ConfigError, DeadlineError, PauseTimeout

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.split("<!-- deadlines -->")[1].split("<!-- /deadlines -->")[0].strip()
    assert shown == markdown_table(), "copy trivmm.deadlines.markdown_table() into the README"


def test_every_row_is_a_field_and_every_field_a_row() -> None:
    assert {field.name for field in attrs.fields(Deadlines)} == set(TABLE)
    assert all(getattr(Deadlines(), name) == row.default_s for name, row in TABLE.items())


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True, None])
def test_a_limit_is_a_positive_number_of_seconds(value: object) -> None:
    with pytest.raises(ConfigError, match=r"deadlines\.pause"):
        Deadlines(pause=value)  # type: ignore[arg-type]


async def test_expiry_carries_name_limit_and_diagnosis(autojump_clock: trio.testing.MockClock) -> None:
    said = []

    def diagnose() -> str:
        said.append(trio.current_time())
        return "vcpu3 is late"

    with pytest.raises(PauseTimeout) as caught:
        with Deadlines(pause=2).enter("pause", diagnose):
            await trio.sleep(5)
    assert (caught.value.name, caught.value.limit_s, caught.value.diagnosis) == ("pause", 2, "vcpu3 is late")
    assert len(said) == 1


async def test_a_budget_shortens_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(DeadlineError, match=r"quiesce \(0.25 s\)"):
        with Deadlines().enter("quiesce", "why", at_most_s=0.25):
            await trio.sleep(5)
    assert trio.current_time() - began == pytest.approx(0.25)
    with pytest.raises(DeadlineError):
        with Deadlines().enter("quiesce", "why", at_most_s=-1):
            await trio.sleep(5)


async def test_an_outer_cancellation_is_not_an_expiry(autojump_clock: trio.testing.MockClock) -> None:
    with trio.move_on_after(1) as scope:
        with Deadlines().enter("commit", "why"):
            await trio.sleep(5)
    assert scope.cancelled_caught
