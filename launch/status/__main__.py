"""Entry: `python -m launch.status`."""

from conf.schema import run
from launch.config import StatusConfig
from launch.status.table import status

if __name__ == "__main__":
    run(StatusConfig, status)
