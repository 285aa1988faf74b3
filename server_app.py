"""Flower's entry to the ServerApp."""

from fomoe_flwr.federation.apps import server_app as app

__all__ = ["app"]
