"""Entry: `python -m trainer.tracking sync run_dir=RUN`."""

from conf.schema import run_one_of
from trainer.config.tracking import SyncConfig
from trainer.tracking.sync import sync

if __name__ == "__main__":
    run_one_of({"sync": (SyncConfig, sync)})
