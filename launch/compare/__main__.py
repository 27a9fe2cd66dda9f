"""Entry: `python -m launch.compare RUN RUN ...`."""

import sys

from conf.schema import run
from launch.compare.compare import compare, split
from launch.config import CompareConfig

if __name__ == "__main__":
    folders, sys.argv[1:] = split(sys.argv[1:])
    run(CompareConfig, lambda cfg: compare(cfg, folders))
