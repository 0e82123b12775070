"""The routers: a new one is a file here and a line in the union and the match."""

from tsmoe.moe.routers.sequence import SequenceRouter, SequenceRouterConfig

RouterConfig = SequenceRouterConfig
AnyRouter = SequenceRouter


def build_router(config: RouterConfig, d_model: int, num_experts: int) -> AnyRouter:
    """Build the router that a config section describes."""
    match config:
        case SequenceRouterConfig():
            return SequenceRouter(config, d_model, num_experts)
