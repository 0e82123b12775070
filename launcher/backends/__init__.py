"""Ways to start a job: each has its config with a pure `plan`, and a small `submit`."""

from launcher.backends.accelerate_hosts import AccelerateConfig
from launcher.backends.deepspeed_hosts import DeepSpeedConfig
from launcher.backends.local import LocalConfig
from launcher.backends.slurm import SlurmConfig

AnyBackend = LocalConfig | DeepSpeedConfig | SlurmConfig | AccelerateConfig

__all__ = ["AccelerateConfig", "AnyBackend", "DeepSpeedConfig", "LocalConfig", "SlurmConfig"]
