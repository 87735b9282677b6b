"""Mixture-of-experts routing: balancing losses, correction bias, load of experts, replay of choices."""

from veomni.moe.controller import RouterController
from veomni.moe.install import install_controller
from veomni.moe.load import ExpertLoad
from veomni.moe.options import MoEOptions
from veomni.moe.replay import RoutingLog, record_routing, replay_routing
from veomni.moe.routers import RouterScoring, find_routers

__all__ = [
    "ExpertLoad",
    "MoEOptions",
    "RouterController",
    "RouterScoring",
    "RoutingLog",
    "find_routers",
    "install_controller",
    "record_routing",
    "replay_routing",
]
