"""The mesh of one rank, as the unit tests have it."""

from tests.unit.conftest import mesh

__all__ = ["mesh"]
