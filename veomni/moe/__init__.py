"""Mixture-of-experts routing: balancing losses, correction bias, load of experts, replay of choices."""

from veomni.moe.controller import RouterController
from veomni.moe.install import install_controller
from veomni.moe.load import ExpertLoad
from veomni.moe.options import BalanceScope, MoEOptions
from veomni.moe.replay import RoutingLog, record_routing, replay_routing
from veomni.moe.routers import Router, RouterHook, Routers, RouterScoring, RoutingDecision, find_routers

__all__ = [
    "BalanceScope",
    "ExpertLoad",
    "MoEOptions",
    "Router",
    "RouterController",
    "RouterHook",
    "RouterScoring",
    "Routers",
    "RoutingDecision",
    "RoutingLog",
    "find_routers",
    "install_controller",
    "record_routing",
    "replay_routing",
]
