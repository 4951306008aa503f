"""Quality metrics: how near an inversion comes to its target. To add one: a file here and a row in `table`."""

from restyle_deploy.bench.metrics.base import DATA_RANGE as DATA_RANGE
from restyle_deploy.bench.metrics.base import Metric as Metric
from restyle_deploy.bench.metrics.base import MetricOptions as MetricOptions
from restyle_deploy.bench.metrics.table import METRICS as METRICS
from restyle_deploy.bench.metrics.table import MetricSet as MetricSet
from restyle_deploy.bench.metrics.table import open_metrics as open_metrics
