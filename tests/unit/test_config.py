"""A configuration is read once, checked whole, and never changes; every error is named at once, with the remedy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foundation.comparing import plan
from foundation.config import (
    Config,
    config_hash,
    describe,
    flatten,
    from_dict,
    load,
    model_sizes,
    resolved_yaml,
    to_dict,
)
from foundation.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


COMPARISONS = [path for path in sorted(CONFIGS.glob("compare/*.yaml")) if "\nrows:" in path.read_text()]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_delivered_comparison_shares_one_budget(path: Path) -> None:
    found = plan.load(path)
    assert len(found.cells) == len(found.spec.rows) * len(found.spec.seeds) >= 4


@pytest.mark.parametrize("path", sorted({*CONFIGS.rglob("*.yaml")} - {*COMPARISONS}), ids=lambda path: path.stem)
def test_every_delivered_file_is_valid_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert load(written(tmp_path, resolved_yaml(config))) == config == from_dict(to_dict(config))


def test_the_defaults_are_the_published_recipe() -> None:
    config = load(CONFIGS / "sar-jepa.yaml")
    assert config == Config()
    assert config.train.samples == 94_776 * 300
    assert config.optim.warmup_samples == 94_776 * 20
    assert (config.train.global_batch, config.data.lanes, config.optim.lr) == (300, 60, 1e-3)


def test_a_file_inherits_from_its_base_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, "seed: 3\nmodel: {size: tiny, decoder: {depth: 2}}", "a.yaml")
    written(tmp_path, "base: a.yaml\nmodel: {decoder: {width: 64}}", "b.yaml")
    config = load(written(tmp_path, "base: b.yaml\nname: c", "c.yaml"))
    assert (config.name, config.seed, config.model.size) == ("c", 3, "tiny")
    assert (config.model.decoder.depth, config.model.decoder.width) == (2, 64)


def test_the_tiny_recipe_differs_from_the_published_one_only_where_it_says() -> None:
    full, tiny = flatten(Config()), flatten(load(CONFIGS / "sar-jepa-tiny.yaml"))
    assert {key for key in full if full[key] != tiny[key]} == {
        *("name", "data.lanes", "model.size", "optim.warmup_samples"),
        *("model.decoder.width", "model.decoder.depth", "model.decoder.heads"),
        *("train.samples", "train.global_batch", "train.log_every", "train.checkpoint_every"),
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("optim.grad_clip=null", None),
        ("train.samples=2e6", 2_000_000),
        ("train.micro_batch=75", 75),
        ("objective.radii=[3, 5]", (3, 5)),
        ("data.crop_scale=[.5,1]", (0.5, 1.0)),
        ("model.decoder.depth=2", 2),
        ("train.compile=true", True),
        ("tracking.uri=http://host:5000", "http://host:5000"),
    ],
)
def test_an_override_is_read_as_yaml_would_be(override: str, value: object) -> None:
    found: object = load(CONFIGS / "sar-jepa.yaml", [override])
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_yaml_anchors_and_merges_are_understood(tmp_path: Path) -> None:
    config = load(written(tmp_path, "optim: {<<: {lr: 1, weight_decay: 0}, lr: 2.0e-3}"))
    assert (config.optim.lr, config.optim.weight_decay) == (2e-3, 0.0)


def test_an_empty_file_and_an_empty_section_mean_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == load(written(tmp_path, "optim:\n")) == Config()


def test_all_errors_of_file_and_overrides_come_at_once(tmp_path: Path) -> None:
    text = "optim: {lr: -1, betas: [1, .9, 3]}\nmodel: {size: bse, decoder: 4}\nseed: true"
    path = written(tmp_path, text)
    message = refused(
        path, "objective.radii=[5,-1]", "objective.draw=never", "data.flip=often", "nonsense", "train.keep=[1"
    )
    assert message.splitlines()[0] == f"Found 10 errors in {path}:"
    for line in (
        "optim.lr = -1: number > 0",
        "optim.betas = [1, 0.9, 3]: list [number >= 0 and < 1; number >= 0 and < 1]",
        "objective.draw = 'never': one of per_image, shared",
        f"model.size = 'bse': one of {', '.join(model_sizes())}",
        "model.decoder = 4: a section of keys",
        "seed = True: whole number >= 0",
        "objective.radii.1 = -1: list of whole number >= 1",
        "data.flip = 'often': number >= 0 and <= 1",
        "override 'nonsense': must have the form section.key=value",
        "override 'train.keep=[1': not valid YAML: while parsing a flow sequence",
    ):
        assert f"\n  {line}" in message
    assert "do:    correct these keys" in message


@pytest.mark.parametrize(
    ("given_path", "meant"),
    [
        ("optim.weigth_decay", "optim.weight_decay"),
        ("optim.larning_rate", ""),
        ("lr", "optim.lr"),
        ("model.width", "model.decoder.width"),
        ("train.mask_ratio", "objective.mask_ratio"),
        ("train.mask_ration", "objective.mask_ratio"),
        ("data.globl_batch", "train.global_batch"),
        ("trian.samples", "train"),
        ("xyzzy", ""),
    ],
)
def test_a_misspelt_or_misplaced_key_is_answered_with_the_right_one(given_path: str, meant: str) -> None:
    message = refused(CONFIGS / "demo.yaml", f"{given_path}=1")
    assert "no such key" in message
    assert message.count("did you mean") == bool(meant)
    assert f"did you mean {meant}?" in message or not meant


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.global_batch=301"], "train.global_batch = 301: a multiple of data.lanes = 60"),
        (["train.micro_batch=7"], "train.micro_batch = 7: a divisor of train.global_batch = 300"),
        (["train.samples=10"], "optim.warmup_samples = 1895520: at most train.samples = 10"),
        (["optim.min_lr=1"], "optim.min_lr = 1.0: at most optim.lr = 0.001"),
        (["data.crop_scale=[1,.5]"], "data.crop_scale = [1.0, 0.5]: [low, high] with 0 < low <= high"),
        (["model.decoder.heads=7"], "model.decoder.width = 512: a multiple of model.decoder.heads = 7"),
        (["objective.radii=[224]"], "objective.radii = [224]: radii below data.image_size = 224 (reflect padding)"),
        (["objective.mask_ratio=.01"], "objective.mask_ratio = 0.01: a share that masks at least one of 49 tokens"),
        (["data.image_size=230"], "data.image_size = 230: a multiple of model.patch = 16"),
        (["objective.window=15"], "objective.window = 15: at most the token grid's side 14"),
        (
            ["objective.windows=9"],
            "objective.windows = 9: at most 8: a window of 7 has 8 distinct rows in a grid of 14",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_named(overrides: list[str], line: str) -> None:
    message = refused(CONFIGS / "sar-jepa.yaml", *overrides)
    assert message.startswith("Found 1 error in")
    assert line in message


def test_contradictions_are_listed_beside_wrong_values_but_not_because_of_them() -> None:
    message = refused(
        CONFIGS / "sar-jepa.yaml", "data.flip=2", "train.global_batch=301", "optim.lr=x", "optim.min_lr=1"
    )
    assert message.startswith("Found 3 errors in")
    assert "optim.min_lr" not in message


def test_a_contradiction_cannot_be_constructed_directly_either() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch = 300: a multiple of data\.lanes = 7"):
        Config(data=Config().data.model_copy(update={"lanes": 7}))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "run.yaml: not valid YAML: while parsing"),
        ("- 1", "run.yaml: must be a mapping of keys to values, not list"),
        ("seed: 1\nname: x\nseed: 2", "run.yaml: line 3: 'seed' is given twice"),
        ("seed: !!python/object:os.system 1", "run.yaml: not valid YAML: could not determine a constructor"),
        ("base: run.yaml", "run.yaml: `base:` leads back to this file"),
        ("base: gone.yaml", "gone.yaml: cannot be read (No such file or directory)"),
        ("base: 3", "base = 3: path of a YAML file, relative to this one"),
        ("[" * 3000, "run.yaml: not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_configuration_error(text: str, line: str, tmp_path: Path) -> None:
    assert line in refused(written(tmp_path, text))


def test_missing_and_binary_files_are_configuration_errors(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "gone.yaml")
    assert "cannot be read (Is a directory)" in refused(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: is not UTF-8 text" in refused(tmp_path / "binary.yaml")


def test_numbers_that_would_fill_the_memory_are_refused() -> None:
    line = "model.channels = 1000000000: whole number >= 1 and <= 1024"
    assert line in refused(CONFIGS / "demo.yaml", "model.channels=1e9")


VALUES = st.one_of(st.text(max_size=20), st.text("[]{}:,&*!-.eE0123456789 'x", max_size=20), st.floats().map(str))


@given(st.sampled_from(["", "=", *(f"{row.path}=" for row in describe()), "data=", "base=", "a.b.c="]), VALUES)
def test_any_override_is_either_accepted_or_a_configuration_error(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        load(CONFIGS / "demo.yaml", [key + value])


def test_nothing_can_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().optim.lr = 1.0


def test_the_hash_depends_on_values_not_on_how_they_were_written(tmp_path: Path) -> None:
    one = load(written(tmp_path, "optim: {lr: 1.0e-3}\nseed: 5"))
    two = load(written(tmp_path, "seed: 5\noptim: {lr: 1e-3}"))
    assert config_hash(one) == config_hash(two) != config_hash(Config())
    assert len(config_hash(one)) == 12


def test_every_key_is_documented_with_the_default_that_it_has() -> None:
    rows = describe()
    assert [row.path for row in rows] == list(flatten(Config()))
    assert all(row.description and row.type for row in rows)
    tree = yaml.safe_load(resolved_yaml(Config()))
    assert {row.path: row.default for row in rows}["optim.betas"] == tree["optim"]["betas"]


def test_errors_in_a_named_section_are_told_like_all_others(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {amplitude: {a: {scale: -5}, b: {decibels: 3}, c: {scale: 1, sclae: 2}}}")
    message = refused(path, "train.global_batch=7")
    assert "Found 4 errors" in message
    assert "data.amplitude.a.scale = -5: number > 0" in message
    assert "data.amplitude.b = {'decibels': 3}: needs scale, a number > 0" in message
    assert "data.amplitude.c.sclae = 2: no such key" in message
    assert "train.global_batch = 7: a multiple of data.lanes = 60" in message
