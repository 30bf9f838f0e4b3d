"""The keys that are printed are those that configs have, each with its meaning."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mlseg import config, run
from mlseg.config import Settings
from mlseg.config.keys import Key, described, keys, kinds, printed
from mlseg.problems.systems import SYSTEMS, parse_run

CONFIGS = Path(__file__).parents[2] / "configs"


def flat(values: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all that a resolved config holds, without lists and others' options."""
    for name, value in values.items():
        yield f"{path}{name}"
        if isinstance(value, dict) and name != "options":
            yield from flat(value, f"{path}{name}.")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!c]*.yaml")), ids=lambda path: path.stem)
def test_every_key_that_a_resolved_config_holds_is_printed(path: Path) -> None:
    settings, system = parse_run(config.load(path))
    known = {key.path for key in keys(system.settings)}
    things = kinds(system.settings)
    of_things = {key.path for kind in things for own in kind.things.values() for key in own}
    of_things |= {kind.key for kind in things}
    for key in flat(settings.model_dump(mode="json")):
        if key not in known:
            above, _, last = key.rpartition(".")
            assert above in known, key
            assert last in of_things, key


@pytest.mark.parametrize("name", SYSTEMS.names())
def test_every_key_has_a_meaning(name: str) -> None:
    schema = SYSTEMS.get(name).settings
    assert [key.path for key in keys(schema) if not key.meaning] == []
    for kind in kinds(schema):
        for thing, own in kind.things.items():
            silent = [key.path for key in own if not key.meaning]
            assert silent == [], f"{kind.kind} {thing}"


class Inner(Settings):
    """What lies within.

    Attributes:
        rates: of both players,
            in their order.
        mode: how.
    """

    rates: Annotated[tuple[float, float], Field(strict=False)] = (0.1, 0.2)
    mode: Literal["fast", "slow"] = "slow"


class Outer(Settings):
    """All of it.

    Attributes:
        number: of steps.
        players: by their names.
    """

    number: Annotated[int, Field(ge=1, lt=9)]
    inner: Inner = Inner()
    players: dict[str, Inner] = {}


def test_types_defaults_and_meanings_in_words() -> None:
    assert list(keys(Outer)) == [
        Key("number", "integer >= 1 < 9", "required", "of steps."),
        Key("inner", "mapping", "the defaults of its keys", "What lies within."),
        Key(
            "inner.rates",
            "list of 2: number, number",
            "[0.1, 0.2]",
            "of both players, in their order.",
        ),
        Key("inner.mode", "fast or slow", "slow", "how."),
        Key("players", "mapping of mapping", "{}", "by their names."),
        Key(
            "players.*.rates",
            "list of 2: number, number",
            "[0.1, 0.2]",
            "of both players, in their order.",
        ),
        Key("players.*.mode", "fast or slow", "slow", "how."),
    ]
    assert "number: integer >= 1 < 9 (required)\n    of steps." in "\n".join(printed(Outer))


def test_meanings_of_several_names_in_one_entry() -> None:
    def build(given: int, *, low: int, high: int) -> None:
        """Something.

        Args:
            low, high: the bounds; the
                second is larger.

        Raises:
            ValueError: it isn't.
        """

    both = "the bounds; the second is larger."
    assert described(build) == {"low": both, "high": both}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--keys"]) == 0
    assert "engine.validate_every: integer >= 0 (100)\n" in capsys.readouterr().out
    assert run.main(["--keys", "segn"]) == 2
    assert "did you mean 'segan'" in capsys.readouterr().err
