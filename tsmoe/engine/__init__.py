"""Engines turn gradients into an update, on one process or many. DeepSpeed lives here only."""

from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.plain_engine import PlainEngineConfig

EngineConfig = PlainEngineConfig | DeepSpeedEngineConfig
