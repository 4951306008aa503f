"""The reference model, rebuilt from a bundle and called as a session is."""

import sys
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy import reference
from restyle_deploy.bench.reference import check_reference, open_torch_reference
from restyle_deploy.bundle import Bundle, read_bundle
from restyle_deploy.errors import BackendUnavailableError, VerificationError
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import create_inputs


def test_reference_computes_what_a_session_does(toy_bundle: Path) -> None:
    with Session.open(toy_bundle, threads=1) as session, open_torch_reference(session.bundle, threads=1) as model:
        check_reference(model, session)
        images = create_inputs(session.config)
        found, expected = model.invert(images, steps=2), session.invert(images, steps=2)
        np.testing.assert_allclose(found.images, expected.images, rtol=0, atol=1e-3)
        assert model.describe().keys() == {"library", "version", "threads"}
        assert (model.describe()["library"], model.describe()["threads"]) == ("torch", 1)


def test_threads_are_given_back(toy_bundle: Path) -> None:
    import torch

    before = torch.get_num_threads()
    with open_torch_reference(read_bundle(toy_bundle), threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_reference_that_computes_something_else_is_refused(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = reference.model_from_bundle

    def rebuild_another(bundle: Bundle) -> RestyleModel:
        model = rebuild(bundle)
        model.latent_avg = model.latent_avg + 1e-3
        return model

    monkeypatch.setattr(reference, "model_from_bundle", rebuild_another)
    with (
        Session.open(toy_bundle, threads=1) as session,
        open_torch_reference(session.bundle, threads=1) as model,
        pytest.raises(VerificationError, match="differs from"),
    ):
        check_reference(model, session)


def test_missing_torch_is_one_line_with_the_remedy(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with (
        pytest.raises(BackendUnavailableError, match=r"needs torch, .*pip install 'restyle-deploy\[export\]'"),
        open_torch_reference(bundle, threads=None),
    ):
        raise AssertionError("it was opened")
