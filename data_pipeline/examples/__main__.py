"""Entry: `python -m data_pipeline.examples preview`."""

from conf.schema import run_one_of
from data_pipeline.examples.examples_config import PreviewConfig
from data_pipeline.examples.preview import preview

if __name__ == "__main__":
    run_one_of({"preview": (PreviewConfig, preview)})
