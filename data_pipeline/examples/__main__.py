"""Entry: `python -m data_pipeline.examples preview` and `rank`."""

from conf.schema import run_one_of
from data_pipeline.examples.examples_config import PreviewConfig, RankConfig
from data_pipeline.examples.preview import preview
from data_pipeline.examples.rank import rank

if __name__ == "__main__":
    run_one_of({"preview": (PreviewConfig, preview), "rank": (RankConfig, rank)})
