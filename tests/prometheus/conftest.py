"""A Prometheus registry of its own for each test."""

import pytest
from prometheus_client import CollectorRegistry


@pytest.fixture
def registry():
    return CollectorRegistry(auto_describe=True)
