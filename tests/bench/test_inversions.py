import pytest

from restyle_deploy.bench.inversions import quality_batch
from restyle_deploy.model_config import ModelConfig


@pytest.mark.parametrize(("output_size", "steps", "batch"), [(64, 10, 8), (1024, 10, 2), (1024, 1, 8), (1024, 50, 1)])
def test_batches_fit_in_memory(output_size: int, steps: int, batch: int) -> None:
    config = ModelConfig(encoder_type="BackboneEncoder", domain="faces", output_size=output_size)
    assert quality_batch(config, steps) == batch
