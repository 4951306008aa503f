from pathlib import Path

import numpy as np
import pytest

from benchmarks.encoder_precision import STEPS, measure, split_encoder
from restyle_deploy.bundle import open_bundle

pytest.importorskip("openvino")


def test_a_cut_encoder_computes_what_the_whole_one_does(toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    height, width = bundle.config.input_shape
    targets = np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)
    rows = measure(bundle, targets, (0,), short="fp32")
    cut = "encoder fp32 to block 0, fp32 from there on, generator fp32"
    assert [(row["what"], row["image"]) for row in rows] == [
        (what, image) for what in ("encoder refined, generator fp32", cut, cut) for image in (0, 1)
    ]
    for row in rows:
        assert len(row["latent_errors"]) == STEPS
        assert max(row["latent_errors"]) < 1e-4
        assert row["psnr_db"] > 80


def test_block_that_is_not_there_is_named(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the encoder has no block 99"):
        split_encoder(open_bundle(toy_bundle), 99, tmp_path)
