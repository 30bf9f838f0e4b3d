"""Configs: what is merged, what is refused and in which words, and the way back to YAML."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml_texts import text

from mlseg import config
from mlseg.config import Override, Settings, Tree, dump, load, parse
from mlseg.errors import UserError


class RMSprop(Settings):
    name: Literal["rmsprop"] = "rmsprop"
    lr: float = 1e-5
    momentum: float = 0.9


class Adam(Settings):
    name: Literal["adam"]
    lr: float = pydantic.Field(1e-3, gt=0)
    betas: Annotated[tuple[float, float], pydantic.Strict(False)] = (0.5, 0.999)

    @pydantic.field_validator("betas")
    @classmethod
    def _ordered(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if betas[0] > betas[1]:
            raise UserError("the first beta is the smaller one")
        return betas


class Engine(Settings):
    iterations: int = 5
    size: int | list[int] = 64
    log: Literal["json", "plain"] = "json"


class Experiment(Settings):
    system: str
    engine: Engine = Engine()
    optimizer: Annotated[RMSprop | Adam, pydantic.Field(discriminator="name")] = RMSprop()
    untagged: RMSprop | Adam | None = None
    problems: dict[str, Engine] = {}
    stages: list[Engine] = []
    notes: str | None = None

    @pydantic.model_validator(mode="after")
    def _even(self) -> "Experiment":
        if self.engine.iterations == 13:
            raise ValueError("thirteen iterations\nbring bad luck")
        return self


BASIC = """\
system: e2eaug
engine:
  iterations: 10
optimizer: {name: rmsprop, lr: 1e-5, momentum: 0.5}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "basic.yaml").write_text(BASIC)
    return tmp_path


def message(*overrides: str, file: str = "basic.yaml") -> str:
    """The error of a config, which is always one line."""
    with pytest.raises(UserError) as caught:
        parse(Experiment, load(file, overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_file_is_read_with_its_types(folder: Path) -> None:
    settings = parse(Experiment, load("basic.yaml"))
    assert settings.engine == Engine(iterations=10)
    assert settings.optimizer == RMSprop(lr=1e-5, momentum=0.5)


def test_settings_are_frozen(folder: Path) -> None:
    settings = parse(Experiment, load("basic.yaml"))
    with pytest.raises(pydantic.ValidationError):
        setattr(settings, "system", "other")  # noqa: B010, what a type checker would refuse


class TestInheritance:
    def test_a_chain_merges_and_knows_where_each_value_was_set(self, folder: Path) -> None:
        (folder / "middle").mkdir()
        (folder / "middle" / "a.yaml").write_text(
            "base: ../basic.yaml\nengine: {size: [64, 32]}\nsystem: segan\n"
        )
        (folder / "b.yaml").write_text("base: middle/a.yaml\nengine:\n  size: 16\n  log: plain\n")
        tree = load("b.yaml", ["engine.iterations=7", "problems.weights.size=[8, 8]"])
        assert tree.values == {
            "system": "segan",
            "engine": {"iterations": 7, "size": 16, "log": "plain"},
            "optimizer": {"name": "rmsprop", "lr": 1e-5, "momentum": 0.5},
            "problems": {"weights": {"size": [8, 8]}},
        }
        assert tree.where("system") == "middle/a.yaml:3"
        assert tree.where("optimizer.lr") == "basic.yaml:4"
        assert tree.where("engine.log") == "b.yaml:4"
        assert tree.where("engine.iterations") == "command line"
        assert tree.where(("problems", "weights", "size", 1)) == "command line"
        assert tree.where("engine.not_there") == tree.where("engine") == "b.yaml:2"
        assert tree.where("not_there") == tree.source == "b.yaml"
        # The list of the file below has left nothing behind.
        assert not [path for path in tree.origins if path[:2] == ("engine", "size") and path[2:]]

    @pytest.mark.parametrize("key", ["name", "method"])
    def test_another_component_starts_afresh(self, folder: Path, key: str) -> None:
        (folder / "base.yaml").write_text(f"part: {{{key}: a, x: 1}}\n")
        (folder / "other.yaml").write_text(f"base: base.yaml\npart: {{{key}: b, y: 2}}\n")
        assert load("other.yaml").values == {"part": {key: "b", "y": 2}}
        (folder / "same.yaml").write_text(f"base: base.yaml\npart: {{{key}: a, y: 2}}\n")
        assert load("same.yaml").values == {"part": {key: "a", "x": 1, "y": 2}}

    def test_loading_twice_shares_nothing(self, folder: Path) -> None:
        first = load("basic.yaml", ["engine.iterations=1"])
        assert load("basic.yaml").values["engine"]["iterations"] == 10
        assert first.values["engine"]["iterations"] == 1

    def test_a_cycle(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("system: x\nbase: b.yaml\n")
        (folder / "b.yaml").write_text("base: a.yaml\n")
        assert message(file="a.yaml") == (
            "b.yaml:1: base: a config can't inherit from itself (a.yaml -> b.yaml -> a.yaml)"
        )

    def test_a_base_that_is_missing(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("\nbase: basik.yaml\n")
        assert message(file="a.yaml") == (
            "a.yaml:2: base: basik.yaml: no such file; did you mean basic.yaml?"
        )

    def test_a_base_that_is_no_name(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("base: [basic.yaml]\n")
        assert "expected a file's name, got the list" in message(file="a.yaml")


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", 1e-5),
            ("-2E3", -2000.0),
            (".5", 0.5),
            ("100", 100),
            ("010", "010"),
            ("null", None),
            ("~", None),
            ("", None),
            ("true", True),
            ("no", "no"),
            ("2018-01-01", "2018-01-01"),
            ("1:30", "1:30"),
            ("'1'", "1"),
            ("[ph2, 3]", ["ph2", 3]),
            ("{name: adam}", {"name": "adam"}),
            ("a=b", "a=b"),
        ],
    )
    def test_a_value_is_read_as_yaml(self, folder: Path, text: str, value: Any) -> None:
        read = load("basic.yaml", [f"new.key={text}"]).values["new"]["key"]
        assert read == value
        assert type(read) is type(value)

    def test_their_order_does_not_matter_unless_a_key_comes_twice(self, folder: Path) -> None:
        one = load("basic.yaml", ["optimizer.lr=0.1", "optimizer.name=adam"])
        two = load("basic.yaml", ["optimizer.name=adam", "optimizer.lr=0.1"])
        assert one.values["optimizer"] == two.values["optimizer"] == {"lr": 0.1, "name": "adam"}
        assert load("basic.yaml", ["a=1", "a=2"]).values["a"] == 2

    def test_what_another_component_drops_is_said(self, folder: Path) -> None:
        tree = load("basic.yaml", ["optimizer.name=adam", "engine.size=3", "optimizer.lr=0.1"])
        assert tree.notes == [
            "optimizer.name=adam starts from the defaults of adam; dropped: optimizer.momentum"
        ]
        assert load("basic.yaml", ["optimizer={name: adam}"]).notes == [
            "optimizer.name=adam starts from the defaults of adam; dropped: optimizer.lr, "
            "optimizer.momentum"
        ]
        for short in ("adam", load("basic.yaml").values["optimizer"]["name"]):
            assert load("basic.yaml", [f"optimizer={short}"]).notes == [
                f"optimizer={short} starts from the defaults of {short}; dropped: optimizer.lr, "
                "optimizer.momentum"
            ]
        # Nothing is lost by the same name, by new keys, and where all are given anew.
        for override in (
            "optimizer.name=rmsprop",
            "new.name=a",
            "optimizer={name: a, lr: 1, momentum: 1}",
        ):
            assert not load("basic.yaml", [override]).notes

    def test_a_null_becomes_a_mapping(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("system: x\nuntagged: null\n")
        settings = parse(Experiment, load("a.yaml", ["untagged.name=adam"]))
        assert settings.untagged == Adam(name="adam")

    @pytest.mark.parametrize("text", ["engine", "=1", "engine..size=1", ".a=1"])
    def test_what_is_none(self, folder: Path, text: str) -> None:
        assert f"command line: '{text}' is no override; write KEY=VALUE" in message(text)

    def test_base_is_for_files(self, folder: Path) -> None:
        assert "only a file can say" in message("base=basic.yaml")

    def test_broken_yaml(self, folder: Path) -> None:
        assert message("engine.size=[1").startswith("command line: engine.size:1: not valid YAML")


class TestFaults:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            (
                "engine.iteratons=3",
                "engine.iteratons: unknown key; did you mean 'engine.iterations'?",
            ),
            (
                "iterations=3",
                "iterations: unknown key here; did you mean 'engine.iterations'?",
            ),
            ("engine.zzz=3", "engine.zzz: unknown key; valid here: iterations, size, log"),
            ("optimizer.momentun=1", "unknown key; did you mean 'optimizer.momentum'?"),
            ("optimizer={name: adam, momentum: 1}", "valid here: name, lr, betas"),
            ("untagged={name: adam, moment: 1}", "untagged.moment: unknown key; valid here: name"),
            ("problems.w.sise=3", "problems.w.sise: unknown key; did you mean 'problems.w.size'?"),
            ("stages=[{}, {sise: 1}]", "stages.1.sise: unknown key; did you mean 'stages.1.size'?"),
            ("engine.iterations=1.5", "engine.iterations: expected an integer, got 1.5"),
            ("engine.iterations=ten", "expected an integer, got the string 'ten'"),
            ("engine.iterations=true", "expected an integer, got true"),
            ("engine.iterations=null", "expected an integer, got null"),
            ("engine=3", "engine: expected a mapping, got 3"),
            ("engine.size=a", "engine.size: expected an integer or a list, got the string 'a'"),
            ("engine.size=[1, x]", "engine.size.1: expected an integer, got the string 'x'"),
            ("system=[a]", "system: expected a string, got the list ['a']"),
            ("engine.log=jason", "'jason' is none of json, plain; did you mean 'json'?"),
            ("engine.log.x=1", "expected 'json' or 'plain', got a mapping with x"),
            ("optimizer.name=adm", "'adm' is none of rmsprop, adam; did you mean 'adam'?"),
            ("optimizer={name: adam, lr: -1}", "optimizer.lr: should be greater than 0, got -1"),
            ("optimizer.lr=.nan", "optimizer.lr: expected a finite number, got nan"),
            ("optimizer={name: adam, betas: [1]}", "expected at least 2 items, got the list [1]"),
            ("optimizer={name: adam, betas: [0.9, 0.5]}", "the first beta is the smaller one"),
            ("engine.iterations=13", "basic.yaml: thirteen iterations bring bad luck"),
            ("notes=3", "notes: expected a string, got 3"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, folder: Path, override: str, expected: str) -> None:
        text = message(override)
        assert text.endswith(expected) or expected in text
        assert text.startswith(("command line: ", "basic.yaml: "))

    def test_a_file_s_line_is_named(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("base: basic.yaml\n\nengine:\n  log: plain\n  size: x\n")
        assert message(file="a.yaml").startswith("a.yaml:5: engine.size: expected an integer")

    def test_several_faults_are_counted(self, folder: Path) -> None:
        text = message("engine.iterations=a", "seed=1", "engine.size=b")
        assert text.startswith("command line: engine.iterations: ")
        assert text.endswith(" (and 2 more)")

    def test_a_missing_key(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("untagged: {lr: 1}\nengine: {}\n")
        assert message(file="a.yaml") == "a.yaml: system: missing; it must be set to a string"

    def test_a_missing_name_lists_the_choices(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("system: x\noptimizer:\n  lr: 1.0\n")
        assert message(file="a.yaml") == (
            "a.yaml:2: optimizer.name: missing; it must be set to one of rmsprop, adam"
        )

    def test_text_asks_before_the_schema_is_known(self) -> None:
        tree = Tree({"a": {"b": "c"}, "n": 1}, {("n",): "x.yaml:2"}, "x.yaml")
        assert tree.text("a.b") == "c"
        with pytest.raises(UserError, match=r"^x\.yaml:2: n: expected a string, got 1$"):
            tree.text("n")
        with pytest.raises(UserError, match=r"^x\.yaml: system: missing"):
            tree.text("system")


class TestFiles:
    def test_a_missing_file_names_the_nearest(self, folder: Path) -> None:
        assert message(file="basics.yml") == "basics.yml: no such file; did you mean basic.yaml?"
        (folder / "configs").mkdir()
        (folder / "configs" / "segan.yaml").write_text("")
        assert "did you mean configs/segan.yaml?" in message(file="segan")
        assert "no such file" in message(file="nowhere/at/all.yaml")

    def test_a_folder(self, folder: Path) -> None:
        (folder / "configs").mkdir()
        assert "configs: can't be read: " in message(file="configs")

    def test_no_text(self, folder: Path) -> None:
        (folder / "a.yaml").write_bytes(b"system: \xff\xfe")
        assert message(file="a.yaml") == "a.yaml: not UTF-8 text (byte 8)"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("system: x\nengine: [1, 2\nseed: 1\n", "a.yaml:3: not valid YAML: "),
            ("a: 1\n\tb: 2\n", "a.yaml:2: not valid YAML: "),
            ("a: 1\n--- \nb: 2\n", "a.yaml:2: not valid YAML: "),
            ("a: 1\nb: \x07\n", "a.yaml:2: not valid YAML: character"),
            ("a: 1\nb: *c\n", "a.yaml:2: not valid YAML: found undefined alias"),
            ("a: 1\nb:\n  c: 1\n  c: 2\n", "a.yaml:4: key 'c' is written twice, first in line 3"),
            ("- a\n", "a.yaml: a config is a mapping of keys to values, not the list ['a']"),
            ("a: 1\n2: b\n", "a.yaml:2: key 2 is no text; write '2'"),
            ("[a]: b\n", "a.yaml:1: a key is a single word"),
            ("a: 1\nb: !!python/name:os.system x\n", "a.yaml:2: the YAML tag "),
            ("a: 1\nb: !!int x\n", "a.yaml:2: 'x' can't be read as int"),
            ("a: 1\nb: !!bool x\n", "a.yaml:2: 'x' can't be read as bool"),
            ("a: &x\n  b: *x\n", "a reference (*) to a value that contains it"),
        ],
    )
    def test_what_is_no_config(self, folder: Path, text: str, expected: str) -> None:
        (folder / "a.yaml").write_text(text)
        assert expected in message(file="a.yaml")

    def test_an_alias_is_a_copy(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("a: &x {n: 1}\nb: *x\n")
        assert load("a.yaml", ["b.n=2"]).values == {"a": {"n": 1}, "b": {"n": 2}}

    def test_an_empty_file_is_an_empty_config(self, folder: Path) -> None:
        (folder / "a.yaml").write_text("# nothing\n")
        assert load("a.yaml").values == {}


number = st.floats(allow_nan=False, allow_infinity=False)
engines = st.builds(
    Engine,
    iterations=st.integers(),
    size=st.integers() | st.lists(st.integers(), max_size=3),
    log=st.sampled_from(["json", "plain"]),
)
optimizers = st.builds(RMSprop, lr=number, momentum=number) | st.builds(
    Adam,
    name=st.just("adam"),
    lr=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
)


@given(
    system=text,
    engine=engines.filter(lambda engine: engine.iterations != 13),
    optimizer=optimizers,
    untagged=optimizers | st.none(),
    problems=st.dictionaries(text, engines, max_size=2),
    stages=st.lists(engines, max_size=2),
    notes=text | st.none(),
)
def test_dump_is_read_back_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, **values: Any
) -> None:
    settings = Experiment(**values)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(settings), encoding="utf-8", newline="")
    assert parse(Experiment, load(path)) == settings


# Of keys that come twice the last holds, and else the order says nothing.
KEYS = ["engine={iterations: 3, log: {every: 1}}", "engine.log.name=x", "engine.log.every=2"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_overrides_are_one_layer(order: tuple[int, ...], folder: Path) -> None:
    (folder / "any.yaml").write_text("engine: {iterations: 9, more: 1}\n")
    tree = load("any.yaml", [KEYS[index] for index in order])
    engine = {"iterations": 3, "more": 1, "log": {"every": 2, "name": "x"}}
    assert tree.values == {"engine": engine}
    tree = load("any.yaml", ["log={a: 1}", "log=3", "log={b: 2}", "log.c=3"])
    assert tree.values["log"] == {"b": 2, "c": 3}


@pytest.mark.parametrize("value", ["adam", "3", "null", "[lr]"])
def test_an_override_below_one_without_keys(value: str, folder: Path) -> None:
    """One of the two would be lost."""
    (folder / "any.yaml").write_text("optimizer: {name: sgd, lr: 1}\n")
    both = [f"optimizer={value}", "optimizer.lr=3"]
    for overrides in (both, both[::-1]):
        with pytest.raises(UserError, match=r"command line: optimizer: given as .*optimizer\.lr"):
            load("any.yaml", overrides)
    with pytest.raises(UserError, match=r"optimizer\.lr\.x: lr is given without keys"):
        load("any.yaml", ["optimizer={lr: 3}", "optimizer.lr.x=1"])


def test_nothing_that_a_file_has_overwritten(folder: Path) -> None:
    """As a grid's row does: it is of the command line all the same."""
    tree = load("basic.yaml", ["engine.iterations="])
    config.override(tree, [Override("engine.iterations", 3, {(): "grid.yaml:9"})])
    with pytest.raises(UserError, match=r"^command line: engine\.iterations: nothing stands"):
        parse(Experiment, tree)


def test_whose_files_are_named(folder: Path) -> None:
    """Those of the folder that has them, if the one that was asked for has none."""
    (folder / "configs").mkdir()
    (folder / "configs" / "qqqqqq.yaml").touch()
    with pytest.raises(UserError, match=r"elsewhere/zz\.yaml: no such file; configs has qqqqqq\."):
        load("elsewhere/zz.yaml")
