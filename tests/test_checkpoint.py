"""Checkpoint files of every kind, good and bad: nothing is executed, nothing is passed over, every message says why."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from restyle_deploy.checkpoint import Checkpoint, config_from_options, load_checkpoint
from restyle_deploy.errors import CheckpointError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import ModelConfig, official_generator_channels
from restyle_deploy.models.restyle import model_from_checkpoint
from tests.toy import toy_checkpoint_content, toy_options

NOT_A_CHECKPOINT = "not a torch checkpoint, or damaged"


class MakesDirectory:
    """Makes a directory when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def load_after(change: Callable[[dict[str, Any]], object], directory: Path, **options: Any) -> Checkpoint:
    """Load a toy checkpoint whose content was changed."""
    content = toy_checkpoint_content(**options)
    change(content)
    torch.save(content, directory / "changed.pt")
    return load_checkpoint(directory / "changed.pt")


def refusal_after(change: Callable[[dict[str, Any]], object], directory: Path) -> str:
    with pytest.raises(CheckpointError, match=r"changed\.pt: ") as caught:
        load_after(change, directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config_from(**options: Any) -> ModelConfig:
    return config_from_options({**toy_options(), **options}, mapping_layers=2, overrides={})


# Files


def test_a_toy_checkpoint_is_read(toy_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(toy_checkpoint)
    assert checkpoint.path == toy_checkpoint
    assert checkpoint.sha256 == sha256_of_file(toy_checkpoint)
    assert checkpoint.config == ModelConfig(
        encoder_type="BackboneEncoder",
        domain="faces",
        output_size=64,
        input_size=32,
        style_dim=16,
        mapping_layers=2,
        generator_channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 8},
        encoder_widths=(8, 8, 16, 16),
        encoder_units=(1, 1, 1, 1),
    )
    assert checkpoint.latent_avg.shape == (10, 16)
    expected = toy_checkpoint_content()["state_dict"]
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())


def test_a_file_in_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    torch.save(toy_checkpoint_content(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt").config.output_size == 64


def test_entries_of_the_training_are_ignored(tmp_path: Path) -> None:
    def add_training_state(content: dict[str, Any]) -> None:
        weight = torch.nn.Parameter(torch.zeros(2))
        content["optimizer"] = torch.optim.Adam([weight]).state_dict()
        content["discriminator_state_dict"] = OrderedDict(weight=torch.full((2,), torch.nan))
        content["discriminator_optimizer_state_dict"] = {"state": {}, "param_groups": []}
        content["global_step"] = 7

    assert load_after(add_training_state, tmp_path).config == config_from()


@pytest.mark.parametrize("path", ["absent.pt", "."])
def test_what_is_no_file_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("share", [0.0, 0.0003, 0.001, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    torch.save(toy_checkpoint_content(), path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    # Cut within the name of torch's own class, the old format seems to hold an object of another class.
    with pytest.raises(CheckpointError, match=rf"short\.pt: ({NOT_A_CHECKPOINT}|holds pickled objects)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"\0" * 100, b"<html>not found</html>\n", b"version https://git-lfs", pickle.dumps({}, protocol=2), b"PK\x03\x04"],
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"other\.pt: {NOT_A_CHECKPOINT}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_another_zip_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match=NOT_A_CHECKPOINT):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_pickled_objects_are_refused_and_not_executed(is_zip: bool, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    content = {**toy_checkpoint_content(), "hook": MakesDirectory(trace)}
    torch.save(content, tmp_path / "hostile.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"hostile\.pt: holds pickled objects .* is refused \(\w+\.mkdir\)"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert not trace.exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert trace.exists(), "the file would have done nothing in any case"


@pytest.mark.parametrize(
    ("value", "name"),
    [(argparse.Namespace(output_size=64), r"argparse\.Namespace"), (np.zeros(2), "numpy"), (Path(), "pathlib")],
)
def test_a_refused_object_is_named(value: object, name: str, tmp_path: Path) -> None:
    torch.save({**toy_checkpoint_content(), "opts": value}, tmp_path / "toy.pt")
    with pytest.raises(CheckpointError, match=rf"refused \({name}.*\); save it again with plain values only") as caught:
        load_checkpoint(tmp_path / "toy.pt")
    assert "\n" not in str(caught.value)


# Entries


@pytest.mark.parametrize(("content", "kind"), [([1], "list"), (torch.zeros(2), "Tensor"), (None, "NoneType")])
def test_content_other_than_a_dict_is_refused(content: object, kind: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "toy.pt")
    with pytest.raises(CheckpointError, match=f"holds a {kind}, expected a dict"):
        load_checkpoint(tmp_path / "toy.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"no state_dict and no latent_avg in it \(found: nothing\)"),
        ({"g_ema": {}, 3: 1}, r"no state_dict and no latent_avg in it \(found: g_ema, 3\)"),
        ({"state_dict": {}}, r"no latent_avg in it \(found: state_dict\)"),
    ],
)
def test_missing_entries_are_named(content: dict[Any, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "toy.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "toy.pt")


@pytest.mark.parametrize(
    "state_dict",
    [
        None,
        [torch.zeros(2)],
        {"encoder.a": 1.0},
        {3: torch.zeros(2)},
        {"encoder.a": torch.zeros(2, device="meta")},
        {"encoder.a": torch.eye(2).to_sparse()},
    ],
    ids=["nothing", "list", "number", "number as name", "meta", "sparse"],
)
def test_weights_other_than_dense_tensors_are_refused(state_dict: object, tmp_path: Path) -> None:
    message = refusal_after(lambda content: content.update(state_dict=state_dict), tmp_path)
    assert "`state_dict` holds something else than dense tensors by name" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def convert(content: dict[str, Any]) -> None:
        weights = content["state_dict"]
        content["state_dict"] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        content["latent_avg"] = content["latent_avg"].to(dtype)

    checkpoint = load_after(convert, tmp_path)
    dtypes = {key: value.dtype for key, value in checkpoint.state_dict.items()}
    assert {dtypes[key] for key in dtypes if not key.endswith("num_batches_tracked")} == {torch.float32}
    assert dtypes["encoder.input_layer.1.num_batches_tracked"] == torch.int64
    assert checkpoint.latent_avg.dtype == torch.float32


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def damage(content: dict[str, Any]) -> None:
        content["state_dict"]["encoder.styles.0.linear.bias"][3] = torch.nan
        content["state_dict"]["decoder.noises.noise_1"][0, 0, 0, 0] = -torch.inf
        content["latent_avg"][0, 0] = torch.inf

    message = refusal_after(damage, tmp_path)
    assert message.endswith("NaN or infinity in encoder.styles.0.linear.bias, decoder.noises.noise_1, latent_avg")


@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_one_average_style_is_repeated(shape: tuple[int, ...], tmp_path: Path) -> None:
    style = torch.arange(16.0).view(shape)
    checkpoint = load_after(lambda content: content.update(latent_avg=style), tmp_path)
    assert torch.equal(checkpoint.latent_avg, torch.arange(16.0).repeat(10, 1))


def test_an_average_latent_that_was_trained_is_a_plain_tensor(tmp_path: Path) -> None:
    def train(content: dict[str, Any]) -> None:
        content["latent_avg"] = torch.nn.Parameter(content["latent_avg"])
        content["state_dict"] = {
            key: torch.nn.Parameter(value) if value.is_floating_point() else value
            for key, value in content["state_dict"].items()
        }

    checkpoint = load_after(train, tmp_path)
    assert not checkpoint.latent_avg.requires_grad
    assert not any(value.requires_grad for value in checkpoint.state_dict.values())


@pytest.mark.parametrize(
    ("latent_avg", "got"),
    [
        (torch.zeros(10, 15), r"\[10, 15\]"),
        (torch.zeros(18, 16), r"\[18, 16\]"),
        (torch.zeros(1, 10, 16), r"\[1, 10, 16\]"),
        ([0.0] * 16, "list"),
        (None, "NoneType"),
    ],
)
def test_an_average_latent_of_another_shape_is_refused(latent_avg: object, got: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"latent_avg: got {got}, expected \[10, 16\] or \[16\]"):
        load_after(lambda content: content.update(latent_avg=latent_avg), tmp_path)


# Options

OFFICIAL = ModelConfig(
    encoder_type="BackboneEncoder",
    domain="faces",
    output_size=1024,
    generator_channels=official_generator_channels(1024),
)


def test_absent_options_mean_the_official_faces(tmp_path: Path) -> None:
    latent_avg = torch.zeros(18, 512)
    entries: list[dict[str, Any]] = [{}, {"opts": None}, {"opts": {}}, {"opts": {"output_size": None}}]
    for entry in [*entries, {"opts": {"dataset_type": None}}]:
        torch.save({"state_dict": {}, "latent_avg": latent_avg, **entry}, tmp_path / "toy.pt")
        checkpoint = load_checkpoint(tmp_path / "toy.pt")
        assert checkpoint.config == config_from_options({}, mapping_layers=0, overrides={})
    assert config_from_options({}, mapping_layers=8, overrides={}) == OFFICIAL


@pytest.mark.parametrize(("opts", "kind"), [([], "list"), ("output_size=64", "str"), (0, "int")])
def test_options_other_than_a_dict_are_refused(opts: object, kind: str, tmp_path: Path) -> None:
    message = refusal_after(lambda content: content.update(opts=opts), tmp_path)
    assert message.endswith(f"`opts` is a {kind}, expected a dict")


def test_official_options_give_the_official_architecture() -> None:
    options = {
        "encoder_type": "ResNetBackboneEncoder",
        "dataset_type": "cars_encode",
        "output_size": 512,
        "device": "cuda:0",
        "checkpoint_path": None,
        "learning_rate": 1e-4,
    }
    config = config_from_options(options, mapping_layers=8, overrides={})
    assert (config.encoder_type, config.domain, config.output_size) == ("ResNetBackboneEncoder", "cars", 512)
    assert (config.input_size, config.style_dim, config.encoder_widths) == (256, 512, (64, 128, 256, 512))
    assert config.image_shape == (384, 512)


def test_overrides_win(toy_checkpoint: Path) -> None:
    config = load_checkpoint(toy_checkpoint, overrides={"domain": "cars", "encoder_units": [2, 1, 1, 1]}).config
    assert (config.domain, config.encoder_units) == ("cars", (2, 1, 1, 1))
    assert config.style_dim == 16


def test_mapping_network_may_only_be_absent_as_a_whole(tmp_path: Path) -> None:
    def remove(content: dict[str, Any], beginning: str) -> None:
        for key in [key for key in content["state_dict"] if key.startswith(beginning)]:
            del content["state_dict"][key]

    without = load_after(lambda content: remove(content, "decoder.style."), tmp_path)
    assert without.config.mapping_layers == 0
    model_from_checkpoint(without)
    truncated = load_after(lambda content: remove(content, "decoder.style.2."), tmp_path)
    with pytest.raises(CheckpointError, match=r"2 missing: decoder\.style\.2\.weight, decoder\.style\.2\.bias"):
        model_from_checkpoint(truncated)


def test_official_mapping_network_has_eight_layers(tmp_path: Path) -> None:
    checkpoint = load_after(lambda content: content["opts"].pop("mapping_layers"), tmp_path)
    assert checkpoint.config.mapping_layers == 8


def test_channels_may_be_keyed_by_text() -> None:
    channels = {"4": 8, "8": 8, "16": 8, "32": 4, "64": 2}
    assert config_from(generator_channels=channels).generator_channels == {4: 8, 8: 8, 16: 8, 32: 4, 64: 2}


def test_absent_channels_are_the_official_ones() -> None:
    assert config_from(generator_channels=None).generator_channels == official_generator_channels(64)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *(("output_size", value, "a power of two from 32 to 1024") for value in (True, 1.5, "64", [64], 0, -64, 16)),
        *(("output_size", value, "a power of two from 32 to 1024") for value in (48, 2048, 2**70, float("nan"))),
        *(("input_size", value, "a power of two from 32 to output_size (64)") for value in (16, 48, 128, "32", False)),
        *(("style_dim", value, "a positive whole number") for value in (0, -1, 16.0, "16", True)),
        *(("encoder_type", value, "a name") for value in (3, ["BackboneEncoder"])),
        *(("domain", value, "one of faces, cars,") for value in ("boats", 3, ["cars"])),
        *(("encoder_widths", value, "4 positive whole numbers") for value in ([8, 8, 8], [8, 8, 8, 0], "8888", 8, [])),
        *(("encoder_widths", value, "4 positive whole numbers") for value in ([8, 8, 8, 8, 8], [8, 8, 8, 8.0])),
        *(("encoder_units", value, "4 positive whole numbers, or none") for value in ([3, 4, 14], [3, 4, 6, "3"], 3)),
        *(
            ("generator_channels", value, "a positive whole number for each of the sizes 4, 8, 16, 32, 64")
            for value in (
                {4: 8},
                {4: 8, 8: 8, 16: 8, 32: 8, 64: 8, 128: 8},
                {4: 8, 8: 8, 16: 8, 32: 8, 64: 0},
                {4: 8, 8: 8, 16: 8, 32: 8, 64: "8"},
                {"four": 8},
                {4.5: 8},
                [8, 8, 8, 8, 8],
                8,
            )
        ),
    ],
)
def test_an_impossible_option_is_named_with_what_was_expected(field: str, value: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match="^impossible model options: ") as caught:
        config_from(**{field: value})
    assert f"{field} is {value!r}, expected {expected}" in str(caught.value)


def test_all_impossible_options_are_in_one_message(tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["opts"] |= {"output_size": "64", "style_dim": 0, "encoder_widths": [8], "generator_channels": 8}

    message = refusal_after(spoil, tmp_path)
    assert "impossible model options: output_size is '64', " in message
    assert all(f"; {field} is " in message for field in ("style_dim", "encoder_widths", "generator_channels"))


def test_an_impossible_override_is_named() -> None:
    with pytest.raises(CheckpointError, match="mapping_layers is -1, expected a whole number, 0 or more"):
        config_from_options({}, mapping_layers=8, overrides={"mapping_layers": -1})


def test_an_unknown_override_is_named(toy_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"toy\.pt: unknown model fields channels, size; known are domain, "):
        load_checkpoint(toy_checkpoint, overrides={"size": 64, "channels": 3})
