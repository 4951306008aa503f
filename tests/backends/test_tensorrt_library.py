"""Loggers and objects of both libraries. Those of TensorRT for RTX are real; none needs a GPU."""

import logging
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

from restyle_deploy.backends.tensorrt_library import Messages, construct, create_logger
from restyle_deploy.errors import BuildError
from tests.backends.recording_library import recorded


@pytest.fixture
def trt() -> Any:
    return recorded()[1]


def test_messages_are_kept_for_those_who_hold_them(trt: Any, caplog: pytest.LogCaptureFixture) -> None:
    held, dropped = Messages(), Messages()
    loggers = [create_logger(trt, held), create_logger(trt, dropped)]
    del dropped
    with caplog.at_level(logging.INFO):
        for logger in loggers:
            logger.log(trt.ILogger.Severity.ERROR, "no memory is left")
            logger.log(3, "Layers:\nName: a")
    assert (held.errors, held.engine_layers) == (["no memory is left"], "Layers:\nName: a")
    assert [record.message for record in caplog.records] == ["error: no memory is left"] * 2


def test_that_a_process_has_several_loggers_is_no_warning(trt: Any, caplog: pytest.LogCaptureFixture) -> None:
    logger = create_logger(trt, Messages(), warning_level=logging.WARNING)
    with caplog.at_level(logging.INFO):
        logger.log(2, "The logger passed into createInferRuntime differs from one already registered")
        logger.log(2, "of another model of GPU")
    assert [record.message for record in caplog.records] == ["of another model of GPU"]


def test_object_that_is_not_made_is_refused_with_the_reason(trt: Any) -> None:
    messages = Messages()

    def Builder(logger: Any) -> Any:
        messages.errors.append("CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(BuildError, match=r"^TensorRT 10\.9\.0 cannot make a Builder: CUDA .* error: 35$"):
        construct(trt, messages, Builder, SimpleNamespace())


def test_wrong_arguments_are_no_refusal(trt: Any) -> None:
    with pytest.raises(TypeError, match="argument"):
        construct(trt, Messages(), lambda: None, "too many")


@pytest.mark.tensorrt
def test_library_may_call_a_logger_whose_owner_is_gone() -> None:
    """It keeps the first one while any object of its lives, and reports there what belongs to none."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    script = """
        import gc
        import tensorrt_rtx as trt
        from restyle_deploy.backends.tensorrt_library import Messages, construct, create_logger

        def builder():
            messages = Messages()
            return construct(trt, messages, trt.Builder, create_logger(trt, messages))

        first, second = builder(), builder()
        del first
        gc.collect()
        print(trt.get_plugin_registry().get_creator("no such plugin", "1", ""))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
