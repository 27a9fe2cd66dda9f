"""Entry: `python -m data_pipeline.order`."""

from conf.schema import run
from data_pipeline.config import OrderConfig
from data_pipeline.order.lookup import order

if __name__ == "__main__":
    run(OrderConfig, order)
