"""Entry: `python -m data_pipeline.shards write|verify|import|export`."""

from conf.schema import run_one_of
from data_pipeline.shards.convert import export, import_
from data_pipeline.shards.shards_config import ExportConfig, ImportConfig, ShardsConfig, VerifyConfig
from data_pipeline.shards.verify import verify
from data_pipeline.shards.write import write

if __name__ == "__main__":
    run_one_of(
        {
            "write": (ShardsConfig, write),
            "verify": (VerifyConfig, verify),
            "import": (ImportConfig, import_),
            "export": (ExportConfig, export),
        }
    )
