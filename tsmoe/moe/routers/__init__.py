"""The routers: a new one is a file here and a line in the union and the match."""

from tsmoe.moe.routers.linear import LinearRouter, LinearRouterConfig
from tsmoe.moe.routers.recurrent import RecurrentRouter, RecurrentRouterConfig
from tsmoe.moe.routers.sequence import SequenceRouter, SequenceRouterConfig

RouterConfig = SequenceRouterConfig | LinearRouterConfig | RecurrentRouterConfig
AnyRouter = SequenceRouter | LinearRouter | RecurrentRouter


def build_router(config: RouterConfig, d_model: int, num_experts: int) -> AnyRouter:
    """Build the router that a config section describes."""
    match config:
        case SequenceRouterConfig():
            return SequenceRouter(config, d_model, num_experts)
        case LinearRouterConfig():
            return LinearRouter(config, d_model, num_experts)
        case RecurrentRouterConfig():
            return RecurrentRouter(config, d_model, num_experts)
