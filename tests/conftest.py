"""For all tests: the repository on the import path, one thread for torch, and hypothesis without randomness.

What several files share is in core50_files.py (a mirror of CORe50's files) and tiny.py (an experiment).
"""
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import STANDIN
from models.mobilenet import PointwiseConv2d

pytest_plugins = ["core50_files", "tiny"]

torch.set_num_threads(1)
unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None,
                          suppress_health_check=unchecked)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def float32_products():
    """A Learner sets the precision of matrix products for the whole process: no test inherits another's."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    PointwiseConv2d.bfloat16 = False


@pytest.fixture(scope="session")
def standin_weights():
    """Path of real ImageNet weights of MobileNetV1."""
    path = STANDIN / "mobilenet_w1_imagenet_uint8.pth"
    if not path.is_file():
        pytest.skip(f"needs real ImageNet weights, and {path} is not there")
    return path
