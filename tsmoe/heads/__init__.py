"""Heads: what a token predicts, and how it is scored. A new one is a file here, a line in the union
and one in the match."""

from tsmoe.heads.point import PointHead, PointHeadConfig
from tsmoe.heads.quantile import QuantileHead, QuantileHeadConfig

HeadConfig = PointHeadConfig | QuantileHeadConfig
NextPatchHead = PointHead | QuantileHead


def build_head(config: HeadConfig, d_model: int, patch_length: int) -> NextPatchHead:
    """Build the head that a config section describes."""
    match config:
        case PointHeadConfig():
            return PointHead(d_model, patch_length)
        case QuantileHeadConfig():
            return QuantileHead(config, d_model, patch_length)
